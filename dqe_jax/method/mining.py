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
arrays `[chunk_queries, rows of the device]`, never `[B, N, M]`. Only candidates are exchanged; on
CPUs, for quantiles, one number for each query and row too (see `sharded.py`).
"""

from __future__ import annotations

import dataclasses
import math

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Float, Int, Key, Shaped

from dqe_jax.method import sharded, trns
from dqe_jax.method.arrays import Array
from dqe_jax.method.settings import NegativesConfig
from dqe_jax.method.similarity import best_token, chunk_similarity, paired_similarity

CHUNK_ROWS = 512
CHUNK_QUERIES = 256
CHUNK_SCORES = 2**23
AT_ONCE = 512  # rows of the bank whose best tokens are found at once
ZONE_RULES = ("trns", "qure")  # those that draw from a mid-zone


@dataclasses.dataclass(frozen=True)
class MiningRule:
    """How negatives are mined, made once from `config.negatives`.

    Attributes:
      name: of the rule, see the module's table.
      bounds: mode of `trns.mid_zone_bounds`.
      lower: lower bound, in the unit of the mode.
      upper: upper bound, likewise.
      floor: no lower bound lies below it.
      per_query: negatives drawn for each query.
      sample_temperature: of the draws; None draws uniformly.
      drops_depth: of the mode `drops`.
      drops_apart: likewise.
    """

    name: str
    bounds: str
    lower: float
    upper: float
    floor: float
    per_query: int
    sample_temperature: float | None
    drops_depth: int
    drops_apart: int

    @classmethod
    def of(cls, negatives: NegativesConfig, name: str | None = None) -> MiningRule | None:
        """The rule of a config; None if nothing is mined.

        Args:
          negatives: `config.negatives`.
          name: another rule than the config's, with its settings.
        """
        name = name or negatives.rule
        return None if name == "in_batch" else cls.named(negatives, name)

    @classmethod
    def named(cls, negatives: NegativesConfig, name: str) -> MiningRule:
        """A rule with the settings of a config.

        Args:
          negatives: `config.negatives`.
          name: of the rule.

        Raises:
          ValueError: it mines nothing.
        """
        if name == "in_batch":
            raise ValueError("the rule in_batch mines nothing")
        qure = name == "qure"
        return cls(
            name=name,
            bounds="drops" if qure else negatives.bounds,
            lower=negatives.lower,
            upper=negatives.upper,
            floor=0.0 if qure else negatives.floor,
            per_query=negatives.per_query,
            sample_temperature=(negatives.sample_temperature or None) if name == "trns" else None,
            drops_depth=negatives.drops_depth,
            drops_apart=negatives.drops_apart,
        )

    @property
    def has_zone(self) -> bool:
        """Whether it draws from a mid-zone."""
        return self.name in ZONE_RULES


@flax.struct.dataclass
class Bank:
    """Embeddings of the training gallery, this device's rows: device `i` has the `i`-th run of `S`.

    Attributes:
      tokens: `[S, M, d]`, L2-normalised, float32 or bfloat16; S is a multiple of `CHUNK_ROWS`.
      image_id: int32 `[S]`; -1 for padding.
    """

    tokens: Array
    image_id: Array


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

    rows: Array
    drawn: Array
    lower: Array
    upper: Array
    zone: Array


def draw(
    key: Key[Array, ""],
    delta: Float[Array, "B N"],
    forbidden: Bool[Array, "B N"],
    row_ids: Int[Array, " B"],
    rule: MiningRule,
    *,
    candidate_axis: str | None = None,
    chunk: int | None = None,
) -> Mined:
    """Draws each query's negatives by a rule.

    Args:
      key: random key, the same on all devices.
      delta: `[B, N]` target-relative similarity.
      forbidden: bool `[B, N]`.
      row_ids: int `[B]`, what tells the queries' draws apart.
      rule: of the config.
      candidate_axis: the mapped axis if the candidates are spread over devices; see `trns`.
      chunk: as for `trns.sample_negatives`.
    """
    lower, upper = trns.mid_zone_bounds(
        delta,
        ~forbidden,
        rule.bounds,
        lower=rule.lower,
        upper=rule.upper,
        floor=rule.floor,
        depth=rule.drops_depth,
        apart=rule.drops_apart,
        candidate_axis=candidate_axis,
    )
    zone = trns.mid_zone_mask(delta, lower, upper, forbidden)
    mask = {"random": ~forbidden, "hardest": jnp.zeros_like(forbidden)}.get(rule.name, zone)
    rows, drawn = trns.sample_negatives(
        key,
        delta,
        mask,
        rule.per_query,
        forbidden=forbidden,
        lower=None if rule.name == "hardest" else lower,
        row_ids=row_ids,
        sample_temperature=rule.sample_temperature,
        candidate_axis=candidate_axis,
        chunk=chunk,
    )
    return Mined(rows, drawn, lower, upper, sharded.total(zone.sum(1), candidate_axis))


def describe(
    mined: Mined,
    delta: Float[Array, "B n"],
    false: Bool[Array, "B n"] | None,
    rule: MiningRule,
) -> dict[str, Shaped[Array, " B"]]:
    """What to log of what was drawn, `[B]` each.

    Args:
      mined: of the queries.
      delta: `[B, n]` of the drawn candidates.
      false: bool `[B, n]`, drawn ones that are truly relevant; None if truth is not known.
      rule: by which they were drawn.
    """
    number = mined.drawn.sum(1)

    def share(which: Array) -> Array:
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
    if rule.has_zone:
        logs["negatives/fallback"] = share(~within)
    if false is not None:
        logs["negatives/false"] = share(false)
    return logs


# ----------------------------------------------------------------------------------- from the bank


def _rounded(query: Array, bank: Bank) -> Array:
    """The query in float32, rounded as the bank is: products are exact then, and alike."""
    return lax.stop_gradient(query).astype(bank.tokens.dtype).astype(jnp.float32)


def _rows(tokens: Array, at: Array) -> Array:
    """`tokens[at]` in float32.

    A bfloat16 bank is read as integers: XLA's CPU backend has no slices of bfloat16, and would
    convert the whole bank first. The barrier keeps the integers from being copied as a whole.
    """
    if tokens.dtype != jnp.bfloat16:
        return tokens[at]
    tokens, at = lax.optimization_barrier((tokens, at))
    bits = lax.bitcast_convert_type(tokens, jnp.uint16)[at]
    return lax.bitcast_convert_type(bits, jnp.bfloat16).astype(jnp.float32)


def bank_scores(
    query: Float[Array, "B d"], bank: Bank, chunk: int = CHUNK_ROWS
) -> Float[Array, "B S"]:
    """`s(q, T)` with this device's rows, `chunk` of them at a time, float32."""
    query = _rounded(query, bank)
    tokens = bank.tokens.reshape(-1, chunk, *bank.tokens.shape[1:])

    def step(i: Array, scores: Array) -> Array:
        found = chunk_similarity(query, _rows(tokens, i))
        return lax.dynamic_update_slice(scores, found, (0, i * chunk))

    start = jnp.zeros((len(query), len(bank.image_id)), jnp.float32)
    return lax.fori_loop(0, len(tokens), step, start)


