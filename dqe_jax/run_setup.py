"""What training and evaluation set up alike: devices, text and the model of a config."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from tokenizers import Tokenizer

from dqe_jax.checkpoints import store
from dqe_jax.config import MODEL_FIELDS, START_FIELDS, differences, flatten
from dqe_jax.data import tokenizer as text_tokens
from dqe_jax.data.annotations import hp_fashioniq
from dqe_jax.data.annotations.hp_fashioniq import Judgement
from dqe_jax.data.pipeline import Split, known_positives, load_split, photo_ids
from dqe_jax.data.transforms import join_captions
from dqe_jax.distributed import mesh, processes
from dqe_jax.evaluation import protocols, report
from dqe_jax.evaluation.evaluator import Result, RetrievalEvaluator
from dqe_jax.models import DQE, DTYPES, build_model, freeze, parts_of
from dqe_jax.models.weights import sizes as size_files
from dqe_jax.models.weights.initial import Pretrained, open_pretrained
from dqe_jax.models.weights.stacking import stack_layers
from dqe_jax.models.weights.transfer import fit
from dqe_jax.training import state
from dqe_jax.training.bank import BankKeeper
from dqe_jax.utils.errors import UserError

BACKBONE = "backbone/"
# Tokens of the shortest text of a pretrained backbone: its start, a word, its end.
LEAST_LENGTH = 3


def devices_of(num_devices: int) -> list[jax.Device]:
    """The first `num_devices` devices; all of all processes for 0.

    Raises:
      UserError: there are fewer, or several processes that would not all take part.
    """
    devices = mesh.all_devices()
    if num_devices > len(devices):
        raise UserError(
            f"config.num_devices is {num_devices}: this run has {len(devices)} devices."
        )
    if num_devices not in (0, len(devices)) and jax.process_count() > 1:
        raise UserError(
            f"config.num_devices is {num_devices}: with several processes all {len(devices)} "
            "devices take part; set it to 0."
        )
    return devices[:num_devices] if num_devices else devices


def open_split(config: Any, builder: Any, name: str) -> Split:
    """A split of the data set of a config; captions are in order where training draws the order."""
    data = config.data
    order = "forward" if data.captions == "random" else data.captions
    return load_split(builder, name, data.image_size, data.cache_images, order)


def encode_wordings(tokenizer: Tokenizer, split: Split, captions: str) -> np.ndarray:
    """Ids of the texts that training draws from, int32 `[Q, V, L]`: two orders for "random"."""
    ids = [encode_texts(tokenizer, split)]
    if captions == "random":
        other = [join_captions(texts, "reverse") for texts in split.queries.captions]
        ids.append(text_tokens.encode(tokenizer, other)[0])
    return np.stack(ids, axis=1)


def encode_texts(tokenizer: Tokenizer, split: Split) -> np.ndarray:
    """Ids of a split's texts, int32 `[Q, L]`; says how many texts were cut."""
    ids, cut = text_tokens.encode(tokenizer, split.queries.texts)
    rows = np.flatnonzero(cut)
    if len(rows):
        logging.warning(
            "%d of %d texts of %s are cut to %d tokens, such as %r: raise config.data.max_length.",
            *(len(rows), len(ids), split.name, ids.shape[1], split.queries.texts[rows[0]]),
        )
    return ids


def open_weights(config: Any) -> Pretrained | None:
    """The pretrained weights of a config, found but not read; None for the tiny backbone.

    Raises:
      UserError: they cannot be found, or do not fit the config.
    """
    if config.model.backbone == "tiny":
        return None
    pretrained = open_pretrained(config.model)
    longest = pretrained.sizes.max_length
    if config.data.max_length > longest:
        raise UserError(
            f"config.data.max_length is {config.data.max_length}: {config.model.backbone} takes "
            f"at most {longest} tokens."
        )
    if config.data.max_length < LEAST_LENGTH:
        raise UserError(
            f"config.data.max_length is {config.data.max_length}: {config.model.backbone} needs at "
            f"least {LEAST_LENGTH}, for the start, a word and the end of a text."
        )
    if config.data.image_size % pretrained.sizes.vision.patch_size:
        raise UserError(
            f"config.data.image_size is {config.data.image_size}: it must be a multiple of the "
            f"patch size of the backbone, {pretrained.sizes.vision.patch_size}."
        )
    return pretrained


