"""SigLIP and SigLIP 2 of fixed resolution as a backbone: both towers and their heads.

A learned query attends to the patch tokens and gives the image's embedding (multihead attention
pooling); the last token of a text that is padded to full length gives the text's. Zhai et al.,
"Sigmoid Loss for Language Image Pre-Training", ICCV 2023; Tschannen et al., "SigLIP 2", 2025.
`two_towers.py` has the composer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import ClassVar

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Float, Int, UInt8

from dqe_jax.method.arrays import Array
from dqe_jax.models.encoder import (
    ACTIVATIONS,
    Compute,
    Stack,
    VisionSizes,
    VisionTower,
    attend,
)
from dqe_jax.models.features import ImageFeatures, States, TextFeatures
from dqe_jax.models.two_towers import COMPOSER_PART, TwoTowers

PIXELS = (0.5, 0.5, 0.5)  # mean and standard deviation


@dataclasses.dataclass(frozen=True)
class SiglipSizes:
    """Sizes of a SigLIP model; `vision` is a tower without class token, with a patch bias.

    `embed_dim` is the width of the vision tower; `max_length` the length of every text, padded with
    `pad_id`.
    """

    vision: VisionSizes
    text_width: int
    text_depth: int
    text_heads: int
    text_mlp_dim: int
    text_activation: str
    text_epsilon: float
    vocab_size: int
    max_length: int
    embed_dim: int
    pad_id: int = 0


def _variant(
    patch: int, width: int, depth: int, heads: int, mlp_dim: int, image_size: int
) -> SiglipSizes:
    vision = VisionSizes(
        image_size=image_size,
        patch_size=patch,
        width=width,
        depth=depth,
        heads=heads,
        mlp_dim=mlp_dim,
        activation="gelu_pytorch_tanh",
        epsilon=1e-6,
        pre_norm=False,
        patch_bias=True,
        class_token=False,
        pixel_mean=PIXELS,
        pixel_std=PIXELS,
    )
    return SiglipSizes(
        vision=vision,
        text_width=width,
        text_depth=depth,
        text_heads=heads,
        text_mlp_dim=mlp_dim,
        text_activation="gelu_pytorch_tanh",
        text_epsilon=1e-6,
        vocab_size=256_000,
        max_length=64,
        embed_dim=width,
    )


# SigLIP 2 (Tschannen et al., 2025, section 2); both towers have the same shape. Variant: patch,
# width, depth, heads, width inside the MLPs, pixels a side.
VARIANTS = {
    "vit_b_16": _variant(16, 768, 12, 12, 3072, 224),
    "vit_l_16": _variant(16, 1024, 24, 16, 4096, 256),
    "so400m_14": _variant(14, 1152, 27, 16, 4304, 224),
    "so400m_14_384": _variant(14, 1152, 27, 16, 4304, 384),
}


class PoolingHead(nn.Module):
    """Multihead attention pooling: a learned query attends to the patches, then an MLP."""

    sizes: VisionSizes
    compute: Compute = Compute()

    @nn.compact
    def __call__(self, tokens: Float[Array, "B P D"]) -> Float[Array, "B D"]:
        """Tokens behind the tower's norm to one vector an image."""
        s, dtype = self.sizes, self.compute.dtype
        width = s.width
        init = nn.initializers.xavier_uniform()
        probe = jnp.asarray(self.param("probe", init, (1, width)), dtype)
        # One parameter for all three, as the published files have it: the probe alone asks.
        kernel = jnp.asarray(self.param("qkv_kernel", init, (width, 3 * width)), dtype)
        bias = jnp.asarray(self.param("qkv_bias", nn.initializers.zeros, (3 * width,)), dtype)
        q = probe @ kernel[:, :width] + bias[:width]
        k, v = jnp.split(tokens @ kernel[:, width:] + bias[width:], 2, axis=-1)
        q = jnp.broadcast_to(q, (len(tokens), 1, width))
        x = attend(q, k, v, s.heads, self.compute)
        x = nn.Dense(width, dtype=dtype, name="out")(x)
        y = nn.LayerNorm(s.epsilon, dtype=dtype, name="norm")(x)
        y = nn.Dense(s.mlp_dim, dtype=dtype, name="mlp_in")(y)
        x = x + nn.Dense(width, dtype=dtype, name="mlp_out")(ACTIVATIONS[s.activation](y))
        return x[:, 0]


