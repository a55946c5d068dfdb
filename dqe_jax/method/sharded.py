"""Rows that are spread over devices, treated as if they lay on one: quantile, top-k, gather.

Each function says in one line of NumPy what it gives. `candidate_axis` is the mapped axis over
which the candidates are spread; None means that each device holds all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Float, Int

from dqe_jax.method.arrays import Array, Scalar

SORTED = 2048  # candidates up to which sorting is the quicker way to quantiles
EXACT = 2**24  # whole numbers up to this are exact in float32
LANES = 64  # keys that are counted side by side
_FIRST, _LAST = -(2**31), 2**31 - 1  # of int32
SLOTS = 4  # of `routed_gather`: slots for each pair of devices, in means


def total(x: Array, candidate_axis: str | None) -> Array:
    """The sum over the devices that hold candidates."""
    return x if candidate_axis is None else lax.psum(x, candidate_axis)


# --------------------------------------------------------------------------------------- quantiles


def distributed_quantile(
    values: Float[Array, "B N"],
    mask: Bool[Array, "B N"],
    count: Int[Array, " B"],
    quantiles: Sequence[Scalar],
    candidate_axis: str | None,
) -> list[Float[Array, " B"]]:
    """`np.quantile(values[i, mask[i]], q)` of each row, exact, without moving the values.

    On CPUs alone the values are moved: each device then holds those of all, `[B, N]`.

    Args:
      values: float32 `[B, N of the device]`.
      mask: bool `[B, N of the device]`, which values count.
      count: int `[B]`, how many count over all devices; of a row without any the result is no
        number of meaning.
      quantiles: in [0, 1], numbers or scalars; linearly interpolated.
      candidate_axis: see the module.

    Returns:
      float32 `[B]` for each quantile.
    """
    if candidate_axis is None and values.shape[1] <= SORTED:
        ordered = jnp.sort(jnp.where(mask, values, jnp.inf), axis=1)
        return [_sorted_quantile(ordered, count, q) for q in quantiles]
    return _counted_quantiles(values, mask, count, quantiles, candidate_axis)


def _sorted_quantile(ordered: Array, count: Array, q: Scalar) -> Array:
    """Quantile `q` of the first `count[i]` values of each ascending row."""
    below, above, weight = _neighbours(count, q)
    low, high = (jnp.take_along_axis(ordered, i[:, None], axis=1)[:, 0] for i in (below, above))
    return low + (high - low) * weight


def _neighbours(count: Array, q: Scalar) -> tuple[Array, Array, Array]:
    """Ranks `[B]` on both sides of quantile `q` of `count` values, and the weight of the upper."""
    last = jnp.maximum(count - 1, 0)
    position = q * last.astype(jnp.float32)
    below = jnp.floor(position).astype(jnp.int32)
    return below, jnp.minimum(below + 1, last), position - below


def _counted_quantiles(
    values: Array,
    mask: Array,
    count: Array,
    quantiles: Sequence[Scalar],
    candidate_axis: str | None,
) -> list[Array]:
    """As `distributed_quantile`, for more values than are sorted."""
    keys = _in_blocks(jnp.where(mask, _key_of(values), jnp.int32(_LAST)))
    places = [_neighbours(count, q) for q in quantiles]
    ranks = jnp.stack([below for below, _, _ in places], axis=1)  # [B, number of quantiles]

    def everywhere(keys: Array) -> tuple[Array, Array, Array]:
        return _search(keys, ranks, candidate_axis)

    def gathered(keys: Array) -> tuple[Array, Array, Array]:
        # XLA's CPU backend may start another exchange while a loop that holds one runs; processes
        # that do so in different orders would wait for each other for ever.
        return _search(lax.all_gather(keys, str(candidate_axis), axis=1, tiled=True), ranks, None)

    if candidate_axis is None:
        found, following, up_to = everywhere(keys)
    else:
        found, following, up_to = lax.platform_dependent(keys, cpu=gathered, default=everywhere)
    results = []
    for i, (_, above, weight) in enumerate(places):
        upper = jnp.where(up_to[:, i] > above, found[:, i], following[:, i])
        low, high = (_float_of(key) for key in (found[:, i], upper))
        results.append(low + (high - low) * weight)
    return results


def _search(keys: Array, ranks: Array, candidate_axis: str | None) -> tuple[Array, Array, Array]:
    """The keys of each row at these ranks, the next larger keys, and how many are not larger.

    The bits of a key are found from the highest to the lowest. For each bit all devices count the
    keys below a guess: 32 passes over the keys for all ranks at once.

    Args:
      keys: int32 `[B, G, C, LANES]`.
      ranks: int32 `[B, Q]`, from 0.
      candidate_axis: see the module.

    Returns:
      Keys int32 `[B, Q]` twice, and numbers `[B, Q]`.
    """
    size = keys[0].size * (1 if candidate_axis is None else lax.axis_size(candidate_axis))
    number = jnp.float32 if size < EXACT else jnp.int32  # the first is quicker

    def by_bytes(guess: Array) -> Array:
        # A CPU adds four times as many bytes as whole numbers at a time.
        below = keys[:, None] < guess[:, :, None, None, None]
        return below.sum(3, dtype=jnp.int8).sum((2, 3), dtype=number)

    def at_once(guess: Array) -> Array:
        below = keys[:, None] < guess[:, :, None, None, None]
        return below.sum((2, 3, 4), dtype=number)

    def step(_: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
        span, first, up_to = state
        half = span >> 1
        guess = _raised(first, half + 1)
        below = lax.platform_dependent(guess, cpu=by_bytes, default=at_once)
        below = total(below, candidate_axis)
        higher = below <= ranks
        return half, jnp.where(higher, guess, first), jnp.where(higher, up_to, below)

    # The key at a rank is one of `first` to `first + span`; `up_to` keys are not larger than these.
    state: tuple[Array, ...] = (
        jnp.uint32(0xFFFFFFFF),
        jnp.full(ranks.shape, _FIRST, jnp.int32),
        jnp.full(ranks.shape, size, number),
    )
    _, found, up_to = lax.fori_loop(0, 32, step, state)  # a number of turns that `plan` can count
    flat = keys.reshape(len(keys), -1)

    def lowest_above(key: Array) -> Array:
        return jnp.where(flat > key, flat, _LAST).min(1)

    columns = range(ranks.shape[1])
    following = jnp.stack([lowest_above(found[:, i : i + 1]) for i in columns], axis=1)
    if candidate_axis is not None:
        following = lax.pmin(following, candidate_axis)
    return found, following, up_to


def _raised(keys: Array, by: Array) -> Array:
    """`keys + by`, with `by` of uint32."""
    return lax.bitcast_convert_type(lax.bitcast_convert_type(keys, jnp.uint32) + by, jnp.int32)


def _in_blocks(keys: Array) -> Array:
    """`[B, N]` as `[B, G, C, LANES]`, with at most 127 for `C`, whose sum a byte holds."""
    rows = -(-keys.shape[1] // LANES)
    groups = -(-rows // 127)
    rows = -(-rows // groups)
    missing = groups * rows * LANES - keys.shape[1]
    keys = jnp.pad(keys, ((0, 0), (0, missing)), constant_values=_LAST)
    return keys.reshape(len(keys), groups, rows, LANES)


def _key_of(values: Array) -> Array:
    """Ascending whole numbers in the order of the floats; -0 is made equal to 0."""
    bits = lax.bitcast_convert_type(values, jnp.int32)
    bits = jnp.where(values == 0, 0, bits)
    return jnp.where(bits < 0, bits ^ _LAST, bits)


def _float_of(key: Array) -> Array:
    return lax.bitcast_convert_type(jnp.where(key < 0, key ^ _LAST, key), jnp.float32)


# ------------------------------------------------------------------------------------------- top-k


def distributed_top_k(
    values: Float[Array, "B N"],
    num: int,
    candidate_axis: str | None,
    offset: Int[Array, ""] | int = 0,
) -> tuple[Float[Array, "B k"], Int[Array, "B k"]]:
    """`np.argsort(-values, axis=1, kind="stable")[:, :num]` over all devices, and the values there.

    Args:
      values: float32 `[B, N of the device]`.
      num: how many, `k`; may exceed N.
      candidate_axis: see the module.
      offset: column of all candidates at which this device's begin.

    Returns:
      Values float32 and columns int32, both `[B, k]`. Equal values keep the order of their columns.
      What a row lacks comes as -inf.
    """
    best, columns = local_top_k(values, min(num, values.shape[1]))
    return merge_top_k(best, columns + offset, num, candidate_axis)


def local_top_k(
    values: Float[Array, "B N"], num: int
) -> tuple[Float[Array, "B k"], Int[Array, "B k"]]:
    """The `num` highest of this device's values, and their columns int32."""
    best, columns = lax.top_k(values, num)
    return best, columns.astype(jnp.int32)


