"""Sizes of a backbone: from a Hugging Face config, and as JSON.

Files are not trusted: a size that no model has would only exhaust memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from dqe_jax.models.blip2 import Blip2Sizes
from dqe_jax.models.clip import ClipSizes
from dqe_jax.models.dino import FAMILIES, V2, V2_REGISTERS, V3, DinoSizes, swiglu_width
from dqe_jax.models.dino import PIXEL_MEAN as DINO_MEAN
from dqe_jax.models.dino import PIXEL_STD as DINO_STD
from dqe_jax.models.encoder import ACTIVATIONS, VisionSizes
from dqe_jax.models.given import GivenArray, GivenSizes, GivenSource
from dqe_jax.models.settings import MOST_DEPTH, MOST_HEADS, MOST_PIXELS, MOST_WIDTH
from dqe_jax.models.siglip import PIXELS, SiglipSizes
from dqe_jax.utils.errors import UserError, reason_of
from dqe_jax.utils.fields import Check, flag, integer, number, one_of
from dqe_jax.utils.files import JsonObject
from dqe_jax.utils.quiet import import_transformers

# Of a pretrained backbone, and of any that has sizes beside those of its config.
PretrainedSizes = ClipSizes | SiglipSizes | DinoSizes | Blip2Sizes
Sizes = PretrainedSizes | GivenSizes

SIZES: dict[str, type[ClipSizes] | type[SiglipSizes] | type[DinoSizes] | type[Blip2Sizes]] = {
    "clip": ClipSizes,
    "siglip": SiglipSizes,
    "dino": DinoSizes,
    "blip2": Blip2Sizes,
}
MODEL_TYPES = {
    "clip": "clip",
    "metaclip_2": "clip",
    "siglip": "siglip",
    **{family: "dino" for family in FAMILIES},
    "blip-2": "blip2",
}
# What pads the texts of SigLIP 1, by the size of its vocabulary: its configs do not say it.
SIGLIP_1_PADDING = {32_000: 1}
_Value = TypeVar("_Value")
MOST_LENGTH, MOST_WORDS = 10_000, 10_000_000
# Sizes that are true or false.
FLAGS = (
    *("pre_norm", "patch_bias", "qkv_bias", "class_token"),
    *("key_bias", "layer_scale", "gated", "antialias"),
)
# Dtypes in which features from outside are stored.
GIVEN_DTYPES = ("float32", "float16", "bfloat16")


def to_json(sizes: Sizes) -> JsonObject:
    """Sizes as JSON; `from_json` is the inverse."""
    return dataclasses.asdict(sizes)


def from_json(backbone: str, content: Any) -> Sizes:
    """Sizes that `to_json` wrote; the content of a file is anything.

    Raises:
      ValueError: it did not write them, or one is far too large; the text names it.
    """
    if backbone == "features":
        return _given_from_json(content)
    if backbone == "dino":
        return _dino_from_json(content)
    try:
        fields = dict(content)
        vision = VisionSizes(**_with_tuples(fields["vision"]))
        sizes = SIZES[backbone](**(fields | {"vision": vision}))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"sizes are not those of {backbone}: {reason_of(error)}") from error
    _check_all("sizes.vision", vision, but=())
    _check_all("sizes", sizes, but=("vision",))
    _check_heads(sizes)
    return sizes


def _dino_from_json(content: Any) -> DinoSizes:
    """Sizes of DINO with a text tower; raises as `from_json`."""
    try:
        text, family = dict(content["text"]), content["family"]
        vision = VisionSizes(**_with_tuples(content["vision"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"sizes are not those of dino: {reason_of(error)}") from error
    _check_all("sizes.vision", vision, but=())
    if family not in FAMILIES:
        raise ValueError(f"sizes.family is {family!r:.40}: it must be one of {', '.join(FAMILIES)}")
    other = from_json("clip" if "end_id" in text else "siglip", text)
    assert isinstance(other, ClipSizes | SiglipSizes)
    sizes = DinoSizes(vision, family, other)
    _check_heads(sizes)
    return sizes


def _with_tuples(content: Any) -> JsonObject:
    """The fields of a section, with tuples where JSON has lists."""
    return {n: tuple(x) if isinstance(x, list) else x for n, x in dict(content).items()}


def _given_from_json(content: Any) -> GivenSizes:
    """Sizes of features; raises as `from_json`."""
    try:
        return GivenSizes(
            *(
                tuple(
                    GivenSource(str(s["name"]), str(s["origin"]), tuple(map(_array, s["arrays"])))
                    for s in content[kind]
                )
                for kind in ("images", "texts")
            )
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"sizes are not those of features: {reason_of(error)}") from error


def _array(content: Any) -> GivenArray:
    shape = tuple(content["shape"])
    for size in shape:
        _checked("sizes of features", "width", size)
    if not 1 <= len(shape) <= 2 or content["dtype"] not in GIVEN_DTYPES:
        raise ValueError(f"features have shape {shape} and dtype {content['dtype']!r:.40}")
    return GivenArray(str(content["name"]), shape, content["dtype"])


def _check_all(place: str, sizes: PretrainedSizes | VisionSizes, but: Sequence[str]) -> None:
    """Raises a `ValueError` for the first size that is not allowed; leaves those of `but` out."""
    for own in dataclasses.fields(sizes):
        if own.name not in but:
            _checked(f"{place}.{own.name}", own.name, getattr(sizes, own.name))


def _checked(told: str, name: str, value: _Value) -> _Value:
    """The value of a size, a field of `VisionSizes`, `ClipSizes` or `Blip2Sizes`.

    Raises:
      ValueError: it is not allowed; the text calls it `told`.
    """
    check = _check_of(name.removeprefix("text_"))
    try:
        check.read(value)
    except ValueError:
        raise ValueError(f"{told} is {value!r:.40}: it must be {check.words}") from None
    return value


def _check_of(name: str) -> Check:
    """What a size may be."""
    if name in FLAGS:
        return flag()
    if name == "rotary_base":
        return number(0, 1_000_000)
    if name in ("pixel_mean", "pixel_std"):
        return _colors(0.0 if name == "pixel_mean" else 0.001)
    if name == "family":
        return one_of("clip", "metaclip_2")
    if name == "activation":
        return one_of(*ACTIVATIONS)
    if name == "epsilon":
        return number(0, 1)
    most = {
        **dict.fromkeys(("image_size", "patch_size"), MOST_PIXELS),
        **dict.fromkeys(("depth", "cross_every"), MOST_DEPTH),
        "heads": MOST_HEADS,
        **dict.fromkeys(("width", "embed_dim"), MOST_WIDTH),
        "mlp_dim": 8 * MOST_WIDTH,
        **dict.fromkeys(("max_length", "num_queries", "registers"), MOST_LENGTH),
        **dict.fromkeys(("vocab_size", "end_id", "pad_id"), MOST_WORDS),
    }
    return integer(0 if name in ("end_id", "pad_id", "registers") else 1, most[name])


def _colors(least: float) -> Check:
    """A number for each of red, green and blue."""

    def test(value: tuple[object, ...]) -> bool:
        numbers = [x for x in value if isinstance(x, (int, float)) and least <= x <= 1]
        return len(numbers) == len(value) == 3

    return Check(tuple, test, f"three numbers from {least:g} to 1")


def _check_heads(sizes: PretrainedSizes) -> None:
    """Raises a `ValueError` for a tower whose channels do not divide into its attention heads."""
    vision = sizes.vision
    text = (
        (sizes.width, sizes.heads)
        if isinstance(sizes, Blip2Sizes)
        else (sizes.text_width, sizes.text_heads)
    )
    for width, heads in ((vision.width, vision.heads), text):
        if width % heads:  # transformers 4 lets it pass
            raise ValueError(f"{width} channels do not divide into {heads} attention heads")
    if vision.rotary_base and vision.width // vision.heads % 4:
        raise ValueError(
            f"{vision.width // vision.heads} channels of a head do not divide into 4, as rotary "
            "positions need it"
        )


def backbone_of(config: JsonObject, origin: str) -> str:
    """The backbone that a `config.json` of Hugging Face is of.

    Raises:
      UserError: it is of no model that is known here.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in MODEL_TYPES:
        raise UserError(
            f"weights {origin}: its config.json has model_type {kind!r}; known are "
            f"{', '.join(MODEL_TYPES)}."
        )
    return MODEL_TYPES[kind]


