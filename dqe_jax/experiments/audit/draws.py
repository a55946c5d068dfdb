"""Mines the bank for a sample of queries by every rule, and measures what was drawn.

Scores are those of the bank, computed on all devices. Negatives are drawn from them by
`mining.draw`, with the candidates in the order of the bank: for the same key these are the draws of
`BankKeeper.mine_all`, of which all scores are at hand here too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from dqe_jax.data.splits import Split
from dqe_jax.distributed import mesh
from dqe_jax.experiments.audit import candidates, statistics
from dqe_jax.experiments.audit.candidates import CLASSES, Truth
from dqe_jax.method import mining
from dqe_jax.method.arrays import Array, Params
from dqe_jax.method.mining import Bank, Mined, MiningRule
from dqe_jax.method.settings import NegativesConfig
from dqe_jax.training.bank import BankKeeper
from dqe_jax.utils.errors import UserError
from dqe_jax.utils.files import JsonObject

RULES = ("random", "hardest", "qure", "trns")
LOWERS = (0.0, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1)

Draw = Callable[..., Mined]
# Of figures: a rule, another word, or a setting of the sweep, quantile and floor.
_Name = str | tuple[float, float]


def rule_of(negatives: NegativesConfig, rule: str) -> MiningRule:
    """A rule with the settings of `config.negatives`.

    Raises:
      UserError: the rule mines nothing, or is unknown.
    """
    if rule not in RULES:
        raise UserError(f"--rules: {rule!r} is not one of {', '.join(RULES)}.")
    return MiningRule.named(negatives, rule)


def audit(
    keeper: BankKeeper,
    params: Params,
    step: int,
    *,
    split: Split,
    rows: np.ndarray,
    negatives: NegativesConfig,
    rules: Sequence[str],
    lowers: Sequence[float],
    seed: int,
    devices: Sequence[jax.Device],
) -> JsonObject:
    """Fills the bank, mines it for a sample of queries and measures what was drawn.

    Args:
      keeper: of the split's bank.
      params: replicated over the devices.
      step: of the checkpoint.
      split: of the data set.
      rows: int `[B]`, positions of the queries, as `candidates.sample_queries` gives.
      negatives: `config.negatives`.
      rules: to mine by, of `RULES`.
      lowers: lower quantiles of the sweep, below the upper one; none for no sweep.
      seed: of the draws.
      devices: of the keeper.

    Returns:
      What goes to the JSON: `candidates`, `bounds`, `rules`, `oracle`, `sweep`, `histogram`; see
      `statistics` for the figures.
    """
    bank = keeper.refresh(params, step)
    truth = candidates.truth_of(split, rows)
    query = keeper.embed_queries(params, rows)
    measure = _Measure(negatives, rules, lowers, jax.random.key(seed))
    target = split.queries.target[rows]
    for here, scores in _scores(query, bank, devices):
        image_ids = np.asarray(bank.image_id).reshape(-1)
        delta = scores[np.arange(len(scores)), target[here]][:, None] - scores
        part = Truth(truth.known[here], truth.relevant[here], truth.near[here])
        measure.add(delta, *candidates.classify(part, image_ids), rows[here].astype(np.int32))
    return measure.facts()


def _scores(
    query: np.ndarray, bank: Bank, devices: Sequence[jax.Device]
) -> Iterator[tuple[slice, np.ndarray]]:
    """Scores of the whole bank, for some queries at a time: `(which, float32 [b, devices * S])`."""
    size = min(mining.CHUNK_QUERIES, len(query))
    score = mesh.pmap(mining.bank_scores, in_axes=(None, 0), out_axes=0, devices=devices)
    for start in range(0, len(query), size):
        here = slice(start, min(start + size, len(query)))
        parts = np.asarray(score(mesh.pad_rows(query[here], size), bank))
        whole = np.moveaxis(parts, 0, 1).reshape(size, -1)
        yield here, whole[: here.stop - start]


def _draw_by(rule: MiningRule) -> Draw:
    """`(key, delta, forbidden, row_ids) -> Mined`, compiled."""

    def draw(key: jax.Array, delta: Array, forbidden: Array, row_ids: Array) -> Mined:
        return mining.draw(key, delta, forbidden, row_ids, rule, chunk=mining.CHUNK_ROWS)

    return jax.jit(draw)


def _draw_above(negatives: NegativesConfig) -> Draw:
    """The same by `trns` with quantiles as bounds; lower one and floor are further arguments.

    They are arguments so that all settings of a sweep share one program.
    """
    rule = dataclasses.replace(
        MiningRule.named(negatives, "trns"), bounds="quantile", upper=upper_of(negatives)
    )

    def draw(
        key: jax.Array,
        delta: Array,
        forbidden: Array,
        row_ids: Array,
        lower: float,
        floor: float,
    ) -> Mined:
        setting = dataclasses.replace(rule, lower=lower, floor=floor)
        return mining.draw(key, delta, forbidden, row_ids, setting, chunk=mining.CHUNK_ROWS)

    return jax.jit(draw)


def upper_of(negatives: NegativesConfig) -> float:
    """Upper quantile of the sweep: the config's; none (1) where its bounds are no quantiles."""
    return negatives.upper if negatives.bounds == "quantile" else 1.0


