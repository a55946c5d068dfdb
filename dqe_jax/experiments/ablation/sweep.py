"""One factor at a time: variants trained with several values of one field of the config."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Sequence

from absl import logging
from etils import epath

from dqe_jax.config import AnyConfig, RunConfig, fields, flatten
from dqe_jax.evaluation import protocols
from dqe_jax.experiments.ablation import curves, figure, scores, sharing
from dqe_jax.experiments.ablation.curves import Curve, Difference
from dqe_jax.experiments.ablation.record import (
    METRICS,
    Run,
    describe,
    read_log,
    training_times,
    validation_metrics,
)
from dqe_jax.experiments.ablation.runs import told_unwritable, train_or_read
from dqe_jax.experiments.ablation.tuned import check, difference_cell, stem_of, told_kind
from dqe_jax.experiments.ablation.variants import BASE, VARIANTS, choose_variants, variant_config
from dqe_jax.utils.errors import UserError
from dqe_jax.utils.files import write_json
from dqe_jax.utils.paths import whole_path
from dqe_jax.utils.text_table import text_table

Value = str | int | float | bool
# Fields that a variant does not read where it mines nothing, or weighs no attributes: its run is
# the same whatever they say, and is trained once.
OF_MINING = ("negatives.", "loss.preference", "loss.margin", "loss.form")
OF_ATTRIBUTES = ("model.attributes.", "loss.intent", "loss.alignment")
NOTE = (
    "Split {split}, protocol {protocol}; seeds {seeds}; learning rate {rate:g}. ± is the standard "
    f"deviation over seeds (n - 1). Differences to {BASE} with the same value are paired over "
    "seeds and queries; in brackets their 95% interval, by bootstrap over seeds, then reference "
    "images, and for how many seeds the difference is above 0."
)


@dataclasses.dataclass(frozen=True)
class Place:
    """A variant with a value of the factor, over its seeds.

    Attributes:
      value: of the factor.
      variant: its name.
      found: the curves of its runs.
    """

    value: Value
    variant: str
    found: Sequence[Curve]


def read_sweep(text: str) -> tuple[str, tuple[Value, ...]]:
    """The field and the values of `negatives.upper=0.02,0.1,0.6`.

    Raises:
      UserError: it is not of this form, or names no field of a config.
    """
    name, equals, words = text.removeprefix("config.").partition("=")
    values = tuple(dict.fromkeys(_value(word) for word in words.split(",") if word.strip()))
    if not equals or not values:
        raise UserError(f"--sweep={text}: give it as FIELD=VALUE,VALUE, a field of the config.")
    if name not in fields():
        raise UserError(f"--sweep={text}: config.{name} is not a field of a config.")
    if name == "seed":
        raise UserError("--sweep=seed: seeds are not swept; say how many by --seeds.")
    return name, values


def _value(word: str) -> Value:
    """A number or a truth value, or the word itself."""
    try:
        found = ast.literal_eval(word.strip())
    except (ValueError, SyntaxError):
        return word.strip()
    return found if isinstance(found, (str, int, float, bool)) else word.strip()


def run_sweep(
    config: AnyConfig,
    workdir: str | os.PathLike[str],
    *,
    sweep: str,
    variants: Sequence[str] = ("full",),
    seeds: int = 2,
    kind: str = "",
) -> list[Run]:
    """Trains what is not there yet, and writes `sweep-<field>.json`, `.md` and `.png`.

    All else is as the config says, the learning rate and the steps too. It can be killed at any
    time: the same call goes on where it was. Several processes that make the same call at once
    share the runs. Runs that several values or sweeps share are trained
    once.

    Args:
      config: of the runs; its seed is the first.
      workdir: of the sweep; sweeps of several fields may share it.
      sweep: as for `read_sweep`.
      variants: names of `VARIANTS`, beside `infonce`.
      seeds: how many runs of each.
      kind: of change: the metrics are of its queries alone; "" for all.

    Returns:
      The runs of the table.

    Raises:
      UserError: for everything that a user can put right.
    """
    config = RunConfig.of(config)
    check(config, seeds)
    name, values = read_sweep(sweep)
    names = choose_variants(variants or ("full",), config.data.dataset)
    for variant in names:
        for value in values:
            swept_config(config, variant, config.seed, name, value)  # checks it
    place, seen = whole_path(workdir), range(config.seed, config.seed + seeds)
    plan = [(value, variant, seed) for value in values for variant in names for seed in seen]

    def train(item: tuple[Value, str, int]) -> Run:
        value, variant, seed = item
        return _complete(config, place, variant, seed, name, value)

    found: dict[tuple[Value, str, int], Curve] = {}
    for item, run in sharing.in_turn(plan, train):
        found[item] = curves.read_curve(run, place, config.eval.split, kind)
        text = "%s=%s, run %d of %d: %s"
        logging.info(text, name, item[0], len(found), len(plan), describe(run))
        whole = [
            Place(value, variant, [found[value, variant, seed] for seed in seen])
            for value in values
            for variant in names
            if all((value, variant, seed) in found for seed in seen)
        ]
        if any((each.value, each.variant) == item[:2] for each in whole):
            write_results(config, place, name, whole, kind)
    return [found[item].run for item in plan]


def swept_config(config: RunConfig, variant: str, seed: int, name: str, value: Value) -> RunConfig:
    """The config of one run; a field that the variant does not read stays as it is."""
    own = variant_config(config, variant, seed, config.total_steps)
    changes: dict[str, object] = {"eval.curve": True}
    if not _unread(own, name):
        changes[name] = value
    # What decides the variant comes last: a sweep of a rule leaves InfoNCE as it is.
    return config.with_changes({"seed": seed, **changes, **VARIANTS[variant]})


def _unread(config: RunConfig, name: str) -> bool:
    mines, weighs = config.negatives.rule != "in_batch", config.model.attributes.enabled
    return (not mines and name.startswith(OF_MINING)) or (
        not weighs and name.startswith(OF_ATTRIBUTES)
    )


def _complete(
    config: RunConfig, workdir: epath.Path, variant: str, seed: int, name: str, value: Value
) -> Run:
    """One run, trained if it is not there.

    Raises:
      UserError: as `runs.complete`.
    """
    own = swept_config(config, variant, seed, name, value)
    directory = workdir / f"{variant}-{_label(own)}-{seed}"
    metrics, _ = train_or_read(own, directory)
    log = read_log(directory)
    seconds, found = training_times(log)[-1][1], validation_metrics(log)
    return Run(variant, name, seed, own.total_steps, seconds, metrics, found, directory.name)


def _label(config: RunConfig) -> str:
    """A digest of what decides a run's result but for its seed: runs of one label are alike."""
    known = fields()
    deciding = {
        name: value
        for name, value in flatten(config.to_dict()).items()
        if known[name].role != "free" and name != "seed"
    }
    text = json.dumps(deciding, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def write_results(
    config: RunConfig, workdir: epath.Path, name: str, places: Sequence[Place], kind: str = ""
) -> None:
    """Writes the files of `run_sweep` for the runs so far, and logs the table.

    Raises:
      UserError: a file cannot be written.
    """
    split, dataset = config.eval.split, config.data.dataset
    compared = differences_of(places)
    runs = [each.run for place in places for each in place.found]
    facts = {
        "dataset": dataset,
        "split": split,
        "protocol": protocols.protocol_of(dataset, config.eval.protocol).name,
        "field": name,
        "places": [
            {
                "value": place.value,
                "variant": place.variant,
                "runs": [dataclasses.asdict(each.run) for each in place.found],
            }
            for place in places
        ],
        "differences": [{**dataclasses.asdict(each), "value": value} for value, each in compared],
    }
    if kind:
        facts["kind"] = kind
    stem = stem_of(f"sweep-{re.sub(r'[^a-z0-9]+', '-', name)}", kind)
    write_json(workdir / f"{stem}.json", facts)
    cells = table_cells(name, places, compared)
    logging.info("%s, %s:\n%s", name, split, text_table(cells))
    seeds = ", ".join(str(seed) for seed in sorted({run.seed for run in runs}))
    note = NOTE.format(seeds=seeds, rate=config.optimizer.learning_rate, **facts)
    text = [f"# {name} on {dataset}", note, scores.markdown_table(cells)]
    text[1] += told_kind(kind)
    text.append(f"![Metrics against {name}]({stem}.png)")
    with told_unwritable(workdir):
        (workdir / f"{stem}.md").write_text("\n\n".join(text) + "\n")
        drawn = [
            (place.value, place.variant, [each.run for each in place.found]) for place in places
        ]
        figure.draw_factor(drawn, compared, workdir / f"{stem}.png", name, split)


def differences_of(places: Sequence[Place]) -> list[tuple[Value, Difference]]:
    """Differences to InfoNCE at the end, at each value of the factor."""
    base = {place.value: place.found for place in places if place.variant == BASE}
    return [
        (place.value, each)
        for place in places
        if place.variant != BASE and place.value in base
        for each in curves.differences(place.found, base[place.value])
        if each.at == "end"
    ]


def table_cells(
    name: str, places: Sequence[Place], compared: Sequence[tuple[Value, Difference]]
) -> list[tuple[str, ...]]:
    """The head and the lines of the table."""
    keys = [key for key in METRICS if all(key in p.found[0].run.metrics for p in places)]
    head = [cell for key in keys for cell in (key, f"{key} - {BASE}")]
    cells = [(name, "variant", "runs", "steps", "seconds", *head)]
    for place in places:
        (line,) = scores.summarize([each.run for each in place.found])
        row = [str(place.value), place.variant, str(line.runs)]
        row += [f"{line.steps:,}", f"{line.seconds:,.0f}"]
        for key in keys:
            score = line.scores[key]
            spread = "" if score.spread is None else f" ± {score.spread:.4f}"
            ends = [
                difference_cell(each)
                for value, each in compared
                if (value, each.variant, each.metric) == (place.value, place.variant, key)
            ]
            row += [f"{score.mean:.4f}{spread}", "".join(ends)]
        cells.append(tuple(row))
    return cells
