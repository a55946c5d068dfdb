"""An ablation: variants of one config, trained over seeds with equal steps and with equal time.

| variant | attribute weights | mined negatives |
| --- | --- | --- |
| `infonce` | no | none; what the others are compared with, always there |
| `attributes` | yes | none |
| `trns` | no | TRNS |
| `full` | yes | TRNS |
| `qure`, `hardest`, `random` | as the config says | by that rule |
| `in_batch-oracle` | as the config says | none, and nothing valid is a negative of InfoNCE |
| `trns-oracle`, `hardest-oracle` | as the config says | by that rule, of what is not valid |

All else is as the config says. Oracles know which images are in truth valid (`negatives.oracle`):
they show what a rule that told them apart without fail would gain. They are left out where the
truth is not known.

**Equal steps**: `config.total_steps` for all. **Equal time**: a variant gets the steps that its run
with equal steps and the first seed had taken when it had trained for as long as that of `infonce`;
one that is faster goes on at its mean speed. Mining, refreshes of the bank and compilation count,
evaluation and saving do not (`train_seconds` in `timing.jsonl`), so that other work on the machine
during the runs of the first seed falsifies the steps.

| in the workdir | |
| --- | --- |
| `<variant>-<steps or time>-<seed>/` | the runs; one of `config.total_steps` is under `steps` |
| `times.json` | seconds, ratio to `infonce` and steps of equal time; fixed once they are measured |
| `ablation.json`, `.md`, `.png` | all results; the tables; validation metrics against steps |

Of a complete run `checkpoints/` may be removed; `--config.keep_checkpoints=1` keeps one a run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dqe_jax.config import check_config, differences
from dqe_jax.data.datasets import DATASETS
from dqe_jax.evaluation import protocols
from dqe_jax.training import loop
from dqe_jax.utils.errors import UserError
from dqe_jax.utils.json_file import write_json
from dqe_jax.utils.paths import whole_path
from dqe_jax.utils.text_table import text_table

BASE = "infonce"
# What each variant changes of the config.
VARIANTS: dict[str, dict[str, Any]] = {
    BASE: {"negatives.rule": "in_batch", "model.attributes.enabled": False},
    "attributes": {"negatives.rule": "in_batch", "model.attributes.enabled": True},
    "trns": {"negatives.rule": "trns", "model.attributes.enabled": False},
    "full": {"negatives.rule": "trns", "model.attributes.enabled": True},
    "qure": {"negatives.rule": "qure"},
    "hardest": {"negatives.rule": "hardest"},
    "random": {"negatives.rule": "random"},
    "in_batch-oracle": {"negatives.rule": "in_batch", "negatives.oracle": "all"},
    "trns-oracle": {"negatives.rule": "trns", "negatives.oracle": "mined"},
    "hardest-oracle": {"negatives.rule": "hardest", "negatives.oracle": "mined"},
}
EQUAL = ("steps", "time")
# Columns of the tables, and metrics of the plot, of those that the data set has.
METRICS = ("R@1", "R@10", "mAP@10")
PLOTTED = ("R@1", "mAP@10")
NOTE = (
    "Split {split}, protocol {protocol}; seeds {seeds}. A cell: mean ± standard deviation (n - 1) "
    f"over seeds. ` - {BASE}`: difference of the means; in brackets in units of the spread, the "
    "root mean square of the two standard deviations. Seconds: of training, compilation included, "
    "evaluation not."
)
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


@dataclasses.dataclass(frozen=True)
class Run:
    """A complete run.

    Attributes:
      variant: of `VARIANTS`.
      equal: "steps" or "time".
      seed: of the run.
      steps: taken.
      seconds: of training.
      metrics: of `config.eval.split`.
      validation: metrics by step.
      directory: of the run.
    """

    variant: str
    equal: str
    seed: int
    steps: int
    seconds: float
    metrics: Mapping[str, float]
    validation: Mapping[int, Mapping[str, float]]
    directory: str


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


# ---------------------------------------------------------------------------------------- the runs


def choose_variants(names: Sequence[str], dataset: str = "shapes") -> tuple[str, ...]:
    """The variants of these names, all for none, in the order of `VARIANTS` and with `infonce`.

    Without names, oracles are left out for a data set whose truth is not known.

    Raises:
      UserError: a name is not known.
    """
    for name in names:
        if name not in VARIANTS:
            raise UserError(
                f"--variants: there is no variant {name!r}; choose of {', '.join(VARIANTS)}."
            )
    if not names:
        tells = DATASETS[dataset].has_truth
        names = [v for v, changes in VARIANTS.items() if tells or "negatives.oracle" not in changes]
    return tuple(v for v in VARIANTS if v in names or v == BASE)


def variant_config(config: Any, variant: str, seed: int, steps: int) -> Any:
    """A copy of a config for one run."""
    changed = config.copy_and_resolve_references()
    changed.update_from_flattened_dict({**VARIANTS[variant], "seed": seed, "total_steps": steps})
    return changed


def run_ablation(
    config: Any,
    workdir: str | os.PathLike[str],
    *,
    variants: Sequence[str],
    seeds: int,
    equal: Sequence[str] = EQUAL,
) -> list[Run]:
    """Trains what is not there yet and writes the files of the module's table.

    It can be killed at any time: the same call goes on where it was.

    Args:
      config: see `configs/common.py`; its seed is the first.
      workdir: of the ablation.
      variants: as `choose_variants` gives.
      seeds: how many.
      equal: of `EQUAL`.

    Returns:
      All runs of the tables.

    Raises:
      UserError: for everything that a user can put right, such as a changed config.
    """
    if seeds < 1:
        raise UserError(f"--seeds is {seeds}: it must be at least 1.")
    for variant in variants:
        check_config(variant_config(config, variant, config.seed, config.total_steps))
    workdir = whole_path(workdir)
    count, runs = len(equal) * seeds * len(variants), []
    for kind in equal:
        steps = dict.fromkeys(variants, config.total_steps)
        if kind == "time":
            steps = steps_of_equal_time(config, workdir, variants)
        for seed in range(config.seed, config.seed + seeds):
            for variant in variants:
                run, is_new = complete(config, workdir, variant, kind, seed, steps[variant])
                runs.append(run)
                logging.info("Run %d of %d: %s", len(runs), count, describe(run))
                if is_new or len(runs) == count:
                    write_results(config, workdir, runs)
    return runs


def complete(
    config: Any, workdir: epath.Path, variant: str, equal: str, seed: int, steps: int
) -> tuple[Run, bool]:
    """One run, and whether it had still to be trained or evaluated.

    Raises:
      UserError: as `train_and_evaluate`, or the split has no labels.
    """
    own = variant_config(config, variant, seed, steps)
    # With the same steps it is the same run.
    place = "steps" if steps == config.total_steps else equal
    directory = workdir / f"{variant}-{place}-{seed}"
    metrics, is_new = train_or_read(own, directory)
    log = read_log(directory)
    seconds, validation = training_times(log)[-1][1], validation_metrics(log)
    run = Run(variant, equal, seed, steps, seconds, metrics, validation, directory.name)
    return run, is_new


def train_or_read(config: Any, directory: epath.Path) -> tuple[dict[str, float], bool]:
    """The final metrics of the run of a config, and whether it had still to be trained.

    Raises:
      UserError: as `complete`.
    """
    metrics = held_metrics(config, directory)
    is_new = metrics is None
    if is_new:
        # Each run compiles the same, whatever ran before, and memory does not grow with the runs.
        jax.clear_caches()
        metrics = loop.train_and_evaluate(config, directory)
    if not set(METRICS) & set(metrics):
        raise UserError(
            f"config.eval.split is {config.eval.split!r}: {config.data.dataset} has no labels "
            "there to compare variants by; take --config.eval.split=validation."
        )
    return metrics, is_new


def held_metrics(config: Any, directory: epath.Path) -> dict[str, float] | None:
    """The final metrics of a run of this config, if it is complete."""
    report = directory / "eval" / f"{config.eval.split}-{config.total_steps}.json"
    try:
        trained = json.loads((directory / "config.json").read_text())
        found = json.loads(report.read_text())
    except (OSError, json.JSONDecodeError):  # not there, or the run was killed as it wrote
        return None
    protocol = protocols.protocol_of(config.data.dataset, config.eval.protocol).name
    same = not differences(config.to_dict(), trained) and found["protocol"] == protocol
    return found["metrics"] if same else None


def read_log(directory: epath.Path) -> list[dict[str, Any]]:
    """The lines of a complete run's `metrics.jsonl` and `timing.jsonl`.

    Raises:
      UserError: it is not there, or does not hold them.
    """
    path = directory / "timing.jsonl"
    try:
        log = [
            json.loads(line)
            for file in (directory / "metrics.jsonl", path)
            for line in file.read_text().splitlines()
        ]
        if training_times(log):
            return log
    except (OSError, json.JSONDecodeError):
        pass
    raise UserError(f"{path} is not the log of a run: remove {directory} to train it again.")


def training_times(log: Sequence[Mapping[str, Any]]) -> list[tuple[int, float]]:
    """Steps, and the seconds of training that they had taken, of each line that says so."""
    return [(line["step"], line["train_seconds"]) for line in log if "train_seconds" in line]


def validation_metrics(log: Sequence[Mapping[str, Any]]) -> dict[int, dict[str, float]]:
    """Those of `METRICS` that were measured on the validation split, by step."""
    found: dict[int, dict[str, float]] = {}
    for line in log:
        for key in METRICS:
            if f"validation/{key}" in line:
                found.setdefault(line["step"], {})[key] = line[f"validation/{key}"]
    return found


# -------------------------------------------------------------------------------------- equal time


def steps_of_equal_time(
    config: Any, workdir: epath.Path, variants: Sequence[str]
) -> dict[str, int]:
    """Steps of each variant that take as long as `config.total_steps` of `infonce`.

    They are those of `times.json`; what is not there is measured, on the runs with equal steps and
    the first seed, and added.

    Raises:
      UserError: as `complete`, or `times.json` is of no use.
    """
    path = workdir / "times.json"
    times = _read_times(path)
    if times and times[BASE]["steps"] != config.total_steps:
        raise UserError(
            f"config.total_steps is {config.total_steps}: {path} is of an ablation of "
            f"{times[BASE]['steps']} steps; take another --workdir, or the config of that ablation."
        )
    for variant in variants:
        if variant in times:
            continue
        run, _ = complete(config, workdir, variant, "steps", config.seed, config.total_steps)
        budget = times[BASE]["seconds"] if times else run.seconds
        steps = steps_within(budget, training_times(read_log(workdir / run.directory)))
        ratio = run.seconds / budget
        times[variant] = {"seconds": run.seconds, "ratio": ratio, "steps": steps}
        _write_whole(path, times)
        if variant != BASE:
            logging.info(
                "%s takes %.3f times as long as %s: %d steps of it take equal time.",
                *(variant, ratio, BASE, steps),
            )
    return {variant: times[variant]["steps"] for variant in variants}


def steps_within(budget: float, times: Sequence[tuple[int, float]]) -> int:
    """Steps of a run after `budget` seconds, at least 1; beyond its end at its mean speed.

    Args:
      budget: seconds.
      times: steps of the run and the seconds that they had taken, rising.
    """
    steps, seconds = map(np.array, zip((0, 0.0), *times))
    if budget >= seconds[-1]:
        return round(int(steps[-1]) * budget / seconds[-1])
    return max(round(float(np.interp(budget, seconds, steps))), 1)


def _read_times(path: epath.Path) -> dict[str, dict[str, Any]]:
    if not path.exists():
        return {}
    try:
        times = json.loads(path.read_text())
        if all({"seconds", "steps"} <= set(times[v]) for v in {BASE, *times}):
            return times
    except (OSError, json.JSONDecodeError, KeyError, TypeError):
        pass
    raise UserError(f"{path} holds no times of an ablation: remove it to measure them again.")


def _write_whole(path: epath.Path, content: Any) -> None:
    """Writes JSON so that an interruption leaves the old file or the new one."""
    part = path.with_name(path.name + ".part")
    write_json(part, content)
    part.replace(path)


# ------------------------------------------------------------------------------------- the results


def describe(run: Run) -> str:
    """A run as one line of a log."""
    found = ", ".join(f"{key} {run.metrics[key]:.4f}" for key in METRICS if key in run.metrics)
    return (
        f"{run.variant}, equal {run.equal}, seed {run.seed}: {found}; {run.steps} steps in "
        f"{run.seconds:.0f} s."
    )


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


def score(values: Sequence[float], base: Sequence[float] = ()) -> Score:
    """A metric's values over seeds, against those of `infonce`; none for itself."""
    mean, spread = statistics.fmean(values), _spread(values)
    if not base:
        return Score(mean, spread, None, None)
    gain, other = mean - statistics.fmean(base), _spread(base)
    if spread is None or other is None or not spread + other:
        return Score(mean, spread, gain, None)
    return Score(mean, spread, gain, gain / ((spread**2 + other**2) / 2) ** 0.5)


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
    gain = "" if found.gain is None else f"{found.gain:+.4f}"
    if found.gain_in_spreads is not None:
        gain += f" ({found.gain_in_spreads:+.1f})"
    return f"{found.mean:.4f}{spread}", gain


