"""Draws negatives by a rule: from the global batch, or from the bank of the whole training gallery.

Pure functions per device, like the training step, made of the parts in `trns.py`:

| rule | mid-zone | drawn |
| --- | --- | --- |
| `trns` | by `config.negatives.bounds`, above `floor` | by `exp(-delta / sample_temperature)` |
| `qure` | between the two steepest drops behind the target | uniformly |
| `random` | everything allowed | uniformly |
| `hardest` | everything allowed | the lowest `delta` |

From the bank every device scores the queries of all devices against its own rows, chunk by chunk
with the maximum over tokens inside, for some queries at a time: beside the bank it holds a few
arrays `[chunk_queries, rows of the device]`, never `[B, N, M]`. Only candidates are exchanged.
"""

from __future__ import annotations

import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from dqe_jax.method import trns

CHUNK_ROWS = 512
CHUNK_QUERIES = 256
CHUNK_SCORES = 2**23
# Of the exchange of tokens: slots for each pair of devices, in means; rows read at once.
SLOTS = 4
AT_ONCE = 512


@flax.struct.dataclass
class Bank:
    """Embeddings of the training gallery, this device's rows: device `i` has the `i`-th run of `S`.

    Attributes:
      tokens: `[S, M, d]`, L2-normalised, float32 or bfloat16; S is a multiple of `CHUNK_ROWS`.
      photo: int32 `[S]`, image ids; -1 for padding.
    """

    tokens: jax.Array
    photo: jax.Array


@flax.struct.dataclass
class Mined:
    """What was drawn for `B` queries.

    Attributes:
      rows: int32 `[B, n]`, candidates: columns of the pool, or rows of the bank.
      drawn: bool `[B, n]`, false where none was left.
      lower: `[B]`, bounds of the mid-zone, in `delta`.
      upper: `[B]`.
      zone: int32 `[B]`, its size.
    """

    rows: jax.Array
    drawn: jax.Array
    lower: jax.Array
    upper: jax.Array
    zone: jax.Array


def draw(
    key: jax.Array,
    delta: jax.Array,
    forbidden: jax.Array,
    row_ids: jax.Array,
    negatives: Any,
    *,
    axis_name: str | None = None,
    chunk: int | None = None,
) -> Mined:
    """Draws each query's negatives by the rule of the config.

    Args:
      key: random key, the same on all devices.
      delta: `[B, N]` target-relative similarity.
      forbidden: bool `[B, N]`.
      row_ids: int `[B]`, what tells the queries' draws apart.
      negatives: `config.negatives`.
      axis_name: the mapped axis if the candidates are spread over devices; see `trns`.
      chunk: as for `trns.sample_negatives`.
    """
    rule, bounds, floor = negatives.rule, negatives.bounds, negatives.floor
    temperature = negatives.sample_temperature
    if rule == "qure":
        bounds, floor, temperature = "drops", 0.0, 0.0
    lower, upper = trns.mid_zone_bounds(
        delta,
        ~forbidden,
        bounds,
        lower=negatives.lower,
        upper=negatives.upper,
        floor=floor,
        depth=negatives.drops_depth,
        apart=negatives.drops_apart,
        axis_name=axis_name,
    )
    zone = trns.mid_zone_mask(delta, lower, upper, forbidden)
    mask = {"random": ~forbidden, "hardest": jnp.zeros_like(forbidden)}.get(rule, zone)
    rows, drawn = trns.sample_negatives(
        key,
        delta,
        mask,
        negatives.per_query,
        forbidden=forbidden,
        lower=None if rule == "hardest" else lower,
        row_ids=row_ids,
        sample_temperature=temperature if rule == "trns" and temperature else None,
        axis_name=axis_name,
        chunk=chunk,
    )
    size = zone.sum(1)
    size = size if axis_name is None else lax.psum(size, axis_name)
    return Mined(rows, drawn, lower, upper, size)


def describe(
    mined: Mined, delta: jax.Array, false: jax.Array | None, rule: str
) -> dict[str, jax.Array]:
    """What to log of what was drawn, `[B]` each.

    Args:
      mined: of the queries.
      delta: `[B, n]` of the drawn candidates.
      false: bool `[B, n]`, drawn ones that are in truth valid; None if truth is not known.
      rule: of the config.
    """
    number = mined.drawn.sum(1)

    def share(which: jax.Array) -> jax.Array:
        return (which & mined.drawn).sum(1) / jnp.maximum(number, 1)

    within = (delta > mined.lower[:, None]) & (delta <= mined.upper[:, None])
    logs = {
        "negatives/zone": mined.zone,
        "negatives/lower": mined.lower,
        "negatives/upper": mined.upper,
        "negatives/delta": jnp.where(mined.drawn, delta, 0).sum(1) / jnp.maximum(number, 1),
        "negatives/easy": share(delta > mined.upper[:, None]),
        "negatives/drawn": number,
    }
    if rule in ("trns", "qure"):
        logs["negatives/fallback"] = share(~within)
    if false is not None:
        logs["negatives/false"] = share(false)
    return logs


