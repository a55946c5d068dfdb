"""The trade of the lower bound: accuracy and false negatives of TRNS as the bound rises.

Trains a config with the rule `trns` once for each lower quantile, with the config's floor
(`delta > 0`: no candidate that beats the target) and without it. A low bound draws hard negatives,
many of them truly relevant; a high one draws easy ones, hardly any of them relevant. One program
gives both curves, so that a user sees what a bound costs and what it brings.

| in the workdir | |
| --- | --- |
| `lower-<quantile>-<floor or free>-<seed>/` | the runs |
| `bounds.json`, `.md`, `.png` | all points; a table; the curves |

It goes on with what was interrupted, as the ablation does.
"""

from __future__ import annotations

import dataclasses
import math
import os
import statistics
from collections.abc import Mapping, Sequence

from absl import logging
from etils import epath
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dqe_jax.config import AnyConfig, RunConfig
from dqe_jax.experiments.ablation.figure import PLOTTED
from dqe_jax.experiments.ablation.record import METRICS, read_log
from dqe_jax.experiments.ablation.runs import told_unwritable, train_or_read
from dqe_jax.experiments.ablation.scores import markdown_table, score
from dqe_jax.utils.errors import UserError
from dqe_jax.utils.files import JsonObject, write_json
from dqe_jax.utils.paths import whole_path
from dqe_jax.utils.text_table import text_table

# Logged values that the table shows beside the metrics: means over the steps that mined.
DRAWN = {"false": "negatives/false", "delta": "negatives/delta"}
_STYLES = {"floor": ("#000000", "o", "-"), "free": ("#cc79a7", "s", "--")}
_SMALLEST = 0.001  # the axis of quantiles is linear below it, logarithmic above
NOTE = (
    "Split {split}; seeds {seeds}; {steps:,} steps. A cell: mean ± standard deviation (n - 1) over "
    "seeds. `false`: share of the drawn negatives that is truly relevant, `delta`: their mean "
    "delta, both over the logged steps that mined."
)


@dataclasses.dataclass(frozen=True)
class Point:
    """A complete run at one setting of the bound.

    Attributes:
      lower: the quantile.
      floor: "floor" (the config's) or "free" (none).
      seed: of the run.
      metrics: of `config.eval.split`, those of `METRICS`.
      drawn: means of `DRAWN`; without `false` where the truth is not known.
      directory: of the run.
    """

    lower: float
    floor: str
    seed: int
    metrics: Mapping[str, float]
    drawn: Mapping[str, float]
    directory: str


def read_lowers(texts: Sequence[str]) -> list[float]:
    """Lower quantiles from the words of a flag, ascending, each once.

    Raises:
      UserError: one is no number from 0 to below 1.
    """
    try:
        lowers = sorted({float(text) for text in texts})
    except ValueError as error:
        raise UserError(
            f"--lowers={','.join(texts)}: name numbers, such as 0,0.005,0.02,0.1."
        ) from error
    if not all(0 <= q < 1 for q in lowers):
        raise UserError(
            f"--lowers={','.join(texts)}: lower quantiles must be at least 0 and below 1."
        )
    return lowers


def config_at(config: RunConfig, lower: float, floor: str, seed: int) -> RunConfig:
    """The config of one point of the curve."""
    changes: dict[str, object] = {
        "negatives.rule": "trns",
        "negatives.bounds": "quantile",
        "negatives.lower": lower,
    }
    if config.negatives.bounds != "quantile":  # the config's upper bound has another unit
        changes["negatives.upper"] = 1.0
    if floor == "free":
        changes["negatives.floor"] = -math.inf
    return config.with_changes({**changes, "seed": seed})


def run_curve(
    config: AnyConfig, workdir: str | os.PathLike[str], *, lowers: Sequence[float], seeds: int
) -> list[Point]:
    """Trains what is not there yet and writes the files of the module's table.

    Args:
      config: of the runs; its seed is the first.
      workdir: of the curve.
      lowers: quantiles, as `read_lowers` gives.
      seeds: how many.

    Raises:
      UserError: for everything that a user can put right, such as a changed config.
    """
    config = RunConfig.of(config)
    if math.isinf(config.negatives.floor):
        raise UserError(
            "config.negatives.floor is -inf: the curve compares with and without it; take 0."
        )
    negatives = config.negatives
    if (negatives.pool, negatives.warmup) == ("bank", "in_batch") and (
        negatives.first_refresh >= config.total_steps
    ):
        raise UserError(
            f"config.negatives.first_refresh is {negatives.first_refresh}: nothing would be mined; "
            f"it must be below config.total_steps, {config.total_steps}."
        )
    wanted = [
        (lower, floor, seed)
        for seed in range(config.seed, config.seed + seeds)
        for floor in _STYLES
        for lower in lowers
    ]
    for setting in wanted:
        config_at(config, *setting)  # checks it
    root, points = whole_path(workdir), []
    for lower, floor, seed in wanted:
        directory = root / f"lower-{lower:g}-{floor}-{seed}"
        own = config_at(config, lower, floor, seed)
        metrics, is_new = train_or_read(own, directory)
        kept = {key: metrics[key] for key in METRICS if key in metrics}
        drawn = means_of_drawn(read_log(directory))
        points.append(Point(lower, floor, seed, kept, drawn, directory.name))
        logging.info("Run %d of %d: %s", len(points), len(wanted), points[-1])
        if is_new or len(points) == len(wanted):
            write_results(config, root, points)
    return points


