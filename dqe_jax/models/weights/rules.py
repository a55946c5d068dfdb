"""Which tensor is which parameter: one rule for each parameter of a pretrained backbone.

Layouts: `CLIPModel`, `MetaClip2Model`, `SiglipModel`, `Dinov2Model`, `Dinov2WithRegistersModel`,
`DINOv3ViTModel` and `Blip2ForImageTextRetrieval` of Hugging Face `transformers`, and the names of
LAVIS for BLIP-2 with a CLIP ViT-L/14. Paths are those of layers that are not scanned.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

from dqe_jax.models.blip2 import Blip2Sizes
from dqe_jax.models.clip import ClipSizes
from dqe_jax.models.dino import V2, V2_REGISTERS, V3, DinoSizes
from dqe_jax.models.encoder import VisionSizes
from dqe_jax.models.siglip import SiglipSizes
from dqe_jax.models.weights.sizes import PretrainedSizes


@dataclasses.dataclass(frozen=True)
class Rule:
    """How tensors become a parameter.

    Attributes:
      path: of the parameter, below the backbone.
      names: of the tensors; several are joined along their first axis, in equal parts.
      kind: "array" (as it is), "linear" (`[out, in]` to `[in, out]`), "patches" (a convolution
        `[out, channels, p, p]` to `[p * p * channels, out]`), or "positions" (an array whose rows
        after the first form a square grid that may be interpolated).
      lead: axes of length 1 that the tensor has before those of the parameter.
    """

    path: str
    names: tuple[str, ...]
    kind: str = "array"
    lead: int = 0


@dataclasses.dataclass(frozen=True)
class Layout:
    """The rules of a model in one layout.

    Attributes:
      name: of the layout.
      rules: one for each parameter.
      ignored: patterns of tensors that may be there and carry nothing we need.
      blank: shapes of those of them that `transformers` misses: they are written as zeros.
    """

    name: str
    rules: tuple[Rule, ...]
    ignored: tuple[str, ...] = ()
    blank: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)


def _linear(path: str, *names: str, bias: bool = True) -> list[Rule]:
    rules = [Rule(f"{path}/kernel", tuple(f"{n}.weight" for n in names), "linear")]
    return rules + [Rule(f"{path}/bias", tuple(f"{n}.bias" for n in names))] * bias


def _norm(path: str, name: str) -> list[Rule]:
    return [Rule(f"{path}/scale", (f"{name}.weight",)), Rule(f"{path}/bias", (f"{name}.bias",))]


def _clip_layer(path: str, name: str) -> list[Rule]:
    qkv = [f"{name}.self_attn.{part}_proj" for part in "qkv"]
    return [
        *_norm(f"{path}/norm_attention", f"{name}.layer_norm1"),
        *_linear(f"{path}/qkv", *qkv),
        *_linear(f"{path}/out", f"{name}.self_attn.out_proj"),
        *_norm(f"{path}/norm_mlp", f"{name}.layer_norm2"),
        *_linear(f"{path}/mlp_in", f"{name}.mlp.fc1"),
        *_linear(f"{path}/mlp_out", f"{name}.mlp.fc2"),
    ]


def clip_layout(sizes: ClipSizes) -> Layout:
    """`CLIPModel` of Hugging Face, or `MetaClip2Model`, whose tensors have the same names."""
    rules = [
        Rule("logit_scale", ("logit_scale",)),
        Rule("vision/class_token", ("vision_model.embeddings.class_embedding",)),
        Rule(
            "vision/positions", ("vision_model.embeddings.position_embedding.weight",), "positions"
        ),
        Rule(
            "vision/patches/kernel", ("vision_model.embeddings.patch_embedding.weight",), "patches"
        ),
        # The missing "e" is part of the published name.
        *_norm("vision/pre_norm", "vision_model.pre_layrnorm"),
        *_norm("vision/post_norm", "vision_model.post_layernorm"),
        *_linear("visual_projection", "visual_projection", bias=False),
        *_text(sizes),
    ]
    for i in range(sizes.vision.depth):
        rules += _clip_layer(f"vision/encoder/layers_{i}", f"vision_model.encoder.layers.{i}")
    name = "CLIPModel" if sizes.family == "clip" else "MetaClip2Model"
    return Layout(name, tuple(rules), ("*.position_ids",))


def siglip_layout(sizes: SiglipSizes) -> Layout:
    """`SiglipModel` of Hugging Face."""
    vision, head = "vision_model.embeddings", "vision_model.head"
    rules = [
        Rule("logit_scale", ("logit_scale",), lead=1),
        Rule("logit_bias", ("logit_bias",), lead=1),
        Rule("vision/positions", (f"{vision}.position_embedding.weight",), "positions"),
        Rule("vision/patches/kernel", (f"{vision}.patch_embedding.weight",), "patches"),
        Rule("vision/patches/bias", (f"{vision}.patch_embedding.bias",)),
        *_norm("vision/post_norm", "vision_model.post_layernorm"),
        Rule("vision_head/probe", (f"{head}.probe",), lead=1),
        Rule("vision_head/qkv_kernel", (f"{head}.attention.in_proj_weight",), "linear"),
        Rule("vision_head/qkv_bias", (f"{head}.attention.in_proj_bias",)),
        *_linear("vision_head/out", f"{head}.attention.out_proj"),
        *_norm("vision_head/norm", f"{head}.layernorm"),
        *_linear("vision_head/mlp_in", f"{head}.mlp.fc1"),
        *_linear("vision_head/mlp_out", f"{head}.mlp.fc2"),
        *_text(sizes),
    ]
    for i in range(sizes.vision.depth):
        rules += _clip_layer(f"vision/encoder/layers_{i}", f"vision_model.encoder.layers.{i}")
    return Layout("SiglipModel", tuple(rules), ("*.position_ids",))


def dino_layouts(sizes: DinoSizes) -> tuple[Layout, ...]:
    """A DINO model of Hugging Face, with the text tower of `CLIPModel` or `SiglipModel`.

    The first has the names of the published files, the second those of `transformers` 5 itself.
    What else the other model holds is ignored.
    """
    name = {V2: "Dinov2Model", V2_REGISTERS: "Dinov2WithRegistersModel", V3: "DINOv3ViTModel"}
    ignored = ("embeddings.mask_token", "vision_model.*", "visual_projection.*", "logit_*")
    width = sizes.vision.width
    # Which is there in each of these models but DINOv2, whose config can do without.
    blank = {V2_REGISTERS: (1, width), V3: (1, 1, width)}
    return tuple(
        Layout(
            name[sizes.family],
            (*_dino(sizes, published), *_text(sizes.text)),
            (*ignored, "*.position_ids"),
            {"embeddings.mask_token": blank[sizes.family]} if sizes.family in blank else {},
        )
        for published in (True, False)
    )


def _dino(sizes: DinoSizes, published: bool) -> Iterable[Rule]:
    """The tower; `published` says by which of the two sets of names."""
    vision, third = sizes.vision, sizes.family == V3
    patches = "embeddings.patch_embeddings" + ("" if third else ".projection")
    yield Rule("vision/class_token", ("embeddings.cls_token",), lead=2)
    yield Rule("vision/patches/kernel", (f"{patches}.weight",), "patches")
    yield Rule("vision/patches/bias", (f"{patches}.bias",))
    if vision.registers:
        yield Rule("vision/registers", ("embeddings.register_tokens",), lead=1)
    if not third:
        yield Rule("vision/positions", ("embeddings.position_embeddings",), "positions", lead=1)
    yield from _norm("vision/post_norm", "norm" if third else "layernorm")
    layers = ("layer" if published else "model.layer") if third else "encoder.layer"
    for i in range(vision.depth):
        path, name = f"vision/encoder/layers_{i}", f"{layers}.{i}"
        attention = f"{name}.attention"
        split = third or not published
        parts = [f"{attention}.{part}_proj" for part in "qkv"]
        if not split:
            parts = [f"{attention}.attention.{part}" for part in ("query", "key", "value")]
        yield from _norm(f"{path}/norm_attention", f"{name}.norm1")
        yield from _linear(f"{path}/qkv", *parts, bias=vision.qkv_bias and vision.key_bias)
        if vision.qkv_bias and not vision.key_bias:
            yield Rule(f"{path}/query_bias", (f"{parts[0]}.bias",))
            yield Rule(f"{path}/value_bias", (f"{parts[2]}.bias",))
        yield from _linear(f"{path}/out", f"{attention}.{'o_proj' if split else 'output.dense'}")
        yield Rule(f"{path}/scale_attention", (f"{name}.layer_scale1.lambda1",))
        yield from _norm(f"{path}/norm_mlp", f"{name}.norm2")
        yield Rule(f"{path}/scale_mlp", (f"{name}.layer_scale2.lambda1",))
        inside: tuple[str, ...] = (f"{name}.mlp.fc1",)
        out = f"{name}.mlp.fc2"
        if third:
            inside, out = (f"{name}.mlp.up_proj",), f"{name}.mlp.down_proj"
        if vision.gated and split:
            inside = (f"{name}.mlp.gate_proj", f"{name}.mlp.up_proj")
            out = f"{name}.mlp.down_proj"
        elif vision.gated:
            inside, out = (f"{name}.mlp.weights_in",), f"{name}.mlp.weights_out"
        yield from _linear(f"{path}/mlp_in", *inside)
        yield from _linear(f"{path}/mlp_out", out)


def _text(sizes: ClipSizes | SiglipSizes) -> Iterable[Rule]:
    """The text tower of `CLIPModel` or `SiglipModel`, with its projection."""
    embeddings = "text_model.embeddings"
    yield Rule("text/words/embedding", (f"{embeddings}.token_embedding.weight",))
    yield Rule("text/positions", (f"{embeddings}.position_embedding.weight",))
    yield from _norm("text/final_norm", "text_model.final_layer_norm")
    if isinstance(sizes, SiglipSizes):
        yield from _linear("text_projection", "text_model.head")
    else:
        yield from _linear("text_projection", "text_projection", bias=False)
    for i in range(sizes.text_depth):
        yield from _clip_layer(f"text/encoder/layers_{i}", f"text_model.encoder.layers.{i}")


def _qformer(sizes: Blip2Sizes, name: str, self_name: str) -> Iterable[Rule]:
    """The Q-Former's layers under `name`; `self_name` is what holds query, key and value."""
    for i in range(sizes.depth):
        path, layer = f"qformer/layers_{i}", f"{name}.{i}"
        kinds = [("attention", "attention")]
        if i % sizes.cross_every == 0:
            kinds.append(("cross_attention", "crossattention"))
        for part, theirs in kinds:
            inside = f"{layer}.{theirs}.{self_name}"
            if part == "attention":
                yield from _linear(
                    f"{path}/{part}/qkv", *(f"{inside}.{n}" for n in ("query", "key", "value"))
                )
            else:
                yield from _linear(f"{path}/{part}/query", f"{inside}.query")
                yield from _linear(f"{path}/{part}/key_value", f"{inside}.key", f"{inside}.value")
            yield from _linear(f"{path}/{part}/out", f"{layer}.{theirs}.output.dense")
            yield from _norm(f"{path}/{part}/norm", f"{layer}.{theirs}.output.LayerNorm")
        for part, suffix in (("query_mlp", "_query"), ("text_mlp", "")):
            yield from _linear(f"{path}/{part}/mlp_in", f"{layer}.intermediate{suffix}.dense")
            yield from _linear(f"{path}/{part}/mlp_out", f"{layer}.output{suffix}.dense")
            yield from _norm(f"{path}/{part}/norm", f"{layer}.output{suffix}.LayerNorm")


