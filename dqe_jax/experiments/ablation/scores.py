"""The tables of an ablation: metrics over seeds, beside those of `infonce`."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence

from dqe_jax.evaluation import gain
from dqe_jax.experiments.ablation.record import METRICS, Run
from dqe_jax.experiments.ablation.variants import BASE


@dataclasses.dataclass(frozen=True)
class Score:
    """A metric over seeds; what cannot be said of so few runs, or of `infonce` itself, is None.

    Attributes:
      mean: over seeds.
      spread: standard deviation (of a sample: n - 1).
      gain: difference of the means to `infonce`.
      gain_in_spreads: the same, in root mean squares of the two spreads.
    """

    mean: float
    spread: float | None
    gain: float | None
    gain_in_spreads: float | None


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of a table: a variant over its seeds."""

    variant: str
    runs: int
    steps: int
    seconds: float
    scores: Mapping[str, Score]


def summarize(runs: Sequence[Run]) -> list[Line]:
    """A line for each variant of runs that are equal in the same thing, in the order they came."""
    by_variant: dict[str, list[Run]] = {}
    for run in runs:
        by_variant.setdefault(run.variant, []).append(run)
    keys = [key for key in METRICS if all(key in run.metrics for run in runs)]

    def values(variant: str, key: str) -> list[float]:
        return [run.metrics[key] for run in by_variant.get(variant, ())]

    return [
        Line(
            variant=variant,
            runs=len(own),
            steps=own[0].steps,
            seconds=statistics.fmean(run.seconds for run in own),
            scores={
                key: score(values(variant, key), values(BASE, key) if variant != BASE else ())
                for key in keys
            },
        )
        for variant, own in by_variant.items()
    ]


def composition_gains(lines: Sequence[Line]) -> dict[str, str | float] | None:
    """The composition gain of the means; None without `text-only` or `image-only`."""
    rows = {line.variant: {key: one.mean for key, one in line.scores.items()} for line in lines}
    columns = list(lines[0].scores) if lines else []
    return gain.composition_gain(rows, columns, ("text-only", "image-only"))


def score(values: Sequence[float], base: Sequence[float] = ()) -> Score:
    """A metric's values over seeds, against those of `infonce`; none for itself."""
    mean, spread = statistics.fmean(values), _spread(values)
    if not base:
        return Score(mean, spread, None, None)
    gained, other = mean - statistics.fmean(base), _spread(base)
    if spread is None or other is None or not spread + other:
        return Score(mean, spread, gained, None)
    return Score(mean, spread, gained, gained / ((spread**2 + other**2) / 2) ** 0.5)


def _spread(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def table_cells(lines: Sequence[Line]) -> list[tuple[str, ...]]:
    """The head and the lines of a table."""
    keys = list(lines[0].scores)
    head = [cell for key in keys for cell in (key, f"{key} - {BASE}")]
    cells = [("variant", "runs", "steps", "seconds", *head)]
    for line in lines:
        scores = [cell for key in keys for cell in _score_cells(line.scores[key])]
        cells.append(
            (line.variant, str(line.runs), f"{line.steps:,}", f"{line.seconds:,.0f}", *scores)
        )
    return cells


def _score_cells(found: Score) -> tuple[str, str]:
    spread = "" if found.spread is None else f" ± {found.spread:.4f}"
    gained = "" if found.gain is None else f"{found.gain:+.4f}"
    if found.gain_in_spreads is not None:
        gained += f" ({found.gain_in_spreads:+.1f})"
    return f"{found.mean:.4f}{spread}", gained


def markdown_table(cells: Sequence[Sequence[str]]) -> str:
    """Cells as a table of Markdown, the first line its head."""
    head, *body = cells
    rows = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
