"""The figures of an audit, in NumPy: of each query, then over queries; histograms and tables.

| figure of a rule | |
| --- | --- |
| `false` | share of the drawn that is truly relevant; `false_se`: standard error over queries |
| `easy` | share of the drawn above the upper bound that the config gives the rule `trns` |
| `beats` | share of the drawn that scores at least as high as the target: `delta <= 0` |
| `delta` | mean `delta` of the drawn |
| `zone` | candidates in the mid-zone of the rule |
| `fallback` | share of the drawn from outside this zone; none for rules without one |
| `drawn` | number drawn for a query |

Each is the mean over queries. A setting of the sweep also has

| figure | |
| --- | --- |
| `quantile`, `floor` | the lower bound: this quantile of the deltas, at least the floor |
| `rank` | the quantile as a rank among the allowed candidates |
| `cut` | allowed candidates that the lower bound cuts off, with the floor |
| `valid_cut` | share of the relevant ones that it cuts off |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from dqe_jax.utils.files import JsonObject
from dqe_jax.utils.text_table import text_table

FINE_BINS = 4000  # over [-2, 2]: fine enough for the deltas of untrained models
BINS = 80  # of a picture


def share(which: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """Share of the counted that is `which`: bool `[B, n]` both, `-> [B]`, nan of none counted."""
    return mean(which, counted)


def mean(values: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """Mean of the counted values of each row, `[B, n] -> [B]`; nan where none is counted."""
    number = counted.sum(1)
    total = np.where(counted, values, 0).sum(1, dtype=np.float64)
    return np.where(number > 0, total / np.maximum(number, 1), np.nan)


def of_candidates(
    delta: np.ndarray, counted: np.ndarray, relevant: np.ndarray, easy_above: np.ndarray
) -> dict[str, np.ndarray]:
    """Figures of each query's candidates, `[B]` each; see the module's table.

    Args:
      delta: `[B, n]`.
      counted: bool `[B, n]`, the candidates that count: the drawn ones, or all allowed ones.
      relevant: bool `[B, n]`, truly relevant.
      easy_above: `[B]`, the `delta` above which a candidate is easy.
    """
    return {
        "false": share(relevant, counted),
        "easy": share(delta > easy_above[:, None], counted),
        "beats": share(delta <= 0, counted),
        "delta": mean(delta, counted),
        "drawn": counted.sum(1).astype(np.float64),
    }


def of_zone(
    delta: np.ndarray, drawn: np.ndarray, lower: np.ndarray, upper: np.ndarray, zone: np.ndarray
) -> dict[str, np.ndarray]:
    """Size of the mid-zone, and how much of the drawn lies outside, `[B]` each.

    Args:
      delta: `[B, n]` of the drawn.
      drawn: bool `[B, n]`.
      lower: `[B]`, the bounds.
      upper: `[B]`.
      zone: int `[B]`, candidates within.
    """
    within = (delta > lower[:, None]) & (delta <= upper[:, None])
    return {"zone": zone.astype(np.float64), "fallback": share(~within, drawn)}


def of_cut(
    delta: np.ndarray, allowed: np.ndarray, relevant: np.ndarray, lower: np.ndarray
) -> dict[str, np.ndarray]:
    """What a lower bound cuts off: `cut` and `valid_cut`, `[B]` each.

    Args:
      delta: `[B, N]` of all candidates.
      allowed: bool `[B, N]`.
      relevant: bool `[B, N]`.
      lower: `[B]`.
    """
    cut = allowed & (delta <= lower[:, None])
    return {"cut": cut.sum(1).astype(np.float64), "valid_cut": share(cut, allowed & relevant)}


def standard_error(values: np.ndarray) -> float:
    """Standard error of the mean of the values that are not nan; nan of fewer than two."""
    values = values[~np.isnan(values)]
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else np.nan


def over_queries(columns: Mapping[str, np.ndarray]) -> dict[str, float | None]:
    """Means over the queries that have a value; `false_se` beside `false`. None where none has."""
    found: dict[str, float] = {}
    for name, values in columns.items():
        finite = values[np.isfinite(values)]
        found[name] = float(finite.mean()) if len(finite) else np.nan
        if name == "false":
            found["false_se"] = standard_error(values)
    return {name: None if np.isnan(value) else value for name, value in found.items()}


def concatenate(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Columns of chunks of queries as columns of all."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def lower_quantiles(wanted: Sequence[float], upper: float) -> list[float]:
    """Those of the quantiles that are below the upper one, ascending, each once."""
    return sorted({q for q in wanted if 0 <= q < upper})


# -------------------------------------------------------------------------------------- histograms


def fine_edges() -> np.ndarray:
    """Edges `[FINE_BINS + 1]` over all that `delta` can be: scores lie in [-1, 1]."""
    return np.linspace(-2, 2, FINE_BINS + 1)


def count_deltas(delta: np.ndarray, classes: np.ndarray, number: int) -> np.ndarray:
    """Counts of candidates by class and bin of `fine_edges`: int64 `[number, FINE_BINS]`.

    Args:
      delta: `[n]`.
      classes: int `[n]`, from 0 to `number - 1`.
      number: of classes.
    """
    edges = fine_edges()
    clipped = np.clip(delta, edges[0], edges[-1])
    return np.stack([np.histogram(clipped[classes == c], edges)[0] for c in range(number)])


def trim(counts: np.ndarray, tail: float = 0.001) -> tuple[np.ndarray, np.ndarray]:
    """The part of a histogram that has something in it, in at most about `BINS` bins.

    Args:
      counts: int `[C, FINE_BINS]`.
      tail: the share of each class that may be left out at either end.

    Returns:
      edges `[b + 1]` and counts int `[C, b]`.
    """
    ends = []
    for row in counts[counts.any(axis=1)]:
        reached = np.cumsum(row) / row.sum()
        ends.append((np.searchsorted(reached, tail), np.searchsorted(reached, 1 - tail) + 1))
    if not ends:
        return fine_edges()[[0, -1]], counts.sum(1, keepdims=True)
    first, last = min(a for a, _ in ends), min(max(b for _, b in ends), counts.shape[1])
    width = -(-(last - first) // BINS)
    last = min(first + -(-(last - first) // width) * width, counts.shape[1])
    starts = np.arange(first, last, width)
    return fine_edges()[[*starts, last]], np.add.reduceat(counts[:, :last], starts, axis=1)


# ------------------------------------------------------------------------------------------ tables


def rules_table(facts: JsonObject) -> str:
    """The rules of an audit as text, and the base rate: what all allowed candidates are.

    Args:
      facts: with `rules` and `oracle`, as the audit writes them.
    """
    head = ("rule", "false", "+-", "easy", "beats", "delta", "zone", "fallback", "drawn")
    lines: list[tuple[str, ...]] = [head]
    for name, row in {**facts["rules"], "oracle": facts["oracle"]}.items():
        lines.append((name, *_shares(row, "false", "false_se", "easy", "beats"), *_rest(row)))
    return text_table(lines)


def sweep_table(facts: JsonObject) -> str:
    """The settings of the sweep as text.

    Args:
      facts: with `sweep`, as the audit writes it.
    """
    lines: list[tuple[str, ...]] = [
        (
            *("lower", "rank", "floor", "cut", "relevant cut"),
            *("false", "+-", "easy", "beats", "delta", "zone", "fallback", "drawn"),
        )
    ]
    for row in facts["sweep"]:
        floor = "off" if row["floor"] is None else f"{row['floor']:g}"
        place = (f"{row['quantile']:g}", _number(row["rank"]), floor, _number(row["cut"]))
        shares = _shares(row, "valid_cut", "false", "false_se", "easy", "beats")
        lines.append((*place, *shares, *_rest(row)))
    return text_table(lines)


def _shares(row: Mapping[str, float | None], *names: str) -> list[str]:
    values = [row.get(name) for name in names]
    return ["-" if value is None else f"{100 * value:.2f} %" for value in values]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}"


def _rest(row: Mapping[str, float | None]) -> list[str]:
    delta = row.get("delta")
    return [
        "-" if delta is None else f"{delta:.4f}",
        _number(row.get("zone")),
        *_shares(row, "fallback"),
        _number(row.get("drawn")),
    ]