def describe_weights(config: Any) -> Pretrained | None:
    """As `open_weights`; weights are looked for only if they decide the sizes of the model."""
    if config.model.backbone != "tiny" and config.model[config.model.backbone].variant != "auto":
        config = config.copy_and_resolve_references()
        config.model.weights = ""
    return open_weights(config)


def tokenizer_of(config: Any, pretrained: Pretrained) -> Tokenizer:
    """The tokenizer of a pretrained backbone.

    Raises:
      UserError: it cannot be found, or does not fit the model.
    """
    length = config.data.max_length
    named = config.model.tokenizer
    if named:
        tokenizer = text_tokens.pretrained_tokenizer(named, length)
    elif pretrained.tokenizer:
        tokenizer = text_tokens.tokenizer_from_json(pretrained.tokenizer)
        padding = tokenizer.padding
        text_tokens.set_length(tokenizer, length, padding["pad_id"], padding["pad_token"])
    elif pretrained.source is not None:
        tokenizer = text_tokens.pretrained_tokenizer(pretrained.source.directory, length)
    else:
        raise UserError(
            f"config.model.tokenizer is empty: {config.model.backbone} needs a tokenizer; name a "
            "directory with its files, or config.model.weights that come with one."
        )
    # Without added tokens: published BLIP-2 files add some that no text contains.
    size = tokenizer.get_vocab_size(with_added_tokens=False)
    if size > pretrained.sizes.vocab_size:
        raise UserError(
            f"the tokenizer has {size} words: the text embeddings of {config.model.backbone} have "
            f"{pretrained.sizes.vocab_size} rows; name the tokenizer of the weights in "
            "config.model.tokenizer."
        )
    if config.model.backbone == "blip2" and tokenizer.padding["pad_id"] != 0:
        raise UserError(
            f"the tokenizer pads with id {tokenizer.padding['pad_id']}: blip2 needs BERT's, which "
            "pads with 0; name it in config.model.tokenizer."
        )
    return tokenizer


def model_of(config: Any, tokenizer: Tokenizer, sizes: Any = None) -> DQE:
    """The model of a config over a tokenizer's vocabulary; `sizes` are those of its weights."""
    return build_model(
        config.model,
        vocab_size=tokenizer.get_vocab_size(),
        max_length=config.data.max_length,
        image_size=config.data.image_size,
        sizes=sizes,
    )


@dataclasses.dataclass(frozen=True)
class Trained:
    """A checkpoint and the model it is of.

    Attributes:
      config: of the caller.
      trained_by: config of the run, as a nested dict.
      manager: of the run's checkpoints.
      step: of the checkpoint.
      model: as the config and the checkpoint say.
      tokenizer: of the checkpoint.
      devices: to run on.
    """

    config: Any
    trained_by: dict[str, Any]
    manager: Any
    step: int
    model: DQE
    tokenizer: Tokenizer
    devices: list[jax.Device]

    @property
    def directory(self) -> epath.Path:
        """Of the checkpoints."""
        return self.manager.directory

    @property
    def output(self) -> epath.Path:
        """Where results go: `eval/`, or a place of its own for what the run was not trained on."""
        names = ("data.dataset", "data.variant", "eval.protocol")
        own, run = (flatten(c) for c in (self.config.to_dict(), self.trained_by))
        # A field that the run did not have yet is no difference.
        other = [own[name] for name in names if own[name] != run.get(name, own[name])]
        return self.directory.parent / "-".join(["eval", *other])

    def read_params(self) -> Any:
        """The parameters alone, replicated over the devices."""
        shapes = param_shapes(self.model, self.config)
        params = store.restore(self.manager, self.step, params=shapes)["params"]
        return mesh.replicate(params, self.devices)