class TextTower(nn.Module):
    """SigLIP's text transformer: every token attends to every other, padding too."""

    sizes: SiglipSizes
    compute: Compute = Compute()

    def setup(self) -> None:
        """Creates the submodules."""
        s, dtype = self.sizes, self.compute.dtype
        self.words = nn.Embed(s.vocab_size, s.text_width, dtype=dtype)
        self.positions = self.param(
            "positions", nn.initializers.normal(0.01), (s.max_length, s.text_width)
        )
        layer = dict(
            heads=s.text_heads,
            mlp_dim=s.text_mlp_dim,
            activation=s.text_activation,
            epsilon=s.text_epsilon,
        )
        self.encoder = Stack(s.text_depth, layer, self.compute)
        self.final_norm = nn.LayerNorm(s.text_epsilon, dtype=dtype)

    def __call__(self, ids: Int[Array, "B L"]) -> Float[Array, "B full D"]:
        """Ids to the tokens of the text at full length, `max_length`, with which it was trained."""
        missing = self.sizes.max_length - ids.shape[1]
        ids = jnp.pad(ids, ((0, 0), (0, missing)), constant_values=self.sizes.pad_id)
        x = self.words(ids) + self.positions.astype(self.compute.dtype)
        return self.final_norm(self.encoder(x)[0])


def text_states(tower: TextTower, ids: Int[Array, "B L"]) -> States:
    """Tokens `[B, L, D]`, and the last token of the text at full length, `[B, D]`."""
    tokens = tower(ids)
    return {"tokens": tokens[:, : ids.shape[1]], "pooled": tokens[:, -1]}


def text_features(
    sizes: SiglipSizes, project: Callable[[Array], Array], ids: Int[Array, "B L"], states: States
) -> TextFeatures:
    """Tokens `[B, L, D]`, and the projected last token, `[B, d]`."""
    tokens = states["tokens"][:, : ids.shape[1]]  # a store has all of them
    # The first token counts, so that no text is all padding.
    mask = (ids != sizes.pad_id) | (jnp.arange(ids.shape[1]) == 0)
    return TextFeatures(ids, mask, tokens, project(states["pooled"]))


class Siglip(TwoTowers):
    """Backbone interface: see `models/features.py`. `sizes`: a row of `VARIANTS`, or any others."""

    sizes: SiglipSizes

    PARTS: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "pooling": ("vision_head/*",),
        "vision": ("vision/*",),
        "text": ("text/*",),
        "projections": ("text_projection/*",),
        "logit_scale": ("logit_scale", "logit_bias"),
        "composer": COMPOSER_PART,
    }
    TOWERS: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "image": ("vision", "pooling"),
        "text": ("text",),
    }
    COMMON_SPACE: ClassVar[bool] = True  # images and texts agree before anything trains

    def setup(self) -> None:
        """Creates the submodules."""
        self.vision = VisionTower(self.sizes.vision, self.image_size, self.compute)
        self.vision_head = PoolingHead(self.sizes.vision, self.compute)
        self.text = TextTower(self.sizes, self.compute)
        self.text_projection = nn.Dense(self.embed_dim, dtype=self.compute.dtype)
        # SigLIP's own: for image-text scores; composed retrieval learns a temperature of its own.
        scale, bias = jnp.log(jnp.float32(10)), jnp.asarray(-10, jnp.float32)
        self.logit_scale = self.param("logit_scale", lambda _: scale)
        self.logit_bias = self.param("logit_bias", lambda _: bias)
        self.make_composer()

    def image_states(self, image: UInt8[Array, "B H W 3"], train: bool = False) -> States:
        """Patch tokens `[B, P, D]`, those of the last layer behind the norm; pooled, `[B, D]`."""
        del train
        last, before = self.vision(image)
        last = self.vision.norm(last)
        tokens = last if self.features == "last" else before
        return {"tokens": tokens, "pooled": self.vision_head(last)}

    def image_features(self, states: States, train: bool = False) -> ImageFeatures:
        """Patch tokens `[B, P, D]` and gallery embedding `[B, M=1, d]`, which is as pooled."""
        del train
        return ImageFeatures(states["tokens"], states["pooled"][:, None])

    def text_states(self, ids: Int[Array, "B L"], train: bool = False) -> States:
        """Tokens `[B, L, D]`, and the last token of the text at full length, `[B, D]`."""
        del train
        return text_states(self.text, ids)

    def text_features(
        self, ids: Int[Array, "B L"], states: States, train: bool = False
    ) -> TextFeatures:
        """Tokens `[B, L, D]`, and the projected last token, `[B, d]`."""
        del train
        return text_features(self.sizes, self.text_projection, ids, states)

    def __call__(
        self, image: UInt8[Array, "images H W 3"], ids: Int[Array, "texts L"]
    ) -> Float[Array, "images texts"]:
        """SigLIP's logits, of which the sigmoid is the probability that text and image match."""
        return jnp.exp(self.logit_scale) * self.cosines(image, ids) + self.logit_bias