def from_hugging_face(
    backbone: str,
    config: JsonObject,
    origin: str,
    processor: JsonObject | None = None,
    text: ClipSizes | SiglipSizes | None = None,
) -> PretrainedSizes:
    """Sizes of a `config.json` of a model of Hugging Face.

    Args:
      backbone: of `SIZES`.
      config: the content of the file.
      origin: what the user named, for errors.
      processor: the content of `preprocessor_config.json`, which says mean and standard deviation
        of the pixels; without one they are those of the backbone.
      text: of the model whose text tower "dino" takes.

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
        if backbone == "dino":
            assert text is not None, "a text tower is chosen before"
            sizes: PretrainedSizes = DinoSizes(*_dino(dict(config), origin), text)
        else:
            sizes = _READERS[backbone](dict(config), origin)
        _check_heads(sizes)
    except UserError:
        raise
    except Exception as error:  # transformers checks fields, by errors of many kinds
        raise UserError(
            f"weights {origin}: its config.json is refused ({reason_of(error)}); get it again."
        ) from error
    try:
        return _with_pixels(sizes, processor or {})
    except (ValueError, TypeError) as error:
        raise UserError(
            f"weights {origin}: its preprocessor_config.json is refused ({reason_of(error)}); get "
            "it again."
        ) from error


def _with_pixels(sizes: PretrainedSizes, processor: JsonObject) -> PretrainedSizes:
    """Sizes with what a `preprocessor_config.json` says of the pixels.

    Raises:
      ValueError: it says what cannot be.
    """
    found: dict[str, Any] = {
        ours: _checked(theirs, ours, tuple(processor[theirs]))
        for ours, theirs in (("pixel_mean", "image_mean"), ("pixel_std", "image_std"))
        if processor.get(theirs) is not None
    }
    found = {name: tuple(map(float, values)) for name, values in found.items()}
    vision = dataclasses.replace(sizes.vision, **found)
    return dataclasses.replace(sizes, vision=vision)


def _activation(name: str, origin: str) -> str:
    if name not in ACTIVATIONS:
        raise UserError(
            f"weights {origin}: hidden_act {name!r} of its config.json is not one of "
            f"{', '.join(ACTIVATIONS)}."
        )
    return name


def _sizes(section: object, place: str, **names: str) -> JsonObject:
    """Sizes by our names for them, of a section of a config; `names` has theirs.

    Raises:
      ValueError: one is not allowed; the text has its name in the file.
    """
    return {
        ours: _checked(f"{place}{theirs}", ours, _first(getattr(section, theirs)))
        for ours, theirs in names.items()
    }


def _first(value: object) -> object:
    """Of a size for each axis, or of several ids, the first one."""
    return value[0] if isinstance(value, (list, tuple)) else value


def _vision(config: Any, origin: str, **kind: Any) -> VisionSizes:
    sizes = _sizes(
        config,
        "vision_config.",
        image_size="image_size",
        patch_size="patch_size",
        width="hidden_size",
        depth="num_hidden_layers",
        heads="num_attention_heads",
        mlp_dim="intermediate_size",
        epsilon="layer_norm_eps",
    )
    return VisionSizes(**sizes, activation=_activation(config.hidden_act, origin), **kind)


def _clip(content: JsonObject, origin: str) -> ClipSizes:
    family = content["model_type"]
    if family == "metaclip_2":
        # The same fields with the same defaults; not every release has this class.
        towers = {
            name: {field: x for field, x in content[name].items() if field != "model_type"}
            for name in ("text_config", "vision_config")
            if isinstance(content.get(name), dict)
        }
        content = content | towers | {"model_type": "clip"}
    config = import_transformers().CLIPConfig.from_dict(content)  # with what the file leaves out
    text = _sizes(
        config.text_config,
        "text_config.",
        text_width="hidden_size",
        text_depth="num_hidden_layers",
        text_heads="num_attention_heads",
        text_mlp_dim="intermediate_size",
        text_epsilon="layer_norm_eps",
        vocab_size="vocab_size",
        max_length="max_position_embeddings",
        end_id="eos_token_id",
    )
    return ClipSizes(
        vision=_vision(config.vision_config, origin, pre_norm=True, patch_bias=False),
        text_activation=_activation(config.text_config.hidden_act, origin),
        family=family,
        **text,
        **_sizes(config, "", embed_dim="projection_dim"),
    )


def _siglip(content: JsonObject, origin: str) -> SiglipSizes:
    config = import_transformers().SiglipConfig.from_dict(content)
    towers, told = config.text_config, content.get("text_config") or {}
    text = _sizes(
        towers,
        "text_config.",
        text_width="hidden_size",
        text_depth="num_hidden_layers",
        text_heads="num_attention_heads",
        text_mlp_dim="intermediate_size",
        text_epsilon="layer_norm_eps",
        vocab_size="vocab_size",
        max_length="max_position_embeddings",
    )
    # `transformers` has a default for what pads, which is that of none of the published tokenizers.
    padding = told.get("pad_token_id", SIGLIP_1_PADDING.get(text["vocab_size"], 0))
    vision = _vision(
        config.vision_config,
        origin,
        pre_norm=False,
        patch_bias=True,
        class_token=False,
    )
    if not getattr(config.vision_config, "vision_use_head", True):
        raise ValueError("vision_config.vision_use_head is false: there is no pooling head")
    width = getattr(towers, "projection_size", None) or towers.hidden_size
    if width != vision.width:
        raise ValueError(
            f"text_config.projection_size is {width}, and vision_config.hidden_size "
            f"{vision.width}: they must be the same"
        )
    return SiglipSizes(
        vision=dataclasses.replace(vision, pixel_mean=PIXELS, pixel_std=PIXELS),
        text_activation=_activation(towers.hidden_act, origin),
        embed_dim=vision.width,
        pad_id=_checked("text_config.pad_token_id", "pad_id", padding),
        **text,
    )


def _dino(content: JsonObject, origin: str) -> tuple[VisionSizes, str]:
    """Sizes of the tower, and its family."""
    library, family = import_transformers(), content["model_type"]
    names = ("Dinov2Config", "Dinov2WithRegistersConfig", "DINOv3ViTConfig")
    kind = getattr(library, dict(zip(FAMILIES, names))[family], None)
    if kind is None:
        raise ValueError(f"transformers {library.__version__} does not know {family}")
    config, third = kind.from_dict(content), family == V3
    gated = bool(config.use_gated_mlp if third else config.use_swiglu_ffn)
    if third:
        hidden, qkv, key = config.intermediate_size, config.query_bias, config.key_bias
        if qkv != config.value_bias or (key and not qkv):
            raise ValueError("query_bias, key_bias and value_bias do not fit together")
        if not (config.proj_bias and config.mlp_bias):
            raise ValueError("proj_bias or mlp_bias is false")
    else:
        hidden, qkv, key = int(config.hidden_size * config.mlp_ratio), config.qkv_bias, True
        if gated:
            hidden = swiglu_width(config.hidden_size, config.mlp_ratio)
    registers = getattr(config, "num_register_tokens", 0)
    if family != V2 and not registers:
        raise ValueError("num_register_tokens is 0: a model of this kind has registers")
    named = _sizes(
        config,
        "",
        image_size="image_size",
        patch_size="patch_size",
        width="hidden_size",
        depth="num_hidden_layers",
        heads="num_attention_heads",
        epsilon="layer_norm_eps",
    )
    return VisionSizes(
        mlp_dim=_checked("intermediate_size", "mlp_dim", hidden),
        # The gate of DINOv2's MLP is SiLU whatever hidden_act says.
        activation="silu" if gated and not third else _activation(config.hidden_act, origin),
        pre_norm=False,
        patch_bias=True,
        qkv_bias=_checked("query_bias" if third else "qkv_bias", "qkv_bias", qkv),
        registers=_checked("num_register_tokens", "registers", registers),
        key_bias=_checked("key_bias", "key_bias", key),
        layer_scale=True,
        gated=gated,
        rotary_base=float(_checked("rope_theta", "rotary_base", config.rope_theta))
        if third
        else 0.0,
        antialias=family == V2_REGISTERS,
        pixel_mean=DINO_MEAN,
        pixel_std=DINO_STD,
        **named,
    ), family


def _blip2(content: JsonObject, origin: str) -> Blip2Sizes:
    config = import_transformers().Blip2Config.from_dict(content)
    former = _sizes(
        config.qformer_config,
        "qformer_config.",
        width="hidden_size",
        depth="num_hidden_layers",
        heads="num_attention_heads",
        mlp_dim="intermediate_size",
        epsilon="layer_norm_eps",
        cross_every="cross_attention_frequency",
        vocab_size="vocab_size",
        max_length="max_position_embeddings",
    )
    vision = config.vision_config
    bias = _sizes(vision, "vision_config.", qkv_bias="qkv_bias")
    return Blip2Sizes(
        vision=_vision(vision, origin, pre_norm=False, patch_bias=True, **bias),
        activation=_activation(config.qformer_config.hidden_act, origin),
        **former,
        **_sizes(config, "", num_queries="num_query_tokens", embed_dim="image_text_hidden_size"),
    )


_READERS: Mapping[str, Callable[[JsonObject, str], PretrainedSizes]] = {
    "clip": _clip,
    "siglip": _siglip,
    "blip2": _blip2,
}
