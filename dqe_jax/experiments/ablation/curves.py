"""Curves of runs over steps and over time, and differences to InfoNCE with their intervals."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from etils import epath

from dqe_jax.evaluation import curve
from dqe_jax.evaluation.curve import Point
from dqe_jax.evaluation.intervals import Interval, over_seeds
from dqe_jax.experiments.ablation.record import METRICS, Run, read_log, training_times

EPOCHS = (1, 2, 4, 8)  # at which the table shows differences


@dataclasses.dataclass(frozen=True)
class Curve:
    """A run with the points that it kept.

    Attributes:
      run: the run.
      points: by step, ascending; the last is that of the end.
      seconds: of training until each point.
    """

    run: Run
    points: Mapping[int, Point]
    seconds: Mapping[int, float]

    @property
    def end(self) -> Point:
        """The last point."""
        return self.points[max(self.points)]

    def at_time(self, seconds: float) -> Point | None:
        """The newest point that was reached in so many seconds of training; None if none was."""
        steps = list(self.points)
        place = bisect.bisect_right([self.seconds[step] for step in steps], seconds)
        return self.points[steps[place - 1]] if place else None


@dataclasses.dataclass(frozen=True)
class Difference:
    """How far a variant is ahead of InfoNCE in a metric, over the seeds that both have.

    Attributes:
      variant: its name.
      metric: which.
      at: "end", "steps" or "time".
      value: steps, or seconds of training; of "end" 0.
      epochs: how often the variant had seen its queries, in the mean over seeds.
      mean: over seeds and queries.
      low: of the 95% interval, by bootstrap over seeds, then references.
      high: likewise.
      by_seed: the difference of each seed.
    """

    variant: str
    metric: str
    at: str
    value: float
    epochs: float
    mean: float
    low: float
    high: float
    by_seed: Sequence[float]


def read_curve(run: Run, workdir: epath.Path, split: str, kind: str = "") -> Curve:
    """The curve of a complete run on a split.

    Args:
      run: the run.
      workdir: of the ablation.
      split: of the points.
      kind: of the queries that count, in the metrics of the run too; "" for all.

    Raises:
      UserError: a file of it cannot be read, or no query is of the kind.
    """
    directory = workdir / run.directory
    steps, seconds = zip(*training_times(read_log(directory)))
    points = {
        step: curve.read_point(directory, split, step)
        for step in curve.steps_of(directory, split)
        if step <= run.steps
    }
    if kind:
        points = {step: point.of_kind(kind) for step, point in points.items()}
        own = {name: run.metrics[f"{name}/{kind}"] for name in METRICS if name in run.metrics}
        run = dataclasses.replace(run, metrics=own)
    return Curve(run, points, {s: float(np.interp(s, steps, seconds)) for s in points})


def differences(own: Sequence[Curve], base: Sequence[Curve]) -> list[Difference]:
    """All differences of a variant to InfoNCE: at the end, at equal steps and at equal time.

    At equal steps are the points that all runs of both have. At equal time each run counts with the
    newest point that it had reached after so many seconds of training; the seconds are those of
    InfoNCE's points, in the mean over seeds.

    Args:
      own: of the variant, over its seeds.
      base: of InfoNCE.
    """
    others = {each.run.seed: each for each in base}
    pairs = [(each, others[each.run.seed]) for each in own if each.run.seed in others]
    if not pairs:
        return []
    found = _compared(pairs, "end", 0, [(a.end, b.end) for a, b in pairs])
    every = [set(each.points) for pair in pairs for each in pair]
    for step in sorted(set.intersection(*every)):
        both = [(a.points[step], b.points[step]) for a, b in pairs]
        found += _compared(pairs, "steps", step, both)
    for step in sorted(set.intersection(*(set(b.points) for _, b in pairs))):
        time = float(np.mean([b.seconds[step] for _, b in pairs]))
        reached = [(a.at_time(time), b.points[step]) for a, b in pairs]
        both = [(a, b) for a, b in reached if a is not None]
        if len(both) == len(pairs):
            found += _compared(pairs, "time", time, both)
    return found


def _compared(
    pairs: Sequence[tuple[Curve, Curve]],
    at: str,
    value: float,
    points: Sequence[tuple[Point, Point]],
) -> list[Difference]:
    """The differences of all metrics at one place, `points` being one pair for each seed."""
    first = points[0][0]
    found = []
    for metric in METRICS:
        if not all(metric in point.values for pair in points for point in pair):
            continue
        table = np.stack([a.values[metric] - b.values[metric] for a, b in points])
        interval: Interval = over_seeds(table, first.reference, first.strata)
        found.append(
            Difference(
                variant=pairs[0][0].run.variant,
                metric=metric,
                at=at,
                value=value,
                epochs=float(np.mean([a.epochs for a, _ in points])),
                mean=interval.value,
                low=interval.low,
                high=interval.high,
                by_seed=[float(x) for x in np.nanmean(table, axis=1)],
            )
        )
    return found


def nearest(found: Sequence[Difference], epochs: float) -> Difference | None:
    """Of differences at equal steps the one nearest to some epochs; None if none is near.

    Near is within a quarter of the epochs.
    """
    closest = min(found, key=lambda each: abs(each.epochs - epochs), default=None)
    if closest is None or abs(closest.epochs - epochs) > epochs / 4:
        return None
    return closest
