"""Target-relative negative sampling (TRNS): which candidates of a pool may act as negatives.

For query `i` with target `t_i` and candidate `c` the target-relative similarity is

    delta[i, c] = s(q_i, T_{t_i}) - s(q_i, T_c),        s(q, T) = max_m <q, T_m>.

Negatives come only from the mid-zone `lower < delta <= upper` of its distribution. At or below
`lower` a candidate is as good as the target and probably a false negative; above `upper` it is easy
and teaches nothing (DQE-CIR, arXiv:2603.04037).

All functions are pure and jit-able. Symbols: `B` queries, `N` candidates of the pool, `M` tokens of
a gallery embedding, `d` its width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

SORTED = 2048  # candidates up to which sorting is the quicker way to quantiles
BOUND_MODES = ("absolute", "quantile", "std", "drops")
RULES = ("in_batch", "random", "hardest", "qure", "trns")
ORACLES = ("none", "mined", "all")


def _scores(query: jax.Array, tokens: jax.Array) -> jax.Array:
    """`[B, d], [N, d] -> [B, N]` float32."""
    return jnp.einsum(
        "bd,nd->bn",
        query,
        tokens,
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


def _best_token(query: jax.Array, gallery: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Score and index of the best token, both `[B, N]`: one product a token, a running maximum."""
    tokens = jnp.moveaxis(gallery, 1, 0)  # [M, N, d]
    first = _scores(query, tokens[0])

    def step(carry, item):
        (best, index), (m, token) = carry, item
        scores = _scores(query, token)
        return (jnp.maximum(best, scores), jnp.where(scores > best, m, index)), None

    start = first, jnp.zeros(first.shape, jnp.int32)
    return lax.scan(step, start, (jnp.arange(1, len(tokens)), tokens[1:]))[0]


@jax.custom_vjp
def similarity(query: jax.Array, gallery: jax.Array) -> jax.Array:
    """The ranking score `s(q, T) = max_m <q, T_m>` of every query with every candidate.

    No `[B, N, M]` array, in the backward pass neither: it keeps the index of the best token (the
    first of equals, which gets the whole gradient).

    Args:
      query: `[B, d]` L2-normalised.
      gallery: `[N, M, d]`, tokens L2-normalised.

    Returns:
      float32 `[B, N]`.
    """
    return _best_token(query, gallery)[0]


def _similarity_forward(query: jax.Array, gallery: jax.Array):
    best, index = _best_token(query, gallery)
    return best, (query, gallery, index)


def _similarity_backward(saved, cotangent: jax.Array):
    query, gallery, index = saved
    product = {"precision": lax.Precision.HIGHEST, "preferred_element_type": jnp.float32}

    def step(query_grad, item):
        m, token = item
        own = jnp.where(index == m, cotangent, 0)  # [B, N], what this token was the best for
        query_grad += jnp.einsum("bn,nd->bd", own, token.astype(jnp.float32), **product)
        token_grad = jnp.einsum("bn,bd->nd", own, query.astype(jnp.float32), **product)
        return query_grad, token_grad.astype(token.dtype)

    items = jnp.arange(gallery.shape[1]), jnp.moveaxis(gallery, 1, 0)
    query_grad, token_grads = lax.scan(step, jnp.zeros(query.shape, jnp.float32), items)
    return query_grad.astype(query.dtype), jnp.moveaxis(token_grads, 0, 1)


similarity.defvjp(_similarity_forward, _similarity_backward)


