"""Follows a run from elsewhere: evaluates each checkpoint once, until training is done.

Only the run's directory is shared with the trainer, which it never waits for. Metrics go to
`<workdir>/watch-<split>/`, the files of `MetricLog`: TensorBoard on the workdir shows them beside
those of training. What is logged there is not evaluated again when the watcher is started anew.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

from absl import logging
from etils import epath

from dqe_jax.checkpoints import store
from dqe_jax.checkpoints.trained import Trained, open_trained
from dqe_jax.config import AnyConfig, RunConfig
from dqe_jax.data import datasets, splits
from dqe_jax.evaluation.evaluator import RetrievalEvaluator
from dqe_jax.evaluation.run import evaluate_and_report, make_evaluator, output_of
from dqe_jax.feature_store.features import Features
from dqe_jax.method.arrays import Params
from dqe_jax.utils.errors import UserError
from dqe_jax.utils.files import read_json
from dqe_jax.utils.metric_log import MetricLog
from dqe_jax.utils.paths import whole_path

RETRIES = 3
_REMOVED = "Step %d was removed before it was evaluated: raise config.keep_checkpoints."


def watch(
    config: AnyConfig,
    workdir: str | os.PathLike[str],
    *,
    split: str = "validation",
    output: str | os.PathLike[str] | None = None,
    poll_s: float = 30.0,
    patience_s: float = 0.0,
) -> dict[int, dict[str, float]]:
    """Evaluates the checkpoints of a run as they appear; the last one with a full report.

    Args:
      config: of the run.
      workdir: of the run; need not exist yet.
      split: to evaluate on, by any name of it.
      output: where the files of the last checkpoint's report go; None for that of
        `run.output_of`.
      poll_s: seconds between looks.
      patience_s: seconds without a new checkpoint after which to give up; 0 for never.

    Returns:
      Metrics by step, of the checkpoints evaluated here.

    Raises:
      UserError: no data, other data than those of the run, another model, or no new checkpoint for
        `patience_s`.
    """
    config = RunConfig.of(config)
    split = datasets.split_of(config.data.dataset, split)
    root = whole_path(workdir)
    opened = splits.open_split(config.data, datasets.open_dataset(config.data, split), split)
    log = MetricLog(root / f"watch-{split}", resume_step=None, again="")
    seen = set(log.steps())
    found: dict[int, dict[str, float]] = {}
    evaluator: RetrievalEvaluator | None = None
    logging.info("Following %s: %d checkpoints were evaluated before.", root, len(seen))
    try:
        for step in _new_steps(root, seen, poll_s, patience_s):
            read = _read(config, root, step, poll_s)
            if read is None:
                logging.warning(_REMOVED, step)
                continue
            trained, params = read
            if evaluator is None:
                _check_data(trained, opened)
                place = whole_path(output) if output else output_of(trained, opened)
                words, devices = trained.tokenizer, trained.devices
                features = Features(config, trained.model, devices)
                evaluator = make_evaluator(config, trained.model, words, opened, devices, features)
            features.fill(params)
            if step >= _total_steps(root):
                result = evaluate_and_report(
                    config,
                    evaluator,
                    params,
                    step=step,
                    directory=place,
                    averaged=trained.averaged,
                )
            else:
                result = evaluator.run(params)
            found[step] = result.metrics
            log.write(step, {f"{split}/{name}": x for name, x in result.metrics.items()})
            logging.info("Step %d, %s", step, evaluator.describe(result.metrics))
    finally:
        log.close()
    logging.info("Training is done; %d checkpoints were evaluated here.", len(found))
    return found


def _check_data(trained: Trained, split: splits.Split) -> None:
    """Raises a `UserError` if the data are not those of the run: one log is of one data set."""
    held = (trained.data or {}).get(split.name, split.digest)
    if held != split.digest:
        raise UserError(
            f"the run in {trained.directory.parent} has other data than {split.name} here: --watch "
            "follows a run on its own; evaluate it without --watch."
        )


def _new_steps(
    workdir: epath.Path, seen: set[int], poll_s: float, patience_s: float
) -> Iterator[int]:
    """The steps that are not in `seen`, as their checkpoints appear, until training is done.

    Each is added to `seen` before it is given.

    Raises:
      UserError: there is no new one for `patience_s`, unless that is 0.
    """
    since = time.time()
    while not (seen and max(seen) >= _total_steps(workdir)):
        waiting = [step for step in store.steps_of(workdir) if step not in seen]
        if waiting:
            since = time.time()
            seen.add(waiting[0])
            yield waiting[0]
        elif patience_s and time.time() - since > patience_s:
            raise UserError(
                f"no new checkpoint in {workdir} for {patience_s:.0f} s: see what became "
                "of training, or raise --patience_s."
            )
        else:
            time.sleep(poll_s)


def _read(
    config: RunConfig, workdir: epath.Path, step: int, poll_s: float
) -> tuple[Trained, Params] | None:
    """A checkpoint and its parameters; None if the trainer has removed it meanwhile.

    It removes one file by file: an error of a checkpoint that is still there is an error only when
    it stays.
    """
    for attempt in range(RETRIES):
        try:
            trained = open_trained(config, workdir, step)
            trained.manager.close()
            return trained, trained.place_params()
        except Exception as error:
            if step not in store.steps_of(workdir):
                return None
            told = isinstance(error, UserError) and not isinstance(error, store.DamagedError)
            if told or attempt == RETRIES - 1:
                raise
            time.sleep(poll_s)
    return None


def _total_steps(workdir: epath.Path) -> int:
    """Steps of the whole run, which the trainer says when it starts."""
    path = workdir / "config.json"
    total = read_json(path, dict, "copy it from the run again").get("total_steps")
    if type(total) is not int:
        raise UserError(f"{path} has no total_steps: copy it from the run again.")
    return total
