"""Sizes of a pretrained backbone: from a Hugging Face config, and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from dqe_jax.models.blip2 import Blip2Sizes
from dqe_jax.models.clip import ClipSizes
from dqe_jax.models.encoder import ACTIVATIONS, VisionSizes
from dqe_jax.utils.errors import UserError, reason_of

SIZES = {"clip": ClipSizes, "blip2": Blip2Sizes}
MODEL_TYPES = {"clip": "clip", "blip-2": "blip2"}


def to_json(sizes: Any) -> dict[str, Any]:
    """Sizes as JSON; `from_json` is the inverse."""
    return dataclasses.asdict(sizes)


def from_json(backbone: str, content: Mapping[str, Any]) -> Any:
    """Sizes that `to_json` wrote."""
    fields = dict(content)
    return SIZES[backbone](**(fields | {"vision": VisionSizes(**fields["vision"])}))


def backbone_of(config: Mapping[str, Any], origin: str) -> str:
    """The backbone that a `config.json` of Hugging Face is of.

    Raises:
      UserError: it is of no model that is known here.
    """
    kind = config.get("model_type")
    if kind not in MODEL_TYPES:
        raise UserError(
            f"weights {origin}: its config.json has model_type {kind!r}; known are "
            f"{', '.join(MODEL_TYPES)}."
        )
    return MODEL_TYPES[kind]


def from_hugging_face(backbone: str, config: Mapping[str, Any], origin: str) -> Any:
    """Sizes of a `config.json` of `CLIPModel` or `Blip2ForImageTextRetrieval`.

    Raises:
      UserError: it is missing, of another model, or asks for what is not built here.
    """
    if not config:
        raise UserError(
            f"weights {origin} come without a config.json: name the variant in "
            f"config.model.{backbone}.variant."
        )
    if backbone_of(config, origin) != backbone:
        raise UserError(
            f"weights {origin} are of model_type {config['model_type']!r}: config.model.backbone "
            f"is {backbone!r}."
        )
    try:
        return {"clip": _clip, "blip2": _blip2}[backbone](dict(config), origin)
    except UserError:
        raise
    except Exception as error:  # transformers checks fields, by errors of many kinds
        raise UserError(
            f"weights {origin}: its config.json is refused ({reason_of(error)}); get it again."
        ) from error


def _activation(name: str, origin: str) -> str:
    if name not in ACTIVATIONS:
        raise UserError(
            f"weights {origin}: hidden_act {name!r} of its config.json is not one of "
            f"{', '.join(ACTIVATIONS)}."
        )
    return name


def _side(value: Any) -> int:
    return value if isinstance(value, int) else value[0]


def _vision(config: Any, origin: str, **kind: bool) -> VisionSizes:
    if config.hidden_size % config.num_attention_heads:  # transformers 4 lets it pass
        raise ValueError(
            f"{config.hidden_size} channels do not divide into {config.num_attention_heads} "
            "attention heads"
        )
    return VisionSizes(
        image_size=_side(config.image_size),
        patch_size=_side(config.patch_size),
        width=config.hidden_size,
        depth=config.num_hidden_layers,
        heads=config.num_attention_heads,
        mlp_dim=config.intermediate_size,
        activation=_activation(config.hidden_act, origin),
        epsilon=config.layer_norm_eps,
        **kind,
    )


def _clip(config: dict[str, Any], origin: str) -> ClipSizes:
    from transformers import CLIPConfig  # slow to import; fills in what the file leaves out

    config = CLIPConfig.from_dict(config)
    text, end = config.text_config, config.text_config.eos_token_id
    return ClipSizes(
        vision=_vision(config.vision_config, origin, pre_norm=True, patch_bias=False),
        text_width=text.hidden_size,
        text_depth=text.num_hidden_layers,
        text_heads=text.num_attention_heads,
        text_mlp_dim=text.intermediate_size,
        text_activation=_activation(text.hidden_act, origin),
        text_epsilon=text.layer_norm_eps,
        vocab_size=text.vocab_size,
        max_length=text.max_position_embeddings,
        embed_dim=config.projection_dim,
        end_id=end if isinstance(end, int) else end[0],
    )


def _blip2(config: dict[str, Any], origin: str) -> Blip2Sizes:
    from transformers import Blip2Config

    config = Blip2Config.from_dict(config)
    former = config.qformer_config
    return Blip2Sizes(
        vision=_vision(
            config.vision_config,
            origin,
            pre_norm=False,
            patch_bias=True,
            qkv_bias=config.vision_config.qkv_bias,
        ),
        width=former.hidden_size,
        depth=former.num_hidden_layers,
        heads=former.num_attention_heads,
        mlp_dim=former.intermediate_size,
        activation=_activation(former.hidden_act, origin),
        epsilon=former.layer_norm_eps,
        cross_every=former.cross_attention_frequency,
        num_queries=config.num_query_tokens,
        vocab_size=former.vocab_size,
        max_length=former.max_position_embeddings,
        embed_dim=config.image_text_hidden_size,
    )