def merge_top_k(
    values: Float[Array, "B k"],
    columns: Int[Array, "B k"],
    num: int,
    candidate_axis: str | None,
) -> tuple[Float[Array, "B num"], Int[Array, "B num"]]:
    """The `num` best of all devices' best, `[B, num]`: only these are exchanged.

    Where the queries can be shared out, each device decides for its share of them: what it receives
    is then in proportion to B, not to B times the devices.
    """
    if candidate_axis is not None:
        shared = len(values) % lax.axis_size(candidate_axis) == 0

        def bring(x: Array) -> Array:
            """`[B, k]` of each device to `[B or a share of it, devices * k]`, devices in order."""
            if shared:
                return lax.all_to_all(x, candidate_axis, split_axis=0, concat_axis=1, tiled=True)
            return lax.all_gather(x, candidate_axis, axis=1, tiled=True)

        values, columns = bring(values), bring(columns)
        values, best = lax.top_k(values, min(num, values.shape[1]))
        columns = jnp.take_along_axis(columns, best, axis=1)
        if shared:
            values, columns = (
                lax.all_gather(x, candidate_axis, tiled=True) for x in (values, columns)
            )
    missing = ((0, 0), (0, num - values.shape[1]))
    return jnp.pad(values, missing, constant_values=-jnp.inf), jnp.pad(columns, missing)


