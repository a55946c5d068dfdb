"""Target-relative negative sampling (TRNS): which candidates of a pool may act as negatives.

For query `i` with target `t_i` and candidate `c` the target-relative similarity is

    delta[i, c] = s(q_i, T_{t_i}) - s(q_i, T_c),        s(q, T) = max_m <q, T_m>.

Negatives come only from the mid-zone `lower < delta <= upper` of its distribution. At or below
`lower` a candidate is as good as the target and probably a false negative; above `upper` it is easy
and teaches nothing (DQE-CIR, arXiv:2603.04037).

All functions are pure and jit-able. Symbols: `B` queries, `N` candidates that a device holds. With
`candidate_axis`, the mapped axis, the candidates are spread over the devices, and the results are
those of all of them; with None each device holds all candidates, as the pool of a batch does.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Float, Int, Key

from dqe_jax.method import sharded
from dqe_jax.method.arrays import Array, Scalar
from dqe_jax.method.settings import BOUND_MODES

# --------------------------------------------------------------------------------- bounds and mask


def mid_zone_bounds(
    delta: Float[Array, "B N"],
    candidate_mask: Bool[Array, "B N"],
    mode: str,
    *,
    lower: Scalar,
    upper: Scalar,
    floor: Scalar = 0.0,
    depth: int = 1024,
    apart: int = 1,
    candidate_axis: str | None = None,
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """Bounds of the mid-zone of each query's target-relative similarity distribution.

    Args:
      delta: float `[B, N]`.
      candidate_mask: bool `[B, N]`, the candidates that belong to the distribution: no known
        positive, no padding.
      mode: `absolute`: `lower` and `upper` are values of delta. `quantile`: they are quantiles in
        [0, 1] of the query's deltas, linearly interpolated. `std`: they are multiples k in
        `mean + k * standard deviation` of the query's deltas. `drops`: see `drop_bounds`; `lower`
        and `upper` are not used.
      lower: lower bound, in the unit of `mode`.
      upper: upper bound, in the unit of `mode`.
      floor: no lower bound lies below it. With 0, the method's value, a candidate that scores at
        least as high as the target is never in the zone; `-inf` takes this cut away.
      depth: of `drops`.
      apart: of `drops`.
      candidate_axis: see the module; bounds are exact in every mode.

    Returns:
      (lower `[B]`, upper `[B]`) float32, values of delta. A query without a candidate has the empty
      zone (floor, floor).

    Raises:
      ValueError: unknown mode.
    """
    delta = delta.astype(jnp.float32)
    count = sharded.total(candidate_mask.sum(axis=1), candidate_axis)
    if mode == "absolute":
        low: Array = jnp.full(delta.shape[:1], lower, jnp.float32)
        high: Array = jnp.full(delta.shape[:1], upper, jnp.float32)
    elif mode == "quantile":
        low, high = sharded.distributed_quantile(
            delta, candidate_mask, count, (lower, upper), candidate_axis
        )
    elif mode == "std":
        mean, std = _mean_and_std(delta, candidate_mask, count, candidate_axis)
        low, high = mean + lower * std, mean + upper * std
    elif mode == "drops":
        low, high = drop_bounds(delta, candidate_mask, depth, apart, candidate_axis)
    else:
        raise ValueError(f"mid-zone mode {mode!r} is not one of {BOUND_MODES}")
    low = jnp.maximum(low, floor)
    empty = count == 0
    return jnp.where(empty, floor, low), jnp.where(empty, floor, high)


def _mean_and_std(
    delta: Float[Array, "B N"],
    candidate_mask: Bool[Array, "B N"],
    count: Int[Array, " B"],
    candidate_axis: str | None,
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """Mean and standard deviation of each query's deltas, `[B]` each."""
    number = jnp.maximum(count, 1)
    summed = sharded.total(jnp.where(candidate_mask, delta, 0).sum(axis=1), candidate_axis)
    mean = summed / number
    deviation = jnp.where(candidate_mask, delta - mean[:, None], 0)
    square = sharded.total(jnp.square(deviation).sum(axis=1), candidate_axis)
    return mean, jnp.sqrt(square / number)


