"""Which tensor is which parameter: one rule for each parameter of a pretrained backbone.

Layouts: `CLIPModel`, `MetaClip2Model`, `SiglipModel` and `Blip2ForImageTextRetrieval` of Hugging
Face `transformers`, and the names of LAVIS for BLIP-2 with a CLIP ViT-L/14. Paths are those of
layers that are not scanned.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from dqe_jax.models.blip2 import Blip2Sizes
from dqe_jax.models.clip import ClipSizes
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
    """

    name: str
    rules: tuple[Rule, ...]
    ignored: tuple[str, ...] = ()


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
        Rule("text/words/embedding", ("text_model.embeddings.token_embedding.weight",)),
        Rule("text/positions", ("text_model.embeddings.position_embedding.weight",)),
        *_norm("text/final_norm", "text_model.final_layer_norm"),
        *_linear("visual_projection", "visual_projection", bias=False),
        *_linear("text_projection", "text_projection", bias=False),
    ]
    for i in range(sizes.vision.depth):
        rules += _clip_layer(f"vision/encoder/layers_{i}", f"vision_model.encoder.layers.{i}")
    for i in range(sizes.text_depth):
        rules += _clip_layer(f"text/encoder/layers_{i}", f"text_model.encoder.layers.{i}")
    name = "CLIPModel" if sizes.family == "clip" else "MetaClip2Model"
    return Layout(name, tuple(rules), ("*.position_ids",))


def siglip_layout(sizes: SiglipSizes) -> Layout:
    """`SiglipModel` of Hugging Face."""
    vision, text, head = "vision_model.embeddings", "text_model.embeddings", "vision_model.head"
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
        Rule("text/words/embedding", (f"{text}.token_embedding.weight",)),
        Rule("text/positions", (f"{text}.position_embedding.weight",)),
        *_norm("text/final_norm", "text_model.final_layer_norm"),
        *_linear("text_projection", "text_model.head"),
    ]
    for i in range(sizes.vision.depth):
        rules += _clip_layer(f"vision/encoder/layers_{i}", f"vision_model.encoder.layers.{i}")
    for i in range(sizes.text_depth):
        rules += _clip_layer(f"text/encoder/layers_{i}", f"text_model.encoder.layers.{i}")
    return Layout("SiglipModel", tuple(rules), ("*.position_ids",))


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
    return blip2_layout(sizes), blip2_lavis_layout(sizes)