def _itm_head() -> list[Rule]:
    return [
        Rule("itm_kernel", ("itm_head.weight",), "linear"),
        Rule("itm_bias", ("itm_head.bias",)),
    ]


def blip2_layout(sizes: Blip2Sizes) -> Layout:
    """`Blip2ForImageTextRetrieval` of Hugging Face.

    That class has no norm before its vision tower; for a tower with one (ViT-L/14) its tensors are
    named as in `CLIPModel`.
    """
    vision = sizes.vision
    embeddings = "vision_model.embeddings"
    positions = ".position_embedding" + (".weight" if vision.pre_norm else "")
    lead = 0 if vision.pre_norm else 1
    rules = [
        Rule("query_tokens", ("query_tokens",), lead=1),
        Rule("vision/positions", (embeddings + positions,), "positions", lead=lead),
        Rule("vision/class_token", (f"{embeddings}.class_embedding",), lead=2 * lead),
        Rule("vision/patches/kernel", (f"{embeddings}.patch_embedding.weight",), "patches"),
        *_norm("vision/post_norm", "vision_model.post_layernorm"),
        Rule("text/words/embedding", ("embeddings.word_embeddings.weight",)),
        Rule("text/positions", ("embeddings.position_embeddings.weight",)),
        *_norm("qformer/norm", "qformer.layernorm"),
        *_qformer(sizes, "qformer.encoder.layer", "attention"),
        *_linear("vision_projection", "vision_projection"),
        *_linear("text_projection", "text_projection"),
        *_itm_head(),
    ]
    if vision.patch_bias:
        rules.append(Rule("vision/patches/bias", (f"{embeddings}.patch_embedding.bias",)))
    if vision.pre_norm:
        rules += _norm("vision/pre_norm", "vision_model.pre_layrnorm")
    for i in range(vision.depth):
        path, name = f"vision/encoder/layers_{i}", f"vision_model.encoder.layers.{i}"
        rules += _clip_layer(path, name) if vision.pre_norm else _eva_layer(path, name, vision)
    return Layout("Blip2ForImageTextRetrieval", tuple(rules), ("*.position_ids",))


