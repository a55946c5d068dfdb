"""Ranks a gallery on CPU devices: a rough pass over a quarter of the bytes, then exact scores.

For one query a CPU ranks as fast as it reads the gallery. The first pass reads a copy in int8,
with one scale for each image. What this changes is bounded: by Cauchy-Schwarz
`|<q, t> - <q, t'>| <= |q| |t - t'|`, and for each image the largest `|t - t'|` of its tokens, the
`error` of its copy, is known. So its exact score lies between two numbers. The exact list of
length `k` holds no image whose upper number is below the `k`-th best lower one. If at most
`kept_of(k)` images remain, their exact scores give the exact list. If more do, the caller is told,
and ranks all images exactly.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dqe_jax.distributed import mesh
from dqe_jax.evaluation.ranking import best_of_devices
from dqe_jax.method.arrays import Array
from dqe_jax.method.similarity import listed_similarity, ranking_similarity

ROWS = 512  # images that are copied at a time
# Rounding of a product of two vectors in float32, as a share of their lengths: hundreds of numbers.
ROUNDING = 1e-4
# Bytes of a chunk in float32. Larger ones do not stay in a CPU's cache, and take longer.
CHUNK = 2**22


class Rough(NamedTuple):
    """A rough copy.

    Attributes:
      tokens: int8 `[..., M, d]`.
      scale: float32 `[...]`; times `tokens` it is nearly the exact embedding.
      error: float32 `[...]`, the largest length of what is missing, with that of float32 sums.
    """

    tokens: Array | np.ndarray
    scale: Array | np.ndarray
    error: Array | np.ndarray


def rough_copy(gallery: np.ndarray) -> Rough:
    """The rough copy of a gallery, float32 `[N, M, d]`."""
    copy = Rough(
        np.empty(gallery.shape, np.int8), *(np.empty(len(gallery), np.float32) for _ in range(2))
    )
    for start in range(0, len(gallery), ROWS):
        here = slice(start, start + ROWS)
        exact = gallery[here].astype(np.float64)
        # A scale must be a number of float32 that is not 0.
        tiny = np.finfo(np.float32).tiny
        scale = np.maximum(np.abs(exact).max((1, 2), initial=0) / 127, tiny).astype(np.float32)
        tokens = np.clip(np.rint(exact / scale[:, None, None]), -127, 127)
        away = np.linalg.norm(exact - tokens * scale[:, None, None], axis=-1)
        error = (away + ROUNDING * np.linalg.norm(exact, axis=-1)).max(1, initial=0)
        copy.tokens[here], copy.scale[here] = tokens, scale
        with np.errstate(over="ignore"):
            copy.error[here] = np.nextafter(error.astype(np.float32), np.float32(np.inf))
    return copy


def rows_of_a_chunk(chunk_rows: int, tokens: int, width: int) -> int:
    """A divisor of `chunk_rows`: the images of a chunk of `CHUNK` bytes at most, or one."""
    fit = max(1, CHUNK // (4 * max(1, tokens * width)))
    return max(math.gcd(chunk_rows, 1 << i) for i in range(fit.bit_length()))


def kept_of(k: int) -> int:
    """How many images of the rough pass get exact scores for lists of length `k`."""
    return max(256, 4 * k)


def rough_shard(
    queries: jax.Array,
    excluded: Array,
    rough: Rough,
    num_rows: Array,
    allowed: Array,
    *,
    k: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The first pass; per device.

    It is a program of its own: together with the second one, XLA runs it on a CPU in a way that
    takes twice as long.

    Args:
        queries: `[C, d]`; few of them, as the rough scores of all images are held, and the
            tokens of `kept_of(k)` images of each.
        excluded: int `[C, E]`, as for `ranking.RankFn`.
        rough: the copy of this device's chunks: `[S, rows, M, d]`, and `[S, rows]` twice.
        num_rows: of the gallery, without padding.
        allowed: bool of as many rows; the others are left out.
        k: length of the lists.

    Returns:
        The best upper bounds of scores and their places on this device, `[C, kept]`, and the
        `k`-th best lower bound `[C]`, -inf where fewer rows remain.
    """
    size = rough.scale.size
    first_row = lax.axis_index(mesh.AXIS).astype(jnp.int32) * size
    counts = (first_row + jnp.arange(size) < num_rows) & allowed.reshape(-1)

    def roughly(chunk: Rough) -> Array:
        return ranking_similarity(queries, chunk.tokens.astype(jnp.float32)) * chunk.scale

    found = lax.map(roughly, rough).swapaxes(0, 1).reshape(len(queries), size)
    found = jnp.where(counts, found, -jnp.inf)
    place = excluded - first_row
    place = jnp.where(place < 0, size, place)  # a negative index would wrap around
    found = found.at[jnp.arange(len(queries))[:, None], place].set(-jnp.inf, mode="drop")
    away = jnp.linalg.norm(queries, axis=-1, keepdims=True) * rough.error.reshape(-1)
    away = jnp.where(found == -jnp.inf, 0.0, away)
    if k <= size:
        threshold = lax.top_k(found - away, k)[0][:, -1]
    else:
        threshold = jnp.full(len(queries), -jnp.inf)
    best, index = lax.top_k(found + away, min(kept_of(k), size))
    return best, index, threshold


def exact_shard(
    queries: jax.Array,
    best: jax.Array,
    index: jax.Array,
    threshold: jax.Array,
    gallery: Array,
    *,
    k: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The second pass; per device.

    Args:
        queries: `[C, d]`.
        best: that `rough_shard` gave.
        index: likewise.
        threshold: likewise.
        gallery: this device's chunks `[S, rows, M, d]`, float32.
        k: length of the lists.

    Returns:
        Rows and scores `[C, k]`, over all devices, and bool `[C]`: whether that list is exact.
    """
    size, kept = gallery.shape[0] * gallery.shape[1], best.shape[1]
    first_row = lax.axis_index(mesh.AXIS).astype(jnp.int32) * size
    # All are kept, or those that are not cannot be in the list: their scores are at most `last`.
    last = best[:, -1]
    sure = (last < threshold) | (last == -jnp.inf) | (kept == size)
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
