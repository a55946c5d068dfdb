"""Ranks a gallery for every query, exactly, on all devices.

The score of a gallery image is `s(q, T) = max_m <q, T_m>`, computed in float32 at the highest
precision of matrix products. The gallery is cut into chunks of `chunk_rows` rows, in row order;
every device holds a run of consecutive chunks and scans them with a running top-k, so that no array
of all scores, let alone `[Q, N, M]`, ever exists. Only the `k` best of each device are exchanged.

**Order.** Higher scores first, equal scores by gallery row. `lax.top_k` is stable, and candidates
always meet it in row order: those kept from earlier chunks before the chunk's own, those of earlier
devices before later ones. A row's place inside its chunk, and so the shape and position of the
matrix product that scores it, does not depend on the number of devices: neither does the result.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dqe_jax.distributed import mesh
from dqe_jax.method.arrays import Array
from dqe_jax.method.similarity import listed_similarity, ranking_similarity
from dqe_jax.utils.errors import UserError

CHUNK_ROWS, CHUNK_QUERIES = 512, 256
# Chunks of queries that a call ranks at the most: a chunk of the gallery is read once for all.
QUERY_CHUNKS = 4
# Chunks of the gallery whose scores are searched at once.
GROUP = 8
_Best = tuple[jax.Array, jax.Array]  # scores and rows, `[parts, C, k]`


class RankFn(Protocol):
    """Ranks a gallery for each query; see `make_rank_fn`."""

    def __call__(
        self, queries: np.ndarray, gallery: np.ndarray, *, excluded: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The `k` best rows of each query, best first, equal scores by row.

        Args:
            queries: float `[Q, d]`.
            gallery: float `[N, M, d]`, `M` tokens for each image.
            excluded: int `[Q, E]` gallery rows that must not appear in a query's list (the
                reference, for instance), padded with -1; None excludes nothing.

        Returns:
            NumPy arrays `rows` int32 `[Q, k]` and `scores` float32 `[Q, k]`. If fewer than `k` rows
            remain for a query, the surplus is row -1 with score -inf.

        Raises:
            ValueError: shapes do not fit together, or an excluded row is not in the gallery.
            UserError: an embedding is not finite.
        """


