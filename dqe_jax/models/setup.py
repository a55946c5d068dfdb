"""The model of a config: its weights, its tokenizer and the parameters that it starts with."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from tokenizers import Tokenizer

from dqe_jax.data import tokenizer as text_tokens
from dqe_jax.data.settings import DataConfig
from dqe_jax.distributed.mesh import REMEMBERED
from dqe_jax.method.arrays import Array, Params
from dqe_jax.models import freeze, lora
from dqe_jax.models.build import DTYPES, PRETRAINED, build_model, parts_of
from dqe_jax.models.dino import DinoSizes
from dqe_jax.models.dqe import DQE
from dqe_jax.models.features import States, StoredText, given_spec
from dqe_jax.models.settings import ModelConfig
from dqe_jax.models.siglip import SiglipSizes
from dqe_jax.models.weights.initial import Pretrained, open_pretrained
from dqe_jax.models.weights.sizes import Sizes
from dqe_jax.models.weights.stacking import stack_layers
from dqe_jax.models.weights.transfer import fit
from dqe_jax.utils.errors import UserError, reason_of
from dqe_jax.utils.files import JsonObject

BACKBONE = "backbone/"
# The shortest text of a pretrained backbone has three tokens: start, one word, end.
LEAST_LENGTH = 3


def open_weights(config: ModelConfig, data: DataConfig) -> Pretrained | None:
    """The weights of a config's pretrained backbone, found but not read; None for another one.

    Args:
      config: `config.model`.
      data: `config.data`, whose images and texts must fit.

    Raises:
      UserError: they cannot be found, or do not fit the config.
    """
    if config.backbone not in PRETRAINED:
        return None
    pretrained = open_pretrained(config)
    longest = pretrained.sizes.max_length
    if data.max_length > longest:
        raise UserError(
            f"config.data.max_length is {data.max_length}: {config.backbone} takes at most "
            f"{longest} tokens."
        )
    if data.max_length < LEAST_LENGTH:
        raise UserError(
            f"config.data.max_length is {data.max_length}: {config.backbone} needs at least "
            f"{LEAST_LENGTH}, for the start, a word and the end of a text."
        )
    if data.image_size % pretrained.sizes.vision.patch_size:
        raise UserError(
            f"config.data.image_size is {data.image_size}: it must be a multiple of the patch size "
            f"of the backbone, {pretrained.sizes.vision.patch_size}."
        )
    return pretrained


def describe_weights(config: ModelConfig, data: DataConfig) -> Pretrained | None:
    """As `open_weights`; weights are looked for only if they decide the sizes of the model."""
    if config.backbone in PRETRAINED:
        section = getattr(config, config.backbone)
        if "auto" not in (section.variant, getattr(section, "text", "")):
            config = dataclasses.replace(config, weights="")
            if config.backbone == "dino":
                plain = dataclasses.replace(config.dino, text_weights="")
                config = dataclasses.replace(config, dino=plain)
    return open_weights(config, data)


def tokenizer_of(config: ModelConfig, data: DataConfig, pretrained: Pretrained) -> Tokenizer:
    """The tokenizer of a pretrained backbone, for texts of `config.data.max_length` tokens.

    Raises:
      UserError: it cannot be found, or does not fit the model.
    """
    length, named = data.max_length, config.tokenizer
    if named:
        tokenizer = text_tokens.pretrained_tokenizer(named, length)
    elif pretrained.tokenizer:
        tokenizer = _converted_tokenizer(pretrained.tokenizer, length, pretrained.origin)
    elif pretrained.source is not None:
        tokenizer = text_tokens.pretrained_tokenizer(pretrained.source.directory, length)
    else:
        raise UserError(
            f"config.model.tokenizer is empty: {config.backbone} needs a tokenizer; name a "
            "directory with its files, or config.model.weights that come with one."
        )
    sizes = pretrained.sizes
    if isinstance(sizes, DinoSizes):
        sizes = sizes.text  # whose tokenizer it is
    if isinstance(sizes, SiglipSizes):
        try:
            tokenizer = text_tokens.lower_cased_to_its_end(tokenizer)
        except ValueError as error:
            raise UserError(
                f"the tokenizer of {config.backbone} cannot be used ({error}); name that of the "
                "weights in config.model.tokenizer."
            ) from error
    # Without added tokens: published BLIP-2 files add some that no text contains.
    size = tokenizer.get_vocab_size(with_added_tokens=False)
    if size > sizes.vocab_size:
        raise UserError(
            f"the tokenizer has {size} words: the text embeddings of {config.backbone} have "
            f"{sizes.vocab_size} rows; name the tokenizer of the weights in "
            "config.model.tokenizer."
        )
    pad_id = _padding(tokenizer)["pad_id"]
    if config.backbone == "blip2" and pad_id != 0:
        raise UserError(
            f"the tokenizer pads with id {pad_id}: blip2 needs BERT's, which "
            "pads with 0; name it in config.model.tokenizer."
        )
    if isinstance(sizes, SiglipSizes) and pad_id != sizes.pad_id:
        raise UserError(
            f"the tokenizer pads with id {pad_id}: these weights of siglip were trained with "
            f"{sizes.pad_id}; name their tokenizer in config.model.tokenizer."
        )
    return tokenizer


def _converted_tokenizer(text: str, length: int, origin: str) -> Tokenizer:
    """The tokenizer that came with converted weights."""
    try:
        tokenizer = text_tokens.tokenizer_from_json(text)
        padding = _padding(tokenizer)
        return text_tokens.set_length(tokenizer, length, padding["pad_id"], padding["pad_token"])
    except Exception as error:  # tokenizers raises bare exceptions
        raise UserError(
            f"config.model.weights: the tokenizer in {origin} is damaged ({reason_of(error)}); "
            "convert the weights again."
        ) from error


def _padding(tokenizer: Tokenizer) -> JsonObject:
    """How a tokenizer pads.

    Raises:
      ValueError: it does not.
    """
    if tokenizer.padding is None:
        raise ValueError("it has no padding")
    return tokenizer.padding


def model_of(
    config: ModelConfig, data: DataConfig, tokenizer: Tokenizer, sizes: Sizes | None = None
) -> DQE:
    """The model of a config over a tokenizer's vocabulary; `sizes` are those of its weights."""
    return build_model(
        config,
        vocab_size=tokenizer.get_vocab_size(),
        max_length=data.max_length,
        image_size=data.image_size,
        sizes=sizes,
    )


