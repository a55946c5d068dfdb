"""The runs of an ablation: trained in order, each once, with equal steps or with equal time."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np
from absl import logging
from etils import epath

from dqe_jax.config import AnyConfig, RunConfig
from dqe_jax.evaluation import protocols
from dqe_jax.evaluation.gain import gain_line
from dqe_jax.experiments.ablation import figure, scores, sharing
from dqe_jax.experiments.ablation.record import (
    EQUAL,
    METRICS,
    Run,
    describe,
    held_metrics,
    read_log,
    training_times,
    validation_metrics,
)
from dqe_jax.experiments.ablation.variants import BASE, choose_variants, variant_config
from dqe_jax.training import loop
from dqe_jax.utils.errors import UserError
from dqe_jax.utils.files import (
    JsonObject,
    cannot_write,
    read_json,
    to_json,
    write_at_once,
    write_json,
)
from dqe_jax.utils.paths import whole_path
from dqe_jax.utils.text_table import text_table

NOTE = (
    "Split {split}, protocol {protocol}; seeds {seeds}. A cell: mean ± standard deviation (n - 1) "
    f"over seeds. ` - {BASE}`: difference of the means; in brackets in units of the spread, the "
    "root mean square of the two standard deviations. Seconds: of training, compilation included, "
    "evaluation not."
)


def run_ablation(
    config: AnyConfig,
    workdir: str | os.PathLike[str],
    *,
    variants: Sequence[str] = (),
    seeds: int = 3,
    equal: Sequence[str] = EQUAL,
) -> list[Run]:
    """Trains what is not there yet and writes the files of the package's table.

    It can be killed at any time: the same call goes on where it was. Several processes that make
    the same call at once share the runs.

    Args:
      config: of the runs; its seed is the first.
      workdir: of the ablation.
      variants: names of `VARIANTS`, beside `infonce`; none for all.
      seeds: how many runs of each.
      equal: of `EQUAL`.

    Returns:
      All runs of the tables.

    Raises:
      UserError: for everything that a user can put right, such as a changed config.
    """
    config = RunConfig.of(config)
    if seeds < 1:
        raise UserError(f"--seeds is {seeds}: it must be at least 1.")
    variants = choose_variants(variants, config.data.dataset)
    for variant in variants:
        variant_config(config, variant, config.seed, config.total_steps)  # checks it
    workdir = whole_path(workdir)
    seen = range(config.seed, config.seed + seeds)
    plan = [(kind, seed, variant) for kind in equal for seed in seen for variant in variants]
    found: dict[tuple[str, int, str], Run] = {}
    for kind in equal:
        steps = dict.fromkeys(variants, config.total_steps)
        if kind == "time":
            steps = steps_of_equal_time(config, workdir, variants)

        def train(item: tuple[str, int, str], steps: Mapping[str, int] = steps) -> tuple[Run, bool]:
            kind, seed, variant = item
            return complete(config, workdir, variant, kind, seed, steps[variant])

        own = [item for item in plan if item[0] == kind]
        for item, (run, is_new) in sharing.in_turn(own, train):
            found[item] = run
            logging.info("Run %d of %d: %s", len(found), len(plan), describe(run))
            if is_new or len(found) == len(plan):
                write_results(config, workdir, [found[each] for each in plan if each in found])
    return [found[item] for item in plan]


def complete(
    config: RunConfig, workdir: epath.Path, variant: str, equal: str, seed: int, steps: int
) -> tuple[Run, bool]:
    """One run, and whether it had still to be trained or evaluated.

    Raises:
      UserError: as `train_and_evaluate`, or the split has no labels.
    """
    own = variant_config(config, variant, seed, steps)
    # With the same number of steps it would be the same run.
    place = "steps" if steps == config.total_steps else equal
    directory = workdir / f"{variant}-{place}-{seed}"
    metrics, is_new = train_or_read(own, directory)
    log = read_log(directory)
    seconds, validation = training_times(log)[-1][1], validation_metrics(log)
    run = Run(variant, equal, seed, steps, seconds, metrics, validation, directory.name)
    return run, is_new


def train_or_read(config: RunConfig, directory: epath.Path) -> tuple[dict[str, float], bool]:
    """The final metrics of the run of a config, and whether it had still to be trained.

    Raises:
      UserError: as `complete`.
    """
    held = held_metrics(config, directory)
    if held is None:
        # Each run compiles the same, whatever ran before, and memory does not grow with the runs.
        jax.clear_caches()
        metrics = loop.train_and_evaluate(config, directory)
    else:
        metrics = held
    if not set(METRICS) & set(metrics):
        raise UserError(
            f"config.eval.split is {config.eval.split!r}: {config.data.dataset} has no labels "
            "there to compare variants by; take --config.eval.split=validation."
        )
    return metrics, held is None


def steps_of_equal_time(
    config: RunConfig, workdir: epath.Path, variants: Sequence[str]
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

    def train(variant: str) -> tuple[Run, bool]:
        return complete(config, workdir, variant, "steps", config.seed, config.total_steps)

    for variant in variants:
        if variant in times:
            continue
        ((_, (run, _)),) = sharing.in_turn([variant], train)
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


def _read_times(path: epath.Path) -> dict[str, JsonObject]:
    if not path.exists():
        return {}
    try:
        times = read_json(path, dict)
    except UserError:
        times = {}
    if not all(_is_time(times.get(variant)) for variant in {BASE, *times}):
        raise UserError(f"{path} holds no times of an ablation: remove it to measure them again.")
    return times


def _is_time(value: object) -> bool:
    """Whether it says how long a variant trains, and how many steps."""
    if not isinstance(value, dict):
        return False
    seconds, steps = value.get("seconds", 0), value.get("steps", 0)
    return type(seconds) in (int, float) and seconds > 0 and type(steps) is int and steps > 0


def _write_whole(path: epath.Path, content: object) -> None:
    """Writes JSON so that an interruption leaves the old file or the new one."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_at_once(path, to_json(content))
    except OSError as error:
        raise cannot_write(path.parent, error) from error