def make_rank_fn(
    k: int,
    *,
    chunk_rows: int = CHUNK_ROWS,
    chunk_queries: int = CHUNK_QUERIES,
    devices: Sequence[jax.Device] | None = None,
) -> RankFn:
    """Makes a function that ranks.

    Reuse the function: it compiles once for each `(d, M, E)` and number of gallery chunks. A device
    holds its share of the gallery and `chunk_queries * chunk_rows * M` scores at a time.

    Args:
        k: length of the ranked lists.
        chunk_rows: gallery rows scored at once on a device; the gallery is padded (and the padding
            masked) to a multiple of `chunk_rows` times the number of devices.
        chunk_queries: queries ranked at once; the last chunk is padded.
        devices: the devices to use, of all processes; by default all.

    Raises:
        ValueError: `k` or a chunk size is not positive.
    """
    if min(k, chunk_rows, chunk_queries) < 1:
        raise ValueError(f"{k=}, {chunk_rows=} and {chunk_queries=} must be positive")
    devices = mesh.all_devices() if devices is None else list(devices)
    rank_chunk = _rank_program(k, chunk_rows, chunk_queries, tuple(devices))
    place = mesh.placer(devices)

    def rank(
        queries: np.ndarray, gallery: np.ndarray, *, excluded: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `RankFn` says."""
        queries = np.asarray(queries, np.float32)
        gallery = np.asarray(gallery, np.float32)
        check_embeddings(queries, gallery)
        excluded = check_excluded(excluded, len(queries), len(gallery))
        if not len(queries):
            return np.zeros((0, k), np.int32), np.zeros((0, k), np.float32)

        placed = place(own_chunks(gallery, chunk_rows, devices))
        num_rows, results = np.int32(len(gallery)), []
        size = QUERY_CHUNKS * chunk_queries
        for start in range(0, len(queries), size):
            here = slice(start, start + size)
            part = rank_chunk(
                mesh.pad_rows(queries[here], size),
                mesh.pad_rows(excluded[here], size),
                placed,
                num_rows,
                np.int32(len(queries[here])),
            )
            # Waits for the call: collectives in flight can starve each other on few CPU cores.
            results.append([np.asarray(x) for x in part])
        rows, scores = (np.concatenate(parts)[: len(queries)] for parts in zip(*results))
        return rows, scores

    return rank


@functools.lru_cache(mesh.REMEMBERED)
def _rank_program(
    k: int, chunk_rows: int, chunk_queries: int, devices: tuple[jax.Device, ...]
) -> mesh.Program[..., tuple[jax.Array, jax.Array]]:
    return mesh.pmap(
        functools.partial(rank_shard, k=k, chunk_rows=chunk_rows, chunk_queries=chunk_queries),
        in_axes=(None, None, 0, None, None),
        out_axes=(None, None),
        devices=devices,
    )


def own_chunks(gallery: np.ndarray, chunk_rows: int, devices: Sequence[jax.Device]) -> np.ndarray:
    """The padded gallery in chunks, those of this process's devices: `[devices, S, rows, M, d]`."""
    padded = mesh.pad_rows(gallery, chunk_rows * len(devices))
    by_device = padded.reshape(len(devices), -1, chunk_rows, *gallery.shape[1:])
    return by_device[mesh.own_devices(devices)]


def rank_shard(
    queries: Array,
    excluded: Array,
    gallery: Array,
    num_rows: Array | np.int32,
    num_queries: Array | np.int32,
    allowed: Array | None = None,
    *,
    k: int,
    chunk_rows: int,
    chunk_queries: int,
) -> tuple[jax.Array, jax.Array]:
    """Per device: `[Q, d]`, `[Q, E]`, its `[S, rows, M, d]`, `[]`, `[]` to the global top-k.

    `Q` is a multiple of `chunk_queries`; chunks of queries beyond `num_queries` cost nothing. With
    `allowed`, bool `[S, rows]`, the other rows are left out.
    """
    steps = gallery.shape[0]
    first_row = lax.axis_index(mesh.AXIS).astype(jnp.int32) * (steps * chunk_rows)
    parts = queries.reshape(-1, chunk_queries, queries.shape[-1])
    left_out = excluded.reshape(len(parts), chunk_queries, -1)
    needed = -(-num_queries // chunk_queries)
    query_index = jnp.arange(chunk_queries)[:, None]

    def score(chunk: Array, column: Array, held: Array) -> Array:
        """Scores of all queries with one chunk, which is read once, from that column on."""
        tokens = gallery[chunk]

        def of_part(i: Array, held: Array) -> Array:
            scores = ranking_similarity(parts[i], tokens)
            # Sorting would order -0 before 0, but as scores they are equal.
            scores = jnp.where(scores == 0, 0.0, scores)
            if allowed is not None:
                scores = jnp.where(allowed[chunk], scores, -jnp.inf)
            return lax.dynamic_update_slice(held, scores[None], (i, 0, column))

        return lax.fori_loop(0, needed, of_part, held)

    def search(first: Array | int, number: int, best: _Best) -> _Best:
        """The best so far and those of a number of chunks: one search for all of these."""
        start, size = first_row + first * chunk_rows, number * chunk_rows
        held = jnp.zeros((len(parts), chunk_queries, size), jnp.float32)
        held = lax.fori_loop(
            0, number, lambda i, held: score(first + i, i * chunk_rows, held), held
        )

        def of_part(i: Array, best: _Best) -> _Best:
            scores, rows = (x[i] for x in best)
            found = jnp.where(start + jnp.arange(size) < num_rows, held[i], -jnp.inf)
            # A negative index would wrap around: send whatever is not in this group past its end,
            # where `drop` ignores it.
            place = left_out[i] - start
            place = jnp.where(place < 0, size, place)
            found = found.at[query_index, place].set(-jnp.inf, mode="drop")
            scores, index = lax.top_k(jnp.concatenate([scores, found], axis=1), k)
            kept = jnp.take_along_axis(rows, jnp.minimum(index, k - 1), axis=1)
            rows = jnp.where(index < k, kept, start + index - k)
            return best[0].at[i].set(scores), best[1].at[i].set(rows)

        return lax.fori_loop(0, needed, of_part, best)

    # These come first, so that at a score of -inf they are kept and not the masked rows.
    best: _Best = (
        jnp.full((len(parts), chunk_queries, k), -jnp.inf, jnp.float32),
        jnp.full((len(parts), chunk_queries, k), -1, jnp.int32),
    )
    groups, rest = divmod(steps, GROUP)
    best = lax.fori_loop(0, groups, lambda g, best: search(g * GROUP, GROUP, best), best)
    if rest:
        best = search(groups * GROUP, rest, best)
    best = jax.tree.map(lambda x: x.reshape(-1, k), best)
    # [Q, devices * k], devices in order, hence equal scores in row order.
    scores, rows = (lax.all_gather(x, mesh.AXIS, axis=1, tiled=True) for x in best)
    scores, index = lax.top_k(scores, k)
    return jnp.take_along_axis(rows, index, axis=1), scores


ScoreFn = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def make_score_fn(
    *, chunk_queries: int = 256, devices: Sequence[jax.Device] | None = None
) -> ScoreFn:
    """Makes `score(queries, gallery, rows) -> scores`: of a few gallery rows for each query.

    The returned function takes `queries` float `[Q, d]`, `gallery` float `[N, M, d]` and `rows` int
    `[Q, S]`, padded with -1, and gives float32 `[Q, S]`, -inf for padding: the score that
    `make_rank_fn` ranks by. A score does not depend on the other queries, nor on the devices.

    Args:
        chunk_queries: queries scored at once on a device; the last chunk is padded.
        devices: the devices to use, of all processes; by default all.
    """
    devices = mesh.all_devices() if devices is None else list(devices)
    chunk = chunk_queries * len(devices)
    score_chunk = mesh.map_rows(_score_shard, columns=2, devices=devices)

    def score(queries: np.ndarray, gallery: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Scores `rows` of `gallery` for each of `queries`: see `make_score_fn`."""
        queries = np.asarray(queries, np.float32)
        gallery = np.asarray(gallery, np.float32)
        rows = np.asarray(rows)
        check_embeddings(queries, gallery)
        parts = [np.zeros(rows.shape, np.float32)[:0]]
        for start in range(0, len(queries), chunk):
            here = rows[start : start + chunk]
            inputs = (queries[start : start + chunk], gallery[here])
            padded = [mesh.pad_rows(x, chunk) for x in inputs]
            own = [mesh.own_rows(x, chunk, devices) for x in padded]
            parts.append(np.asarray(score_chunk((), *own))[: len(here)])
        return np.where(rows >= 0, np.concatenate(parts), -np.inf).astype(np.float32)

    return score


def _score_shard(_: object, queries: Array, tokens: Array) -> Array:
    """Per device: nothing, `[C, d]`, `[C, S, M, d]` to `[C, S]`."""
    return listed_similarity(queries, tokens)


def order_subset(rows: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Rows `[Q, S]` of small sets, best first, equal scores by row, padding (-1) last."""
    order = np.lexsort((rows, np.where(rows >= 0, -scores, np.inf)), axis=1)
    return np.take_along_axis(rows, order, axis=1)


def check_embeddings(queries: np.ndarray, gallery: np.ndarray) -> None:
    """Raises what `RankFn` says for queries `[Q, d]` and a gallery `[N, M, d]`."""
    if queries.ndim != 2 or gallery.ndim != 3 or queries.shape[1] != gallery.shape[2]:
        raise ValueError(
            "expected queries [Q, d] and a gallery [N, M, d], "
            f"got {list(queries.shape)} and {list(gallery.shape)}"
        )
    if not gallery.shape[1]:
        raise ValueError("the gallery has no tokens: M = 0")
    for name, array in (("query", queries), ("gallery", gallery)):
        if not np.isfinite(array).all():
            raise UserError(
                f"the {name} embeddings hold values that are not finite: "
                "evaluate a checkpoint from before training diverged"
            )


def check_excluded(excluded: np.ndarray | None, num_queries: int, num_rows: int) -> np.ndarray:
    """`excluded` as int32 `[Q, E]` with `E >= 1`."""
    if excluded is None:
        return np.full((num_queries, 1), -1, np.int32)
    excluded = np.asarray(excluded)
    if excluded.ndim != 2 or len(excluded) != num_queries:
        raise ValueError(f"expected excluded [{num_queries}, E], got {list(excluded.shape)}")
    if not excluded.shape[1]:
        return np.full((num_queries, 1), -1, np.int32)
    if not np.issubdtype(excluded.dtype, np.integer):
        raise ValueError(f"excluded rows must be integers, not {excluded.dtype}")
    if excluded.size and (excluded.min() < -1 or excluded.max() >= num_rows):
        raise ValueError(f"excluded rows must lie in [-1, {num_rows})")
    return excluded.astype(np.int32)
