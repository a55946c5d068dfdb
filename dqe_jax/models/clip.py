"""CLIP (Radford et al., 2021) as a backbone: both towers and their projections.

OpenCLIP models and MetaCLIP 2 have the same form. `two_towers.py` has the composer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import ClassVar

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Float, Int, UInt8

from dqe_jax.method.arrays import Array
from dqe_jax.models.encoder import Compute, Stack, VisionSizes, VisionTower
from dqe_jax.models.features import ImageFeatures, States, TextFeatures
from dqe_jax.models.two_towers import COMPOSER_PART, TwoTowers

# This end-of-text id in a config of CLIP stands for "the highest id": configs written before the id
# was put right in `transformers`. In MetaCLIP 2 it is the id itself.
LEGACY_END = 2


@dataclasses.dataclass(frozen=True)
class ClipSizes:
    """Sizes of a CLIP model; `vision` is a tower with a norm before it and no patch bias.

    `family` is the `model_type` that `transformers` knows it by: "clip" or "metaclip_2".
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
    end_id: int
    family: str = "clip"

    @property
    def ends_with_highest(self) -> bool:
        """Whether the highest id of a text ends it, whatever `end_id` is."""
        return self.family == "clip" and self.end_id == LEGACY_END


def _variant(
    patch: int,
    width: int,
    depth: int,
    heads: int,
    text_width: int,
    embed_dim: int,
    image_size: int = 224,
) -> ClipSizes:
    vision = VisionSizes(
        image_size=image_size,
        patch_size=patch,
        width=width,
        depth=depth,
        heads=heads,
        mlp_dim=4 * width,
        activation="quick_gelu",
        epsilon=1e-5,
        pre_norm=True,
        patch_bias=False,
    )
    return ClipSizes(
        vision=vision,
        text_width=text_width,
        text_depth=12,
        text_heads=text_width // 64,
        text_mlp_dim=4 * text_width,
        text_activation="quick_gelu",
        text_epsilon=1e-5,
        vocab_size=49408,
        max_length=77,
        embed_dim=embed_dim,
        end_id=49407,
    )


# As published (Radford et al., 2021, appendix F). Variant: patch, width, depth, heads, width of the
# text tower, d, pixels a side.
VARIANTS = {
    "vit_b_32": _variant(32, 768, 12, 12, 512, 512),
    "vit_b_16": _variant(16, 768, 12, 12, 512, 512),
    "vit_l_14": _variant(14, 1024, 24, 16, 768, 768),
    "vit_l_14_336": _variant(14, 1024, 24, 16, 768, 768, 336),
}


class TextTower(nn.Module):
    """CLIP's causal text transformer."""

    sizes: ClipSizes
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
            causal=True,
        )
        self.encoder = Stack(s.text_depth, layer, self.compute)
        self.final_norm = nn.LayerNorm(s.text_epsilon, dtype=dtype)

    def __call__(self, ids: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        """Ids to tokens. Causal: padding cannot reach the text before."""
        x = self.words(ids) + self.positions[: ids.shape[1]].astype(self.compute.dtype)
        return self.final_norm(self.encoder(x)[0])


def text_states(tower: TextTower, ids: Int[Array, "B L"]) -> States:
    """Tokens `[B, L, D]`."""
    return {"tokens": tower(ids)}


def text_features(
    sizes: ClipSizes, project: Callable[[Array], Array], ids: Int[Array, "B L"], states: States
) -> TextFeatures:
    """Tokens `[B, L, D]`, and the projected token of the end of the text, `[B, d]`."""
    tokens = states["tokens"][:, : ids.shape[1]]  # a store has all of them
    is_end = ids == sizes.end_id
    end = ids.argmax(1) if sizes.ends_with_highest else is_end.argmax(1)
    mask = jnp.arange(ids.shape[1]) <= end[:, None]
    pooled = jnp.take_along_axis(tokens, end[:, None, None], axis=1)[:, 0]
    return TextFeatures(ids, mask, tokens, project(pooled))


class Clip(TwoTowers):
    """Backbone interface: see `models/features.py`. `sizes`: a row of `VARIANTS`, or any others."""

    sizes: ClipSizes

    PARTS: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "vision": ("vision/*",),
        "text": ("text/*",),
        "projections": ("visual_projection/*", "text_projection/*"),
        "logit_scale": ("logit_scale",),
        "composer": COMPOSER_PART,
    }
    TOWERS: ClassVar[Mapping[str, tuple[str, ...]]] = {"image": ("vision",), "text": ("text",)}
    COMMON_SPACE: ClassVar[bool] = True  # see `features.has_common_space`

    def setup(self) -> None:
        """Creates the submodules."""
        dtype = self.compute.dtype
        d = self.sizes.embed_dim
        self.vision = VisionTower(self.sizes.vision, self.image_size, self.compute)
        self.text = TextTower(self.sizes, self.compute)
        self.visual_projection = nn.Dense(d, use_bias=False, dtype=dtype)
        self.text_projection = nn.Dense(d, use_bias=False, dtype=dtype)
        # CLIP's own temperature: for image-text scores; composed retrieval learns one of its own.
        start = jnp.asarray(2.6592, jnp.float32)
        self.logit_scale = self.param("logit_scale", lambda _: start)
        self.make_composer()

    def image_states(self, image: UInt8[Array, "B H W 3"], train: bool = False) -> States:
        """Patch tokens `[B, P, D]`, and the class token behind the tower's norm, `[B, D]`."""
        del train
        last, before = self.vision(image)
        tokens = last if self.features == "last" else before
        return {"tokens": tokens[:, 1:], "pooled": self.vision.norm(last[:, 0])}

    def image_features(self, states: States, train: bool = False) -> ImageFeatures:
        """Patch tokens `[B, P, D]` and gallery embedding `[B, M=1, d]`."""
        del train
        projected = self.visual_projection(states["pooled"])
        return ImageFeatures(states["tokens"], projected[:, None])

    def text_states(self, ids: Int[Array, "B L"], train: bool = False) -> States:
        """Tokens `[B, L, D]`."""
        del train
        return text_states(self.text, ids)

    def text_features(
        self, ids: Int[Array, "B L"], states: States, train: bool = False
    ) -> TextFeatures:
        """Tokens `[B, L, D]`, and the projected token of the end of the text, `[B, d]`."""
        del train
        return text_features(self.sizes, self.text_projection, ids, states)

    def __call__(
        self, image: UInt8[Array, "images H W 3"], ids: Int[Array, "texts L"]
    ) -> Float[Array, "images texts"]:
        """CLIP's image-text logits: what CLIP was trained for."""
        return jnp.exp(self.logit_scale) * self.cosines(image, ids)