def write_results(config: RunConfig, workdir: epath.Path, runs: Sequence[Run]) -> None:
    """Writes `ablation.json`, `.md` and `.png` of the runs so far, and logs the tables.

    Raises:
      UserError: a file cannot be written.
    """
    groups = {kind: [run for run in runs if run.equal == kind] for kind in EQUAL}
    lines = {kind: scores.summarize(group) for kind, group in groups.items() if group}
    split, dataset = config.eval.split, config.data.dataset
    facts = {
        "dataset": dataset,
        "split": split,
        "protocol": protocols.protocol_of(dataset, config.eval.protocol).name,
        "tables": {k: [dataclasses.asdict(line) for line in table] for k, table in lines.items()},
        "runs": [dataclasses.asdict(run) for run in runs],
    }
    gains = {kind: scores.composition_gains(table) for kind, table in lines.items()}
    if any(gains.values()):
        facts["composition_gain"] = gains
    write_json(workdir / "ablation.json", facts)
    seeds = ", ".join(str(seed) for seed in sorted({run.seed for run in runs}))
    text = [f"# Ablation on {dataset}", NOTE.format(seeds=seeds, **facts)]
    for kind, table in lines.items():
        cells = scores.table_cells(table)
        logging.info("Equal %s, %s:\n%s", kind, split, text_table(cells))
        text += [f"## Equal {kind}", scores.markdown_table(cells)]
        if found := gains[kind]:
            logging.info("%s", gain_line(found))
            text.append(gain_line(found))
    text += ["## Validation", "![Validation metrics against steps](ablation.png)"]
    with told_unwritable(workdir):
        (workdir / "ablation.md").write_text("\n\n".join(text) + "\n")
        figure.draw(runs, workdir / "ablation.png")


@contextlib.contextmanager
def told_unwritable(workdir: epath.Path) -> Iterator[None]:
    """Raises a `UserError` for what cannot be written to the directory."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write to {workdir} ({error.strerror}): name a writable --workdir."
        ) from error
