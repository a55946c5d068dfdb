"""An exported model: a directory that `dqe_jax.load` opens without the run.

| file | what it holds |
| --- | --- |
| `dqe.json` | config of the run, sizes, attributes, preprocessing, text length, fingerprint |
| `dqe.safetensors` | parameters by path; of pretrained backbones those that `transformers` lacks |
| `model.safetensors` | pretrained backbones: the tensors that `transformers` loads |
| `config.json` | likewise: the config that `transformers` reads, where it has such a model |
| `preprocessor_config.json` | likewise: size, mean and standard deviation of the pixels |
| `text/` | DINO: the same files of its text tower |
| `tokenizer.json` | the tokenizer, as the `tokenizers` library writes it |
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
from typing import cast

import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from dqe_jax.checkpoints.names import FACTS, OWN, TOKENIZER
from dqe_jax.config import RunConfig, fields, flatten
from dqe_jax.data import tokenizer as text_tokens
from dqe_jax.method.arrays import Params
from dqe_jax.models.weights import hugging_face
from dqe_jax.models.weights import sizes as size_files
from dqe_jax.models.weights.sizes import PretrainedSizes, Sizes
from dqe_jax.models.weights.source import SINGLE, TEXT, open_source
from dqe_jax.models.weights.stacking import stack_layers, unstack_layers
from dqe_jax.models.weights.transfer import read_backbone
from dqe_jax.utils.errors import UserError, reason_of
from dqe_jax.utils.files import JsonObject, is_regular, read_json, read_text, write_json

FORMAT = 1
AGAIN = "export the run again"


@dataclasses.dataclass(frozen=True)
class Exported:
    """What an exported directory holds.

    Attributes:
      config: of the run.
      step: of the checkpoint.
      sizes: of the model, where the config does not say them.
      tokenizer: its JSON.
      params: by path, layers stacked where the config says so; dtypes are those of the files.
      fingerprint: that the export says.
      probability: curve of `evaluation/probability.py`, as JSON; None without one.
    """

    config: RunConfig
    step: int
    sizes: Sizes | None
    tokenizer: str
    params: dict[str, np.ndarray]
    fingerprint: str
    probability: JsonObject | None


def config_of(held: JsonObject) -> RunConfig:
    """The config of a run of this or an older version, from what its checkpoint holds.

    Fields that are no longer known are left out, and newer ones have their defaults.

    Raises:
      UserError: a field of it is not allowed any more.
    """
    flat = {name: -math.inf if x == "-inf" else x for name, x in flatten(held).items()}
    return RunConfig().with_changes({name: x for name, x in flat.items() if name in fields()})


def write(
    directory: pathlib.Path, params: Params, meta: JsonObject, *, step: int, fingerprint: str
) -> tuple[int, int]:
    """Writes a model; returns the numbers of tensors in Hugging Face layout and of our own.

    Args:
      directory: made if it does not exist.
      params: of the whole model, NumPy arrays.
      meta: of its checkpoint.
      step: of its checkpoint.
      fingerprint: of the model.

    Raises:
      OSError: the directory cannot be written to.
    """
    config = config_of(meta["config"])
    (directory / FACTS).unlink(missing_ok=True)  # a killed export is none
    if config.model.backbone in size_files.SIZES:
        counts = hugging_face.write(directory, params, meta)
    else:
        directory.mkdir(parents=True, exist_ok=True)
        flat = flatten_dict(params, sep="/")
        own = {path: np.array(x, np.float32, order="C") for path, x in flat.items()}
        save_file(own, directory / OWN)
        (directory / TOKENIZER).write_text(meta["tokenizer"])
        counts = 0, len(own)
    attributes = config.model.attributes
    facts = {
        "format": FORMAT,
        "backbone": config.model.backbone,
        "attributes": list(attributes.names) if attributes.enabled else [],
        "image_size": config.data.image_size,
        "preprocess": config.data.preprocess,
        "max_length": config.data.max_length,
        "step": step,
        "fingerprint": fingerprint,
        "sizes": meta["sizes"],
        "probability": meta.get("probability"),
        "config": _json_of(config),
    }
    write_json(epath.Path(directory / FACTS), facts)
    return counts


def _json_of(config: RunConfig) -> JsonObject:
    """The config as JSON can hold it, with "-inf" for the number."""
    flat = flatten(config.to_dict())
    return unflatten_dict({n: "-inf" if x == -math.inf else x for n, x in flat.items()}, sep=".")


def words_of(directory: epath.Path, held: Exported) -> Tokenizer:
    """The tokenizer of an exported model that `read` has read.

    Raises:
      UserError: it is damaged.
    """
    try:
        return text_tokens.tokenizer_from_json(held.tokenizer)
    except Exception as error:  # tokenizers raises bare exceptions
        raise UserError(
            f"{directory / TOKENIZER} is damaged ({reason_of(error)}): {AGAIN}."
        ) from error


def is_exported(directory: epath.Path) -> bool:
    """Whether a directory was written by `write`."""
    return (directory / FACTS).exists()


def read(directory: epath.Path) -> Exported:
    """Reads an exported model from a disk of this machine.

    Raises:
      UserError: a file is missing or damaged, or of a newer version.
    """
    path = directory / FACTS
    facts = read_json(path, dict, AGAIN)
    if facts.get("format") != FORMAT:
        raise UserError(
            f"{path} has format {facts.get('format')!r:.20}, and this version of dqe_jax reads "
            f"format {FORMAT}: {AGAIN} with it."
        )
    try:
        config = config_of(facts["config"])
        sizes = facts["sizes"] and size_files.from_json(config.model.backbone, facts["sizes"])
        step, fingerprint = int(facts["step"]), str(facts["fingerprint"])
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{path} is damaged ({reason_of(error)}): {AGAIN}.") from error
    own = directory / OWN
    try:
        if not is_regular(own):  # a pipe would be read for ever
            raise OSError("it is no regular file")
        flat = load_file(own)
    except Exception as error:  # safetensors raises errors of its own
        raise UserError(f"{own} cannot be read ({reason_of(error)}): {AGAIN}.") from error
    if config.model.backbone in size_files.SIZES:
        flat |= _backbone(directory, config, cast(PretrainedSizes, sizes), flat)
    if config.model.scan_layers:
        flat = flatten_dict(stack_layers(unflatten_dict(flat, sep="/")), sep="/")
    words, probability = read_text(directory / TOKENIZER), facts.get("probability")
    return Exported(config, step, sizes, words, flat, fingerprint, probability)


def _backbone(
    directory: epath.Path, config: RunConfig, sizes: PretrainedSizes, own: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Parameters in the layout of Hugging Face, by path in the whole model."""
    source = open_source(str(directory / SINGLE))
    if config.model.backbone == "dino":
        texts = open_source(str(directory / TEXT / SINGLE))
        source = dataclasses.replace(source, files=source.files | texts.files)
    held = flatten_dict(
        unstack_layers(read_backbone(source, config.model.backbone, sizes)), sep="/"
    )
    return {f"backbone/{path}": x for path, x in held.items() if f"backbone/{path}" not in own}
