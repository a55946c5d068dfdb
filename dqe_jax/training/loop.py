"""The training loop: prepare, restore or initialise, step, log, evaluate, save."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import jax
import numpy as np
import tqdm
from absl import logging

from dqe_jax.checkpoints import store
from dqe_jax.config import AnyConfig, RunConfig, check_batch, flatten
from dqe_jax.data import datasets
from dqe_jax.distributed import mesh, processes
from dqe_jax.distributed.interrupts import Interrupted, Interrupts
from dqe_jax.evaluation import curve
from dqe_jax.evaluation.evaluator import Result
from dqe_jax.evaluation.run import evaluate_and_report
from dqe_jax.method.arrays import Tree
from dqe_jax.method.batch import Batch
from dqe_jax.method.mining import Bank
from dqe_jax.method.objective import Metrics
from dqe_jax.models import freeze, setup, summary
from dqe_jax.models.build import parts_of
from dqe_jax.training.accumulate import Accumulation
from dqe_jax.training.data_wait import DataWait
from dqe_jax.training.faults import Guard, in_sentences
from dqe_jax.training.lease import Lease
from dqe_jax.training.optimizer import make_schedule
from dqe_jax.training.session import Feedback, Session, open_session, restore_or_init, save
from dqe_jax.training.start import open_start
from dqe_jax.training.state import TrainState
from dqe_jax.training.step import StepOutput
from dqe_jax.training.workdir import claim_workdir, write_config
from dqe_jax.utils import progress
from dqe_jax.utils.metric_log import MetricLog, NoLog
from dqe_jax.utils.sinks import Sinks, require_sinks

if TYPE_CHECKING:
    import orbax.checkpoint as ocp  # slow to import


def train_and_evaluate(
    config: AnyConfig,
    workdir: str | os.PathLike[str],
    *,
    stop_at: int | None = None,
    init: str | os.PathLike[str] | None = None,
    feedback: Feedback | None = None,
) -> dict[str, float]:
    """Trains by a config, resuming what the workdir holds, and evaluates on the last split.

    Args:
      config: of the run; as a config file gives it, or checked already.
      workdir: gets `config.json`, `checkpoints/`, the files of `MetricLog` and `eval/`.
      stop_at: ends after this step as if the run were interrupted there: a checkpoint is saved, the
        same command without it goes on.
      init: the run, or the export, whose parameters it starts from; None for fresh ones. A run that
        was saved goes on from what was saved.
      feedback: a log of picks and rejections to learn from, beside the training split.

    Returns:
      The metrics of `config.eval.split`, or of the last validation if `stop_at` ended the run; none
      with `config.eval_every = 0`.

    Raises:
      UserError: for everything that a user can put right, before training starts where possible.
      Interrupted: a signal asked the run to end; it is saved.
    """
    config = RunConfig.of(config)
    began = time.time()
    require_sinks(config.log.sinks)
    freeze.check_frozen(
        config.model.frozen, parts_of(config.model.backbone), adapters=config.model.lora.rank > 0
    )
    devices = mesh.devices_of(config.num_devices)
    check_batch(config, len(devices), jax.process_count())
    datasets.require_training(config.data.dataset)
    if datasets.DATASETS[config.data.dataset].must_be_prepared:
        datasets.find_dataset(config.data)  # before weights are downloaded for nothing
    path, lock = processes.leader_first(
        "workdir", lambda: claim_workdir(workdir, config, alone=processes.leads())
    )
    try:
        pretrained = setup.open_weights(config.model, config.data)
        tokenizer = None
        if pretrained is not None:
            tokenizer = setup.tokenizer_of(config.model, config.data, pretrained)
        builder = processes.leader_first("data", lambda: datasets.open_dataset(config.data))
        start = None if init is None else open_start(init, config)
        session = open_session(
            config, path, builder, devices, pretrained, tokenizer, start, feedback
        )
        with (
            in_sentences(path, session.data_dir),
            contextlib.closing(store.open_for_training(path, config)) as manager,
        ):
            state, seconds = restore_or_init(session, manager)
            if processes.leads():
                write_config(path, config)
            held = lock.check if isinstance(lock, Lease) else _always
            return _train(session, state, manager, Stopwatch(seconds), began, stop_at, held)
    finally:
        if lock is not None:
            lock.close()


def _always() -> None:
    """The check of a lock that the system keeps."""


class Stopwatch:
    """Seconds of training, without the time in which it is paused."""

    def __init__(self, seconds: float = 0.0):
        """Starts at once; `seconds` were measured before."""
        self._before, self._since = seconds, time.time()

    def read(self) -> float:
        """Seconds so far."""
        return self._before + time.time() - self._since

    @contextlib.contextmanager
    def pause(self) -> Iterator[float]:
        """Stands still in this context, which gets the seconds so far."""
        self._before = self.read()
        try:
            yield self._before
        finally:
            self._since = time.time()


class _Reporter:
    """Logs what steps measured, and how fast they were; moves the bar, or writes plain lines."""

    def __init__(self, session: Session, log: MetricLog | NoLog, stopwatch: Stopwatch, start: int):
        config = session.config
        self._log, self._stopwatch = log, stopwatch
        self._schedule = make_schedule(config.optimizer, config.total_steps)
        self._seconds, self._counted = stopwatch.read(), start  # at the last line
        self._examples = session.examples
        self.data_wait = DataWait(config, stored="image" in session.features.kinds)
        self.bar = tqdm.tqdm(
            initial=start,
            total=config.total_steps,
            desc="train",
            unit="step",
            dynamic_ncols=True,
            disable=not processes.leads() or not progress.on_terminal(),
        )
        self._pace = progress.Pace(config.total_steps, start)

    def write(self, step: int, metrics: Metrics) -> None:
        """Writes a line of metrics, and one of times."""
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        seconds = self._stopwatch.read()
        passed, examples = seconds - self._seconds, (step - self._counted) * self._examples
        rate, wait = examples / max(passed, 1e-9), self.data_wait.take(passed)
        self._seconds, self._counted = seconds, step
        self._log.write(step, {**values, "learning_rate": float(self._schedule(step - 1))})
        times = {"train_seconds": seconds, "examples_per_second": rate, **wait}
        self._log.write_timing(step, times)
        self.bar.set_postfix(loss=f"{values['loss']:.3f}", examples_s=f"{rate:.0f}")
        if processes.leads() and self.bar.disable and self._pace.due(step):
            text = "train: step %d of %d, loss %.3f, %.0f examples per second"
            logging.info(text, step, self.bar.total, values["loss"], rate)


def _train(
    session: Session,
    state: TrainState,
    manager: ocp.CheckpointManager,
    stopwatch: Stopwatch,
    began: float,
    stop_at: int | None,
    held: Callable[[], None],
) -> dict[str, float]:
    """Trains and evaluates from a state on; `began` is for the log, `held` as of `run_steps`."""
    config, start = session.config, int(state.step)
    end = min(stop_at or config.total_steps, config.total_steps)
    log = _open_log(session, start) if processes.leads() else NoLog()
    try:
        if start == 0:
            logging.info("Devices: %s", ", ".join(str(device) for device in session.devices))
            logging.info("%s", summary.parameter_table(state.params, config.model))
        if state.average is not None:
            logging.info(
                "Evaluation is of a moving average of the parameters: config.optimizer.ema_decay "
                "is %g.",
                config.optimizer.ema_decay,
            )
        logging.info("Ready after %.1f s; the first step compiles.", time.time() - began)
        with Interrupts() as interrupts:
            state, measured = run_steps(
                session, state, end, manager, log, stopwatch, interrupts, held
            )
        manager.wait_until_finished()
        if end < config.total_steps or not config.eval_every:
            return measured
        return _final_evaluation(session, state, log)
    finally:
        session.batches.close()
        log.close()


def _open_log(session: Session, start: int) -> MetricLog:
    """The log of a run that starts after step `start`."""
    config, workdir = session.config, session.workdir
    own = config.log
    sinks = Sinks(own.sinks, workdir, own.project, flatten(config.to_dict()), fresh=start == 0)
    return MetricLog(workdir, resume_step=start, sinks=sinks)


def run_steps(
    session: Session,
    state: TrainState,
    end: int,
    manager: ocp.CheckpointManager,
    log: MetricLog | NoLog,
    stopwatch: Stopwatch,
    interrupts: Interrupts,
    held: Callable[[], None] = _always,
) -> tuple[TrainState, dict[str, float]]:
    """Takes the steps up to `end`; time spent evaluating and saving is not counted as training.

    `held` raises a `UserError` if another process has taken over the workdir: it is asked before
    anything is written there.

    Returns:
      The state, and the metrics of the last validation.
    """
    config, keeper, start = session.config, session.keeper, int(state.step)
    measured: dict[str, float] = {}
    guard = Guard(config.max_bad_steps, manager)
    reporter = _Reporter(session, log, stopwatch, start)
    with reporter.bar:  # also closed by an error, whose sentence has a line of its own
        for step in range(start + 1, end + 1):
            refreshed = keeper is not None and keeper.refresh_if_due(state.params, step - 1)
            began = time.time()
            output = take_step(session, state, step, interrupts.seen, reporter.data_wait)
            state = output.state
            if step == start + 1:
                jax.block_until_ready(state)
                logging.info("The first step was done %.1f s later.", time.time() - began)
            reporter.bar.update()
            stop, last = guard.check(step, output.control), step == end
            # Log before and after a refresh, to show how stale the bank had become.
            due = keeper is not None and keeper.due(step)
            if step % config.log_every == 0 or last or refreshed or due:
                held()
                reporter.write(step, output.metrics)
            evaluate = config.eval_every > 0 and (step % config.eval_every == 0 or last)
            saving = step % config.checkpoint_every == 0 or last or stop > 0
            if evaluate or saving:
                jax.block_until_ready(state)
                with stopwatch.pause() as seconds:
                    found = _validate(session, state, log, reporter.bar) if evaluate else None
                    measured = measured if found is None else found.metrics
                    if saving:
                        held()
                        stop = max(stop, guard.check_all())  # nothing unsound is saved
                        save(session, manager, state, seconds, found)
            if stop:
                manager.wait_until_finished()
                raise Interrupted(stop, step)
    return state, measured


def take_step(
    session: Session, state: TrainState, number: int, stop: int, data_wait: DataWait
) -> StepOutput:
    """One step, with negatives of the bank as soon as there is one.

    Args:
      session: of the run.
      state: which is donated.
      number: of the step; the first is 1.
      stop: number of the signal that this process saw; 0 for none.
      data_wait: gets the time that the devices waited for batches.
    """
    keeper = session.keeper
    bank: tuple[Bank, ...] = ()
    if keeper is not None and keeper.bank is not None:
        mines = number % session.config.negatives.every == 0
        bank = (keeper.bank,) if mines else ()

    def following(busy: Tree) -> Batch:
        data_wait.add(session.batches.wait(busy))
        batch = session.features.resolve(next(session.batches))
        return keeper.add_mined(batch) if keeper is not None and bank else batch

    told = np.full((mesh.count_own(session.devices), 1), stop, np.int32)
    step = session.bank_step if bank else session.step
    if isinstance(step, Accumulation):
        return step.run(state, following, told, *bank)
    return step(state, following(state), told, *bank)


def _validate(
    session: Session, state: TrainState, log: MetricLog | NoLog, bar: tqdm.tqdm
) -> Result:
    """What the validation split gives; its metrics are logged."""
    step, result = int(state.step), session.validation.run(session.evaluated(state))
    log.write(step, {f"validation/{k}": v for k, v in result.metrics.items()})
    if session.config.eval.curve:
        last = session.last
        same = last is session.validation
        found = result if same else last.run(session.evaluated(state))
        log.write(step, {f"curve/{k}": v for k, v in found.metrics.items()})
        if processes.leads():
            epochs = step * session.examples / session.queries
            curve.write_point(last, found, session.workdir, step, epochs)
    if processes.leads():
        bar.write(f"step {step}, {session.validation.describe(result.metrics)}")
    return result


def _final_evaluation(
    session: Session, state: TrainState, log: MetricLog | NoLog
) -> dict[str, float]:
    """Metrics of the last split, with a full report."""
    config, evaluator, step = session.config, session.last, int(state.step)
    split = evaluator.split
    result = evaluate_and_report(
        config,
        evaluator,
        session.evaluated(state),
        step=step,
        directory=session.workdir / "eval",
        averaged=state.average is not None,
    )
    # The validation split is logged already.
    if split.name != "validation":
        log.write(step, {f"{split.name}/{k}": v for k, v in result.metrics.items()})
    return result.metrics
