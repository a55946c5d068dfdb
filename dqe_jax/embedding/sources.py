"""Where the inputs of a model come from: images and texts by row, for training and for embedding.

A source may give what a frozen tower made of an image or a text in its place (`feature_store/`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol, runtime_checkable

import jax
import numpy as np

from dqe_jax.data.splits import Gallery
from dqe_jax.data.transforms import AUGMENTATIONS
from dqe_jax.distributed import mesh
from dqe_jax.method.arrays import Tree


@runtime_checkable
class Rows(Protocol):
    """Inputs of a model, by row."""

    def batches(self, rows: np.ndarray, size: int, shards: int) -> Iterator[Tree]:
        """The inputs of `rows` in order, `size` at a time: `[shards, size / shards, ...]`.

        Args:
          rows: int `[n]`, a multiple of `size`.
          size: of a batch of this process, a multiple of `shards`.
          shards: this process's devices.
        """


@runtime_checkable
class Images(Rows, Protocol):
    """The images of a gallery."""

    def spec(self) -> Tree:
        """Shape and dtype of one image, as `jax.ShapeDtypeStruct`."""

    def draw(self, row: int, rng: np.random.Generator) -> Tree:
        """One image of a training batch, augmented."""

    def draw_several(self, rows: np.ndarray, rng: np.random.Generator) -> Tree:
        """Images `[n, ...]` of a training batch, each augmented, in order."""


@runtime_checkable
class Texts(Rows, Protocol):
    """Texts in one or more wordings; `batches` gives the first."""

    @property
    def wordings(self) -> int:
        """How many each text has."""

    def draw(self, rows: np.ndarray, wording: np.ndarray | int, length: int | None = None) -> Tree:
        """Texts `[n, ...]` of a training batch, each in a wording, cut to so many tokens."""


class Column:
    """Rows of an array."""

    def __init__(self, array: np.ndarray):
        """An array `[n, ...]`."""
        self._array = array

    def batches(self, rows: np.ndarray, size: int, shards: int) -> Iterator[Tree]:
        """As `Rows` says."""
        for start in range(0, len(rows), size):
            yield mesh.shard(self._array[rows[start : start + size]], shards)


class PlainImages:
    """Images as they are."""

    def __init__(self, gallery: Gallery, augment: str = "none"):
        """Wraps a gallery; `augment` is a name of `transforms.AUGMENTATIONS`."""
        self._gallery = gallery
        self._augment: Callable[[np.ndarray, np.random.Generator], np.ndarray]
        self._augment = AUGMENTATIONS[augment]

    def spec(self) -> Tree:
        """uint8 `[H, W, 3]`."""
        return jax.ShapeDtypeStruct(self._gallery.image_shape, np.uint8)

    def draw(self, row: int, rng: np.random.Generator) -> Tree:
        """As `Images` says."""
        return self._augment(self._gallery[row], rng)

    def draw_several(self, rows: np.ndarray, rng: np.random.Generator) -> Tree:
        """As `Images` says."""
        return np.stack([self.draw(row, rng) for row in rows.tolist()])

    def batches(self, rows: np.ndarray, size: int, shards: int) -> Iterator[Tree]:
        """As `Rows` says; images are read by threads ahead."""
        for images in self._gallery.batches(rows, size):
            yield mesh.shard(images, shards)


class PlainTexts(Column):
    """Texts as token ids."""

    def __init__(self, ids: np.ndarray):
        """int32 `[n, V, L]`, ids of each text in `V` wordings."""
        super().__init__(ids[:, 0])
        self._ids = ids

    @property
    def wordings(self) -> int:
        """`V`."""
        return self._ids.shape[1]

    def draw(self, rows: np.ndarray, wording: np.ndarray | int, length: int | None = None) -> Tree:
        """int32 `[n, L]`."""
        return self._ids[rows, wording, :length]
