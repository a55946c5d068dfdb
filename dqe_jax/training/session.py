"""A run that is set up: what the loop needs and does not change, and how its state is kept."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import TYPE_CHECKING

import jax
from absl import logging
from etils import epath
from tokenizers import Tokenizer

from dqe_jax import __version__
from dqe_jax.checkpoints import store
from dqe_jax.config import RunConfig
from dqe_jax.data import lexicon, pipeline, splits
from dqe_jax.data import tokenizer as text_tokens
from dqe_jax.data.feedback_split import with_feedback
from dqe_jax.data.packing import check_parts
from dqe_jax.data.pipeline import Images, Texts
from dqe_jax.data.splits import Split
from dqe_jax.data.text import Wordings, encode_wordings
from dqe_jax.distributed import mesh
from dqe_jax.evaluation.evaluator import Result, RetrievalEvaluator
from dqe_jax.evaluation.probability import fit
from dqe_jax.evaluation.run import make_evaluator
from dqe_jax.feature_store.features import Features, sizes_of
from dqe_jax.method.arrays import Params, Tree
from dqe_jax.models import freeze, setup
from dqe_jax.models.dqe import DQE
from dqe_jax.models.settings import ModelConfig
from dqe_jax.models.weights import sizes as size_files
from dqe_jax.models.weights.initial import Pretrained
from dqe_jax.models.weights.sizes import Sizes
from dqe_jax.training import average as averages
from dqe_jax.training import state as states
from dqe_jax.training.accumulate import Accumulation, make_accumulation
from dqe_jax.training.bank import BankKeeper, make_bank_keeper
from dqe_jax.training.prefetch import DeviceBatches, send
from dqe_jax.training.start import Start, start_from
from dqe_jax.training.state import Optimizer, TrainState
from dqe_jax.training.step import Step, make_step, uses_bank
from dqe_jax.utils.errors import UserError
from dqe_jax.utils.files import JsonObject

if TYPE_CHECKING:
    import orbax.checkpoint as ocp  # slow to import


@dataclasses.dataclass(frozen=True)
class Feedback:
    """A log of picks and rejections to learn from.

    Attributes:
      path: of the log.
      share: of the queries of an epoch that are the log's, above 0 and below 1.
    """

    path: Path
    share: float = 0.2


@dataclasses.dataclass(frozen=True)
class Session:
    """Everything that the loop needs and that does not change.

    Attributes:
      config: of the run.
      workdir: of the run.
      data_dir: of the prepared data.
      devices: of all processes.
      pretrained: weights that the run starts from, or None.
      sizes: of the model, where the config does not say them.
      tokenizer: of the texts.
      model: of the config.
      params: shapes of the parameters.
      optimizer: of the config.
      step: the mapped step, of a batch or of several, with negatives of the batch.
      bank_step: likewise, with negatives of the bank.
      keeper: of the bank; None without one.
      batches: those of training, on the devices.
      examples: of a step without padding, on average.
      queries: of an epoch.
      validation: the evaluator of the validation split.
      last: the evaluator of the split of the last evaluation.
      features: what frozen towers make of images and texts; filled by `restore_or_init`.
      data: digests of the splits that it is trained and evaluated on, by their names.
      start: what it starts from; None for fresh parameters.
    """

    config: RunConfig
    workdir: epath.Path
    data_dir: epath.Path
    devices: list[jax.Device]
    pretrained: Pretrained | None
    sizes: Sizes | None
    tokenizer: Tokenizer
    model: DQE
    params: Params
    optimizer: Optimizer
    step: Step | Accumulation
    bank_step: Step | Accumulation
    keeper: BankKeeper | None
    batches: DeviceBatches
    examples: float
    queries: int
    validation: RetrievalEvaluator
    last: RetrievalEvaluator
    features: Features
    data: dict[str, str]
    start: Start | None = None

    def evaluated(self, state: TrainState) -> Params:
        """The parameters that are evaluated: replicated, with the average if there is one."""
        return averages.evaluated(self.config, self.optimizer, state, self.devices)


def open_session(
    config: RunConfig,
    workdir: epath.Path,
    builder: splits.Builder,
    devices: list[jax.Device],
    pretrained: Pretrained | None,
    tokenizer: Tokenizer | None,
    start: Start | None = None,
    feedback: Feedback | None = None,
) -> Session:
    """Sets up a run; compiles nothing yet.

    Args:
      config: of the run.
      workdir: of the run.
      builder: of the prepared data.
      devices: of all processes.
      pretrained: weights to start from.
      tokenizer: of these weights; None makes one of the words of the training texts.
      start: what the run starts from, whose tokenizer it takes; None for fresh parameters.
      feedback: a log of picks and rejections to learn from too; None for none.

    Raises:
      UserError: the data lack something that the config asks for.
    """
    # Check now that the data for the final evaluation exist.
    last = splits.open_split(config.data, builder, config.eval.split)
    split = splits.open_split(config.data, builder, "train")
    _check_oracle(config, split)
    if feedback is not None:
        split = with_feedback(split, config.data, feedback.path, feedback.share)
        split = _usable(config, split)
    if start is not None:
        tokenizer = start.tokenizer
    if tokenizer is None:
        tokenizer = text_tokens.train_word_tokenizer(split.queries.texts, config.data.max_length)
    text = encode_wordings(tokenizer, split, config.data.captions)
    held_out = splits.open_split(config.data, builder, "validation")
    sizes = sizes_of(config, pretrained)
    model = setup.model_of(config.model, config.data, tokenizer, sizes)
    params = setup.param_shapes(model, config.model, config.data)
    features = Features(config, model, devices)
    images = features.images(split.gallery, config.data.augment)
    texts = features.texts(text)
    own = open_batches(config, split, text, tokenizer, images, texts, len(devices))
    batches = DeviceBatches(own, functools.partial(send, devices=devices))
    optimizer = states.make_optimizer(config, params, len(devices))
    keeper = None
    if uses_bank(config.negatives):
        keeper = make_bank_keeper(config, model, split, text, devices, features)
    validation = make_evaluator(config, model, tokenizer, held_out, devices, features)
    final = validation
    if last.name != held_out.name:
        final = make_evaluator(config, model, tokenizer, last, devices, features)
    _check_best(config, validation)
    step_of = make_step if config.batch.accumulate == 1 else make_accumulation
    shape, padding = own.packing.shape, own.packing.padding
    return Session(
        config=config,
        workdir=workdir,
        data_dir=epath.Path(builder.data_dir),
        devices=devices,
        pretrained=pretrained,
        sizes=sizes,
        tokenizer=tokenizer,
        model=model,
        params=params,
        optimizer=optimizer,
        step=step_of(config, model, optimizer, devices),
        bank_step=step_of(config, model, optimizer, devices, bank=True),
        keeper=keeper,
        batches=batches,
        examples=config.batch.accumulate * shape.queries * (1 - padding.queries),
        queries=len(split.queries),
        validation=validation,
        last=final,
        features=features,
        data={each.name: each.digest for each in (split, held_out, last)},
        start=start,
    )


def open_batches(
    config: RunConfig,
    split: Split,
    text: Wordings,
    tokenizer: Tokenizer,
    images: Images,
    texts: Texts,
    num_devices: int,
    *,
    say: bool = True,
) -> pipeline.TrainBatches:
    """The iterator over this process's part of the training batches, as NumPy arrays.

    Args:
      config: of the run.
      split: the training split.
      text: of its queries.
      tokenizer: of the texts.
      images: of its gallery.
      texts: of its queries, as the model takes them.
      num_devices: of all processes.
      say: whether the log says what batches are like.

    Raises:
      UserError: they cannot be divided among the devices and chunks.
    """
    words = lexicon.load_lexicon(config.data.lexicon)
    names, needed = config.model.attributes.names, None
    if _reads_words(config.model):
        needed = text_tokens.lengths_of(tokenizer, text.ids).max(axis=1)
    batches = pipeline.train_batches(
        split,
        images=images,
        texts=texts,
        mentions=lexicon.mentions(split.queries.texts, names, words),
        references=config.batch.references,
        queries_per_reference=config.batch.queries_per_reference,
        seed=config.seed,
        needed=needed,
        max_length=config.data.max_length,
        num_threads=config.data.num_threads,
        process=jax.process_index(),
        num_processes=jax.process_count(),
    )
    check_parts(batches.packing.shape, num_devices, config.batch.chunks)
    if say:
        logging.info("%s", pipeline.describe(batches, needed, config.data.max_length))
    return batches


def _reads_words(model: ModelConfig) -> bool:
    """Whether the ids of texts are read, and not features of them alone."""
    own = model.features
    return model.backbone != "features" or own.words or not own.texts


def _usable(config: RunConfig, split: Split) -> Split:
    """The split without rejections if no negatives are mined from the bank, which is said."""
    if split.rejected is None or uses_bank(config.negatives):
        return split
    logging.warning(
        "What users rejected is not used: it joins the negatives that are mined from the bank, and "
        "config.negatives.rule is %r, config.negatives.pool %r.",
        *(config.negatives.rule, config.negatives.pool),
    )
    return dataclasses.replace(split, rejected=None)


def _check_oracle(config: RunConfig, split: Split) -> None:
    """Raises a `UserError` if an oracle is asked for what the data do not say."""
    if config.negatives.oracle != "none" and not any(map(len, split.queries.relevant)):
        raise UserError(
            f"config.negatives.oracle is {config.negatives.oracle!r}: {config.data.dataset} does "
            "not say which images are truly relevant; take 'none'."
        )


def _check_best(config: RunConfig, validation: RetrievalEvaluator) -> None:
    """Raises a `UserError` if `keep_best` names a metric that validation does not measure."""
    known = validation.metric_names()
    if config.keep_best and config.keep_best not in known:
        raise UserError(
            f"config.keep_best is {config.keep_best!r}: validation measures "
            f"{', '.join(known) or 'nothing, for want of labels'}."
        )


def restore_or_init(session: Session, manager: ocp.CheckpointManager) -> tuple[TrainState, float]:
    """The state of the newest checkpoint, or a fresh one; and the seconds trained before."""
    config, keeper = session.config, session.keeper
    if manager.latest_step() is None:
        if session.start is not None:
            params = session.start.fitted(session.params)
        else:
            params = setup.init_params(
                session.model, config.model, config.data, config.seed, session.pretrained
            )
            params = start_from(config, session.features.standardize(params), session.tokenizer)
        state = states.init_state(config, session.optimizer, params, session.devices)
        session.features.fill(state.params)
        return averages.begun(config, session.optimizer, state, session.devices), 0.0
    newest, (meta, items) = store.read_chosen(
        manager, None, lambda step: _read(session, manager, step)
    )
    store.set_aside(manager, newest)
    session.batches.set_state(meta["data_state"])
    session.features.fill(mesh.replicate(items["params"], session.devices))
    if keeper is not None and "bank_params" in items:
        held = states.splitter(config.model)(items["params"])[1]
        whole = freeze.merge(items["bank_params"], held)
        keeper.refresh(mesh.replicate(whole, session.devices), meta["bank_step"])
    logging.info("Resumed from step %d of %s.", newest, manager.directory)
    state = states.place_state(
        session.optimizer, newest, items["params"], items["opt_state"], session.devices
    )
    if config.optimizer.ema_decay and "average" not in items:
        logging.info(
            "The checkpoint has no moving average of the parameters: it starts from them at step "
            "%d (config.optimizer.ema_decay).",
            newest,
        )
    saved = items.get("average")
    state = averages.begun(config, session.optimizer, state, session.devices, saved)
    return state, meta["train_seconds"]


def _read(
    session: Session, manager: ocp.CheckpointManager, step: int
) -> tuple[JsonObject, dict[str, Tree]]:
    """The meta and the items of a checkpoint.

    Raises:
      UserError: it is of other data, or damaged.
    """
    keeper = session.keeper
    like = {"params": session.params, "opt_state": session.optimizer.saved}
    meta = store.read_meta(manager, step)
    _check_data(session, manager, meta.get("data"))
    # The bank is not saved. The loop fills it if it is due now; else it is filled from its
    # snapshot.
    if keeper is not None and meta["bank_step"] is not None and not keeper.scheduled(step):
        like["bank_params"] = states.splitter(session.config.model)(session.params)[0]
    if session.optimizer.average is not None and store.has_average(meta):
        like["average"] = session.optimizer.average
    return meta, store.restore(manager, step, **like)


def _check_data(
    session: Session, manager: ocp.CheckpointManager, held: dict[str, str] | None
) -> None:
    """Raises a `UserError` if a checkpoint was trained on other data than those of the session."""
    if held is None:
        logging.warning(
            "The checkpoints in %s do not say on which data they were trained: they are of an "
            "older version.",
            manager.directory,
        )
        return
    # The split of the last evaluation may have been changed since then.
    other = [
        name for name in session.data if held.get(name, session.data[name]) != session.data[name]
    ]
    if other:
        raise UserError(
            f"the run in {session.workdir} was trained on other data than those in "
            f"{session.data_dir} (split {other[0]!r}): name its data, or take another --workdir."
        )


def save(
    session: Session,
    manager: ocp.CheckpointManager,
    state: TrainState,
    seconds: float,
    validation: Result | None,
) -> None:
    """Saves a checkpoint, with all that the run needs to go on exactly.

    Args:
      session: of the run.
      manager: of its checkpoints.
      state: to save.
      seconds: of training so far.
      validation: what the validation split gave at this step, if it was evaluated.
    """
    keeper, step = session.keeper, int(state.step)
    bank_step, snapshot = None, None
    if keeper is not None and keeper.bank is not None:
        bank_step = keeper.refreshed_at
        snapshot = None if keeper.scheduled(step) else keeper.snapshot
    probability = None
    if validation is not None:
        queries = session.validation.split.queries
        probability = fit(validation.rows, validation.scores, queries)
    meta = {
        "config": session.config.to_dict(),
        "tokenizer": session.tokenizer.to_str(),
        "sizes": session.sizes and size_files.to_json(session.sizes),
        "data_state": session.batches.get_state(),
        "bank_step": bank_step,
        "train_seconds": seconds,
        "data": session.data,
        "probability": probability and probability.to_json(),
        "version": __version__,
    }
    moments = states.state_to_save(session.optimizer, state.opt_state, session.devices)
    average = averages.average_to_save(session.optimizer, state, session.devices)
    store.save(
        manager,
        *(step, state.params, moments, meta),
        bank_params=snapshot,
        average=average,
        metrics=None if validation is None else validation.metrics,
    )
