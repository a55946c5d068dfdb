"""What a backbone makes of images and of texts; the interface between backbones and the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Protocol, runtime_checkable

import flax.struct
from jaxtyping import Float, Int, UInt8

from dqe_jax.method.arrays import Array


@flax.struct.dataclass
class ImageFeatures:
    """Of images.

    Attributes:
      tokens: `[B, P, D]`, what attribute queries and the composer attend to.
      gallery: gallery embedding `[B, M, d]`, not normalised.
    """

    tokens: Array
    gallery: Array


@flax.struct.dataclass
class TextFeatures:
    """Of modification texts.

    Attributes:
      ids: int `[B, L]`.
      mask: bool `[B, L]`, false for padding.
      tokens: `[B, L, D]`.
      pooled: `[B, D']`, one vector a text.
    """

    ids: Array
    mask: Array
    tokens: Array
    pooled: Array


@runtime_checkable
class Backbone(Protocol):
    """A Flax module over images and token ids.

    Attributes:
      PARTS: patterns of the paths of the parameters that form a part, by its name; a part can be
        frozen.
    """

    PARTS: ClassVar[Mapping[str, tuple[str, ...]]]

    @property
    def embed_dim(self) -> int:
        """`d`."""

    def encode_image(self, image: UInt8[Array, "B H W 3"], train: bool = False) -> ImageFeatures:
        """Of images alone; `train` says whether dropout is on."""

    def encode_text(self, ids: Int[Array, "B L"], train: bool = False) -> TextFeatures:
        """Of texts alone."""

    def compose(
        self, image: ImageFeatures, text: TextFeatures, train: bool = False
    ) -> Float[Array, "B d"]:
        """Composed embedding `h`, not normalised.

        Of R images and B = R * Q texts, the Q texts of an image next to one another, so that what
        depends on the image alone is computed once.
        """
