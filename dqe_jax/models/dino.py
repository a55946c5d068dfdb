"""DINOv2 and DINOv3 as a backbone of image tokens, with the text tower of a CLIP or SigLIP model.

The two towers were not trained together: a projection that starts at random brings the image's
class token to the text's space, and composed retrieval trains it. Oquab et al., "DINOv2", TMLR
2024; Darcet et al., "Vision Transformers Need Registers", ICLR 2024; Simeoni et al., "DINOv3",
2025. `two_towers.py` has the composer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from flax import linen as nn
from jaxtyping import Float, Int, UInt8

from dqe_jax.method.arrays import Array
from dqe_jax.models import clip, siglip
from dqe_jax.models.clip import ClipSizes
from dqe_jax.models.encoder import VisionSizes, VisionTower
from dqe_jax.models.features import ImageFeatures, States, TextFeatures
from dqe_jax.models.siglip import SiglipSizes
from dqe_jax.models.two_towers import COMPOSER_PART, TwoTowers

# Of ImageNet, from 0 to 1: what DINO's images are standardized by.
PIXEL_MEAN, PIXEL_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# The types of `transformers`.
V2, V2_REGISTERS, V3 = FAMILIES = ("dinov2", "dinov2_with_registers", "dinov3_vit")


@dataclasses.dataclass(frozen=True)
class DinoSizes:
    """Sizes of a DINO tower, and of the CLIP or SigLIP model whose text tower reads the texts.

    Attributes:
      vision: of the tower.
      family: of `FAMILIES`: the `model_type` that `transformers` knows it by.
      text: of the other model; its own vision tower is not there.
    """

    vision: VisionSizes
    family: str
    text: ClipSizes | SiglipSizes

    @property
    def text_width(self) -> int:
        """Width of the text tower."""
        return self.text.text_width

    @property
    def text_heads(self) -> int:
        """Attention heads of the text tower."""
        return self.text.text_heads

    @property
    def vocab_size(self) -> int:
        """Rows of the text embeddings."""
        return self.text.vocab_size

    @property
    def max_length(self) -> int:
        """Positions of the text tower."""
        return self.text.max_length

    @property
    def embed_dim(self) -> int:
        """`d`."""
        return self.text.embed_dim


def swiglu_width(width: int, ratio: int) -> int:
    """Width in DINOv2's gated MLP: two thirds of a plain one's, rounded up to a multiple of 8."""
    return (int(width * ratio * 2 / 3) + 7) // 8 * 8


def _variant(
    family: str, patch: int, width: int, depth: int, heads: int, registers: int, large: bool = False
) -> tuple[VisionSizes, str]:
    """Sizes of a tower; a `large` one has a gated MLP."""
    third = family == V3
    hidden = swiglu_width(width, 4) if large and not third else 4 * width
    vision = VisionSizes(
        image_size=224 if third else 518,
        patch_size=patch,
        width=width,
        depth=depth,
        heads=heads,
        mlp_dim=hidden,
        activation="silu" if large else "gelu",
        epsilon=1e-5 if third else 1e-6,
        pre_norm=False,
        patch_bias=True,
        registers=registers,
        key_bias=not third,
        layer_scale=True,
        gated=large,
        rotary_base=100.0 if third else 0.0,
        antialias=family == V2_REGISTERS,
        pixel_mean=PIXEL_MEAN,
        pixel_std=PIXEL_STD,
    )
    return vision, family


# As published. Variant: family, patch, width, depth, heads, registers, whether the MLP is gated.
TOWERS = {
    "dinov2_vit_s_14": _variant(V2, 14, 384, 12, 6, 0),
    "dinov2_vit_b_14": _variant(V2, 14, 768, 12, 12, 0),
    "dinov2_vit_l_14": _variant(V2, 14, 1024, 24, 16, 0),
    "dinov2_vit_g_14": _variant(V2, 14, 1536, 40, 24, 0, large=True),
    "dinov2_vit_b_14_reg": _variant(V2_REGISTERS, 14, 768, 12, 12, 4),
    "dinov2_vit_l_14_reg": _variant(V2_REGISTERS, 14, 1024, 24, 16, 4),
    "dinov3_vit_s_16": _variant(V3, 16, 384, 12, 6, 4),
    "dinov3_vit_b_16": _variant(V3, 16, 768, 12, 12, 4),
    "dinov3_vit_l_16": _variant(V3, 16, 1024, 24, 16, 4),
}
# The models whose text tower a variant may take.
TEXTS: dict[str, ClipSizes | SiglipSizes] = {
    **{f"clip_{name}": clip.VARIANTS[name] for name in clip.VARIANTS},
    **{f"siglip_{name}": siglip.VARIANTS[name] for name in siglip.VARIANTS},
}


class Dino(TwoTowers):
    """Backbone interface: see `models/features.py`."""

    sizes: DinoSizes

    PARTS: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "vision": ("vision/*",),
        "text": ("text/*",),
        "projections": ("visual_projection/*", "text_projection/*"),
        "composer": COMPOSER_PART,
    }
    TOWERS: ClassVar[Mapping[str, tuple[str, ...]]] = {"image": ("vision",), "text": ("text",)}

    def setup(self) -> None:
        """Creates the submodules."""
        text, dtype, d = self.sizes.text, self.compute.dtype, self.embed_dim
        self.vision = VisionTower(self.sizes.vision, self.image_size, self.compute)
        self.visual_projection = nn.Dense(d, use_bias=False, dtype=dtype)
        self.text: Any
        if isinstance(text, SiglipSizes):
            self.text = siglip.TextTower(text, self.compute)
            self.text_projection = nn.Dense(d, dtype=dtype)
        else:
            self.text = clip.TextTower(text, self.compute)
            self.text_projection = nn.Dense(d, use_bias=False, dtype=dtype)
        self.make_composer()

    def image_states(self, image: UInt8[Array, "B H W 3"], train: bool = False) -> States:
        """Patch tokens `[B, P, D]` and class token `[B, D]`, of the last layer behind the norm."""
        del train
        last, before = self.vision(image)
        last = self.vision.norm(last)
        tokens = last if self.features == "last" else before
        return {"tokens": tokens[:, 1 + self.sizes.vision.registers :], "pooled": last[:, 0]}

    def image_features(self, states: States, train: bool = False) -> ImageFeatures:
        """Patch tokens `[B, P, D]` and gallery embedding `[B, M=1, d]`."""
        del train
        projected = self.visual_projection(states["pooled"])
        return ImageFeatures(states["tokens"], projected[:, None])

    def text_states(self, ids: Int[Array, "B L"], train: bool = False) -> States:
        """As the backbone whose text tower it is."""
        del train
        if isinstance(self.sizes.text, SiglipSizes):
            return siglip.text_states(self.text, ids)
        return clip.text_states(self.text, ids)

    def text_features(
        self, ids: Int[Array, "B L"], states: States, train: bool = False
    ) -> TextFeatures:
        """As the backbone whose text tower it is."""
        del train
        if isinstance(self.sizes.text, SiglipSizes):
            return siglip.text_features(self.sizes.text, self.text_projection, ids, states)
        return clip.text_features(self.sizes.text, self.text_projection, ids, states)

    def __call__(
        self, image: UInt8[Array, "images H W 3"], ids: Int[Array, "texts L"]
    ) -> Float[Array, "images texts"]:
        """Cosines, which mean something once the projection is trained."""
        return self.cosines(image, ids)