def open_trained(config: Any, directory: str, step: int | None) -> Trained:
    """Opens a checkpoint; its parameters are read later.

    Args:
      config: must agree with that of the checkpoint in what the model depends on.
      directory: a workdir, or its `checkpoints` directory.
      step: of the checkpoint; None for the newest.

    Raises:
      UserError: there is no such checkpoint, or it is of another model.
    """
    manager = store.open_for_reading(directory)
    step = store.choose_step(manager, step)
    meta = store.read_meta(manager, step)
    changed = differences(config.to_dict(), meta["config"], MODEL_FIELDS, START_FIELDS)
    if changed:
        raise UserError(
            f"the checkpoint in {manager.directory} is of another model; --config differs in "
            f"{'; '.join(changed)}."
        )
    devices = devices_of(config.num_devices)
    words = text_tokens.tokenizer_from_json(meta["tokenizer"])
    sizes = meta["sizes"] and size_files.from_json(config.model.backbone, meta["sizes"])
    model = model_of(config, words, sizes)
    return Trained(config, meta["config"], manager, step, model, words, devices)


def param_shapes(model: DQE, config: Any) -> Any:
    """Shapes and dtypes of a model's parameters."""
    return jax.eval_shape(lambda: init_params(model, config))


def init_params(
    model: DQE, config: Any, seed: int = 0, pretrained: Pretrained | None = None
) -> Any:
    """Parameters to start from: pretrained where there are weights, random elsewhere.

    Args:
      model: of the config.
      config: of the run.
      seed: of the random ones.
      pretrained: weights of the backbone; without an origin, all is random.

    Raises:
      UserError: the weights do not fit the model.
    """
    size = config.data.image_size
    image = np.zeros((1, size, size, 3), np.uint8)
    text = np.ones((1, 1, config.data.max_length), np.int32)

    def init(key: jax.Array) -> Any:
        return model.init(key, image, text, image[:, None], train=False)["params"]

    given = {}
    if pretrained is not None and pretrained.origin:
        shapes = flatten_dict(jax.eval_shape(init, jax.random.key(seed)), sep="/")
        held = pretrained.read()
        if config.model.scan_layers:
            held = stack_layers(held)
        own = {p.removeprefix(BACKBONE): x for p, x in shapes.items() if p.startswith(BACKBONE)}
        fitted = fit(held, own, pretrained.origin)
        given = {BACKBONE + path: x for path, x in fitted.items()}

    def missing(key: jax.Array) -> Any:  # what is given is not drawn at all
        return {p: x for p, x in flatten_dict(init(key), sep="/").items() if p not in given}

    flat = jax.jit(missing)(jax.random.key(seed)) | given
    parts = parts_of(config.model.backbone)
    dtype = DTYPES[config.model.frozen_dtype]
    training, frozen = freeze.split(unflatten_dict(flat, sep="/"), config.model.frozen, parts)
    return freeze.merge(training, jax.tree.map(lambda x: x.astype(dtype), frozen))


def make_evaluator(
    config: Any, model: DQE, tokenizer: Tokenizer, split: Split, devices: list[jax.Device]
) -> RetrievalEvaluator:
    """The evaluator of a split; it takes parameters."""
    encode_query, encode_gallery = encoders(model)
    return RetrievalEvaluator(
        split=split,
        text=encode_texts(tokenizer, split),
        encode_query=encode_query,
        encode_gallery=encode_gallery,
        batch_size=config.eval.batch_size,
        top_k=config.eval.top_k,
        devices=devices,
        protocol=protocols.protocol_of(config.data.dataset, config.eval.protocol),
    )


def make_bank_keeper(
    config: Any, model: DQE, split: Split, text: np.ndarray, devices: list[jax.Device]
) -> BankKeeper:
    """The keeper of the bank of a split; `text` int32 `[n, L]` are its queries' texts."""
    encode_query, encode_gallery = encoders(model)
    never = known_positives(split)
    if config.negatives.oracle != "none":
        never = np.concatenate([never, photo_ids(split, split.queries.valid)], axis=1)
    return BankKeeper(
        split=split,
        text=text,
        known_positives=never,
        encode_query=encode_query,
        encode_gallery=encode_gallery,
        trained=lambda params: state.splitter(config.model)(params)[0],
        negatives=config.negatives,
        seed=config.seed,
        batch_size=config.eval.batch_size,
        devices=devices,
    )


def encoders(model: DQE) -> tuple[Callable[..., Any], Callable[..., jax.Array]]:
    """The two entry points as functions of parameters."""

    def encode_query(params, image, text):
        return model.apply({"params": params}, image, text, method="encode_query")

    def encode_gallery(params, image):
        return model.apply({"params": params}, image, method="encode_gallery")

    return encode_query, encode_gallery