# ----------------------------------------------------------------------------------- from the bank


def _rounded(query: jax.Array, bank: Bank) -> jax.Array:
    """The query in float32, rounded as the bank is: products are exact then, and alike."""
    return lax.stop_gradient(query).astype(bank.tokens.dtype).astype(jnp.float32)


def _rows(tokens: jax.Array, at: jax.Array) -> jax.Array:
    """`tokens[at]` in float32.

    A bfloat16 bank is read as integers: XLA's CPU backend has no slices of bfloat16, and would
    convert the whole bank first. The barrier keeps the integers from being copied as a whole.
    """
    if tokens.dtype != jnp.bfloat16:
        return tokens[at]
    tokens, at = lax.optimization_barrier((tokens, at))
    bits = lax.bitcast_convert_type(tokens, jnp.uint16)[at]
    return lax.bitcast_convert_type(bits, jnp.bfloat16).astype(jnp.float32)


def bank_scores(query: jax.Array, bank: Bank, chunk: int = CHUNK_ROWS) -> jax.Array:
    """`max_m <q, T_m>` of this device's rows, `chunk` at a time: `[B, d] -> [B, S]` float32."""
    query = _rounded(query, bank)
    tokens = bank.tokens.reshape(-1, chunk, *bank.tokens.shape[1:])

    def step(i: jax.Array, scores: jax.Array) -> jax.Array:
        # Tokens first: on a CPU this order is half as quick again.
        found = jnp.einsum("smd,bd->smb", _rows(tokens, i), query, precision=lax.Precision.HIGHEST)
        return lax.dynamic_update_slice(scores, found.max(axis=1).T, (0, i * chunk))

    start = jnp.zeros((len(query), len(bank.photo)), jnp.float32)
    return lax.fori_loop(0, len(tokens), step, start)


