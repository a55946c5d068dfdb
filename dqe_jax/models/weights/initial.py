"""The weights that a run starts from: what `config.model.weights` names.

That is a Hugging Face model (a directory, a file, or an id on the hub) or a directory written by
`python -m dqe_jax.convert`: Orbax parameters in `params/`, and `weights.json` with their sizes and
the tokenizer.
"""

from __future__ import annotations

import dataclasses
from typing import cast

import jax
import numpy as np
from etils import epath

from dqe_jax.method.arrays import Params
from dqe_jax.models import dino
from dqe_jax.models.build import named_sizes
from dqe_jax.models.clip import ClipSizes
from dqe_jax.models.dino import DinoSizes
from dqe_jax.models.settings import ModelConfig
from dqe_jax.models.siglip import SiglipSizes
from dqe_jax.models.weights import sizes as size_files
from dqe_jax.models.weights.source import Source, open_source
from dqe_jax.models.weights.transfer import layout_of, read_backbone
from dqe_jax.utils.errors import UserError, reason_of
from dqe_jax.utils.files import read_json
from dqe_jax.utils.paths import whole_path

FACTS, PARAMS = "weights.json", "params"


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """What is known of a run's weights before they are read.

    Attributes:
      backbone: "clip", "siglip", "dino" or "blip2".
      sizes: of the model.
      origin: what the config names; "" for random weights.
      tokenizer: JSON of the tokenizer, if it comes with converted weights.
      source: opened Hugging Face weights, or None.
    """

    backbone: str
    sizes: size_files.PretrainedSizes
    origin: str = ""
    tokenizer: str | None = None
    source: Source | None = None

    def read(self) -> Params:
        """The backbone's parameters as a nested dict, layers not scanned.

        Raises:
          UserError: they do not fit the sizes, or cannot be read.
        """
        import orbax.checkpoint as ocp  # slow

        if self.source is not None:
            return read_backbone(self.source, self.backbone, self.sizes)
        directory = whole_path(self.origin) / PARAMS
        try:
            restored = ocp.StandardCheckpointer().restore(directory)
        except Exception as error:
            raise UserError(
                f"config.model.weights: {directory} cannot be restored "
                f"({reason_of(error)}); convert the weights again."
            ) from error
        return jax.tree.map(np.asarray, restored)


def open_pretrained(config: ModelConfig) -> Pretrained:
    """Finds the weights of a config and their sizes; reads no tensor yet.

    Args:
      config: `config.model` of a pretrained backbone.

    Raises:
      UserError: they cannot be found, or are of another model.
    """
    backbone, origin = config.backbone, config.weights
    section = getattr(config, backbone)
    variant, text = section.variant, getattr(section, "text", "")
    text_origin = getattr(section, "text_weights", "")
    named = named_sizes(backbone, variant, text)
    if not origin and not text_origin:
        if named is None:
            field = "variant" if variant == "auto" else "text"
            raise UserError(
                f"config.model.{backbone}.{field} is 'auto', which takes the sizes of "
                "config.model.weights: name weights, or a variant."
            )
        return Pretrained(backbone, named)
    facts = epath.Path(origin).expanduser() / FACTS
    if origin and facts.exists():
        kind, held, tokenizer = _read_facts(facts)
        if kind != backbone:
            raise UserError(
                f"config.model.weights: {origin} holds weights of {kind!r}; "
                f"config.model.backbone is {backbone!r}."
            )
        if named not in (None, held):
            raise UserError(
                f"config.model.weights: {origin} is not of config.model.{backbone}.variant "
                f"{variant!r}; 'auto' takes the sizes of the weights."
            )
        return Pretrained(backbone, held, origin, tokenizer)
    if backbone == "dino":
        return open_dino(origin, text_origin, variant, text)
    source = open_source(origin)
    sizes = named or size_files.from_hugging_face(backbone, source.config, origin, source.processor)
    layout_of(source, backbone, sizes)  # raises now what reading would raise later
    return Pretrained(backbone, sizes, origin, source=source)


def open_dino(origin: str, text_origin: str, variant: str, text: str) -> Pretrained:
    """Finds the weights of a DINO tower and of a text tower; reads no tensor yet.

    Args:
      origin: of the tower.
      text_origin: of the CLIP or SigLIP model whose text tower and tokenizer are taken.
      variant: of `dino.TOWERS`, or "auto": as its config.json says.
      text: of `dino.TEXTS`, or "auto", likewise.

    Raises:
      UserError: they cannot be found, or are of another model.
    """
    if not origin or not text_origin:
        field = "text_weights" if origin else "weights"
        raise UserError(
            f"config.model.{'dino.' if origin else ''}{field} is empty: the backbone 'dino' takes "
            "its image tower from config.model.weights and its text tower from "
            "config.model.dino.text_weights; name both, or neither."
        )
    images, texts = open_source(origin), open_source(text_origin)
    other: ClipSizes | SiglipSizes | None = dino.TEXTS.get(text)
    if other is None:
        kind = size_files.backbone_of(texts.config, text_origin) if texts.config else ""
        if kind not in ("clip", "siglip"):
            raise UserError(
                f"config.model.dino.text_weights: {text_origin} is no CLIP or SigLIP model with a "
                "config.json; name one, or its variant in config.model.dino.text."
            )
        found = size_files.from_hugging_face(kind, texts.config, text_origin)
        assert isinstance(found, ClipSizes | SiglipSizes)
        other = found
    if variant in dino.TOWERS:
        sizes = DinoSizes(*dino.TOWERS[variant], other)
    else:
        read = size_files.from_hugging_face(
            "dino", images.config, origin, images.processor, text=other
        )
        assert isinstance(read, DinoSizes)
        sizes = read
    both = {name: file for name, file in texts.files.items() if name not in images.files}
    source = dataclasses.replace(images, files=images.files | both, directory=texts.directory)
    layout_of(source, "dino", sizes)
    return Pretrained("dino", sizes, origin, source=source)


def _read_facts(file: epath.Path) -> tuple[str, size_files.PretrainedSizes, str | None]:
    """Backbone, sizes and tokenizer of converted weights.

    Raises:
      UserError: the file does not hold them.
    """
    advice = "convert the weights again"
    content = read_json(file, dict, advice)
    backbone, tokenizer = content.get("backbone"), content.get("tokenizer")
    try:
        if not isinstance(backbone, str) or backbone not in size_files.SIZES:
            raise ValueError(f"backbone is {backbone!r:.40}")
        if not isinstance(tokenizer, str | None):
            raise ValueError("tokenizer is no text")
        sizes = size_files.from_json(backbone, content["sizes"])
        return backbone, cast(size_files.PretrainedSizes, sizes), tokenizer
    except (ValueError, KeyError) as error:
        raise UserError(f"{file} cannot be read ({reason_of(error)}); {advice}.") from error
