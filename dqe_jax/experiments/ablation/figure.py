"""The picture of an ablation: validation metrics against steps."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from etils import epath
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dqe_jax.experiments.ablation.record import EQUAL, Run
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


def curve(runs: Sequence[Run], key: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps at which all runs have a validation metric, its mean and its spread (0 for one run)."""
    having = [{step for step, found in run.validation.items() if key in found} for run in runs]
    steps = np.array(sorted(set.intersection(*having)), int)
    values = np.array([[run.validation[step][key] for step in steps] for run in runs], float)
    spread = values.std(axis=0, ddof=1) if len(runs) > 1 else np.zeros(len(steps))
    return steps, values.mean(axis=0), spread
