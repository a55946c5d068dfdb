"""Embeds rows of sources, such as images with texts, on the devices of all processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import jax
import numpy as np

from dqe_jax.distributed import mesh
from dqe_jax.embedding.sources import Rows
from dqe_jax.method.arrays import Params, Tree

_Arrays = TypeVar("_Arrays")


class RowEmbedder(Generic[_Arrays]):
    """A mapped encoder, and the batches in which it takes its inputs.

    `RowEmbedder[np.ndarray]` is that of an encoder that gives one array.

    Nothing is truncated: short batches are padded, and the padding is cut off again.
    """

    def __init__(
        self,
        encode: Callable[..., Tree],
        *,
        columns: int,
        batch_size: int,
        devices: Sequence[jax.Device],
    ):
        """Compiles nothing yet.

        Args:
          encode: `(params, *inputs [b, ...])` to a tree of `[b, ...]`.
          columns: how many inputs there are.
          batch_size: rows at a time over all devices, a multiple of these.
          devices: to run on, of all processes.
        """
        self._devices, self._batch = list(devices), batch_size
        self._encode = mesh.gather_rows(encode, columns=columns, devices=devices)

    def __call__(self, params: Params, *inputs: tuple[Rows, np.ndarray]) -> _Arrays:
        """Embeds some rows of each source; each process reads those of its own devices.

        Args:
          params: replicated over the devices.
          *inputs: sources, each with rows int `[n]` of it.

        Returns:
          What `encode` gives, as NumPy arrays `[n, ...]`, the same in all processes.
        """
        shards, count = mesh.count_own(self._devices), len(inputs[0][1])
        size = self._batch // len(self._devices) * shards
        read = []
        for source, rows in inputs:
            padded = mesh.pad_rows(rows, self._batch)
            own = mesh.own_rows(padded, self._batch, self._devices)
            read.append(source.batches(own, size, shards))
        parts = [jax.tree.map(np.asarray, self._encode(params, *arrays)) for arrays in zip(*read)]
        # Only the last batch is padded.
        return jax.tree.map(lambda *xs: np.concatenate(xs)[:count], *parts)
