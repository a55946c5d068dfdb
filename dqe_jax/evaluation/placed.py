"""A gallery that stays on the devices and is ranked again and again: for search."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import numpy as np

from dqe_jax.distributed import mesh
from dqe_jax.evaluation import ranking, two_pass

# A program is compiled for each of these lengths of a list, and for each number of queries.
LENGTHS = (32, 128, 1_024)
QUERIES = (1, 16, 256)
EXCLUDED = (8, 128, 1_024)
# Galleries of at least so many bytes get a rough pass on a CPU.
LARGE = 2**26


class PlacedGallery:
    """Ranks a gallery as `ranking.make_rank_fn` does, with the same scores and order.

    Where CPU devices rank a large gallery for one query, a rough pass (`two_pass.py`) finds what
    can be in the list. The list is exact all the same; scores differ by rounding alone.

    Attributes:
      unsure: queries so far whose rough pass did not suffice, which all images were ranked for.
    """

    def __init__(
        self,
        gallery: np.ndarray,
        *,
        devices: Sequence[jax.Device],
        chunk_rows: int = 512,
        large: int = LARGE,
    ):
        """Sends the gallery to the devices.

        Args:
          gallery: float `[N, M, d]`, `N` at least 1.
          devices: of this process.
          chunk_rows: as for `ranking.make_rank_fn`; fewer on a CPU, where they fit its cache.
          large: bytes of a gallery from which on CPU devices keep a rough copy, a quarter as large.

        Raises:
          UserError: an embedding is not finite.
        """
        gallery = np.asarray(gallery, np.float32)
        ranking.check_embeddings(np.zeros((1, gallery.shape[-1]), np.float32), gallery)
        on_cpu = devices[0].platform == "cpu"
        if on_cpu:
            chunk_rows = two_pass.rows_of_a_chunk(chunk_rows, *gallery.shape[1:])
        self._devices, self._chunk_rows, self._count = list(devices), chunk_rows, len(gallery)
        place = mesh.placer(devices)
        self._placed = place(ranking.own_chunks(gallery, chunk_rows, devices))
        self._shape = gallery.shape
        self.unsure = 0
        self._rough: two_pass.Rough | None = None
        if on_cpu and gallery.nbytes >= large:
            copy = two_pass.rough_copy(gallery)
            self._rough = two_pass.Rough(
                *(place(ranking.own_chunks(np.asarray(x), chunk_rows, devices)) for x in copy)
            )

    def __len__(self) -> int:
        return self._count

    def rank(
        self,
        queries: np.ndarray,
        k: int,
        *,
        excluded: np.ndarray | None = None,
        allowed: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The `k` best rows of each query, best first, equal scores by row.

        Args:
          queries: float `[Q, d]`.
          k: length of the lists.
          excluded: int `[Q, E]` rows that must not appear in a query's list, padded with -1.
          allowed: bool `[N]`, the only rows that may appear; None for all.

        Returns:
          `rows` int32 `[Q, k]` and `scores` float32 `[Q, k]`. Where fewer than `k` rows remain, the
          surplus is row -1 with score -inf.

        Raises:
          ValueError: shapes do not fit together, or `k` is not positive.
        """
        if k < 1:
            raise ValueError(f"{k=} must be positive")
        queries = np.asarray(queries, np.float32)
        if queries.ndim != 2 or queries.shape[1] != self._shape[2]:
            raise ValueError(f"expected queries [Q, {self._shape[2]}], got {list(queries.shape)}")
        excluded = ranking.check_excluded(excluded, len(queries), self._count)
        width = _at_least(excluded.shape[1], EXCLUDED)
        excluded = np.pad(excluded, ((0, 0), (0, width - excluded.shape[1])), constant_values=-1)
        if allowed is None:
            allowed = np.ones(self._count, bool)
        masks = ranking.own_chunks(np.asarray(allowed, bool), self._chunk_rows, self._devices)
        size = next((size for size in QUERIES if size >= len(queries)), QUERIES[-1])
        length, devices = _at_least(k, LENGTHS), tuple(self._devices)
        results = [(np.zeros((0, k), np.int32), np.zeros((0, k), np.float32))]
        for start in range(0, len(queries), size):
            here = slice(start, start + size)
            some = mesh.pad_rows(queries[here], size), mesh.pad_rows(excluded[here], size)
            others = np.int32(self._count), masks
            missing = len(queries[here])
            if self._rough is not None and size == 1:  # more take longer to score than to read
                roughly, exactly = _two_pass_programs(length, devices)
                passed = roughly(*some, self._rough, *others)
                rows, scores, sure = exactly(some[0], *passed, self._placed)
                missing = int((~np.asarray(sure)[:missing]).sum())
                self.unsure += missing
            if missing:
                rows, scores = _program(length, devices)(*some, self._placed, *others)
            results.append((np.asarray(rows)[:, :k], np.asarray(scores)[:, :k]))
        found, best = (np.concatenate(parts)[: len(queries)] for parts in zip(*results))
        return found, best


def _at_least(count: int, sizes: Sequence[int]) -> int:
    """The smallest of these sizes that is enough, or a power of two."""
    return next((size for size in sizes if size >= count), 1 << (count - 1).bit_length())


@functools.lru_cache(mesh.REMEMBERED)
def _program(
    k: int, devices: tuple[jax.Device, ...]
) -> mesh.Program[..., tuple[jax.Array, jax.Array]]:
    on_cpu = devices[0].platform == "cpu"
    return mesh.pmap(
        functools.partial(ranking.rank_shard, k=k, on_cpu=on_cpu),
        in_axes=(None, None, 0, None, 0),
        out_axes=(None, None),
        devices=devices,
    )


@functools.lru_cache(mesh.REMEMBERED)
def _two_pass_programs(
    k: int, devices: tuple[jax.Device, ...]
) -> tuple[
    mesh.Program[..., tuple[jax.Array, jax.Array, jax.Array]],
    mesh.Program[..., tuple[jax.Array, jax.Array, jax.Array]],
]:
    return (
        mesh.pmap(
            functools.partial(two_pass.rough_shard, k=k),
            in_axes=(None, None, 0, None, 0),
            out_axes=(0, 0, 0),
            devices=devices,
        ),
        mesh.pmap(
            functools.partial(two_pass.exact_shard, k=k),
            in_axes=(None, 0, 0, 0, 0),
            out_axes=(None, None, None),
            devices=devices,
        ),
    )
