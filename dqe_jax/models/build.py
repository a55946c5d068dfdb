"""Builds the model of a config: a dict from the name of a backbone to how it is built."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from dqe_jax.models import blip2, clip, dino, freeze, siglip
from dqe_jax.models.blip2 import Blip2, Blip2Sizes
from dqe_jax.models.clip import Clip, ClipSizes
from dqe_jax.models.dino import Dino, DinoSizes
from dqe_jax.models.dqe import DQE
from dqe_jax.models.encoder import Compute
from dqe_jax.models.features import Backbone
from dqe_jax.models.given import Given, GivenSizes
from dqe_jax.models.settings import ModelConfig
from dqe_jax.models.siglip import Siglip, SiglipSizes
from dqe_jax.models.tiny import Tiny
from dqe_jax.models.weights.sizes import PretrainedSizes, Sizes
from dqe_jax.utils.errors import UserError

BACKBONES: dict[str, type[Backbone]] = {
    "tiny": Tiny,
    "clip": Clip,
    "siglip": Siglip,
    "dino": Dino,
    "blip2": Blip2,
    "features": Given,
}
# Sizes of the pretrained backbones by name of the variant.
VARIANTS: dict[str, Mapping[str, ClipSizes | SiglipSizes | Blip2Sizes]] = {
    "clip": clip.VARIANTS,
    "siglip": siglip.VARIANTS,
    "blip2": blip2.VARIANTS,
}
# The backbones that have weights of their own.
PRETRAINED = (*VARIANTS, "dino")
DTYPES: dict[str, DTypeLike] = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
# Parts of the model that do not belong to its backbone.
# The head of texts is that of a query without a composer, which has no attribute weights.
PARTS = {
    "attributes": ("attributes/*", "gates/*", "text_head_*"),
    "temperature": ("log_scale", "logit_bias"),
}
# Adapters beside kernels of any part (`lora.py`); they always train.
ADAPTERS = {freeze.ADAPTERS: ("*/lora_*",)}


def parts_of(backbone: str) -> dict[str, tuple[str, ...]]:
    """Patterns of parameter paths (`backbone/vision/*`) of each part of a model."""
    own = {
        part: tuple(f"backbone/{pattern}" for pattern in patterns)
        for part, patterns in BACKBONES[backbone].PARTS.items()
    }
    return ADAPTERS | own | PARTS  # the first that matches


def compute_of(config: ModelConfig) -> Compute:
    """How a model is computed; "auto" attention is cuDNN's on a GPU in bfloat16.

    Raises:
      UserError: cuDNN's is asked for where it does not work.
    """
    attention, backend = config.attention, jax.default_backend()
    flash = backend == "gpu" and config.dtype == "bfloat16"
    if attention == "auto":
        attention = "cudnn" if flash else "xla"
    if attention == "cudnn" and not flash:
        raise UserError(
            "config.model.attention is 'cudnn': it needs a GPU and config.model.dtype 'bfloat16'; "
            f"this is {backend!r} and {config.dtype!r}: take 'auto'."
        )
    return Compute(DTYPES[config.dtype], attention, config.remat, config.scan_layers)


def named_sizes(backbone: str, variant: str, text: str = "") -> PretrainedSizes | None:
    """The sizes of a variant of a pretrained backbone; None for those of the weights.

    Args:
      backbone: of `PRETRAINED`.
      variant: a name of its variants, or "auto".
      text: of "dino": the model whose text tower it takes, or "auto".
    """
    if backbone != "dino":
        return VARIANTS[backbone].get(variant)
    if variant not in dino.TOWERS or text not in dino.TEXTS:
        return None
    return DinoSizes(*dino.TOWERS[variant], dino.TEXTS[text])


def build_backbone(
    config: ModelConfig,
    *,
    vocab_size: int,
    max_length: int,
    image_size: int,
    sizes: Sizes | None = None,
) -> Backbone:
    """The backbone of a config; arguments as of `build_model`."""
    fields = dataclasses.asdict(getattr(config, config.backbone))
    if config.backbone == "tiny":
        return Tiny(
            vocab_size=vocab_size,
            max_length=max_length,
            image_size=image_size,
            dtype=DTYPES[config.dtype],
            **fields,
        )
    if config.backbone == "features":
        assert isinstance(sizes, GivenSizes), "what the features are is known before the model"
        named = {name: fields[name] for name in fields if name not in ("images", "texts")}
        return Given(
            sizes=sizes,
            vocab_size=vocab_size,
            max_length=max_length,
            dtype=DTYPES[config.dtype],
            **named,
        )
    variant, text = fields.pop("variant"), fields.pop("text", "")
    fields.pop("text_weights", None)
    if sizes is None:
        sizes = named_sizes(config.backbone, variant, text)
    assert sizes is not None, "'auto' takes the sizes of the weights"
    compute = compute_of(config)
    assert not isinstance(sizes, GivenSizes), "those are of the backbone 'features'"
    if isinstance(sizes, ClipSizes):
        return Clip(sizes=sizes, image_size=image_size, compute=compute, **fields)
    if isinstance(sizes, DinoSizes):
        return Dino(sizes=sizes, image_size=image_size, compute=compute, **fields)
    if isinstance(sizes, SiglipSizes):
        return Siglip(sizes=sizes, image_size=image_size, compute=compute, **fields)
    return Blip2(sizes=sizes, image_size=image_size, compute=compute, **fields)


def build_model(
    config: ModelConfig,
    *,
    vocab_size: int,
    max_length: int,
    image_size: int,
    sizes: Sizes | None = None,
) -> DQE:
    """The model of a config.

    Args:
      config: `config.model`.
      vocab_size: size of the text vocabulary; pretrained backbones have their own.
      max_length: longest text, in tokens.
      image_size: pixels a side of the square images.
      sizes: of a pretrained backbone, None for those of `config.<backbone>.variant`; or of
        features.

    Raises:
      UserError: the parts of the embedding do not divide it.
    """
    backbone = build_backbone(
        config,
        vocab_size=vocab_size,
        max_length=max_length,
        image_size=image_size,
        sizes=sizes,
    )
    attributes = config.attributes
    if attributes.enabled and attributes.form == "gate" and backbone.embed_dim % attributes.parts:
        raise UserError(
            f"config.model.attributes.parts is {attributes.parts}: it must divide the width of the "
            f"embedding of {config.backbone}, {backbone.embed_dim}."
        )
    return DQE(
        backbone=backbone,
        attribute_names=attributes.names if attributes.enabled else (),
        form=attributes.form,
        parts=attributes.parts,
        width=attributes.width,
        heads=attributes.heads,
        activation=attributes.activation,
        query=config.query,
        initial_tau=config.initial_tau,
        initial_bias=config.initial_bias,
        lora_scale=config.lora.scale,
        upper_layers=config.lora.layers if config.lora.rank else 0,
        dtype=DTYPES[config.dtype],
    )