def paired_similarity(query: jax.Array, target: jax.Array) -> jax.Array:
    """`s(q_i, T_i)` of each query with its own embedding: `[B, d], [B, M, d] -> [B]` float32."""
    scores = jnp.einsum(
        "bd,bmd->bm",
        query,
        target,
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    return scores.max(axis=-1)


def target_relative_similarity(
    query: jax.Array, gallery: jax.Array, target: jax.Array
) -> jax.Array:
    """`delta[i, c] = s(q_i, T_{t_i}) - s(q_i, T_c)` (method, section 2).

    Target and gallery must be embeddings of the same parameters: a fresh target against a stale
    gallery lets a model lower its loss by drifting away from the gallery.

    Args:
      query: `[B, d]` query embeddings.
      gallery: `[N, M, d]` embeddings of the candidates.
      target: `[B, M, d]` embedding of each query's target.

    Returns:
      float32 `[B, N]`; negative where a candidate beats the target.
    """
    return paired_similarity(query, target)[:, None] - similarity(query, gallery)


def _quantile(ordered: jax.Array, count: jax.Array, q: float) -> jax.Array:
    """Quantile `q` of the first `count[i]` values of each ascending row, linearly interpolated."""
    below, above, weight = _neighbours(count, q)
    low, high = (jnp.take_along_axis(ordered, i[:, None], axis=1)[:, 0] for i in (below, above))
    return low + (high - low) * weight


def _neighbours(count: jax.Array, q: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Ranks `[B]` on both sides of quantile `q` of `count` values, and the weight of the upper."""
    last = jnp.maximum(count - 1, 0)
    position = q * last.astype(jnp.float32)
    below = jnp.floor(position).astype(jnp.int32)
    return below, jnp.minimum(below + 1, last), position - below


def _sum(x: jax.Array, axis_name: str | None) -> jax.Array:
    return x if axis_name is None else lax.psum(x, axis_name)


def _counted_quantiles(
    delta: jax.Array,
    valid: jax.Array,
    count: jax.Array,
    qs: tuple[float, ...],
    axis_name: str | None,
) -> list[jax.Array]:
    """`_quantile` of values `[B, N]`, perhaps spread over devices: exact, without moving them.

    The bits of the value at a rank are found from the highest to the lowest, by counting over all
    devices the values below a guess: 32 passes over the values for all quantiles at once.
    """
    bits = lax.bitcast_convert_type(delta, jnp.uint32)
    top = jnp.uint32(1 << 31)
    # Ascending unsigned integers in the order of the floats; -0 is made equal to 0.
    bits = jnp.where(delta == 0, jnp.uint32(0), bits)
    keys = jnp.where(bits >= top, ~bits, bits | top)
    keys = jnp.where(valid, keys, jnp.uint32(0xFFFFFFFF))
    places = [_neighbours(count, q) for q in qs]
    ranks = jnp.stack([below for below, _, _ in places], axis=1)  # [B, number of quantiles]

    def number_below(guess: jax.Array) -> jax.Array:
        counts = [(keys < guess[:, i : i + 1]).sum(1) for i in range(guess.shape[1])]
        return _sum(jnp.stack(counts, axis=1), axis_name)

    def step(bit: jax.Array, found: jax.Array) -> jax.Array:
        guess = found | (top >> bit.astype(jnp.uint32))
        return jnp.where(number_below(guess) <= ranks, guess, found)

    found = lax.fori_loop(0, 32, step, jnp.zeros(ranks.shape, jnp.uint32))
    up_to = number_below(found + 1)
    larger = [
        jnp.where(keys > found[:, i : i + 1], keys, jnp.uint32(0xFFFFFFFF)).min(1)
        for i in range(len(qs))
    ]
    following = jnp.stack(larger, axis=1)
    if axis_name is not None:
        following = lax.pmin(following, axis_name)
    values = []
    for i, (_, above, weight) in enumerate(places):
        upper = jnp.where(up_to[:, i] > above, found[:, i], following[:, i])
        low, high = (_float_of(key) for key in (found[:, i], upper))
        values.append(low + (high - low) * weight)
    return values


def _float_of(key: jax.Array) -> jax.Array:
    top = jnp.uint32(1 << 31)
    bits = jnp.where(key >= top, key ^ top, ~key)
    return lax.bitcast_convert_type(bits, jnp.float32)


def _drops(
    delta: jax.Array, valid: jax.Array, depth: int, apart: int, axis_name: str | None
) -> tuple[jax.Array, jax.Array]:
    """Bounds between the two steepest drops of the scores behind the target (QuRe's rule).

    Of the `depth` candidates next behind the target (`delta >= 0`), in falling order of score, the
    drops between neighbours are ranked by size; the first two that follow one another in that rank
    and lie more than `apart` places apart are the ends of the zone: what is behind the first drop,
    down to the second. Without such a pair the zone is all of the `depth` candidates.
    """
    order = jnp.where(valid & (delta >= 0), -delta, -jnp.inf)
    nearest, _ = _top(order, depth, axis_name)
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


def _top(
    order: jax.Array, num: int, axis_name: str | None, offset: jax.Array | int = 0
) -> tuple[jax.Array, jax.Array]:
    """The `num` highest of each row of `[B, N]`, over all devices: values and global columns.

    Equal values keep the order of their columns. What a row lacks comes as -inf.
    """
    values, columns = _local_top(order, min(num, order.shape[1]))
    return _exchange(values, columns + offset, num, axis_name)


def _local_top(order: jax.Array, num: int) -> tuple[jax.Array, jax.Array]:
    values, columns = lax.top_k(order, num)
    return values, columns.astype(jnp.int32)


def _exchange(
    values: jax.Array, columns: jax.Array, num: int, axis_name: str | None
) -> tuple[jax.Array, jax.Array]:
    """The `num` best of all devices' best, `[B, num]`: only these are exchanged.

    Where the queries can be shared out, each device decides for its share of them: what it receives
    is then in proportion to B, not to B times the devices.
    """
    if axis_name is not None:
        shared = len(values) % lax.axis_size(axis_name) == 0

        def bring(x: jax.Array) -> jax.Array:
            """`[B, k]` of each device to `[B or a share of it, devices * k]`, devices in order."""
            if shared:
                return lax.all_to_all(x, axis_name, split_axis=0, concat_axis=1, tiled=True)
            return lax.all_gather(x, axis_name, axis=1, tiled=True)

        values, columns = bring(values), bring(columns)
        values, best = lax.top_k(values, min(num, values.shape[1]))
        columns = jnp.take_along_axis(columns, best, axis=1)
        if shared:
            values, columns = (lax.all_gather(x, axis_name, tiled=True) for x in (values, columns))
    missing = ((0, 0), (0, num - values.shape[1]))
    return jnp.pad(values, missing, constant_values=-jnp.inf), jnp.pad(columns, missing)


def mid_zone_bounds(
    delta: jax.Array,
    valid: jax.Array,
    mode: str,
    *,
    lower: float,
    upper: float,
    floor: float = 0.0,
    depth: int = 1024,
    apart: int = 1,
    axis_name: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Bounds of the mid-zone of each query's target-relative similarity distribution.

    Args:
      delta: float `[B, N]`.
      valid: bool `[B, N]`, the candidates that belong to the distribution: no known positive, no
        padding.
      mode: `absolute`: `lower` and `upper` are values of delta. `quantile`: they are quantiles in
        [0, 1] of the valid deltas of the query, linearly interpolated. `std`: they are multiples k
        in `mean + k * standard deviation` of the valid deltas. `drops`: between the two steepest
        drops of the sorted scores behind the target, QuRe's rule (Kwak et al., 2025,
        arXiv:2507.12416); `lower` and `upper` are not used.
      lower: lower bound, in the unit of `mode`.
      upper: upper bound, in the unit of `mode`.
      floor: no lower bound lies below it. With 0, the method's value, a candidate that scores at
        least as high as the target is never in the zone; `-inf` takes this cut away.
      depth: of `drops`: how many candidates behind the target are looked at.
      apart: of `drops`: places that the two drops must be more than apart.
      axis_name: the mapped axis if each device holds a part of the candidates, `[B, N of the
        device]`; bounds are those of all, and exact in every mode.

    Returns:
      (lower `[B]`, upper `[B]`) float32, values of delta. A query without a valid candidate has
      the empty zone (floor, floor).

    Raises:
      ValueError: unknown mode.
    """
    delta = delta.astype(jnp.float32)
    count = _sum(valid.sum(axis=1), axis_name)
    if mode == "absolute":
        low = jnp.full(delta.shape[:1], lower, jnp.float32)
        high = jnp.full(delta.shape[:1], upper, jnp.float32)
    elif mode == "quantile" and axis_name is None and delta.shape[1] <= SORTED:
        ordered = jnp.sort(jnp.where(valid, delta, jnp.inf), axis=1)
        low, high = (_quantile(ordered, count, q) for q in (lower, upper))
    elif mode == "quantile":
        low, high = _counted_quantiles(delta, valid, count, (lower, upper), axis_name)
    elif mode == "std":
        total = jnp.maximum(count, 1)
        mean = _sum(jnp.where(valid, delta, 0).sum(axis=1), axis_name) / total
        deviation = jnp.where(valid, delta - mean[:, None], 0)
        std = jnp.sqrt(_sum(jnp.square(deviation).sum(axis=1), axis_name) / total)
        low, high = mean + lower * std, mean + upper * std
    elif mode == "drops":
        low, high = _drops(delta, valid, depth, apart, axis_name)
    else:
        raise ValueError(f"mid-zone mode {mode!r} is not one of {BOUND_MODES}")
    low = jnp.maximum(low, floor)
    empty = count == 0
    return jnp.where(empty, floor, low), jnp.where(empty, floor, high)


def mid_zone_mask(
    delta: jax.Array, lower: jax.Array, upper: jax.Array, forbidden: jax.Array
) -> jax.Array:
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


def sample_negatives(
    key: jax.Array,
    delta: jax.Array,
    mask: jax.Array,
    num: int,
    *,
    forbidden: jax.Array | None = None,
    lower: jax.Array | None = None,
    row_ids: jax.Array | None = None,
    sample_temperature: float | None = None,
    axis_name: str | None = None,
    chunk: int | None = None,
) -> tuple[jax.Array, jax.Array]:
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
      axis_name: the mapped axis if each device holds a part of the candidates, `[B, N of the
        device]`, all parts of one size: indices are then those of all candidates in the order of
        the devices, the same on each. Only the best of each device are exchanged.
      chunk: candidates for which random numbers are drawn at a time, a divisor of the devices'
        parts; draws depend on it. Default: all (for one device).

    Returns:
      indices int32 `[B, num]` into the candidates, and valid bool `[B, num]`: false where no
      candidate was left (the index is then 0). Drawn ones come first, fall-backs after.
    """
    num_queries, num_candidates = delta.shape
    if forbidden is not None:
        mask = mask & ~forbidden
    delta = lax.stop_gradient(delta.astype(jnp.float32))
    if row_ids is None:
        row_ids = jnp.arange(num_queries)
    offset = 0 if axis_name is None else lax.axis_index(axis_name) * num_candidates
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(row_ids)
    noise = _gumbel(keys, num_candidates, offset, chunk)
    logits = 0.0 if sample_temperature is None else -delta / sample_temperature

    drawn, indices = _top(jnp.where(mask, logits + noise, -jnp.inf), num, axis_name, offset)
    valid = drawn > -jnp.inf
    if forbidden is not None:
        rest = ~mask & ~forbidden
        above = rest & (delta > lower[:, None]) if lower is not None else rest
        lacking = (_sum(mask.sum(1), axis_name) < num).any()
        for order, subset in ((-delta, above), (delta, rest & ~above)):
            # Rarely needed: the search is left out where no query lacks anything.
            wanted = jnp.where(subset, order, -jnp.inf)
            size = min(num, num_candidates)
            nothing = (
                jnp.full((num_queries, size), -jnp.inf, jnp.float32),
                jnp.zeros((num_queries, size), jnp.int32),
            )
            scores, filling = lax.cond(
                lacking,
                lambda wanted, nothing: _local_top(wanted, nothing[0].shape[1]),
                lambda wanted, nothing: nothing,
                *(wanted, nothing),
            )
            scores, filling = _exchange(scores, filling + offset, num, axis_name)
            indices = jnp.concatenate([indices, filling], axis=1)
            valid = jnp.concatenate([valid, scores > -jnp.inf], axis=1)
        # A stable sort brings the valid ones to the front and keeps their order.
        front = jnp.argsort(~valid, axis=1, stable=True)[:, :num]
        indices = jnp.take_along_axis(indices, front, axis=1)
        valid = jnp.take_along_axis(valid, front, axis=1)
    return jnp.where(valid, indices.astype(jnp.int32), 0), valid


def _gumbel(keys: jax.Array, num: int, offset: jax.Array | int, chunk: int | None) -> jax.Array:
    """Gumbel noise `[B, num]` of the candidates from `offset` on: by chunks of them."""
    if chunk is None:
        return jax.vmap(lambda k: jax.random.gumbel(k, (num,), jnp.float32))(keys)
    if num % chunk:
        raise ValueError(f"{num} candidates of a device are no multiple of chunk={chunk}")
    chunks = offset // chunk + jnp.arange(num // chunk)

    def of_query(key: jax.Array) -> jax.Array:
        draw = lambda c: jax.random.gumbel(jax.random.fold_in(key, c), (chunk,), jnp.float32)  # noqa: E731
        return jax.vmap(draw)(chunks).reshape(num)

    return jax.vmap(of_query)(keys)


def hardest_negatives(
    delta: jax.Array, forbidden: jax.Array, num: int
) -> tuple[jax.Array, jax.Array]:
    """The `num` allowed candidates of lowest delta, the baseline rule `hardest`.

    Args and returns are as in `sample_negatives`; ties go to the lower index.
    """
    nothing = jnp.zeros_like(forbidden)
    return sample_negatives(jax.random.key(0), delta, nothing, num, forbidden=forbidden)


def forbidden_candidates(
    known_positives: jax.Array,
    candidate_ids: jax.Array,
    query_valid: jax.Array,
    candidate_valid: jax.Array,
) -> jax.Array:
    """What may never be a negative: known positives by image id, and everything of a padding row.

    Args:
      known_positives: int `[B, P]` image ids, the target's included, padded with -1.
      candidate_ids: int `[N]` image ids, at least 0 (copies of one photo share an id).
      query_valid: bool `[B]`, false for padding.
      candidate_valid: bool `[N]`, false for padding.

    Returns:
      bool `[B, N]`.
    """
    # XLA fuses comparison and reduction: no [B, N, P] array is kept.
    known = jnp.any(known_positives[:, None, :] == candidate_ids[None, :, None], axis=-1)
    return known | ~candidate_valid[None, :] | ~query_valid[:, None]