def count_parameters(params: Any, parts: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """Number of parameters of each part, in the order of `parts`; parts without any are left out.

    Args:
      params: of a model, or their shapes.
      parts: as `models.parts_of` gives.
    """
    counts = dict.fromkeys(parts, 0)
    for path, leaf in flatten_dict(params, sep="/").items():
        counts[freeze.part_of(path, parts)] += math.prod(leaf.shape)
    return {part: count for part, count in counts.items() if count}


def parameter_table(params: Any, config: Any) -> str:
    """Parameters of each part and whether they train, as lines of text.

    Args:
      params: of a model, or their shapes.
      config: `config.model`.
    """
    counts = count_parameters(params, parts_of(config.backbone))
    frozen = set(config.frozen) & set(counts)
    rows = [(p, f"{n:,}", "frozen" if p in frozen else "trains") for p, n in counts.items()]
    training = sum(n for part, n in counts.items() if part not in frozen)
    rows.append(("total", f"{sum(counts.values()):,}", f"{training:,} train"))
    widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
    lines = [f"  {a:<{widths[0]}}  {b:>{widths[1]}}  {c}" for a, b, c in rows]
    return "\n".join(["Parameters:", *lines])


def evaluate_and_report(
    config: Any, evaluator: RetrievalEvaluator, params: Any, *, step: int, directory: epath.Path
) -> Result:
    """Evaluates, writes the files of `report.py`, and logs the table and the queries drawn.

    Args:
      config: of the run.
      evaluator: of the split.
      params: of the model.
      step: of the checkpoint.
      directory: where the files go.

    Raises:
      UserError: the directory is not writable, or a submission would be refused.
    """
    result = evaluator.run(params, baselines=True)
    if not processes.leads():
        return result
    report.write_report(
        evaluator,
        result,
        directory,
        f"{evaluator.split.name}-{step}",
        dataset=config.data.dataset,
        step=step,
        attributes=config.model.attributes.names if config.model.attributes.enabled else (),
        sheet_queries=config.eval.sheet_queries,
    )
    return result


def open_preferences(config: Any, split: Split, path: str) -> tuple[list[Judgement], int]:
    """The judgements of HP-FashionIQ whose images are all at hand, and how many there are in all.

    Raises:
      UserError: the file cannot be read, or the split is not FashionIQ's validation split.
    """
    if (config.data.dataset, split.name) != ("fashioniq", "validation"):
        raise UserError(
            f"--hp_fashioniq judges images of FashionIQ's val split, not {split.name} of "
            f"{config.data.dataset}: take --config=configs/fiq.py --split=val."
        )
    judgements = hp_fashioniq.read(epath.Path(path))
    known = set(split.gallery.ids)
    usable = [j for j in judgements if known >= {j.reference, *j.first, *j.second}]
    if not usable:
        raise UserError(f"{path}: none of the images it names is at hand.")
    return usable, len(judgements)


def measure_preferences(
    evaluator: RetrievalEvaluator,
    tokenizer: Tokenizer,
    params: Any,
    judged: tuple[list[Judgement], int],
    path: epath.Path,
) -> dict[str, float]:
    """The metrics of HP-FashionIQ, written to `path` and logged.

    Args:
      evaluator: of FashionIQ's validation split.
      tokenizer: of the model.
      params: replicated over the devices.
      judged: of `open_preferences`.
      path: a .json.
    """
    judgements, official = judged
    row = {image: i for i, image in enumerate(evaluator.split.gallery.ids)}
    ids, _ = text_tokens.encode(tokenizer, [j.text for j in judgements])
    candidates = np.array([[row[image] for image in (*j.first, *j.second)] for j in judgements])
    reference = np.array([row[j.reference] for j in judgements])
    scores = evaluator.score_rows(params, reference, ids, candidates)
    first, second = np.split(scores, 2, axis=1)
    preferred = np.array([j.preferred for j in judgements])
    found = protocols.preference_metrics(first, second, preferred) | {"official": official}
    report.write_json(path, found)
    logging.info(
        "HP-FashionIQ, %d of %d judgements:\n%s", len(judgements), official, json.dumps(found)
    )
    return found