def drop_bounds(
    delta: Float[Array, "B N"],
    candidate_mask: Bool[Array, "B N"],
    depth: int,
    apart: int,
    candidate_axis: str | None,
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """Bounds between the two steepest drops of the scores behind the target (QuRe's rule).

    Of the `depth` candidates next behind the target (`delta >= 0`), in falling order of score, the
    drops between neighbours are ranked by size; the first two that follow one another in that rank
    and lie more than `apart` places apart are the ends of the zone: what is behind the first drop,
    down to the second. Without such a pair the zone is all of the `depth` candidates (Kwak et al.,
    2025, arXiv:2507.12416).
    """
    order = jnp.where(candidate_mask & (delta >= 0), -delta, -jnp.inf)
    nearest, _ = sharded.distributed_top_k(order, depth, candidate_axis)
    near = -nearest  # [B, depth], ascending; inf where there is none
    drop = jnp.where(jnp.isfinite(near[:, 1:]), near[:, 1:] - near[:, :-1], -jnp.inf)
    size, place = lax.top_k(drop, drop.shape[1])
    first, second = place[:, :-1], place[:, 1:]
    fits = (jnp.abs(first - second) > apart) & jnp.isfinite(size[:, 1:])
    pick = jnp.argmax(fits, axis=1)[:, None]
    ends = [jnp.take_along_axis(x, pick, axis=1) for x in (first, second)]
    low, high = (
        jnp.take_along_axis(near, f(*ends), axis=1)[:, 0] for f in (jnp.minimum, jnp.maximum)
    )
    found = fits.any(axis=1)
    last = jnp.where(jnp.isfinite(near), near, -jnp.inf).max(axis=1)
    return jnp.where(found, low, -jnp.inf), jnp.where(found, high, last)


def mid_zone_mask(
    delta: Float[Array, "B N"],
    lower: Float[Array, " B"],
    upper: Float[Array, " B"],
    forbidden: Bool[Array, "B N"],
) -> Bool[Array, "B N"]:
    """`lower < delta <= upper`, without the forbidden candidates.

    Args:
      delta: float `[B, N]`.
      lower: `[B]` values of delta.
      upper: `[B]` values of delta.
      forbidden: bool `[B, N]`: the target, any candidate with its image id, any other known
        positive, padding.

    Returns:
      bool `[B, N]`.
    """
    return (delta > lower[:, None]) & (delta <= upper[:, None]) & ~forbidden


def forbidden_candidates(
    known_positives: Int[Array, "B P"],
    candidate_ids: Int[Array, " N"],
    query_mask: Bool[Array, " B"],
    candidate_mask: Bool[Array, " N"],
) -> Bool[Array, "B N"]:
    """What may never be a negative: known positives by image id, and everything of a padding row.

    Args:
      known_positives: int `[B, P]` image ids, the target's included, padded with -1.
      candidate_ids: int `[N]` image ids, at least 0 (copies of one photo share an id).
      query_mask: bool `[B]`, false for padding.
      candidate_mask: bool `[N]`, false for padding.

    Returns:
      bool `[B, N]`.
    """
    # XLA fuses comparison and reduction: no [B, N, P] array is kept.
    known = jnp.any(known_positives[:, None, :] == candidate_ids[None, :, None], axis=-1)
    return known | ~candidate_mask[None, :] | ~query_mask[:, None]


# ----------------------------------------------------------------------------------------- drawing


def sample_negatives(
    key: Key[Array, ""],
    delta: Float[Array, "B N"],
    mask: Bool[Array, "B N"],
    num: int,
    *,
    forbidden: Bool[Array, "B N"] | None = None,
    lower: Float[Array, " B"] | None = None,
    row_ids: Int[Array, " B"] | None = None,
    sample_temperature: float | None = None,
    candidate_axis: str | None = None,
    chunk: int | None = None,
) -> tuple[Int[Array, "B num"], Bool[Array, "B num"]]:
    """Draws `num` candidates of the mask without replacement (Gumbel top-k).

    Where the mask holds fewer than `num`, and `forbidden` is given, the fall-back of the method
    fills up: first the other candidates above `lower`, nearest first; then those at or below it,
    again in falling order of closeness to `lower`. A forbidden candidate is never drawn.

    Args:
      key: random key, the same on all devices.
      delta: float `[B, N]`.
      mask: bool `[B, N]`, the mid-zone.
      num: candidates to draw for each query; may exceed N.
      forbidden: bool `[B, N]`; None leaves the fall-back out.
      lower: `[B]` lower bounds, used by the fall-back; None counts every candidate as above.
      row_ids: int `[B]`, the query's index in the global batch. Draws depend on the key and this
        index alone, so they do not change with the number of devices. Default: `arange(B)`.
      sample_temperature: draw in proportion to `exp(-delta / sample_temperature)`, which leans to
        the hard side of the zone; None draws uniformly.
      candidate_axis: see the module; all devices hold the same number of candidates. Indices are
        those of all candidates in the order of the devices, the same on each. Only the best of each
        device are exchanged.
      chunk: candidates for which random numbers are drawn at a time, a divisor of the devices'
        parts; draws depend on it. Default: all (for one device).

    Returns:
      indices int32 `[B, num]` into the candidates, and drawn bool `[B, num]`: false where no
      candidate was left (the index is then 0). Drawn ones come first, fall-backs after.
    """
    num_queries, num_candidates = delta.shape
    if forbidden is not None:
        mask = mask & ~forbidden
    delta = lax.stop_gradient(delta.astype(jnp.float32))
    delta = jnp.where(delta == 0, 0.0, delta)  # equal numbers, but sorting tells -0 from 0
    if row_ids is None:
        row_ids = jnp.arange(num_queries)
    offset = 0 if candidate_axis is None else lax.axis_index(candidate_axis) * num_candidates
    order = _random_order(key, delta, mask, row_ids, sample_temperature, offset, chunk)
    best, indices = sharded.distributed_top_k(order, num, candidate_axis, offset)
    drawn = best > -jnp.inf
    if forbidden is not None:
        for more, filled in _fall_back(delta, mask, forbidden, lower, num, candidate_axis, offset):
            indices = jnp.concatenate([indices, more], axis=1)
            drawn = jnp.concatenate([drawn, filled], axis=1)
        # A stable sort brings the drawn ones to the front and keeps their order.
        front = jnp.argsort(~drawn, axis=1, stable=True)[:, :num]
        indices = jnp.take_along_axis(indices, front, axis=1)
        drawn = jnp.take_along_axis(drawn, front, axis=1)
    return jnp.where(drawn, indices.astype(jnp.int32), 0), drawn


def _random_order(
    key: Array,
    delta: Array,
    mask: Array,
    row_ids: Array,
    temperature: float | None,
    offset: Array | int,
    chunk: int | None,
) -> Array:
    """Numbers `[B, N]` of which the highest are drawn; -inf outside the mask."""
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(row_ids)
    noise = _gumbel(keys, delta.shape[1], offset, chunk)
    logits = 0.0 if temperature is None else -delta / temperature
    return jnp.where(mask, logits + noise, -jnp.inf)


def _fall_back(
    delta: Array,
    mask: Array,
    forbidden: Array,
    lower: Array | None,
    num: int,
    candidate_axis: str | None,
    offset: Array | int,
) -> list[tuple[Array, Array]]:
    """What fills up where the mask holds too few: (indices, drawn) `[B, num]`, best group first."""
    rest = ~mask & ~forbidden
    above = rest & (delta > lower[:, None]) if lower is not None else rest
    lacking = (sharded.total(mask.sum(1), candidate_axis) < num).any()
    groups = []
    for order, subset in ((-delta, above), (delta, rest & ~above)):
        # Rarely needed: the search is skipped when every query has enough negatives.
        wanted = jnp.where(subset, order, -jnp.inf)
        size = min(num, delta.shape[1])
        nothing = (
            jnp.full((len(delta), size), -jnp.inf, jnp.float32),
            jnp.zeros((len(delta), size), jnp.int32),
        )
        scores, filling = lax.cond(
            lacking,
            lambda wanted, nothing: sharded.local_top_k(wanted, nothing[0].shape[1]),
            lambda wanted, nothing: nothing,
            *(wanted, nothing),
        )
        scores, filling = sharded.merge_top_k(scores, filling + offset, num, candidate_axis)
        groups.append((filling, scores > -jnp.inf))
    return groups


def _gumbel(keys: Array, num: int, offset: Array | int, chunk: int | None) -> Array:
    """Gumbel noise `[B, num]` of the candidates from `offset` on: by chunks of them."""
    if chunk is None:
        return jax.vmap(lambda k: jax.random.gumbel(k, (num,), jnp.float32))(keys)
    if num % chunk:
        raise ValueError(f"{num} candidates of a device are no multiple of chunk={chunk}")
    chunks = offset // chunk + jnp.arange(num // chunk)

    def of_query(key: Array) -> Array:
        draw = lambda c: jax.random.gumbel(jax.random.fold_in(key, c), (chunk,), jnp.float32)  # noqa: E731
        return jax.vmap(draw)(chunks).reshape(num)

    return jax.vmap(of_query)(keys)


def hardest_negatives(
    delta: Float[Array, "B N"], forbidden: Bool[Array, "B N"], num: int
) -> tuple[Int[Array, "B num"], Bool[Array, "B num"]]:
    """The `num` allowed candidates of lowest delta, the baseline rule `hardest`.

    Args and returns are as in `sample_negatives`; ties go to the lower index.
    """
    nothing = jnp.zeros_like(forbidden)
    return sample_negatives(jax.random.key(0), delta, nothing, num, forbidden=forbidden)
