"""Sources that give what a frozen tower made of images and texts, in their place."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from dqe_jax.distributed import mesh
from dqe_jax.feature_store.given import GivenStore
from dqe_jax.feature_store.needs import Need
from dqe_jax.feature_store.store import Store
from dqe_jax.method.arrays import Tree
from dqe_jax.models.features import StoredText


@dataclasses.dataclass(frozen=True)
class Use:
    """The needs of one source, and the store that serves them."""

    store: Store | GivenStore
    needs: Sequence[Need]

    def batches(self, rows: np.ndarray, size: int, shards: int) -> Iterator[Tree]:
        """Batches of the first need, as `sources.Rows` says."""
        numbers = self.needs[0].rows[rows]
        for start in range(0, len(rows), size):
            yield self.store.table.rows(numbers[start : start + size].reshape(shards, -1))


class StoredImages:
    """Images of a gallery, as what the tower made of them."""

    def __init__(self, use: Use, mirrors: bool):
        """`mirrors` says whether training mirrors them in half of the draws."""
        self._use, self._mirrors = use, mirrors

    def spec(self) -> Tree:
        """Shapes and dtypes of the states of one image."""
        return {
            name: jax.ShapeDtypeStruct(spec.shape, spec.dtype)
            for name, spec in self._use.store.specs.items()
        }

    def draw(self, row: int, rng: np.random.Generator) -> Tree:
        """As `sources.Images` says; draws as `transforms.flip` does."""
        view = int(self._mirrors and rng.random() < 0.5)
        return self._use.store.table.draw(int(self._use.needs[view].rows[row]))

    def draw_several(self, rows: np.ndarray, rng: np.random.Generator) -> Tree:
        """As `sources.Images` says."""
        drawn = [self.draw(row, rng) for row in rows.tolist()]
        return jax.tree.map(lambda *each: np.stack(each), *drawn)

    def batches(self, rows: np.ndarray, size: int, shards: int) -> Iterator[Tree]:
        """As `sources.Rows` says."""
        return self._use.batches(rows, size, shards)


class StoredTexts:
    """Texts, with what the tower made of them."""

    def __init__(self, use: Use, ids: np.ndarray):
        """`ids` is int32 `[n, V, L]`."""
        self._use, self._ids = use, ids

    @property
    def wordings(self) -> int:
        """`V`."""
        return self._ids.shape[1]

    def draw(self, rows: np.ndarray, wording: np.ndarray | int, length: int | None = None) -> Tree:
        """As `sources.Texts` says; the model cuts the states."""
        which = np.broadcast_to(wording, rows.shape)
        numbers = [int(self._use.needs[v].rows[row]) for row, v in zip(rows, which)]
        drawn = [self._use.store.table.draw(number) for number in numbers]
        states = jax.tree.map(lambda *each: np.stack(each), *drawn)
        return StoredText(self._ids[rows, wording, :length], states)

    def batches(self, rows: np.ndarray, size: int, shards: int) -> Iterator[Tree]:
        """As `sources.Rows` says."""
        for i, states in enumerate(self._use.batches(rows, size, shards)):
            here = rows[i * size : (i + 1) * size]
            yield StoredText(mesh.shard(self._ids[here, 0], shards), states)
