"""The picture of an audit: where relevant candidates lie, and what a lower bound trades."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from dqe_jax.utils.files import JsonObject

# Okabe and Ito's colours, told apart by the colour-blind; lines differ in style as well.
_RELEVANT, _NEAR, _UNRELATED, _ZONE = "#d55e00", "#0072b2", "#8c8c8c", "#009e73"
_FLOORS = (("#000000", "o"), ("#cc79a7", "s"))
_CLASSES = {
    "relevant": (_RELEVANT, "-", "truly relevant"),
    "near_miss": (_NEAR, "--", "near miss"),
    "unrelated": (_UNRELATED, "-", "unrelated"),
}
_NEAR_MISS = (
    "Near miss: not relevant, but the reference image itself or the target of another text on the "
    "same reference."
)
_INCHES, _DPI = 9.0, 200
_SMALLEST = 0.001  # the axis of quantiles is linear below it, logarithmic above


def draw(facts: JsonObject) -> bytes:
    """The picture as a PNG, 1800 pixels wide, made to be read at half of that.

    Args:
      facts: of the audit, as it writes them.
    """
    swept = bool(facts["sweep"])
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1, hspace=0.06)
    figure = Figure((_INCHES, 8.2 if swept else 4.8), layout=layout)
    FigureCanvasAgg(figure)
    figure.suptitle(
        f"Negatives of {facts['dataset']}, {facts['split']}, step {facts['step']:,}: "
        f"{facts['queries']:,} queries, {facts['candidates']:,.0f} candidates each",
        fontsize=12,
    )
    if swept:
        grid = figure.add_gridspec(2, 3, height_ratios=(1.35, 1))
        _draw_histogram(figure.add_subplot(grid[0, :]), facts)
        panels = [figure.add_subplot(grid[1, i]) for i in range(3)]
        _draw_sweep(panels, facts)
    else:
        _draw_histogram(figure.add_subplot(), facts)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=_DPI)
    return png.getvalue()


def _draw_histogram(axes: Axes, facts: JsonObject) -> None:
    """Density of `delta` for each class of candidates, and the mean mid-zone as a band."""
    histogram, bounds = facts["histogram"], facts["bounds"]
    edges = np.asarray(histogram["edges"])
    for name in reversed(_CLASSES):
        color, style, words = _CLASSES[name]
        counts = np.asarray(histogram[name])
        label = f"{words} ({counts.sum():,})" if counts.sum() else f"{words}: none"
        density = counts / np.maximum(counts.sum() * np.diff(edges), 1e-12)
        filled = name == "unrelated"
        axes.stairs(
            density,
            edges,
            fill=filled,
            color=color,
            alpha=0.35 if filled else 1,
            linewidth=0 if filled else 1.8,
            linestyle=style,
            label=label,
        )
    lower, upper = (np.inf if bounds[k] is None else bounds[k] for k in ("lower", "upper"))
    low, high = max(lower, edges[0]), min(upper, edges[-1])
    if low < high:
        label = f"mid-zone of trns: mean {lower:.3f} to {upper:.3f}"
        axes.axvspan(low, high, color=_ZONE, alpha=0.13, linewidth=0, label=label)
    axes.axvline(0, color="black", linewidth=1)
    top = axes.get_xaxis_transform()
    axes.annotate(
        *("the target's score", (0, 1)),
        xycoords=top,
        xytext=(0, 3),
        textcoords="offset points",
        ha="center",
        fontsize=8.5,
    )
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(bottom=0)
    axes.set_xlabel(
        "delta = score of the target - score of the candidate   "
        "(left of 0: the candidate beats the target)\n" + _NEAR_MISS,
        fontsize=9,
    )
    axes.set_ylabel("density within the class")
    handles, labels = axes.get_legend_handles_labels()
    order = [2, 1, 0, *range(3, len(labels))]
    axes.legend([handles[i] for i in order], [labels[i] for i in order], fontsize=9)
    _tidy(axes)


def _draw_sweep(panels: Sequence[Axes], facts: JsonObject) -> None:
    """False negatives, hardness and size of the zone by lower bound, with and without floor."""
    rows = facts["sweep"]
    floors = sorted({row["floor"] for row in rows}, key=lambda f: (f is None, f))
    for floor, (color, mark) in zip(floors, _FLOORS):
        line = [row for row in rows if row["floor"] == floor]
        x = [row["quantile"] for row in line]
        style: dict[str, Any] = {
            "color": color,
            "marker": mark,
            "markersize": 4.5,
            "linestyle": "-" if floor is not None else "--",
            "label": "without floor" if floor is None else f"delta > {floor:g}",
        }
        panels[0].errorbar(
            *(x, _values(line, "false", 100)),
            yerr=_values(line, "false_se", 100),
            capsize=2.5,
            **style,
        )
        panels[1].plot(x, _values(line, "delta"), **style)
        panels[2].plot(x, _values(line, "zone"), **style)
    base = facts["oracle"]["false"]
    panels[0].axhline(100 * base, color="black", linewidth=1, linestyle=":", label="base rate")
    panels[0].set_title("false negatives drawn by trns, %", fontsize=10)
    panels[1].set_title("mean delta drawn (low: hard)", fontsize=10)
    panels[2].set_title("candidates in the mid-zone", fontsize=10)
    panels[0].legend(fontsize=8.5)
    for axes in panels:
        axes.set_ylim(bottom=0, top=1.05 * max(axes.get_ylim()[1], 1e-3))
        _quantile_axis(axes, max(row["quantile"] for row in rows), facts)
        _tidy(axes)


def _quantile_axis(axes: Axes, last: float, facts: JsonObject) -> None:
    """Lower quantiles, each with its rank among the candidates."""
    axes.set_xscale("symlog", linthresh=_SMALLEST, linscale=0.6)
    ticks = [t for t in (0.0, 0.001, 0.01, 0.1, 1.0) if t <= last * 1.01]
    ranks = [f"{t:g}\n({t * facts['candidates']:,.0f})" for t in ticks]
    axes.set_xticks(ticks, ranks)
    axes.set_xticks([], minor=True)
    axes.set_xlim(-_SMALLEST / 3, max(last, _SMALLEST) * 1.3)
    used = facts["negatives"]
    if used["bounds"] == "quantile":
        axes.axvline(used["lower"], color=_ZONE, linewidth=1.5, alpha=0.7)
        label = "lower quantile (rank); green: the config's"
    else:
        label = "lower quantile (rank)"
    axes.set_xlabel(label, fontsize=9)


def _values(
    line: Sequence[Mapping[str, float | None]], name: str, factor: float = 1
) -> list[float]:
    values = (row[name] for row in line)
    return [np.nan if value is None else factor * value for value in values]


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8.5)
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
