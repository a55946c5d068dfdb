"""The fields of a config that the model has. The names here are those of tables of the models."""

from __future__ import annotations

import dataclasses

from dqe_jax.utils.fields import (
    DTYPES,
    field,
    flag,
    integer,
    number,
    one_of,
    positive,
    rate,
    text,
    tuple_of_names,
)

BACKBONES = ("tiny", "clip", "siglip", "dino", "blip2", "features")
# Those with a composer over two pretrained towers.
TWO_TOWERS = ("clip", "siglip", "dino")
# Named by the vision tower; "auto" takes the sizes of the weights.
CLIP_VARIANTS = ("vit_b_32", "vit_b_16", "vit_l_14", "vit_l_14_336")
SIGLIP_VARIANTS = ("vit_b_16", "vit_l_16", "so400m_14", "so400m_14_384")
DINO_VARIANTS = (
    *("dinov2_vit_s_14", "dinov2_vit_b_14", "dinov2_vit_l_14", "dinov2_vit_g_14"),
    *("dinov2_vit_b_14_reg", "dinov2_vit_l_14_reg"),
    *("dinov3_vit_s_16", "dinov3_vit_b_16", "dinov3_vit_l_16"),
)
# Models whose text tower `dino` may take.
DINO_TEXTS = (
    *(f"clip_{name}" for name in CLIP_VARIANTS),
    *(f"siglip_{name}" for name in SIGLIP_VARIANTS),
)
BLIP2_VARIANTS = ("vit_g_14", "vit_l_14")
# Layers of a vision tower whose patch tokens the composer may see.
FEATURES = ("penultimate", "last")
ACTIVATIONS = ("sigmoid", "softmax")
FORMS = ("sum", "gate")
QUERIES = ("composed", "text", "image", "sum", "product")
# Of the backbone `features`.
COMPOSERS = ("mlp", "attention")

# Far more than any model has. A larger value is a typing error and would exhaust the memory.
MOST_WIDTH, MOST_HEADS, MOST_DEPTH, MOST_PIXELS = 16_384, 1_024, 1_000, 4_096


@dataclasses.dataclass(frozen=True)
class TinyConfig:
    """The backbone `tiny`, trained from scratch."""

    pixel_mean: float = field(
        222.0,
        "Brightness of the background, of 0 to 255: it becomes 0.",
        number(0, 255),
        "model",
    )
    pixel_std: float = field(
        64.0, "Unit of brightness, of 0 to 255.", number(0.001, 1_000_000), "model"
    )
    patch_size: int = field(16, "Pixels a side of a patch.", integer(1, MOST_PIXELS), "model")
    cell_size: int = field(
        8,
        "Pixels a side of the cells that a patch is embedded from.",
        integer(1, MOST_PIXELS),
        "model",
    )
    cell_width: int = field(64, "Width of an embedded cell.", integer(1, MOST_WIDTH), "model")
    width: int = field(128, "Width of the tokens.", integer(1, MOST_WIDTH), "model")
    heads: int = field(4, "Attention heads.", integer(1, MOST_HEADS), "model")
    image_depth: int = field(4, "Blocks of the image encoder.", integer(0, MOST_DEPTH), "model")
    text_depth: int = field(2, "Blocks of the text encoder.", integer(0, MOST_DEPTH), "model")
    composer_depth: int = field(2, "Blocks of the composer.", integer(1, MOST_DEPTH), "model")
    token_dim: int = field(
        64, "Width of a token inside the embedding heads.", integer(1, MOST_WIDTH), "model"
    )
    embed_dim: int = field(256, "Width of the embeddings.", integer(1, MOST_WIDTH), "model")
    dropout: float = field(0.0, "Dropout on patch and word embeddings.", rate(), "model")


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """The backbone `clip`."""

    variant: str = field(
        "vit_l_14",
        'Variant: "vit_b_32", "vit_b_16", "vit_l_14", "vit_l_14_336", or "auto": as the weights '
        "say.",
        one_of("auto", *CLIP_VARIANTS),
        "model",
    )
    features: str = field(
        "penultimate",
        'Patch tokens that composer and attribute weights see: of the "penultimate" or "last" '
        "layer.",
        one_of(*FEATURES),
        "model",
    )
    composer_width: int = field(512, "Width of the composer.", integer(1, MOST_WIDTH), "model")
    composer_depth: int = field(2, "Blocks of the composer.", integer(0, MOST_DEPTH), "model")
    composer_heads: int = field(
        8, "Attention heads of the composer.", integer(1, MOST_HEADS), "model"
    )


@dataclasses.dataclass(frozen=True)
class SiglipConfig:
    """The backbone `siglip`: SigLIP and SigLIP 2 of fixed resolution."""

    variant: str = field(
        "vit_b_16",
        'Variant of SigLIP 2: "vit_b_16", "vit_l_16", "so400m_14", "so400m_14_384", or "auto": as '
        "the weights say.",
        one_of("auto", *SIGLIP_VARIANTS),
        "model",
    )
    features: str = field(
        "last",
        'Patch tokens that composer and attribute weights see: of the "penultimate" or "last" '
        "layer.",
        one_of(*FEATURES),
        "model",
    )
    composer_width: int = field(512, "Width of the composer.", integer(1, MOST_WIDTH), "model")
    composer_depth: int = field(2, "Blocks of the composer.", integer(0, MOST_DEPTH), "model")
    composer_heads: int = field(
        8, "Attention heads of the composer.", integer(1, MOST_HEADS), "model"
    )