class _Measure:
    """Draws for chunks of queries and collects their figures."""

    def __init__(
        self,
        negatives: NegativesConfig,
        rules: Sequence[str],
        lowers: Sequence[float],
        key: jax.Array,
    ):
        self._rules, self._key = tuple(rules), key
        # TRNS comes first: its bounds say what is easy, whether it is asked for or not.
        self._draws = {rule: _draw_by(rule_of(negatives, rule)) for rule in ("trns", *self._rules)}
        self._sweep = _draw_above(negatives)
        floor = negatives.floor if np.isfinite(negatives.floor) else 0.0
        self._settings = [(q, f) for f in (floor, -np.inf) for q in lowers]
        self._size = 0  # queries of the first, longest chunk: later ones are padded to it
        self._columns: dict[_Name, list[dict[str, np.ndarray]]] = {}
        self._counts = np.zeros((len(CLASSES), statistics.FINE_BINS), np.int64)

    def add(
        self, delta: np.ndarray, classes: np.ndarray, forbidden: np.ndarray, row_ids: np.ndarray
    ) -> None:
        """Adds queries.

        Args:
          delta: float32 `[b, N]`.
          classes: int `[b, N]`, of `CLASSES`.
          forbidden: bool `[b, N]`.
          row_ids: int32 `[b]`, positions of the queries in the split.
        """
        allowed, relevant = ~forbidden, classes == CLASSES.index("relevant")
        self._counts += statistics.count_deltas(delta[allowed], classes[allowed], len(CLASSES))
        self._size = max(self._size, len(delta))
        padded = [mesh.pad_rows(x, self._size) for x in (delta, forbidden, row_ids)]
        inputs = jax.device_put((self._key, *padded))

        def call(draw: Draw, *setting: np.float32) -> Mined:
            mined = jax.device_get(draw(*inputs, *setting))
            return jax.tree.map(lambda x: x[: len(delta)], mined)

        by_trns = call(self._draws["trns"])
        easy_above = np.asarray(by_trns.upper)
        bounds = {"lower": by_trns.lower, "upper": by_trns.upper, "zone": by_trns.zone}
        self._keep("bounds", {name: np.asarray(x, np.float64) for name, x in bounds.items()})
        self._keep("oracle", statistics.of_candidates(delta, allowed, relevant, easy_above))
        for rule, draw in self._draws.items():
            mined = by_trns if rule == "trns" else call(draw)
            found = _figures(mined, delta, relevant, easy_above)
            if rule not in ("trns", "qure"):  # the bounds that come with it are not its own
                del found["zone"], found["fallback"]
            self._keep(rule, found)
        for setting in self._settings:
            mined = call(self._sweep, *np.asarray(setting, np.float32))
            cut = statistics.of_cut(delta, allowed, relevant, np.asarray(mined.lower))
            self._keep(setting, cut | _figures(mined, delta, relevant, easy_above))

    def _keep(self, name: _Name, columns: dict[str, np.ndarray]) -> None:
        self._columns.setdefault(name, []).append(columns)

    def facts(self) -> JsonObject:
        """The figures over all queries."""
        found = {
            name: statistics.over_queries(statistics.concatenate(parts))
            for name, parts in self._columns.items()
        }
        allowed = found["oracle"]["drawn"]
        assert allowed is not None, "each query has a number of candidates"
        edges, counts = statistics.trim(self._counts)
        return {
            "candidates": allowed,
            "bounds": found["bounds"],
            "rules": {rule: found[rule] for rule in self._rules},
            "oracle": found["oracle"],
            "sweep": [
                {
                    "quantile": quantile,
                    "floor": float(floor) if np.isfinite(floor) else None,
                    "rank": quantile * allowed,
                    **found[quantile, floor],
                }
                for quantile, floor in self._settings
            ],
            "histogram": {
                "edges": edges.tolist(),
                **{name: row.tolist() for name, row in zip(CLASSES, counts)},
            },
        }


def _figures(
    mined: Mined, delta: np.ndarray, relevant: np.ndarray, easy_above: np.ndarray
) -> dict[str, np.ndarray]:
    """Figures of what was drawn from all candidates `[b, N]`."""
    rows, drawn, lower, upper, zone = (
        np.asarray(x) for x in (mined.rows, mined.drawn, mined.lower, mined.upper, mined.zone)
    )
    near, false = (np.take_along_axis(x, rows, axis=1) for x in (delta, relevant))
    return statistics.of_candidates(near, drawn, false, easy_above) | statistics.of_zone(
        near, drawn, lower, upper, zone
    )
