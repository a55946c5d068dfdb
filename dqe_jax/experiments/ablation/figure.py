"""The pictures of an ablation: metrics against steps and time, or against a factor."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from etils import epath
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dqe_jax.experiments.ablation.curves import Curve, Difference
from dqe_jax.experiments.ablation.record import EQUAL, METRICS, Run
from dqe_jax.experiments.ablation.variants import BASE

PLOTTED = ("R@1", "mAP@10")
# Colours of Okabe and Ito, which colour-blind readers can tell apart, and markers.
STYLES = {
    BASE: ("#000000", "o"),
    "attributes": ("#e69f00", "s"),
    "trns": ("#56b4e9", "^"),
    "full": ("#d55e00", "D"),
    "qure": ("#009e73", "v"),
    "hardest": ("#cc79a7", "P"),
    "random": ("#0072b2", "X"),
    "attributes-sum": ("#b3a100", "p"),
    "attributes-gate": ("#f5c04d", "h"),
    # Queries without a composer: greys.
    "text-only": ("#555555", "1"),
    "image-only": ("#888888", "2"),
    "sum-of-both": ("#aaaaaa", "3"),
    "product-of-both": ("#cccccc", "4"),
    # Oracles: lighter or darker shades.
    "in_batch-oracle": ("#b07500", "<"),
    "trns-oracle": ("#7a2e00", ">"),
    "hardest-oracle": ("#e0b0cc", "*"),
}


def draw(runs: Sequence[Run], path: os.PathLike[str] | str) -> None:
    """Writes a .png: validation metrics against steps, a line for each variant over its seeds.

    Args:
      runs: at least one.
      path: of the file.
    """
    kinds = [kind for kind in EQUAL if any(run.equal == kind for run in runs)]
    keys = [
        key for key in PLOTTED if any(key in v for run in runs for v in run.validation.values())
    ]
    figure = Figure(figsize=(4.6 * len(keys), 3.2 * len(kinds) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(kinds), len(keys), squeeze=False)
    for row, kind in zip(panels, kinds):
        for axes, key in zip(row, keys):
            _draw_panel(axes, [run for run in runs if run.equal == kind], key)
            axes.set(title=f"equal {kind}", xlabel="steps", ylabel=f"{key}, validation")
    handles, names = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4 * len(keys), frameon=False)
    with epath.Path(path).open("wb") as file:
        figure.savefig(file, format="png", dpi=150)


def _draw_panel(axes: Axes, runs: Sequence[Run], key: str) -> None:
    for variant, (color, marker) in STYLES.items():
        own = [run for run in runs if run.variant == variant]
        if own:
            steps, mean, spread = curve(own, key)
            axes.plot(steps, mean, color=color, marker=marker, markersize=4, label=variant)
            axes.fill_between(steps, mean - spread, mean + spread, color=color, alpha=0.15, lw=0)
    axes.locator_params(axis="x", integer=True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def draw_curves(found: Sequence[Curve], path: os.PathLike[str] | str, split: str) -> None:
    """Writes a .png: validation against steps, and the split against steps and against seconds.

    Lines are means over seeds, bands their standard deviation.

    Args:
      found: at least one.
      path: of the file.
      split: of the points.
    """
    keys = [key for key in reversed(METRICS) if any(key in each.end.values for each in found)]
    figure = Figure(figsize=(13.5, 3.2 * len(keys) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(keys), 3, squeeze=False)
    for row, key in zip(panels, keys):
        _draw_panel(row[0], [each.run for each in found], key)
        for axes, timed in ((row[1], False), (row[2], True)):
            for variant, (color, marker) in STYLES.items():
                own = [each for each in found if each.run.variant == variant]
                if own:
                    x, mean, spread = line_of(own, key, timed=timed)
                    axes.plot(x, mean, color=color, marker=marker, markersize=3, label=variant)
                    axes.fill_between(x, mean - spread, mean + spread, color=color, alpha=0.15)
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.25)
        row[0].set(xlabel="steps", ylabel=f"{key}, validation")
        row[1].set(xlabel="steps", ylabel=f"{key}, {split}")
        row[2].set(xlabel="seconds of training", ylabel=f"{key}, {split}")
    handles, names = panels[0, 1].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=6, frameon=False)
    with epath.Path(path).open("wb") as file:
        figure.savefig(file, format="png", dpi=120)


def draw_factor(
    places: Sequence[tuple[object, str, Sequence[Run]]],
    compared: Sequence[tuple[object, Difference]],
    path: os.PathLike[str] | str,
    name: str,
    split: str,
) -> None:
    """Writes a .png: a metric of variants, and their differences, against values of a field.

    Args:
      places: value, variant and runs.
      compared: value and difference to InfoNCE at the end, with its interval.
      path: of the file.
      name: of the field.
      split: of the metrics.
    """
    values = list(dict.fromkeys(value for value, _, _ in places))
    numbers = {value: i for i, value in enumerate(values)}  # evenly spaced: they may be words
    keys = [key for key in reversed(METRICS) if all(key in runs[0].metrics for *_, runs in places)]
    figure = Figure(figsize=(9.2, 3.2 * len(keys) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(keys), 2, squeeze=False)
    for (left, right), key in zip(panels, keys):
        for variant, (color, marker) in STYLES.items():
            own = [(numbers[v], runs) for v, each, runs in places if each == variant]
            if own:
                table = [[run.metrics[key] for run in runs] for _, runs in own]
                spread = [np.std(x, ddof=1) if len(x) > 1 else 0.0 for x in table]
                x, mean = [at for at, _ in own], [np.mean(row) for row in table]
                left.errorbar(x, mean, spread, color=color, marker=marker, label=variant, capsize=2)
            gains = [
                (numbers[v], d) for v, d in compared if (d.variant, d.metric) == (variant, key)
            ]
            if gains:
                x, gain = [at for at, _ in gains], [each.mean for _, each in gains]
                reach = [[d.mean - d.low for _, d in gains], [d.high - d.mean for _, d in gains]]
                ends = np.maximum(reach, 0.0)  # rounding may leave the mean outside
                right.errorbar(x, gain, ends, color=color, marker=marker, capsize=2)
        left.set(ylabel=f"{key}, {split}")
        right.set(ylabel=f"{key} - {BASE}, 95% interval")
        right.axhline(0, color="#888888", lw=0.8)
        for axes in (left, right):
            axes.set_xticks(range(len(values)), [str(value) for value in values])
            axes.set_xlabel(name)
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.25)
    handles, names = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=6, frameon=False)
    with epath.Path(path).open("wb") as file:
        figure.savefig(file, format="png", dpi=120)


def line_of(
    found: Sequence[Curve], key: str, *, timed: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps or mean seconds of the points that all runs have, a metric's mean and its spread."""
    steps = sorted(set.intersection(*(set(each.points) for each in found)))
    table = [[np.nanmean(each.points[step].values[key]) for step in steps] for each in found]
    values = np.array(table, float).reshape(len(found), len(steps))
    seconds = np.array([[each.seconds[step] for step in steps] for each in found], float)
    x = seconds.mean(axis=0) if timed else np.array(steps, float)
    spread = values.std(axis=0, ddof=1) if len(found) > 1 else np.zeros(len(steps))
    return x, values.mean(axis=0), spread


def curve(runs: Sequence[Run], key: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps at which all runs have a validation metric, its mean and its spread (0 for one run)."""
    having = [{step for step, found in run.validation.items() if key in found} for run in runs]
    steps = np.array(sorted(set.intersection(*having)), int)
    values = np.array([[run.validation[step][key] for step in steps] for run in runs], float)
    spread = values.std(axis=0, ddof=1) if len(runs) > 1 else np.zeros(len(steps))
    return steps, values.mean(axis=0), spread