@dataclasses.dataclass(frozen=True)
class DinoConfig:
    """The backbone `dino`: image tokens of DINOv2 or DINOv3, texts of a CLIP or SigLIP model."""

    variant: str = field(
        "dinov2_vit_b_14",
        'Variant of the tower, such as "dinov2_vit_b_14", "dinov2_vit_l_14_reg" (with registers) '
        'or "dinov3_vit_b_16", or "auto": as the weights say.',
        one_of("auto", *DINO_VARIANTS),
        "model",
    )
    text_weights: str = field(
        "",
        "Weights of the text tower, named as config.model.weights: those of the whole model; its "
        'tokenizer is taken too. "" for random ones.',
        text(),
        "start",
    )
    text: str = field(
        "clip_vit_l_14",
        'Model whose text tower reads the texts, such as "clip_vit_l_14" or "siglip_vit_b_16", or '
        '"auto": as config.model.dino.text_weights say.',
        one_of("auto", *DINO_TEXTS),
        "model",
    )
    features: str = field(
        "last",
        'Patch tokens that composer and attribute weights see: of the "penultimate" or "last" '
        "layer.",
        one_of(*FEATURES),
        "model",
    )
    composer_width: int = field(512, "Width of the composer.", integer(1, MOST_WIDTH), "model")
    composer_depth: int = field(2, "Blocks of the composer.", integer(0, MOST_DEPTH), "model")
    composer_heads: int = field(
        8, "Attention heads of the composer.", integer(1, MOST_HEADS), "model"
    )


@dataclasses.dataclass(frozen=True)
class Blip2Config:
    """The backbone `blip2`."""

    variant: str = field(
        "vit_g_14",
        'Variant, named by its vision tower: "vit_g_14" (EVA), "vit_l_14" (CLIP\'s), or "auto".',
        one_of("auto", *BLIP2_VARIANTS),
        "model",
    )
    dropout: float = field(0.1, "Dropout of the Q-Former.", rate(), "model")


@dataclasses.dataclass(frozen=True)
class GivenConfig:
    """The backbone `features`: what frozen encoders of any kind make of images and texts."""

    images: tuple[str, ...] = field(
        (),
        "Features of images: names of imported features, or encoders as package.module:function. "
        "Several are used side by side.",
        tuple_of_names(empty=True),
        "model",
    )
    texts: tuple[str, ...] = field(
        (),
        "Features of texts, named as those of images; (): an encoder of words that trains from "
        "scratch reads the texts alone.",
        tuple_of_names(empty=True),
        "model",
    )
    words: bool = field(
        True,
        "Whether the encoder of words reads the texts beside config.model.features.texts.",
        flag(),
        "model",
    )
    width: int = field(128, "Width of the tokens.", integer(1, MOST_WIDTH), "model")
    heads: int = field(4, "Attention heads.", integer(1, MOST_HEADS), "model")
    text_depth: int = field(
        0,
        "Blocks of the encoder of words; 0 for the words alone.",
        integer(0, MOST_DEPTH),
        "model",
    )
    composer: str = field(
        "mlp",
        'Composer: "mlp" (of the embedding of the reference and the text: fast) or "attention" '
        "(blocks in which the tokens of the reference attend to those of the text).",
        one_of(*COMPOSERS),
        "model",
    )
    composer_depth: int = field(
        2, "Blocks or hidden layers of the composer.", integer(1, MOST_DEPTH), "model"
    )
    composer_width: int = field(
        384, "Width of the hidden layers of an MLP.", integer(1, MOST_WIDTH), "model"
    )
    composer_norm: bool = field(
        False,
        "Whether an MLP normalises its two inputs and starts at random. Without it small batches "
        "may collapse; runs of earlier versions lack it.",
        flag(),
        "model",
    )
    token_dim: int = field(
        64, "Width of a token inside the embedding heads.", integer(1, MOST_WIDTH), "model"
    )
    embed_dim: int = field(256, "Width of the embeddings.", integer(1, MOST_WIDTH), "model")
    dropout: float = field(0.1, "Dropout on tokens, on words and in the composer.", rate(), "model")