# ------------------------------------------------------------------------------------------ gather


def routed_gather(
    rows: Int[Array, "B n"],
    size: int,
    fetch: Callable[[Array, Array], Array],
    axis: str,
) -> Float[Array, "b n d"]:
    """`fetch(rows, query)` for this device's queries, of rows that other devices may hold.

    All devices know what each asks for, so that only what is fetched is sent, from the device that
    holds a row to the one that has the query: `SLOTS` times the mean number for a pair of devices
    at a time, until all has been.

    Args:
      rows: int `[B, n]`, what each query asks for, the same on all `D` devices; device `i` has the
        `i`-th run of `B / D` queries, and holds the rows from `i * size` on.
      size: rows of a device.
      fetch: of rows of this device int `[k]`, counted from its first, and of the query int `[k]`
        that asks for each, to what is sent, `[k, d]`.
      axis: the mapped axis.

    Returns:
      `[B / D, n, d]`.
    """
    devices, me = lax.axis_size(axis), lax.axis_index(axis)
    queries, each = len(rows) // devices, rows.shape[1]
    asked = rows.reshape(devices, -1)  # [devices, L], by the device that asks
    if devices == 1:
        return fetch(asked[0], jnp.repeat(jnp.arange(len(rows)), each)).reshape(queries, each, -1)

    length = asked.shape[1]
    slots = min(length, SLOTS * -(-length // devices))
    # The entries of `asked` that this device holds, moved to the front of each line.
    places = jnp.argsort(~(asked // size == me), axis=1, stable=True)
    places = jnp.pad(places, ((0, 0), (0, -length % slots)))
    holder, rank = _holders(asked[me], size, devices)

    def send(state: tuple[Array, Array]) -> tuple[Array, Array]:
        turn, found = state
        place = lax.dynamic_slice_in_dim(places, turn * slots, slots, axis=1)  # [devices, slots]
        row = jnp.take_along_axis(asked, place, axis=1) - me * size
        query = jnp.arange(devices)[:, None] * queries + place // each
        # Unused slots may hold any row.
        sent = fetch(jnp.clip(row, 0, size - 1).ravel(), query.ravel())
        sent = sent.reshape(devices, slots, -1)
        got = lax.all_to_all(sent, axis, split_axis=0, concat_axis=0, tiled=True)
        slot = rank - turn * slots
        here = (slot >= 0) & (slot < slots)
        arrived = got[holder, jnp.clip(slot, 0, slots - 1)]
        return turn + 1, jnp.where(here[:, None], arrived, found)

    fetched = jax.eval_shape(fetch, asked[0], asked[0])
    state: tuple[Array, Array] = jnp.int32(0), jnp.zeros(fetched.shape, fetched.dtype)
    if slots == length:
        state = send(state)
    else:
        turns = lax.pmax(-(-(rank.max() + 1) // slots), axis)
        state = lax.while_loop(lambda state: state[0] < turns, send, state)
    return state[1].reshape(queries, each, -1)


def _holders(rows: Array, size: int, devices: int) -> tuple[Array, Array]:
    """Which device holds each row, and which of the rows that are asked of that device it is."""
    holder = rows // size
    of_each = holder[:, None] == jnp.arange(devices)
    rank = jnp.take_along_axis(jnp.cumsum(of_each, axis=0), holder[:, None], axis=1)[:, 0] - 1
    return holder, rank