def best_tokens(query: jax.Array, rows: jax.Array, bank: Bank, axis_name: str | None) -> jax.Array:
    """For each query and bank row, the token of that row that it scores best.

    The score is then `<q, token>`, with the token a constant of the bank's snapshot. All devices
    know what each asks for, so that only tokens are sent, from the device that holds a row to the
    one that has the query: `SLOTS` times the mean number at a time, until all have been.

    Args:
      query: `[B, d]`, the same on all devices; each has the `i`-th run of `B / devices` of them.
      rows: int `[B, n]` of the whole bank.
      bank: this device's part.
      axis_name: the mapped axis, or None.

    Returns:
      float32 `[B / devices, n, d]`, of this device's queries.
    """
    query, tokens, size = _rounded(query, bank), bank.tokens, len(bank.photo)
    devices = 1 if axis_name is None else lax.axis_size(axis_name)
    me = 0 if axis_name is None else lax.axis_index(axis_name)
    asked = rows.reshape(devices, -1)  # [devices, L], by the device that asks
    length, shape = asked.shape[1], (len(query) // devices, rows.shape[1], tokens.shape[2])

    def best_of(wanted: tuple[jax.Array, jax.Array]) -> jax.Array:
        """Of one row of this device, in the bank's dtype."""
        row, index = wanted
        found = _rows(tokens, row)  # [M, d]
        scores = jnp.einsum("d,md->m", query[index], found, precision=lax.Precision.HIGHEST)
        return found[scores.argmax()].astype(tokens.dtype)

    def best(row: jax.Array, index: jax.Array) -> jax.Array:
        return lax.map(best_of, (row, index), batch_size=min(AT_ONCE, len(row)))

    if devices == 1:
        index = jnp.repeat(jnp.arange(len(query)), rows.shape[1])
        return best(asked[0], index).reshape(shape).astype(jnp.float32)

    slots = min(length, SLOTS * -(-length // devices))
    # What this device holds, first of each line: places of `asked`.
    held = asked // size == me
    places = jnp.argsort(~held, axis=1, stable=True)
    places = jnp.pad(places, ((0, 0), (0, -length % slots)))
    # Which device holds what this one asks for, and which of the things that it asks of it that is.
    holder = asked[me] // size
    of_each = holder[:, None] == jnp.arange(devices)
    rank = jnp.take_along_axis(jnp.cumsum(of_each, axis=0), holder[:, None], axis=1)[:, 0] - 1

    def send(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        turn, found = state
        place = lax.dynamic_slice_in_dim(places, turn * slots, slots, axis=1)  # [devices, slots]
        row = jnp.take_along_axis(asked, place, axis=1) - me * size
        index = jnp.arange(devices)[:, None] * shape[0] + place // shape[1]
        # Slots that nothing fills have any row.
        sent = best(jnp.clip(row, 0, size - 1).ravel(), index.ravel())
        sent = sent.reshape(devices, slots, -1)
        got = lax.all_to_all(sent, axis_name, split_axis=0, concat_axis=0, tiled=True)
        slot = rank - turn * slots
        here = (slot >= 0) & (slot < slots)
        arrived = got[holder, jnp.clip(slot, 0, slots - 1)]
        return turn + 1, jnp.where(here[:, None], arrived, found)

    state = jnp.int32(0), jnp.zeros((length, tokens.shape[2]), tokens.dtype)
    if slots == length:
        state = send(state)
    else:
        turns = lax.pmax(-(-(rank.max() + 1) // slots), axis_name)
        state = lax.while_loop(lambda state: state[0] < turns, send, state)
    return state[1].reshape(shape).astype(jnp.float32)


def _target_scores(
    query: jax.Array, row: jax.Array, bank: Bank, axis_name: str | None
) -> jax.Array:
    """`s(q_i, T_i)` with each query's target in the bank: `[B, d], [B] -> [B]` float32."""
    size = len(bank.photo)
    local = row - (0 if axis_name is None else lax.axis_index(axis_name) * size)
    held = (local >= 0) & (local < size)
    tokens = _rows(bank.tokens, jnp.where(held, local, 0))  # [B, M, d]
    scores = jnp.einsum(
        "bd,bmd->bm", _rounded(query, bank), tokens, precision=lax.Precision.HIGHEST
    )
    scores = jnp.where(held, scores.max(1), 0)
    # One device has a row, the others add zero.
    return scores if axis_name is None else lax.psum(scores, axis_name)


def mine_bank(
    key: jax.Array,
    query: jax.Array,
    target_row: jax.Array,
    known_positives: jax.Array,
    row_ids: jax.Array,
    bank: Bank,
    negatives: Any,
    *,
    axis_name: str | None,
    chunk_rows: int = CHUNK_ROWS,
    chunk_queries: int | None = None,
) -> Mined:
    """Mines the whole bank for queries that are the same on all devices.

    Target and candidates are of the bank: of one snapshot.

    Args:
      key: random key, the same on all devices.
      query: `[B, d]`.
      target_row: int `[B]`, the target's row of the bank.
      known_positives: int `[B, P]` image ids that are never negatives, the target's included.
      row_ids: int `[B]`, what tells the queries' draws apart.
      bank: this device's part.
      negatives: `config.negatives`.
      axis_name: the mapped axis, or None for one device.
      chunk_rows: rows scored at once; draws depend on it.
      chunk_queries: queries mined at once; nothing but memory and time depends on it. By default
        as many as have `CHUNK_SCORES` scores, and at least `CHUNK_QUERIES`: the more devices hold
        the bank, the fewer exchanges.
    """
    query = lax.stop_gradient(query)
    padding = bank.photo < 0

    def of_chunk(columns: tuple[jax.Array, ...]) -> Mined:
        q, row, known, ids = columns
        target = _target_scores(q, row, bank, axis_name)
        delta = target[:, None] - bank_scores(q, bank, chunk_rows)
        # Fused comparison and reduction: no [B, S, P] array is kept.
        forbidden = jnp.any(known[:, None, :] == bank.photo[None, :, None], axis=-1) | padding
        return draw(key, delta, forbidden, ids, negatives, axis_name=axis_name, chunk=chunk_rows)

    if chunk_queries is None:
        chunk_queries = max(CHUNK_QUERIES, 2 ** int(math.log2(CHUNK_SCORES / len(bank.photo))))
    size = min(chunk_queries, len(query))
    missing = -len(query) % size

    def split(x: jax.Array) -> jax.Array:
        padded = jnp.concatenate([x, jnp.repeat(x[-1:], missing, axis=0)]) if missing else x
        return padded.reshape(-1, size, *x.shape[1:])

    columns = jax.tree.map(split, (query, target_row, known_positives, row_ids))
    mined = lax.map(of_chunk, columns)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[: len(query)], mined)
