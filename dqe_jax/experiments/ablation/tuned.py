"""The main table: every variant with its own learning rate and steps, as curves with intervals."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Sequence

from absl import logging
from etils import epath

from dqe_jax.config import AnyConfig, RunConfig
from dqe_jax.evaluation import protocols
from dqe_jax.evaluation.gain import gain_line
from dqe_jax.experiments.ablation import curves, figure, scores, sharing, tuning
from dqe_jax.experiments.ablation.curves import EPOCHS, Curve, Difference
from dqe_jax.experiments.ablation.record import Run, describe
from dqe_jax.experiments.ablation.runs import told_unwritable
from dqe_jax.experiments.ablation.tuning import Choice
from dqe_jax.experiments.ablation.variants import BASE, choose_variants
from dqe_jax.utils.errors import UserError
from dqe_jax.utils.files import JsonObject, write_json
from dqe_jax.utils.paths import whole_path
from dqe_jax.utils.text_table import text_table

NOTE = (
    "Split {split}, protocol {protocol}; seeds {seeds}. Each variant has the learning rate and the "
    "steps that were best on validation ({metric} at the end of a run of seed {first}), of one "
    "grid for all: learning rates {rates}; steps {lengths}. ± is the standard deviation over seeds "
    f"(n - 1). Differences to {BASE} are paired over seeds and queries. In brackets are their 95% "
    "interval, by bootstrap over seeds, then reference images, and for how many seeds the "
    "difference is above 0. Seconds: of training, compilation included, evaluation not; other work "
    "on the machine counts in them."
)


def run_tuned(
    config: AnyConfig,
    workdir: str | os.PathLike[str],
    *,
    rates: Sequence[str] = (),
    lengths: Sequence[str] = (),
    variants: Sequence[str] = (),
    seeds: int = 3,
    kind: str = "",
) -> list[Run]:
    """Tunes and trains what is not there yet, and writes `curves.json`, `.md` and `.png`.

    It can be killed at any time: the same call goes on where it was. Several processes that make
    the same call at once share the runs.

    Args:
      config: of the runs; its seed is the first. A point of the curves is kept every
        `config.eval_every` steps.
      workdir: of the ablation.
      rates: learning rates to choose from; none for that of the config.
      lengths: steps to choose from; none for those of the config.
      variants: names of `VARIANTS`, beside `infonce`; none as for `choose_variants`.
      seeds: how many runs of each variant with what was chosen.
      kind: of change: the test metrics are of its queries alone; "" for all.

    Returns:
      The runs of the table.

    Raises:
      UserError: for everything that a user can put right.
    """
    config = RunConfig.of(config)
    check(config, seeds)
    grid = tuning.read_grid(config, rates, lengths)
    names = choose_variants(variants, config.data.dataset)
    for name in names:
        for rate, steps in grid.cells():
            tuning.tuned_config(config, name, config.seed, rate, steps)  # checks it
    place = whole_path(workdir)
    choices = tuning.choose(config, place, names, grid)
    plan = [(s, name) for s in range(config.seed, config.seed + seeds) for name in names]

    def train(item: tuple[int, str]) -> tuple[Run, bool]:
        choice = choices[item[1]]
        return tuning.run_of(config, place, item[1], item[0], choice.rate, choice.steps)

    found: dict[tuple[int, str], Curve] = {}
    for item, (run, is_new) in sharing.in_turn(plan, train):
        found[item] = curves.read_curve(run, place, config.eval.split, kind)
        logging.info("Run %d of %d: %s", len(found), len(plan), describe(run))
        if is_new or len(found) == len(plan):
            done = [found[each] for each in plan if each in found]
            write_results(config, place, [choices[name] for name in names], done, kind)
    return [found[each].run for each in plan]


def check(config: RunConfig, seeds: int) -> None:
    """Raises a `UserError` if there would be no curves."""
    if seeds < 1:
        raise UserError(f"--seeds is {seeds}: it must be at least 1.")
    if not config.eval_every:
        raise UserError(
            "config.eval_every is 0: it says every how many steps the curves have a point; take "
            "--config.eval_every=300."
        )


def write_results(
    config: RunConfig,
    workdir: epath.Path,
    choices: Sequence[Choice],
    found: Sequence[Curve],
    kind: str = "",
) -> None:
    """Writes the files of `run_tuned` for the runs so far, and logs the tables.

    Raises:
      UserError: a file cannot be written.
    """
    runs = [each.run for each in found]
    lines = scores.summarize(runs)
    compared = differences_of(found)
    split, dataset = config.eval.split, config.data.dataset
    facts: JsonObject = {
        "dataset": dataset,
        "split": split,
        "protocol": protocols.protocol_of(dataset, config.eval.protocol).name,
        "chosen": [{**dataclasses.asdict(c), "at_edge": c.at_edge} for c in choices],
        "table": [dataclasses.asdict(line) for line in lines],
        "differences": [dataclasses.asdict(each) for each in compared],
        "runs": [dataclasses.asdict(run) for run in runs],
    }
    if kind:
        facts["kind"] = kind
    if gained := scores.composition_gains(lines):
        facts["composition_gain"] = gained
    stem = stem_of("curves", kind)
    write_json(workdir / f"{stem}.json", facts)
    rates = dict.fromkeys(rate for choice in choices for rate, _, _ in choice.tried)
    lengths = dict.fromkeys(steps for choice in choices for _, steps, _ in choice.tried)
    note = NOTE.format(
        seeds=", ".join(str(seed) for seed in sorted({run.seed for run in runs})),
        metric=choices[0].metric,
        first=config.seed,
        rates=", ".join(f"{rate:g}" for rate in rates),
        lengths=", ".join(f"{steps:,}" for steps in lengths),
        **facts,
    )
    text = [f"# Curves of variants on {dataset}", note + told_kind(kind)]
    main = main_cells(lines, choices, compared)
    logging.info("At the end of each run, %s:\n%s", split, text_table(main))
    text += ["## At the end", scores.markdown_table(main)]
    if gained:
        logging.info("%s", gain_line(gained))
        text.append(gain_line(gained))
    for title, cells in (
        ("At equal steps", cells_by_epochs(compared)),
        ("At equal time", cells_by_time(compared)),
    ):
        if len(cells) > 1:
            text += [f"## {title}", scores.markdown_table(cells)]
    text += ["## Curves", f"![Validation and test metrics]({stem}.png)"]
    with told_unwritable(workdir):
        (workdir / f"{stem}.md").write_text("\n\n".join(text) + "\n")
        figure.draw_curves(found, workdir / f"{stem}.png", split)


def stem_of(name: str, kind: str) -> str:
    """Name of the files of a table, without their ending: `curves-two-changes`."""
    return f"{name}-{re.sub(r'[^a-z0-9]+', '-', kind.lower()).strip('-')}" if kind else name


def told_kind(kind: str) -> str:
    """What the note says of it."""
    return f" Test metrics are of the queries of the kind {kind!r} alone." if kind else ""


def differences_of(found: Sequence[Curve]) -> list[Difference]:
    """All differences to InfoNCE of the curves so far."""
    groups: dict[str, list[Curve]] = {}
    for each in found:
        groups.setdefault(each.run.variant, []).append(each)
    base = groups.pop(BASE, [])
    return [each for own in groups.values() for each in curves.differences(own, base)]


def main_cells(
    lines: Sequence[scores.Line], choices: Sequence[Choice], compared: Sequence[Difference]
) -> list[tuple[str, ...]]:
    """The head and the lines of the table of what variants reach at their ends."""
    keys = list(lines[0].scores)
    chosen = {choice.variant: choice for choice in choices}
    head = [cell for key in keys for cell in (key, f"{key} - {BASE}")]
    cells = [("variant", "runs", "learning rate", "steps", "seconds", *head)]
    for line in lines:
        row = [line.variant, str(line.runs), f"{chosen[line.variant].rate:g}"]
        row += [f"{line.steps:,}", f"{line.seconds:,.0f}"]
        for key in keys:
            score = line.scores[key]
            spread = "" if score.spread is None else f" ± {score.spread:.4f}"
            ends = [
                each
                for each in compared
                if (each.variant, each.metric, each.at) == (line.variant, key, "end")
            ]
            row += [f"{score.mean:.4f}{spread}", "".join(map(difference_cell, ends))]
        cells.append(tuple(row))
    return cells


def difference_cell(found: Difference) -> str:
    """`+0.0130 (+0.0080 to +0.0180; 5 of 5)`."""
    above = sum(x > 0 for x in found.by_seed)
    return (
        f"{found.mean:+.4f} ({found.low:+.4f} to {found.high:+.4f}; {above} of "
        f"{len(found.by_seed)})"
    )


def cells_by_epochs(compared: Sequence[Difference]) -> list[tuple[str, ...]]:
    """Differences of the deciding metric at 1, 2, 4 and 8 epochs, as far as there are points."""
    metric = _metric(compared)
    own = [each for each in compared if each.at == "steps" and each.metric == metric]
    names = list(dict.fromkeys(each.variant for each in own))
    rows = {
        name: [curves.nearest([x for x in own if x.variant == name], n) for n in EPOCHS]
        for name in names
    }
    shown = [i for i in range(len(EPOCHS)) if any(row[i] for row in rows.values())]
    if not shown:
        return [()]
    head = [f"{metric} - {BASE}, epoch {EPOCHS[i]}" for i in shown]
    cells: list[tuple[str, ...]] = [("variant", *head)]
    for name, row in rows.items():
        texts = ("" if x is None else f"{difference_cell(x)}, step {x.value:,.0f}" for x in row)
        every = list(texts)
        cells.append((name, *(every[i] for i in shown)))
    return cells


def cells_by_time(compared: Sequence[Difference]) -> list[tuple[str, ...]]:
    """Differences of the deciding metric at a quarter, a half and all of InfoNCE's time."""
    metric = _metric(compared)
    own = [each for each in compared if each.at == "time" and each.metric == metric]
    times = sorted({each.value for each in own})
    if not times:
        return [()]
    shown = sorted({min(times, key=lambda t: abs(t - times[-1] * x)) for x in (0.25, 0.5, 1.0)})
    names = list(dict.fromkeys(each.variant for each in own))
    head = [f"{metric} - {BASE}, {time:,.0f} s" for time in shown]
    cells: list[tuple[str, ...]] = [("variant", *head)]
    for name in names:
        row = {each.value: difference_cell(each) for each in own if each.variant == name}
        cells.append((name, *(row.get(time, "") for time in shown)))
    return cells


def _metric(compared: Sequence[Difference]) -> str:
    return tuning.metric_of({each.metric: 0.0 for each in compared}) if compared else ""