def markdown_table(cells: Sequence[Sequence[str]]) -> str:
    """Cells as a table of Markdown, the first line its head."""
    head, *body = cells
    rows = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def write_results(config: Any, workdir: epath.Path, runs: Sequence[Run]) -> None:
    """Writes `ablation.json`, `.md` and `.png` of the runs so far, and logs the tables.

    Raises:
      UserError: a file cannot be written.
    """
    groups = {kind: [run for run in runs if run.equal == kind] for kind in EQUAL}
    lines = {kind: summarize(group) for kind, group in groups.items() if group}
    split, dataset = config.eval.split, config.data.dataset
    facts = {
        "dataset": dataset,
        "split": split,
        "protocol": protocols.protocol_of(dataset, config.eval.protocol).name,
        "tables": {k: [dataclasses.asdict(line) for line in table] for k, table in lines.items()},
        "runs": [dataclasses.asdict(run) for run in runs],
    }
    write_json(workdir / "ablation.json", facts)
    seeds = ", ".join(str(seed) for seed in sorted({run.seed for run in runs}))
    text = [f"# Ablation on {dataset}", NOTE.format(seeds=seeds, **facts)]
    for kind, table in lines.items():
        cells = table_cells(table)
        logging.info("Equal %s, %s:\n%s", kind, split, text_table(cells))
        text += [f"## Equal {kind}", markdown_table(cells)]
    text += ["## Validation", "![Validation metrics against steps](ablation.png)"]
    with told_unwritable(workdir):
        (workdir / "ablation.md").write_text("\n\n".join(text) + "\n")
        draw(runs, workdir / "ablation.png")


@contextlib.contextmanager
def told_unwritable(workdir: epath.Path) -> Iterator[None]:
    """Raises a `UserError` for what cannot be written to the directory."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write to {workdir} ({error.strerror}): name a writable --workdir."
        ) from error


# ----------------------------------------------------------------------------------------- the plot


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
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def curve(runs: Sequence[Run], key: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps at which all runs have a validation metric, its mean and its spread (0 for one run)."""
    having = [{step for step, found in run.validation.items() if key in found} for run in runs]
    steps = np.array(sorted(set.intersection(*having)), int)
    values = np.array([[run.validation[step][key] for step in steps] for run in runs], float)
    spread = values.std(axis=0, ddof=1) if len(runs) > 1 else np.zeros(len(steps))
    return steps, values.mean(axis=0), spread