def param_shapes(model: DQE, config: ModelConfig, data: DataConfig) -> Params:
    """Shapes and dtypes of a model's parameters."""
    return jax.eval_shape(lambda: init_params(model, config, data))


def init_params(
    model: DQE,
    config: ModelConfig,
    data: DataConfig,
    seed: int = 0,
    pretrained: Pretrained | None = None,
) -> Params:
    """Parameters to start from: pretrained where there are weights, random elsewhere.

    Args:
      model: of the config.
      config: `config.model`.
      data: `config.data`.
      seed: of the random ones.
      pretrained: weights of the backbone; without an origin, all is random.

    Raises:
      UserError: the weights do not fit the model.
    """
    sizes, key = (model, data.image_size, data.max_length), jax.random.key(seed)
    given: dict[str, Array] = {}
    if pretrained is not None and pretrained.origin:
        shapes = jax.eval_shape(_initializer(*sizes, frozenset()), key)
        held = pretrained.read()
        if config.scan_layers:
            held = stack_layers(held)
        own = {p.removeprefix(BACKBONE): x for p, x in shapes.items() if p.startswith(BACKBONE)}
        smooth = pretrained.sizes.vision.antialias
        fitted = fit(held, own, pretrained.origin, antialias=smooth)
        given = {BACKBONE + path: x for path, x in fitted.items()}

    flat = _initializer(*sizes, frozenset(given))(key) | given
    parts = parts_of(config.backbone)
    dtype = DTYPES[config.frozen_dtype]
    training, frozen = freeze.split(unflatten_dict(flat, sep="/"), config.frozen, parts)
    params = freeze.merge(training, jax.tree.map(lambda x: x.astype(dtype), frozen))
    targets = lora.find_targets(flat, config.lora, config.frozen, parts)
    adapters = lora.begin(flat, targets, config.lora.rank, key)
    return freeze.merge(params, unflatten_dict(adapters, sep="/"))


@functools.lru_cache(REMEMBERED)
def adapted_parts(model: DQE, config: ModelConfig, data: DataConfig) -> frozenset[str]:
    """The parts of a model that have adapters."""
    if not config.lora.rank:
        return frozenset()
    parts = parts_of(config.backbone)
    paths = flatten_dict(param_shapes(model, config, data), sep="/")
    layers = {path.rpartition("/")[0] for path in paths if lora.is_adapter(path)}
    return frozenset(freeze.part_of(f"{layer}/kernel", parts) for layer in layers)


@functools.lru_cache(REMEMBERED)
def _initializer(
    model: DQE, image_size: int, max_length: int, known: frozenset[str]
) -> Callable[[jax.Array], dict[str, Array]]:
    """Draws the parameters of a model by path; those that are known are not drawn at all."""
    ids = np.ones((1, max_length), np.int32)

    def zeros(kind: str, *axes: int) -> States:
        shapes = given_spec(model.backbone, kind, *axes)
        return {name: np.zeros(x.shape, x.dtype) for name, x in shapes.items()}

    image = zeros("image", 1) or np.zeros((1, image_size, image_size, 3), np.uint8)
    states = zeros("text", 1)
    text = StoredText(ids, states) if states else ids

    def draw(key: jax.Array) -> dict[str, Array]:
        params = model.init(key, image, text, image, train=False)["params"]
        return {path: x for path, x in flatten_dict(params, sep="/").items() if path not in known}

    return jax.jit(draw)
