"""Embeds rows of a gallery, with columns beside them, on the devices of all processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import jax
import numpy as np

from dqe_jax.data.splits import Gallery
from dqe_jax.distributed import mesh
from dqe_jax.method.arrays import Params, Tree

_Arrays = TypeVar("_Arrays")


class RowEmbedder(Generic[_Arrays]):
    """A mapped encoder of images, and the batches in which it takes them.

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
          encode: `(params, images [b, H, W, 3], *columns [b, ...])` to a tree of `[b, ...]`.
          columns: how many columns there are beside the images.
          batch_size: rows at a time over all devices, a multiple of these.
          devices: to run on, of all processes.
        """
        self._devices, self._batch = list(devices), batch_size
        self._encode = mesh.map_rows(encode, columns=1 + columns, devices=devices)

    def __call__(
        self, params: Params, gallery: Gallery, rows: np.ndarray, *columns: np.ndarray
    ) -> _Arrays:
        """Embeds the images of some rows; each process reads those of its own devices.

        Args:
          params: replicated over the devices.
          gallery: holds the images.
          rows: int `[n]`, rows of the gallery.
          *columns: arrays `[n, ...]`.

        Returns:
          What `encode` gives, as NumPy arrays `[n, ...]`, the same in all processes.
        """
        own = [
            mesh.own_rows(mesh.pad_rows(x, self._batch), self._batch, self._devices)
            for x in (rows, *columns)
        ]
        size = self._batch // len(self._devices) * mesh.count_own(self._devices)
        parts = []
        for i, images in enumerate(gallery.batches(own[0], size)):
            here = slice(i * size, (i + 1) * size)
            parts.append(self._encode(params, images, *(column[here] for column in own[1:])))
        # Only the last batch is padded.
        return jax.tree.map(lambda *xs: np.concatenate(xs)[: len(rows)], *parts)
