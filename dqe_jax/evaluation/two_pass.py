"""Ranks a gallery that lies on CPU devices: a rough pass over half the bytes, then exact scores.

For one query a CPU ranks as fast as it reads the gallery. The first pass reads a copy in
float16. What this changes is bounded: by Cauchy-Schwarz `|<q, t> - <q, t'>| <= |q| |t - t'|`, and
the largest `|t - t'|` of all tokens, the `error` of the copy, is known. So every image of the exact
list has a rough score of at least the `k`-th best one less twice the bound. If at most `kept`
images have that, their exact scores give the exact list. If more do, the caller is told, and ranks
all images exactly.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dqe_jax.distributed import mesh
from dqe_jax.evaluation.ranking import best_of_devices
from dqe_jax.method.arrays import Array
from dqe_jax.method.similarity import listed_similarity, ranking_similarity

ROWS = 512  # images whose error is found at a time
# Rounding of a product of two vectors in float32, as a share of their lengths: hundreds of numbers.
ROUNDING = 1e-4


def rough_copy(gallery: np.ndarray) -> tuple[np.ndarray, np.float32]:
    """The copy in float16 of float32 `[N, M, d]`, and its error, with that of float32 sums."""
    with np.errstate(over="ignore"):  # the error is then infinite
        copy = gallery.astype(np.float16)
    error = 0.0
    for start in range(0, len(gallery), ROWS):
        exact, rough = (x[start : start + ROWS].astype(np.float64) for x in (gallery, copy))
        away, length = (np.linalg.norm(x, axis=-1) for x in (exact - rough, exact))
        error = max(error, float((away + ROUNDING * length).max(initial=0)))
    return copy, np.nextafter(np.float32(error), np.float32(np.inf))


def kept_of(k: int) -> int:
    """How many images of the rough pass get exact scores for lists of length `k`."""
    return max(128, 2 * k)


def rough_shard(
    queries: jax.Array,
    excluded: Array,
    rough: Array,
    num_rows: Array,
    allowed: Array,
    *,
    k: int,
) -> tuple[jax.Array, jax.Array]:
    """The first pass; per device.

    It is a program of its own: together with the second one, XLA runs it on a CPU in a way that
    takes twice as long.

    Args:
        queries: `[C, d]`; few of them, as the rough scores of all images are held, and the
            tokens of `kept_of(k)` images of each.
        excluded: int `[C, E]`, as for `ranking.RankFn`.
        rough: the copy of this device's chunks, float16 `[S, rows, M, d]`.
        num_rows: of the gallery, without padding.
        allowed: bool `[S, rows]`; the other rows are left out.
        k: length of the lists.

    Returns:
        The best rough scores and their places on this device, `[C, kept]`.
    """
    size = rough.shape[0] * rough.shape[1]
    first_row = lax.axis_index(mesh.AXIS).astype(jnp.int32) * size
    counts = (first_row + jnp.arange(size) < num_rows) & allowed.reshape(-1)

    def roughly(tokens: jax.Array) -> Array:
        return ranking_similarity(queries, tokens.astype(jnp.float32))

    found = lax.map(roughly, rough)  # [S, C, rows]
    found = jnp.where(counts, found.swapaxes(0, 1).reshape(len(queries), size), -jnp.inf)
    place = excluded - first_row
    place = jnp.where(place < 0, size, place)  # a negative index would wrap around
    found = found.at[jnp.arange(len(queries))[:, None], place].set(-jnp.inf, mode="drop")
    best, index = lax.top_k(found, min(kept_of(k), size))
    return best, index


def exact_shard(
    queries: jax.Array, best: jax.Array, index: jax.Array, gallery: Array, error: Array, *, k: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The second pass; per device.

    Args:
        queries: `[C, d]`.
        best: that `rough_shard` gave.
        index: likewise.
        gallery: this device's chunks `[S, rows, M, d]`, float32.
        error: of the copy, see `rough_copy`.
        k: length of the lists.

    Returns:
        Rows and scores `[C, k]`, over all devices, and bool `[C]`: whether that list is exact.
    """
    size, kept = gallery.shape[0] * gallery.shape[1], best.shape[1]
    first_row = lax.axis_index(mesh.AXIS).astype(jnp.int32) * size
    bound = best[:, min(k, kept) - 1] - 2 * error * jnp.linalg.norm(queries, axis=-1)
    # All are kept, or the last one kept cannot be in the list. Where fewer than k remain, the bound
    # is -inf, and so is the last one.
    last = best[:, -1]
    sure = (last < bound) | (last == -jnp.inf) | (kept == size)
    # By row, so that equal scores stay in this order.
    index, best = lax.sort((index, best), num_keys=1)
    tokens = gallery.reshape(size, *gallery.shape[2:])[index]
    scores = listed_similarity(queries, tokens)
    scores = jnp.where(scores == 0, 0.0, scores)  # -0 and 0 are equal
    scores = jnp.where(best == -jnp.inf, -jnp.inf, scores)
    surplus = ((0, 0), (0, max(0, k - kept)))
    scores, at = lax.top_k(jnp.pad(scores, surplus, constant_values=-jnp.inf), k)
    rows = first_row + jnp.take_along_axis(index, jnp.minimum(at, kept - 1), axis=1)
    rows = jnp.where(scores == -jnp.inf, -1, rows)
    rows, scores = best_of_devices((scores, rows))
    return rows, scores, lax.pmin(sure.astype(jnp.int32), mesh.AXIS) == 1
