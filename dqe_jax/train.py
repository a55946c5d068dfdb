"""The training loop: prepare, restore or initialise, step, log, evaluate, save."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from typing import Any

import jax
import jax.numpy as jnp
import tqdm
from absl import logging
from etils import epath
from tokenizers import Tokenizer

from dqe_jax import checkpoint, evaluators, models, parallel, partition, programs, run_setup
from dqe_jax.bank import BankKeeper
from dqe_jax.config import check_batch, check_config, differences
from dqe_jax.data import datasets, lexicon, pipeline
from dqe_jax.data import tokenizer as text_tokens
from dqe_jax.data.annotations import BENCHMARKS
from dqe_jax.optimizer import make_optimizer, make_schedule
from dqe_jax.train_step import TrainState
from dqe_jax.utils.errors import UserError
from dqe_jax.utils.metric_log import MetricLog
from dqe_jax.weights import sizes as size_files
from dqe_jax.weights.initial import Pretrained


def train_and_evaluate(
    config: Any, workdir: str | os.PathLike[str], *, stop_at: int | None = None
) -> dict[str, float]:
    """Trains by a config, resuming what the workdir holds, and evaluates on the last split.

    Args:
      config: see `configs/common.py`.
      workdir: gets `config.json`, `checkpoints/`, `metrics.jsonl`, `events/` and `eval/`.
      stop_at: ends after this step as if the run were interrupted there: a checkpoint is saved, the
        same command without it goes on.

    Returns:
      The metrics of `config.eval.split`, or of the last validation if `stop_at` ended the run.

    Raises:
      UserError: for everything that a user can put right, before training starts.
    """
    began = time.time()
    check_config(config)
    partition.check_frozen(config.model.frozen, models.parts_of(config.model.backbone))
    devices = run_setup.devices_of(config.num_devices)
    check_batch(config, len(devices))
    if config.data.dataset in BENCHMARKS:
        datasets.find_dataset(config.data)  # before weights are downloaded for nothing
    workdir = claim_workdir(workdir, config)
    pretrained = run_setup.open_weights(config)
    tokenizer = run_setup.tokenizer_of(config, pretrained) if pretrained else None
    builder = datasets.open_dataset(config.data)
    run = _prepare(config, builder, devices, pretrained, tokenizer)

    manager = checkpoint.open_for_training(workdir, config.keep_checkpoints)
    state, seconds = _restore_or_init(run, manager)
    start, end = int(state.step), min(stop_at or config.total_steps, config.total_steps)
    log = MetricLog(workdir, resume_step=start)
    try:
        if start == 0:
            _log_start(run, state.params)
        logging.info("Ready after %.0f s; the first step compiles.", time.time() - began)
        state, measured = _loop(run, state, end, manager, log, seconds)
        manager.wait_until_finished()
        if end < config.total_steps:
            return measured
        return _final_evaluation(run, state, workdir, log)
    finally:
        log.close()
        manager.close()


def claim_workdir(workdir: str | os.PathLike[str], config: Any) -> epath.Path:
    """Makes the workdir and writes `config.json` there.

    Raises:
      UserError: it is not writable, or holds a run of another config.
    """
    path = epath.Path(workdir).expanduser().absolute()
    file = path / "config.json"
    try:
        path.mkdir(parents=True, exist_ok=True)
        if file.exists() and _has_trained(path):
            held = json.loads(file.read_text())
            changed = differences(config.to_dict(), held)
            if changed:
                raise UserError(
                    f"{path} holds a run of another config; it differs in {'; '.join(changed)}: "
                    "take another --workdir, or the config of that run."
                )
        file.write_text(json.dumps(config.to_dict(), indent=2) + "\n")
    except OSError as error:
        raise UserError(
            f"--workdir: cannot write to {path} ({error.strerror}); name a writable directory."
        ) from error
    except json.JSONDecodeError as error:
        raise UserError(
            f"{file} is not JSON ({error}); remove it or take another --workdir."
        ) from error
    return path


def _has_trained(workdir: epath.Path) -> bool:
    """Whether there is a checkpoint: a run that ended before its first one is no obstacle."""
    root = workdir / "checkpoints"
    return root.is_dir() and any(child.name.isdigit() for child in root.iterdir())


@dataclasses.dataclass(frozen=True)
class Run:
    """All that the loop needs and that does not change."""

    config: Any
    devices: list[jax.Device]
    pretrained: Pretrained | None
    tokenizer: Any
    model: Any
    tx: Any
    step: Any
    bank_step: Any
    keeper: BankKeeper | None
    batches: Any
    validation: evaluators.RetrievalEvaluator
    last: pipeline.Split


def _prepare(
    config: Any,
    builder: Any,
    devices: list[jax.Device],
    pretrained: Pretrained | None,
    tokenizer: Tokenizer | None,
) -> Run:
    data = config.data
    # What the end of the run needs must be there now.
    last = run_setup.open_split(config, builder, config.eval.split)
    split = run_setup.open_split(config, builder, "train")
    words = lexicon.load_lexicon(data.lexicon)
    names = config.model.attributes.names
    mentions = lexicon.mentions(split.queries.texts, names, words)
    if tokenizer is None:
        tokenizer = text_tokens.train_word_tokenizer(split.queries.texts, data.max_length)
    text = run_setup.encode_wordings(tokenizer, split, data.captions)
    held_out = run_setup.open_split(config, builder, "validation")
    model = run_setup.model_of(config, tokenizer, pretrained and pretrained.sizes)
    tx = make_optimizer(config.optimizer, config.total_steps)

    keeper = None
    if programs.uses_bank(config.negatives):
        keeper = run_setup.make_bank_keeper(config, model, split, text[:, 0], devices)
    batches = pipeline.train_batches(
        split,
        text=text,
        mentions=mentions,
        references=config.batch.references,
        queries_per_reference=config.batch.queries_per_reference,
        augment=data.augment,
        seed=config.seed,
        num_threads=data.num_threads,
    )
    validation = run_setup.make_evaluator(config, model, tokenizer, held_out, devices)
    return Run(
        config=config,
        devices=devices,
        pretrained=pretrained,
        tokenizer=tokenizer,
        model=model,
        tx=tx,
        step=programs.make_step(config, model, tx, devices),
        bank_step=programs.make_step(config, model, tx, devices, bank=True),
        keeper=keeper,
        batches=batches,
        validation=validation,
        last=last,
    )


def _restore_or_init(run: Run, manager: Any) -> tuple[TrainState, float]:
    """The state of the newest checkpoint, or a fresh one; and the seconds trained before."""
    split, newest = programs.splitter(run.config.model), manager.latest_step()
    if newest is None:
        params = run_setup.init_params(run.model, run.config, run.config.seed, run.pretrained)
        opt_state = jax.jit(run.tx.init)(split(params)[0])
        step, seconds = 0, 0.0
    else:
        params = run_setup.param_shapes(run.model, run.config)
        opt_state = jax.eval_shape(run.tx.init, split(params)[0])
        meta = checkpoint.read_meta(manager, newest)
        items = checkpoint.restore(manager, newest, params=params, opt_state=opt_state)
        params, opt_state = items["params"], items["opt_state"]
        run.batches.set_state(meta["data_state"])
        step, seconds = newest, meta["train_seconds"]
        logging.info("Resumed from step %d of %s.", step, manager.directory)
    state = TrainState(jnp.asarray(step, jnp.int32), params, opt_state)
    return parallel.replicate(state, run.devices), seconds


def _log_start(run: Run, params: Any) -> None:
    logging.info("Devices: %s", ", ".join(str(device) for device in run.devices))
    logging.info("%s", run_setup.parameter_table(params, run.config.model))


def _loop(
    run: Run, state: TrainState, end: int, manager: Any, log: MetricLog, seconds: float
) -> tuple[TrainState, dict[str, float]]:
    """Takes the steps up to `end`; time spent evaluating and saving is not counted as training."""
    config, measured = run.config, {}
    schedule = make_schedule(config.optimizer, config.total_steps)
    per_step = config.batch.references * config.batch.queries_per_reference
    start = int(state.step)
    bar = tqdm.tqdm(
        initial=start, total=config.total_steps, desc="train", unit="step", dynamic_ncols=True
    )
    clock, mark, counted = time.time(), seconds, start
    for step in range(start + 1, end + 1):
        refreshed = run.keeper is not None and run.keeper.due(step - 1)
        if refreshed:
            run.keeper.refresh(state.params, step - 1)
        state, metrics = _take_step(run, state, next(run.batches))
        bar.update()
        last = step == end
        # On both sides of a refresh, to show how far the bank had aged.
        due = run.keeper is not None and run.keeper.due(step)
        if step % config.log_every == 0 or last or refreshed or due:
            values = {name: float(value) for name, value in jax.device_get(metrics).items()}
            seconds, clock = seconds + time.time() - clock, time.time()
            rate = (step - counted) * per_step / max(seconds - mark, 1e-9)
            mark, counted = seconds, step
            values |= {
                "learning_rate": float(schedule(step - 1)),
                "examples_per_second": rate,
                "train_seconds": seconds,
            }
            log.write(step, values)
            bar.set_postfix(loss=f"{values['loss']:.3f}", examples_s=f"{rate:.0f}")
        evaluate = step % config.eval_every == 0 or last
        save = step % config.checkpoint_every == 0 or last
        if evaluate or save:
            jax.block_until_ready(state)
            seconds += time.time() - clock
            if save:
                meta = _meta(run, seconds)
                checkpoint.save(manager, step, state.params, state.opt_state, meta)
            if evaluate:
                measured = run.validation.run(state.params).metrics
                log.write(step, {f"validation/{k}": v for k, v in measured.items()})
                headline = run.validation.protocol.headline
                shown = {k: round(measured[k], 4) for k in headline if k in measured}
                bar.write(f"step {step}, validation: {shown}")
            clock = time.time()
    bar.close()
    return state, measured


def _take_step(run: Run, state: TrainState, batch: dict[str, Any]) -> tuple[TrainState, Any]:
    """One step, with negatives of the bank as soon as there is one."""
    if run.keeper is None or run.keeper.bank is None:
        return run.step(state, parallel.shard(batch, parallel.count_own(run.devices)))
    batch = run.keeper.add_mined(batch)
    return run.bank_step(
        state, parallel.shard(batch, parallel.count_own(run.devices)), run.keeper.bank
    )


def _meta(run: Run, seconds: float) -> dict[str, Any]:
    """What is saved with a checkpoint beside the arrays."""
    return {
        "config": run.config.to_dict(),
        "tokenizer": run.tokenizer.to_str(),
        "sizes": run.pretrained and size_files.to_json(run.pretrained.sizes),
        "data_state": run.batches.get_state(),
        "train_seconds": seconds,
    }


def _final_evaluation(
    run: Run, state: TrainState, workdir: epath.Path, log: MetricLog
) -> dict[str, float]:
    split, step = run.last, int(state.step)
    evaluator = run_setup.make_evaluator(run.config, run.model, run.tokenizer, split, run.devices)
    result = run_setup.evaluate_and_report(
        run.config, evaluator, state.params, step=step, directory=workdir / "eval"
    )
    # Of the validation split there is a line already.
    if split.name != "validation":
        log.write(step, {f"{split.name}/{k}": v for k, v in result.metrics.items()})
    return result.metrics
