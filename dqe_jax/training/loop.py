"""The training loop: prepare, restore or initialise, step, log, evaluate, save."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import errno
import os
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import tqdm
from absl import logging
from etils import epath
from tokenizers import Tokenizer

from dqe_jax import models
from dqe_jax.checkpoints import store
from dqe_jax.config import check_batch, check_config
from dqe_jax.data import datasets, lexicon, pipeline, splits
from dqe_jax.data import tokenizer as text_tokens
from dqe_jax.data.annotations import BENCHMARKS
from dqe_jax.data.text import encode_wordings
from dqe_jax.distributed import mesh, processes
from dqe_jax.distributed.interrupts import Interrupted, Interrupts
from dqe_jax.evaluation.evaluator import RetrievalEvaluator
from dqe_jax.evaluation.run import evaluate_and_report, make_evaluator
from dqe_jax.models import freeze, setup, summary
from dqe_jax.models.weights import sizes as size_files
from dqe_jax.models.weights.initial import Pretrained
from dqe_jax.training import state as programs
from dqe_jax.training.bank import BankKeeper, make_bank_keeper
from dqe_jax.training.optimizer import make_schedule
from dqe_jax.training.step import TrainState
from dqe_jax.training.workdir import claim_workdir
from dqe_jax.utils.errors import UserError, reason_of
from dqe_jax.utils.metric_log import MetricLog, NoLog

CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
# What libraries say of a full disk, in errors of their own.
FULL = ("No space left on device", "Disk quota exceeded")


def train_and_evaluate(
    config: Any, workdir: str | os.PathLike[str], *, stop_at: int | None = None
) -> dict[str, float]:
    """Trains by a config, resuming what the workdir holds, and evaluates on the last split.

    Args:
      config: see `configs/common.py`.
      workdir: gets `config.json`, `checkpoints/`, the files of `MetricLog` and `eval/`.
      stop_at: ends after this step as if the run were interrupted there: a checkpoint is saved, the
        same command without it goes on.

    Returns:
      The metrics of `config.eval.split`, or of the last validation if `stop_at` ended the run; none
      with `config.eval_every = 0`.

    Raises:
      UserError: for everything that a user can put right, before training starts where possible.
      Interrupted: a signal asked the run to end; it is saved.
    """
    began = time.time()
    check_config(config)
    freeze.check_frozen(config.model.frozen, models.parts_of(config.model.backbone))
    devices = mesh.devices_of(config.num_devices)
    check_batch(config, len(devices), jax.process_count())
    if config.data.dataset in BENCHMARKS:
        datasets.find_dataset(config.data)  # before weights are downloaded for nothing
    path, lock = processes.leader_first(
        "workdir", lambda: claim_workdir(workdir, config, alone=processes.leads())
    )
    try:
        pretrained = setup.open_weights(config)
        tokenizer = setup.tokenizer_of(config, pretrained) if pretrained else None
        builder = processes.leader_first("data", lambda: datasets.open_dataset(config.data))
        run = _prepare(config, path, builder, devices, pretrained, tokenizer)
        with (
            _in_sentences(run),
            contextlib.closing(store.open_for_training(path, config)) as manager,
        ):
            state, seconds = _restore_or_init(run, manager)
            return _train(run, state, manager, seconds, began, stop_at)
    finally:
        if lock is not None:
            lock.close()


@dataclasses.dataclass(frozen=True)
class Run:
    """All that the loop needs and that does not change."""

    config: Any
    workdir: epath.Path
    data_dir: epath.Path
    devices: list[jax.Device]
    pretrained: Pretrained | None
    tokenizer: Any
    model: Any
    params: Any
    optimizer: programs.Optimizer
    step: Any
    bank_step: Any
    keeper: BankKeeper | None
    batches: Any
    validation: RetrievalEvaluator
    last: splits.Split


def _prepare(
    config: Any,
    workdir: epath.Path,
    builder: Any,
    devices: list[jax.Device],
    pretrained: Pretrained | None,
    tokenizer: Tokenizer | None,
) -> Run:
    data = config.data
    # What the end of the run needs must be there now.
    last = splits.open_split(config, builder, config.eval.split)
    split = splits.open_split(config, builder, "train")
    words = lexicon.load_lexicon(data.lexicon)
    names = config.model.attributes.names
    mentions = lexicon.mentions(split.queries.texts, names, words)
    if tokenizer is None:
        tokenizer = text_tokens.train_word_tokenizer(split.queries.texts, data.max_length)
    text = encode_wordings(tokenizer, split, data.captions)
    held_out = splits.open_split(config, builder, "validation")
    if config.negatives.oracle != "none" and not any(map(len, split.queries.valid)):
        raise UserError(
            f"config.negatives.oracle is {config.negatives.oracle!r}: {data.dataset} does not say "
            "which images are in truth valid; take 'none'."
        )
    model = setup.model_of(config, tokenizer, pretrained and pretrained.sizes)
    params = setup.param_shapes(model, config)

    optimizer = programs.make_optimizer(config, params, len(devices))
    keeper = None
    if programs.uses_bank(config.negatives):
        keeper = make_bank_keeper(config, model, split, text[:, 0], devices)
    batches = pipeline.train_batches(
        split,
        text=text,
        mentions=mentions,
        references=config.batch.references,
        queries_per_reference=config.batch.queries_per_reference,
        augment=data.augment,
        seed=config.seed,
        num_threads=data.num_threads,
        process=jax.process_index(),
        num_processes=jax.process_count(),
    )
    validation = make_evaluator(config, model, tokenizer, held_out, devices)
    if config.keep_best and config.keep_best not in validation.metric_names():
        raise UserError(
            f"config.keep_best is {config.keep_best!r}: validation measures "
            f"{', '.join(validation.metric_names()) or 'nothing, for want of labels'}."
        )
    return Run(
        config=config,
        workdir=workdir,
        data_dir=epath.Path(builder.data_dir),
        devices=devices,
        pretrained=pretrained,
        tokenizer=tokenizer,
        model=model,
        params=params,
        optimizer=optimizer,
        step=programs.make_step(config, model, optimizer, devices),
        bank_step=programs.make_step(config, model, optimizer, devices, bank=True),
        keeper=keeper,
        batches=batches,
        validation=validation,
        last=last,
    )


def _restore_or_init(run: Run, manager: Any) -> tuple[TrainState, float]:
    """The state of the newest checkpoint, or a fresh one; and the seconds trained before."""
    split, newest = programs.splitter(run.config.model), manager.latest_step()
    if newest is None:
        params = setup.init_params(run.model, run.config, run.config.seed, run.pretrained)
        return programs.init_state(run.config, run.optimizer, params, run.devices), 0.0
    like = {"params": run.params, "opt_state": run.optimizer.saved}
    meta = store.read_meta(manager, newest)
    # The bank is made anew: by the loop, if it is due at this step, or of what it was made of.
    rebuilt = (
        run.keeper is not None
        and meta["bank_step"] is not None
        and not run.keeper.scheduled(newest)
    )
    if rebuilt:
        like["bank_params"] = split(run.params)[0]
    items = store.restore(manager, newest, **like)
    run.batches.set_state(meta["data_state"])
    if rebuilt:
        whole = freeze.merge(items["bank_params"], split(items["params"])[1])
        run.keeper.refresh(mesh.replicate(whole, run.devices), meta["bank_step"])
    logging.info("Resumed from step %d of %s.", newest, manager.directory)
    state = programs.place_state(
        run.optimizer, newest, items["params"], items["opt_state"], run.devices
    )
    return state, meta["train_seconds"]


def _train(
    run: Run, state: TrainState, manager: Any, seconds: float, began: float, stop_at: int | None
) -> dict[str, float]:
    """Trains and evaluates from a state on; `began` and `seconds` are for the log."""
    config, start = run.config, int(state.step)
    end = min(stop_at or config.total_steps, config.total_steps)
    log = MetricLog(run.workdir, resume_step=start) if processes.leads() else NoLog()
    try:
        if start == 0:
            _log_start(run, state.params)
        logging.info("Ready after %.0f s; the first step compiles.", time.time() - began)
        with Interrupts() as interrupts:
            state, measured = _loop(run, state, end, manager, log, seconds, interrupts)
        manager.wait_until_finished()
        if end < config.total_steps or not config.eval_every:
            return measured
        return _final_evaluation(run, state, log)
    finally:
        log.close()


@contextlib.contextmanager
def _in_sentences(run: Run) -> Iterator[None]:
    """Raises a `UserError` for what the machine does to a run, the end of saving included."""
    try:
        yield
    except (UserError, Interrupted):
        raise
    except Exception as error:
        sentence = _in_a_sentence(error, run)
        if sentence is None:
            raise
        raise sentence from error


def _in_a_sentence(error: Exception, run: Run) -> UserError | None:
    """The `UserError` for what the machine did to a run; None for anything else."""
    steps = store.steps_of(run.workdir)
    kept = f"step {steps[-1]} is saved" if steps else "nothing is saved yet"
    if not run.data_dir.is_dir():
        sentence = f"the data in {run.data_dir} is gone: {kept}; put it back"
    elif getattr(error, "errno", None) in CANNOT_WRITE or any(w in str(error) for w in FULL):
        sentence = (
            f"cannot write to {run.workdir} ({reason_of(error)}): {kept}; free space or make it "
            "writable"
        )
    else:
        return None
    return UserError(f"{sentence}, and run the same command again: it goes on from there.")


def _log_start(run: Run, params: Any) -> None:
    logging.info("Devices: %s", ", ".join(str(device) for device in run.devices))
    logging.info("%s", summary.parameter_table(params, run.config.model))


def _loop(
    run: Run,
    state: TrainState,
    end: int,
    manager: Any,
    log: MetricLog | NoLog,
    seconds: float,
    interrupts: Interrupts,
) -> tuple[TrainState, dict[str, float]]:
    """Takes the steps up to `end`; time spent evaluating and saving is not counted as training."""
    config, measured = run.config, {}
    schedule = make_schedule(config.optimizer, config.total_steps)
    per_step = config.batch.references * config.batch.queries_per_reference
    start, keeper, guard = int(state.step), run.keeper, _Guard(config.max_bad_steps, manager)
    bar = tqdm.tqdm(
        initial=start,
        total=config.total_steps,
        desc="train",
        unit="step",
        dynamic_ncols=True,
        disable=not processes.leads(),
    )
    clock, mark, counted = time.time(), seconds, start
    for step in range(start + 1, end + 1):
        refreshed = keeper is not None and keeper.due(step - 1)
        if refreshed:
            keeper.refresh(state.params, step - 1)
        state, metrics = _take_step(run, state, interrupts.seen)
        bar.update()
        stop = guard.check(step, metrics)
        last = step == end
        # On both sides of a refresh, to show how far the bank had aged.
        due = keeper is not None and keeper.due(step)
        if step % config.log_every == 0 or last or refreshed or due:
            values = {name: float(value) for name, value in jax.device_get(metrics).items()}
            values = {name: x for name, x in values.items() if name not in ("stop", "bad_in_a_row")}
            seconds, clock = seconds + time.time() - clock, time.time()
            rate = (step - counted) * per_step / max(seconds - mark, 1e-9)
            mark, counted = seconds, step
            log.write(step, {**values, "learning_rate": float(schedule(step - 1))})
            log.write_timing(step, {"train_seconds": seconds, "examples_per_second": rate})
            bar.set_postfix(loss=f"{values['loss']:.3f}", examples_s=f"{rate:.0f}")
        evaluate = config.eval_every > 0 and (step % config.eval_every == 0 or last)
        save = step % config.checkpoint_every == 0 or last or stop > 0
        if evaluate or save:
            jax.block_until_ready(state)
            seconds += time.time() - clock
            found = None
            if evaluate:
                found = measured = run.validation.run(state.params).metrics
                log.write(step, {f"validation/{k}": v for k, v in measured.items()})
                if processes.leads():
                    bar.write(f"step {step}, {run.validation.describe(measured)}")
            if save:
                stop = max(stop, guard.check_all())  # nothing unsound is saved
                _save(run, manager, step, state, seconds, found)
            clock = time.time()
        if stop:
            bar.close()
            manager.wait_until_finished()
            raise Interrupted(stop, step)
    bar.close()
    return state, measured


def _take_step(run: Run, state: TrainState, stop: int) -> tuple[TrainState, Any]:
    """One step, with negatives of the bank as soon as there is one."""
    batch = next(run.batches)
    own = mesh.count_own(run.devices)
    batch = {**batch, "stop": np.full(own, stop, np.int32)}
    if run.keeper is None or run.keeper.bank is None:
        return run.step(state, mesh.shard(batch, own))
    batch = run.keeper.add_mined(batch)
    return run.bank_step(state, mesh.shard(batch, own), run.keeper.bank)


class _Guard:
    """Looks at steps shortly after they were taken, so that the device never waits for the host.

    All processes see the same values at the same step, and so act alike.
    """

    BEHIND = 2

    def __init__(self, max_bad_steps: int, manager: Any):
        self._most, self._manager = max_bad_steps, manager
        self._waiting: collections.deque[tuple[int, Any, Any]] = collections.deque()

    def check(self, step: int, metrics: Any) -> int:
        """Notes a step; the number of the signal that came by `BEHIND` steps before, or 0.

        Raises:
          UserError: too many steps in a row were not finite.
        """
        self._waiting.append((step, metrics["stop"], metrics["bad_in_a_row"]))
        return self._look() if len(self._waiting) > self.BEHIND else 0

    def check_all(self) -> int:
        """Looks at all that are left; returns and raises as `check`."""
        return max([self._look() for _ in range(len(self._waiting))], default=0)

    def _look(self) -> int:
        step, stop, bad = self._waiting.popleft()
        stop, bad = (int(x) for x in jax.device_get((stop, bad)))
        if bad == 1:
            logging.warning("Step %d: the loss or a gradient is not finite; it is skipped.", step)
        if bad >= self._most:
            newest = self._manager.latest_step()
            kept = "no checkpoint is saved" if newest is None else f"step {newest} is saved"
            raise UserError(
                f"the loss or a gradient was not finite in {bad} steps in a row, up to step "
                f"{step}: lower config.optimizer.learning_rate, or look at the data of these steps "
                f"(config.max_bad_steps is {self._most}); {kept}."
            )
        return stop


def _save(
    run: Run,
    manager: Any,
    step: int,
    state: TrainState,
    seconds: float,
    metrics: dict[str, float] | None,
) -> None:
    """Saves a checkpoint, with all that the run needs to go on exactly."""
    keeper = run.keeper
    banked = keeper is not None and keeper.bank is not None
    meta = {
        "config": run.config.to_dict(),
        "tokenizer": run.tokenizer.to_str(),
        "sizes": run.pretrained and size_files.to_json(run.pretrained.sizes),
        "data_state": run.batches.get_state(),
        "bank_step": keeper.step if banked else None,
        "train_seconds": seconds,
    }
    snapshot = keeper.snapshot if banked and not keeper.scheduled(step) else None
    moments = programs.state_to_save(run.optimizer, state.opt_state, run.devices)
    store.save(manager, step, state.params, moments, meta, bank_params=snapshot, metrics=metrics)


def _final_evaluation(run: Run, state: TrainState, log: MetricLog | NoLog) -> dict[str, float]:
    split, step = run.last, int(state.step)
    evaluator = make_evaluator(run.config, run.model, run.tokenizer, split, run.devices)
    result = evaluate_and_report(
        run.config, evaluator, state.params, step=step, directory=run.workdir / "eval"
    )
    # Of the validation split there is a line already.
    if split.name != "validation":
        log.write(step, {f"{split.name}/{k}": v for k, v in result.metrics.items()})
    return result.metrics
