"""Ranks a gallery for every query, exactly, on all devices.

The score of a gallery image is `s(q, T) = max_m <q, T_m>`, computed in float32 at the highest
precision of matrix products. The gallery is cut into chunks of `chunk_rows` rows, in row order;
every device takes a run of consecutive chunks, one after the other, and keeps a running top-k, so
that no array of all scores, let alone `[Q, N, M]`, ever exists. Only the `k` best of each device
are exchanged.

**Order.** Higher scores first, equal scores by gallery row. `lax.top_k` is stable, and candidates
always meet it in row order: those kept from earlier chunks before the chunks' own, those of earlier
devices before later ones. A row's place inside its chunk, and so the shape and position of the
matrix product that scores it, does not depend on the number of devices: neither does the result.

**Speed.** A chunk is sent to its device when it is needed, and once for all queries: a copy of the
whole gallery would take longer than a tenth of its scores. On a CPU a chunk is scored in blocks
whose products fit a core's cache, where their maximum is taken before they leave it. A search costs
more than its part of a chunk, so that several chunks wait for one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dqe_jax.distributed import mesh
from dqe_jax.method.arrays import Array
from dqe_jax.method.similarity import listed_similarity, ranking_similarity
from dqe_jax.utils.errors import UserError

CHUNK_ROWS, CHUNK_QUERIES = 512, 256
# Chunks of queries that are ranked together, for which a chunk of the gallery is sent once.
# Programs are compiled for each of these numbers.
QUERY_CHUNKS = (1, 4, 16)
# Chunks of the gallery whose scores are searched at once.
SEARCHED = 8
# Products `<q, T_m>` of a block on a CPU: 1 MiB.
BLOCK = 2**18
_Best = tuple[jax.Array, jax.Array]  # scores and rows, `[..., C, k]`
_Ranking = tuple[np.ndarray, np.ndarray]  # rows and scores, `[Q, k]`
_T = TypeVar("_T")


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

    Reuse the function: it compiles once for each `(d, M, E)`. A device holds a chunk or two of the
    gallery, `SEARCHED` at the most, and as many chunks of scores of each of
    `QUERY_CHUNKS[-1] * chunk_queries` queries.

    Args:
        k: length of the ranked lists.
        chunk_rows: gallery rows sent to a device at once; the last ones are padded, and the padding
            is masked.
        chunk_queries: queries scored at once; the last chunk is padded.
        devices: the devices to use, of all processes; by default all.

    Raises:
        ValueError: `k` or a chunk size is not positive.
    """
    if min(k, chunk_rows, chunk_queries) < 1:
        raise ValueError(f"{k=}, {chunk_rows=} and {chunk_queries=} must be positive")
    devices = mesh.all_devices() if devices is None else list(devices)
    most = QUERY_CHUNKS[-1] * chunk_queries
    own = devices[mesh.own_devices(devices)]

    def chunks_of(gallery: np.ndarray, number: int, each: int) -> jax.Array:
        """The `number`-th chunk of each own device, which has `each`: `[devices, rows, M, d]`."""
        first, parts = mesh.own_devices(devices).start, []
        for i, device in enumerate(own):
            start = ((first + i) * each + number) * chunk_rows
            part = gallery[min(start, len(gallery) - 1) : start + chunk_rows]
            part = mesh.pad_rows(part, chunk_rows)[:chunk_rows]
            parts.append(jax.device_put(part[None], device))
        return mesh.joined(parts, devices)

    def rank_some(queries: np.ndarray, gallery: np.ndarray, excluded: np.ndarray) -> _Ranking:
        """Ranks for at most `most` queries."""
        parts = -(-len(queries) // chunk_queries)
        each = -(-len(gallery) // (chunk_rows * len(devices)))
        shape = (next(size for size in QUERY_CHUNKS if size >= parts), chunk_queries)
        programs = _programs(k, chunk_rows, shape, tuple(devices))
        held_queries, left_out = mesh.replicate(
            tuple(
                mesh.pad_rows(x, math.prod(shape)).reshape(*shape, x.shape[1])
                for x in (queries, excluded)
            ),
            devices,
        )
        best, held = programs.begin(np.zeros((len(own), 1), np.float32))
        for number in range(each):
            place = number % SEARCHED
            held = programs.score(
                *(held_queries, np.int32(parts), chunks_of(gallery, number, each)),
                *(np.int32(place * chunk_rows), held),
            )
            if place == SEARCHED - 1 or number == each - 1:
                starts = (each * chunk_rows, (number - place) * chunk_rows)
                counts = ((place + 1) * chunk_rows, len(gallery), parts)
                numbers = np.asarray((*starts, *counts), np.int32)
                best = programs.search(best, held, left_out, numbers)
                jax.block_until_ready(best)  # no more than these chunks wait on a device
        rows, scores = programs.finish(best)
        return np.asarray(rows)[: len(queries)], np.asarray(scores)[: len(queries)]

    def rank(
        queries: np.ndarray, gallery: np.ndarray, *, excluded: np.ndarray | None = None
    ) -> _Ranking:
        """As `RankFn` says."""
        queries = np.asarray(queries, np.float32)
        gallery = np.asarray(gallery, np.float32)
        check_embeddings(queries, gallery)
        excluded = check_excluded(excluded, len(queries), len(gallery))
        if not len(queries):
            return np.zeros((0, k), np.int32), np.zeros((0, k), np.float32)
        some = [slice(start, start + most) for start in range(0, len(queries), most)]
        # One after the other: collectives in flight can starve each other on few CPU cores.
        results = [rank_some(queries[part], gallery, excluded[part]) for part in some]
        rows, scores = (np.concatenate(parts) for parts in zip(*results))
        return rows, scores

    return rank


class _Programs(NamedTuple):
    """The programs of `make_rank_fn`, mapped over devices.

    Attributes:
      begin: anything to (an empty best, scores `[P, C, n]` to be held).
      score: of a chunk of the gallery, into the held scores.
      search: the best so far and those of the held scores.
      finish: the best of all devices: rows and scores `[P * C, k]`.
    """

    begin: mesh.Program[..., tuple[_Best, jax.Array]]
    score: mesh.Program[..., jax.Array]
    search: mesh.Program[..., _Best]
    finish: mesh.Program[..., _Best]


@functools.lru_cache(mesh.REMEMBERED)
def _programs(
    k: int, chunk_rows: int, shape: tuple[int, int], devices: tuple[jax.Device, ...]
) -> _Programs:
    on_cpu = devices[0].platform == "cpu"

    def begin(anything: jax.Array) -> tuple[_Best, jax.Array]:
        return _nothing(shape, k), jnp.full((*shape, SEARCHED * chunk_rows), anything[0])

    def score(
        queries: jax.Array, parts: jax.Array, tokens: jax.Array, column: jax.Array, held: jax.Array
    ) -> jax.Array:
        def of_part(i: jax.Array, held: jax.Array) -> jax.Array:
            found = _scores(queries[i], tokens, on_cpu=on_cpu)
            return lax.dynamic_update_slice(held, found[None], (i, 0, column))

        return lax.fori_loop(0, parts, of_part, held)

    def search(best: _Best, held: Array, excluded: Array, numbers: Array) -> _Best:
        of_device, offset, filled, num_rows, parts = numbers
        start = lax.axis_index(mesh.AXIS).astype(jnp.int32) * of_device + offset
        column = jnp.arange(held.shape[-1])
        counts = (column < filled) & (start + column < num_rows)

        def of_part(i: Array, best: _Best) -> _Best:
            scores = jnp.where(counts, held[i], -jnp.inf)
            found = _merged((best[0][i], best[1][i]), scores, start, excluded[i])
            return best[0].at[i].set(found[0]), best[1].at[i].set(found[1])

        return lax.fori_loop(0, parts, of_part, best)

    def finish(best: _Best) -> _Best:
        scores, rows = best
        return best_of_devices((scores.reshape(-1, k), rows.reshape(-1, k)))

    def mapped(
        fn: Callable[..., _T],
        in_axes: Sequence[int | None],
        donated: Sequence[int] = (),
        out: int | None = 0,
    ) -> mesh.Program[..., _T]:
        return mesh.pmap(fn, in_axes=in_axes, out_axes=out, donate_argnums=donated, devices=devices)

    return _Programs(
        begin=mapped(begin, (0,)),
        score=mapped(score, (None, None, 0, None, 0), (4,)),
        search=mapped(search, (0, 0, None, None), (0,)),
        finish=mapped(finish, (0,), (), None),
    )


def _scores(queries: Array, tokens: Array, *, on_cpu: bool) -> jax.Array:
    """Scores `[C, rows]` of queries `[C, d]` and a chunk of the gallery `[rows, M, d]`."""
    rows, number = tokens.shape[:2]
    size = max(1, BLOCK // (len(queries) * number)) if on_cpu else rows
    if size >= rows:
        scores = ranking_similarity(queries, tokens)
    else:

        def of_image(image: Array) -> Array:
            return ranking_similarity(queries, image[None])[:, 0]

        scores = lax.map(of_image, tokens, batch_size=size).T
    # Sorting would order -0 before 0, but as scores they are equal.
    return jnp.where(scores == 0, 0.0, scores)


def _nothing(shape: Sequence[int], k: int) -> _Best:
    """No rows yet: these come first, so that at a score of -inf they are kept, not masked rows."""
    return jnp.full((*shape, k), -jnp.inf, jnp.float32), jnp.full((*shape, k), -1, jnp.int32)


def _merged(best: _Best, scores: jax.Array, start: Array, excluded: Array) -> _Best:
    """The best so far `[C, k]` and those of scores `[C, n]` of rows from `start` on."""
    count, size = scores.shape
    k = best[0].shape[1]
    # A negative index would wrap around: send whatever is not among these rows past their end,
    # where `drop` ignores it.
    place = excluded - start
    place = jnp.where(place < 0, size, place)
    scores = scores.at[jnp.arange(count)[:, None], place].set(-jnp.inf, mode="drop")
    found, index = lax.top_k(jnp.concatenate([best[0], scores], axis=1), k)
    kept = jnp.take_along_axis(best[1], jnp.minimum(index, k - 1), axis=1)
    return found, jnp.where(index < k, kept, start + index - k)


def best_of_devices(best: _Best) -> _Best:
    """Rows and scores `[Q, k]` of all devices, of the best of each."""
    # [Q, devices * k], devices in order, hence equal scores in row order.
    scores, rows = (lax.all_gather(x, mesh.AXIS, axis=1, tiled=True) for x in best)
    scores, index = lax.top_k(scores, best[0].shape[1])
    return jnp.take_along_axis(rows, index, axis=1), scores


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
    allowed: Array,
    *,
    k: int,
    on_cpu: bool,
) -> _Best:
    """Ranks a gallery that lies on the devices; per device.

    Args:
        queries: `[C, d]`.
        excluded: int `[C, E]`, as for `RankFn`.
        gallery: this device's chunks `[S, rows, M, d]`.
        num_rows: of the gallery, without padding.
        allowed: bool `[S, rows]`; the other rows are left out.
        k: length of the lists.
        on_cpu: whether the devices are processors.

    Returns:
        Rows and scores `[C, k]`, over all devices.
    """
    steps, chunk_rows = gallery.shape[:2]
    first_row = lax.axis_index(mesh.AXIS).astype(jnp.int32) * (steps * chunk_rows)
    offsets = jnp.arange(chunk_rows, dtype=jnp.int32)

    def step(best: _Best, chunk: tuple[Array, Array, Array]) -> tuple[_Best, None]:
        tokens, start, mask = chunk
        scores = _scores(queries, tokens, on_cpu=on_cpu)
        scores = jnp.where((start + offsets < num_rows) & mask, scores, -jnp.inf)
        return _merged(best, scores, start, excluded), None

    starts = first_row + chunk_rows * jnp.arange(steps, dtype=jnp.int32)
    best, _ = lax.scan(step, _nothing((len(queries),), k), (gallery, starts, allowed))
    return best_of_devices(best)


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


# Numbers in the scores that a device holds at once.
HELD = 2**24
# Queries that a device places at once, few or many.
PLACED_QUERIES = (16, CHUNK_QUERIES)
# Rows of a gallery that are placed come in multiples of this many: programs are few.
PLACED_ROWS = 8 * CHUNK_ROWS


class PlaceFn(Protocol):
    """Says where some rows of a gallery stand in the whole ranking; see `make_place_fn`."""

    def __call__(
        self,
        queries: np.ndarray,
        gallery: np.ndarray,
        rows: np.ndarray,
        *,
        excluded: np.ndarray | None = None,
    ) -> np.ndarray:
        """The places of each query's rows in its ranking of the whole gallery.

        Args:
            queries: float `[Q, d]`.
            gallery: float `[N, M, d]`.
            rows: int `[Q, R]`, gallery rows, padded with -1.
            excluded: int `[Q]`, a row that is left out of each query's ranking, -1 for none; it
                must not be among its `rows`.

        Returns:
            int32 `[Q, R]`, places counted from 0, ascending, then -1 for padding. The ranking is
            that of `RankFn`: higher scores first, equal ones by row.

        Raises:
            ValueError: shapes do not fit together.
            UserError: an embedding is not finite.
        """


def make_place_fn(*, devices: Sequence[jax.Device] | None = None) -> PlaceFn:
    """Makes a function that places rows, for metrics that look at the whole ranking.

    The gallery lies on every device while its queries are ranked. Some queries at a time have their
    scores with all of it, among which the rows are placed there: only the places come back. It
    compiles once for each `(d, M)`, `R`, number of `PLACED_ROWS` and of `PLACED_QUERIES`.

    Args:
        devices: the devices to use, of all processes; by default all.
    """
    devices = mesh.all_devices() if devices is None else list(devices)
    program = _placing(devices[0].platform == "cpu")
    place_chunk = mesh.map_rows(program, columns=3, devices=devices)

    def place(
        queries: np.ndarray,
        gallery: np.ndarray,
        rows: np.ndarray,
        *,
        excluded: np.ndarray | None = None,
    ) -> np.ndarray:
        """As `PlaceFn` says."""
        queries, gallery = np.asarray(queries, np.float32), np.asarray(gallery, np.float32)
        check_embeddings(queries, gallery)
        rows = np.asarray(rows, np.int32)
        nothing = np.full(len(queries), -1, np.int32)
        left_out = nothing if excluded is None else np.asarray(excluded, np.int32)
        if rows.ndim != 2 or len(rows) != len(queries) or left_out.shape != nothing.shape:
            raise ValueError(
                f"expected rows [{len(queries)}, R] and excluded [{len(queries)}], "
                f"got {list(rows.shape)} and {list(left_out.shape)}"
            )
        if not rows.size:
            return rows
        padded = mesh.pad_rows(gallery, PLACED_ROWS)
        held = mesh.replicate(
            (padded.reshape(-1, CHUNK_ROWS, *gallery.shape[1:]), np.int32(len(gallery))), devices
        )
        few, many = PLACED_QUERIES
        each = few if len(queries) <= few * len(devices) else many
        chunk = max(1, min(each, HELD // len(padded))) * len(devices)
        parts = []
        for start in range(0, len(queries), chunk):
            columns = [x[start : start + chunk] for x in (queries, rows, left_out)]
            own = [mesh.own_rows(mesh.pad_rows(x, chunk), chunk, devices) for x in columns]
            parts.append(place_chunk(held, *own)[: len(columns[0])])
        return np.concatenate(parts)

    return place


@functools.lru_cache(mesh.REMEMBERED)
def _placing(on_cpu: bool) -> Callable[..., jax.Array]:
    """Per device: chunks of a gallery with its size; `[C, d]`, `[C, R]` and `[C]` to `[C, R]`."""

    def placed(
        gallery: tuple[Array, Array], queries: Array, rows: Array, excluded: Array
    ) -> jax.Array:
        chunks, num_rows = gallery
        by_chunk = lax.map(lambda tokens: _scores(queries, tokens, on_cpu=on_cpu), chunks)
        scores = jnp.moveaxis(by_chunk, 0, 1).reshape(len(queries), -1)  # [C, N]

        def of_query(given: tuple[Array, Array, Array]) -> jax.Array:
            return _places(*given, num_rows)

        # On a CPU one after the other: what a query needs stays in the cache.
        size = 1 if on_cpu else len(queries)
        return lax.map(of_query, (scores, rows, excluded), batch_size=size)

    return placed


def _places(scores: Array, rows: Array, excluded: Array, num_rows: Array) -> jax.Array:
    """Places of a query's `rows` int `[R]` by `scores` `[N]`, ascending: int32 `[R]`.

    A sort of all scores would take many times as long. The rows alone are sorted. For each image of
    the gallery a binary search says how many of them come before it. A row's place is the number
    of images that at most so many of the rows precede as precede it, less itself.
    """
    size = len(rows)
    numbers = jnp.arange(len(scores), dtype=jnp.int32)
    held = rows >= 0
    own = jnp.where(held, -scores[jnp.maximum(rows, 0)], jnp.inf)
    own, ids = lax.sort((own, jnp.where(held, rows, len(scores))), num_keys=2)

    def halve(_: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = (low + high) // 2
        at = jnp.minimum(middle, size - 1)
        found, number = own[at], ids[at]
        before = (found < -scores) | ((found == -scores) & (number < numbers))
        going = low < high
        return jnp.where(going & before, middle + 1, low), jnp.where(going & ~before, middle, high)

    ends = jnp.zeros_like(numbers), jnp.full_like(numbers, size)
    preceding, _ = lax.fori_loop(0, size.bit_length(), halve, ends)
    out = (numbers >= num_rows) | (numbers == excluded)
    counts = jnp.zeros(size + 1, jnp.int32).at[jnp.where(out, size, preceding)].add(1)
    places = jnp.cumsum(counts[:size]) - 1
    return jnp.where(jnp.arange(size) < held.sum(), places, -1)


def order_of_subset(
    rows: np.ndarray, scores: np.ndarray, last: np.ndarray | None = None
) -> np.ndarray:
    """The order of small sets, int `[Q, S]`: best first, equal scores by row, padding (-1) last.

    Args:
        rows: int `[Q, S]`.
        scores: float `[Q, S]`.
        last: int `[Q]`, a row that comes after all others of its score; None for none.
    """
    late = np.zeros(rows.shape, bool) if last is None else rows == np.asarray(last)[:, None]
    order: np.ndarray = np.lexsort((rows, late, np.where(rows >= 0, -scores, np.inf)), axis=1)
    return order


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
        if not _is_finite(array):
            raise UserError(
                f"the {name} embeddings hold values that are not finite: "
                "evaluate a checkpoint from before training diverged"
            )


def _is_finite(array: np.ndarray) -> bool:
    """Whether all numbers are finite."""
    flat = array.reshape(-1)
    # Their squares add up to a finite number, as a rule: that takes no array of bool.
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isfinite(np.dot(flat, flat))) or bool(np.isfinite(array).all())


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