def _eva_layer(path: str, name: str, vision: VisionSizes) -> list[Rule]:
    return [
        *_norm(f"{path}/norm_attention", f"{name}.layer_norm1"),
        *_linear(f"{path}/qkv", f"{name}.self_attn.qkv", bias=vision.qkv_bias),
        *_linear(f"{path}/out", f"{name}.self_attn.projection"),
        *_norm(f"{path}/norm_mlp", f"{name}.layer_norm2"),
        *_linear(f"{path}/mlp_in", f"{name}.mlp.fc1"),
        *_linear(f"{path}/mlp_out", f"{name}.mlp.fc2"),
    ]


def blip2_lavis_layout(sizes: Blip2Sizes) -> Layout:
    """LAVIS' names of BLIP-2 stage 1 with a CLIP ViT-L/14 (`pretrain_vitL`)."""
    bert, tower = "Qformer.bert", "visual_encoder"
    rules = [
        Rule("query_tokens", ("query_tokens",), lead=1),
        Rule("vision/positions", (f"{tower}.positional_embedding",), "positions"),
        Rule("vision/class_token", (f"{tower}.class_embedding",)),
        Rule("vision/patches/kernel", (f"{tower}.conv1.weight",), "patches"),
        *_norm("vision/pre_norm", f"{tower}.ln_pre"),
        *_norm("vision/post_norm", "ln_vision"),
        Rule("text/words/embedding", (f"{bert}.embeddings.word_embeddings.weight",)),
        Rule("text/positions", (f"{bert}.embeddings.position_embeddings.weight",)),
        *_norm("qformer/norm", f"{bert}.embeddings.LayerNorm"),
        *_qformer(sizes, f"{bert}.encoder.layer", "self"),
        *_linear("vision_projection", "vision_proj"),
        *_linear("text_projection", "text_proj"),
        *_itm_head(),
    ]
    for i in range(sizes.vision.depth):
        path, name = f"vision/encoder/layers_{i}", f"{tower}.transformer.resblocks.{i}"
        rules += [
            *_norm(f"{path}/norm_attention", f"{name}.ln_1"),
            Rule(f"{path}/qkv/kernel", (f"{name}.attn.in_proj_weight",), "linear"),
            Rule(f"{path}/qkv/bias", (f"{name}.attn.in_proj_bias",)),
            *_linear(f"{path}/out", f"{name}.attn.out_proj"),
            *_norm(f"{path}/norm_mlp", f"{name}.ln_2"),
            *_linear(f"{path}/mlp_in", f"{name}.mlp.c_fc"),
            *_linear(f"{path}/mlp_out", f"{name}.mlp.c_proj"),
        ]
    # The language-modelling head and the temperature of its training.
    return Layout("LAVIS", tuple(rules), ("*.position_ids", "Qformer.cls.*", "temp"))


def layouts_of(sizes: PretrainedSizes) -> tuple[Layout, ...]:
    """The layouts of a backbone of these sizes; the first is the one that is written."""
    if isinstance(sizes, ClipSizes):
        return (clip_layout(sizes),)
    if isinstance(sizes, SiglipSizes):
        return (siglip_layout(sizes),)
    if isinstance(sizes, DinoSizes):
        return dino_layouts(sizes)
    return blip2_layout(sizes), blip2_lavis_layout(sizes)