def means_of_drawn(log: Sequence[JsonObject]) -> dict[str, float]:
    """Means of `DRAWN` over the lines of a run's log that have them."""
    columns = {
        name: [x for x in (line.get(key) for line in log) if isinstance(x, (int, float))]
        for name, key in DRAWN.items()
    }
    return {name: statistics.fmean(values) for name, values in columns.items() if values}


def summarize(points: Sequence[Point]) -> list[JsonObject]:
    """Rows by floor and quantile: mean and spread over seeds of each metric and of what was drawn.

    A row is `{"lower": ..., "floor": ..., "runs": ..., "<name>": (mean, spread or None), ...}`.
    """
    by_setting: dict[tuple[str, float], list[Point]] = {}
    for point in points:
        by_setting.setdefault((point.floor, point.lower), []).append(point)
    rows = []
    for (floor, lower), own in by_setting.items():
        row: JsonObject = {"lower": lower, "floor": floor, "runs": len(own)}
        for name in (*own[0].metrics, *own[0].drawn):
            values = [{**point.metrics, **point.drawn}[name] for point in own]
            found = score(values)
            row[name] = (found.mean, found.spread)
        rows.append(row)
    return rows


def table_cells(rows: Sequence[JsonObject]) -> list[tuple[str, ...]]:
    """The head and the lines of a table."""
    names = [name for name in rows[0] if name not in ("lower", "floor", "runs")]
    cells = [("lower quantile", "floor", "runs", *names)]
    for row in rows:
        values = [
            f"{mean:.4f}" + ("" if spread is None else f" ± {spread:.4f}")
            for mean, spread in (row[name] for name in names)
        ]
        floor = "delta > floor" if row["floor"] == "floor" else "none"
        cells.append((f"{row['lower']:g}", floor, str(row["runs"]), *values))
    return cells


def write_results(config: RunConfig, workdir: epath.Path, points: Sequence[Point]) -> None:
    """Writes `bounds.json`, `.md` and `.png` of the runs so far, and logs the table.

    Raises:
      UserError: a file cannot be written.
    """
    rows, split = summarize(points), config.eval.split
    facts = {
        "dataset": config.data.dataset,
        "split": split,
        "rows": rows,
        "points": [dataclasses.asdict(point) for point in points],
    }
    write_json(workdir / "bounds.json", facts)
    cells = table_cells(rows)
    logging.info("TRNS by its lower bound, %s:\n%s", split, text_table(cells))
    seeds = ", ".join(str(seed) for seed in sorted({point.seed for point in points}))
    note = NOTE.format(split=split, seeds=seeds, steps=config.total_steps)
    title = f"# TRNS by its lower bound on {config.data.dataset}"
    text = [title, note, markdown_table(cells), "![The curves](bounds.png)"]
    with told_unwritable(workdir):
        (workdir / "bounds.md").write_text("\n\n".join(text) + "\n")
        draw(rows, split, workdir / "bounds.png")


def draw(rows: Sequence[JsonObject], split: str, path: os.PathLike[str] | str) -> None:
    """Writes a .png: accuracy, false negatives and hardness against the lower quantile.

    Args:
      rows: as `summarize` gives.
      split: that accuracy is of.
      path: of the file.
    """
    accuracy = [key for key in PLOTTED if key in rows[0]][-1:]
    titles = {key: f"{key}, {split}" for key in accuracy}
    titles |= {"false": "false negatives drawn, share", "delta": "mean delta drawn (low: hard)"}
    names = [name for name in titles if name in rows[0]]
    figure = Figure(figsize=(3.6 * len(names), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    for axes, name in zip(panels, names):
        _draw_panel(axes, rows, name)
        axes.set_title(titles[name], fontsize=10)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    with epath.Path(path).open("wb") as file:
        figure.savefig(file, format="png", dpi=150)


def _draw_panel(axes: Axes, rows: Sequence[JsonObject], name: str) -> None:
    labels = {"floor": "delta > floor", "free": "without floor"}
    for floor, (color, marker, line) in _STYLES.items():
        own = sorted((row for row in rows if row["floor"] == floor), key=lambda row: row["lower"])
        if own:
            axes.errorbar(
                [row["lower"] for row in own],
                [row[name][0] for row in own],
                yerr=[row[name][1] or 0 for row in own],
                color=color,
                marker=marker,
                linestyle=line,
                markersize=4.5,
                capsize=2.5,
                label=labels[floor],
            )
    axes.set_xscale("symlog", linthresh=_SMALLEST, linscale=0.6)
    axes.set_xlabel("lower quantile", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