@dataclasses.dataclass(frozen=True)
class AttributesConfig:
    """Attribute weighting (method, section 1)."""

    enabled: bool = field(
        True, "Weigh attributes; without it the model is the plain composer.", flag(), "model"
    )
    names: tuple[str, ...] = field(
        ("color", "shape"),
        "Names of the attributes; each is a section of the lexicon.",
        tuple_of_names(empty=False),
        "model",
    )
    form: str = field(
        "sum",
        'What the weights do: "sum" (they weigh features of the reference that are added to the '
        'query) or "gate" (they choose, part by part of the embedding, between the reference and '
        "the text).",
        one_of(*FORMS),
        "model",
    )
    parts: int = field(
        8,
        'Parts of the embedding with form "gate": the attributes, and free ones. They divide its '
        "width.",
        integer(1, MOST_WIDTH),
        "model",
    )
    width: int = field(
        128,
        "Width of the attribute features, or of the hidden layer of gates.",
        integer(1, MOST_WIDTH),
        "model",
    )
    heads: int = field(
        4, "Attention heads of the attribute queries.", integer(1, MOST_HEADS), "model"
    )
    activation: str = field(
        "sigmoid",
        'Weights of a sum: "sigmoid" (independent) or "softmax" (they sum to 1).',
        one_of(*ACTIVATIONS),
        "model",
    )


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Adapters of low rank beside kernels of the frozen parts (LoRA)."""

    rank: int = field(
        0,
        "Rank of the adapters beside kernels of config.model.frozen; they train, and are merged "
        "into the kernels on export. 0 makes none.",
        integer(0, MOST_WIDTH),
        "model",
    )
    alpha: float = field(
        16.0, "What adapters add is multiplied by alpha / rank.", positive(1_000_000), "model"
    )
    targets: tuple[str, ...] = field(
        ("query", "value"),
        'Kernels that get adapters: patterns of names, "query", "key", "value", "out", "mlp_in", '
        '"mlp_out", or with a slash of whole paths, "vision/*/query".',
        tuple_of_names(empty=False),
        "model",
    )
    layers: int = field(
        0,
        "How many of the last layers of each stack get adapters; 0 for all.",
        integer(0, MOST_DEPTH),
        "model",
    )

    @property
    def scale(self) -> float:
        """`alpha / rank`; 0 without adapters."""
        return self.alpha / self.rank if self.rank else 0.0


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The model: its backbone, what it starts from and how it is computed."""

    backbone: str = field(
        "tiny",
        'Backbone: "tiny" (from scratch), the pretrained "clip", "siglip", "dino" or "blip2", or '
        '"features": what encoders of any kind make of images and texts.',
        one_of(*BACKBONES),
        "model",
    )
    dtype: str = field(
        "float32",
        'Compute dtype of matrix products: "float32" or "bfloat16". Norms and softmax are float32.',
        one_of(*DTYPES),
        "model",
    )
    weights: str = field(
        "",
        "Weights that a pretrained backbone starts from: a Hugging Face model directory or "
        'safetensors file, an id on its hub, or a directory written by dqe_jax.convert; "" for '
        "random ones.",
        text(),
        "start",
    )
    tokenizer: str = field(
        "",
        'Tokenizer of a pretrained backbone: a directory or an id; "" for that of the weights.',
        text(),
        "start",
    )
    frozen: tuple[str, ...] = field(
        (),
        'Parts of the model that do not train, such as ("vision",): the names are those of the '
        "table of parameters that a run prints first.",
        tuple_of_names(empty=True),
        "model",
    )
    frozen_dtype: str = field(
        "float32",
        "Dtype in which frozen parameters are kept; those that train are float32.",
        one_of(*DTYPES),
        "model",
    )
    remat: bool = field(
        False,
        "Recompute each layer of a pretrained backbone in the backward pass: less memory, more "
        "time.",
        flag(),
        "start",
    )
    scan_layers: bool = field(
        False,
        "Compile one layer of a pretrained tower and loop over it: compiles faster.",
        flag(),
        "model",
    )
    attention: str = field(
        "auto",
        'Attention of pretrained backbones: "xla", "cudnn" (flash attention: NVIDIA GPU, '
        'bfloat16), or "auto": cudnn where it works.',
        one_of("auto", "xla", "cudnn"),
        "start",
    )
    query: str = field(
        "composed",
        'What a query is made of: "composed" (the model), or for comparison, without a composer: '
        '"text" alone, the reference "image" alone, or the "sum" or "product" of the two '
        "embeddings.",
        one_of(*QUERIES),
        "model",
    )
    initial_tau: float = field(
        0.07, "Temperature at the start; it is learned.", number(0.0001, 10_000), "model"
    )
    initial_bias: float = field(
        0.0,
        "Bias at the start of the logits that config.loss.in_batch_form 'sigmoid' compares; it is "
        "learned. SigLIP starts at -10; 0 for a model without one.",
        number(-1_000, 0),
        "model",
    )
    tiny: TinyConfig = dataclasses.field(default_factory=TinyConfig)
    clip: ClipConfig = dataclasses.field(default_factory=ClipConfig)
    siglip: SiglipConfig = dataclasses.field(default_factory=SiglipConfig)
    dino: DinoConfig = dataclasses.field(default_factory=DinoConfig)
    blip2: Blip2Config = dataclasses.field(default_factory=Blip2Config)
    features: GivenConfig = dataclasses.field(default_factory=GivenConfig)
    attributes: AttributesConfig = dataclasses.field(default_factory=AttributesConfig)
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
