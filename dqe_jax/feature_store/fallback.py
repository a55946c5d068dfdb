"""Sources that read a store, or give images and texts as they are if there is no room for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from dqe_jax.embedding.sources import Images, Texts
from dqe_jax.feature_store.store import Store
from dqe_jax.method.arrays import Tree


@dataclasses.dataclass(frozen=True)
class ImagesOrPlain:
    """Images as `stored` gives them, or `plain` once their store is given up."""

    store: Store
    stored: Images
    plain: Images

    @property
    def _own(self) -> Images:
        return self.plain if self.store.given_up else self.stored

    def spec(self) -> Tree:
        """As `sources.Images` says."""
        return self._own.spec()

    def draw(self, row: int, rng: np.random.Generator) -> Tree:
        """As `sources.Images` says."""
        return self._own.draw(row, rng)

    def draw_several(self, rows: np.ndarray, rng: np.random.Generator) -> Tree:
        """As `sources.Images` says."""
        return self._own.draw_several(rows, rng)

    def batches(self, rows: np.ndarray, size: int, shards: int) -> Iterator[Tree]:
        """As `sources.Rows` says."""
        return self._own.batches(rows, size, shards)


@dataclasses.dataclass(frozen=True)
class TextsOrPlain:
    """Texts as `stored` gives them, or `plain` once their store is given up."""

    store: Store
    stored: Texts
    plain: Texts

    @property
    def _own(self) -> Texts:
        return self.plain if self.store.given_up else self.stored

    @property
    def wordings(self) -> int:
        """As `sources.Texts` says."""
        return self._own.wordings

    def draw(self, rows: np.ndarray, wording: np.ndarray | int, length: int | None = None) -> Tree:
        """As `sources.Texts` says."""
        return self._own.draw(rows, wording, length)

    def batches(self, rows: np.ndarray, size: int, shards: int) -> Iterator[Tree]:
        """As `sources.Rows` says."""
        return self._own.batches(rows, size, shards)