def best_tokens(
    query: Float[Array, "B d"], rows: Int[Array, "B n"], bank: Bank, axis: str
) -> Float[Array, "b n d"]:
    """For each query and bank row, the token of that row that it scores best.

    The score is then `<q, token>`, with the token a constant of the bank's snapshot.

    Args:
      query: `[B, d]`, the same on all `D` devices; each has the `i`-th run of `B / D` of them.
      rows: int `[B, n]` of the whole bank.
      bank: this device's part.
      axis: the mapped axis.

    Returns:
      float32 `[B / D, n, d]`, of this device's queries.
    """
    query, tokens = _rounded(query, bank), bank.tokens

    def best_of(wanted: tuple[Array, Array]) -> Array:
        """Tokens of one row of this device, in the bank's dtype."""
        row, index = wanted
        return best_token(query[index], _rows(tokens, row)).astype(tokens.dtype)

    def fetch(row: Array, index: Array) -> Array:
        if tokens.shape[1] == 1:  # there is nothing to choose
            return _rows(tokens, row)[:, 0].astype(tokens.dtype)
        return lax.map(best_of, (row, index), batch_size=min(AT_ONCE, len(row)))

    found = sharded.routed_gather(rows, len(bank.image_id), fetch, axis)
    return found.astype(jnp.float32)


def _target_scores(
    query: Float[Array, "B d"], row: Int[Array, " B"], bank: Bank, axis: str
) -> Float[Array, " B"]:
    """`s(q_i, T_i)` with each query's target in the bank, float32."""
    size = len(bank.image_id)
    local = row - lax.axis_index(axis) * size
    held = (local >= 0) & (local < size)
    tokens = _rows(bank.tokens, jnp.where(held, local, 0))  # [B, M, d]
    scores = paired_similarity(_rounded(query, bank), tokens)
    # Exactly one device has the row; the others add zero.
    return lax.psum(jnp.where(held, scores, 0), axis)


def mine_bank(
    key: Key[Array, ""],
    query: Float[Array, "B d"],
    target_row: Int[Array, " B"],
    known_positives: Int[Array, "B P"],
    row_ids: Int[Array, " B"],
    bank: Bank,
    rule: MiningRule,
    *,
    axis: str,
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
      rule: of the config.
      axis: the mapped axis.
      chunk_rows: rows scored at once; draws depend on it.
      chunk_queries: queries mined at once; nothing but memory and time depends on it. By default
        as many as have `CHUNK_SCORES` scores, and at least `CHUNK_QUERIES`: the more devices hold
        the bank, the fewer exchanges.
    """
    query = lax.stop_gradient(query)
    padding = bank.image_id < 0

    def of_chunk(columns: tuple[Array, ...]) -> Mined:
        q, row, known, ids = columns
        target = _target_scores(q, row, bank, axis)
        delta = target[:, None] - bank_scores(q, bank, chunk_rows)
        # Fused comparison and reduction: no [B, S, P] array is kept.
        forbidden = jnp.any(known[:, None, :] == bank.image_id[None, :, None], axis=-1) | padding
        return draw(key, delta, forbidden, ids, rule, candidate_axis=axis, chunk=chunk_rows)

    if chunk_queries is None:
        size = 2 ** int(math.log2(CHUNK_SCORES / len(bank.image_id)))
        chunk_queries = max(CHUNK_QUERIES, size)
    size = min(chunk_queries, len(query))
    missing = -len(query) % size

    def split(x: Array) -> Array:
        padded = jnp.concatenate([x, jnp.repeat(x[-1:], missing, axis=0)]) if missing else x
        return padded.reshape(-1, size, *x.shape[1:])

    columns = jax.tree.map(split, (query, target_row, known_positives, row_ids))
    mined = lax.map(of_chunk, columns)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[: len(query)], mined)
