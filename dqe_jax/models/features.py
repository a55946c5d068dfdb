"""What a backbone makes of images and of texts; the interface between backbones and the model.

A backbone works in two stages. A tower makes **states** of an image or a text: arrays by name. What
follows makes features of the states. A tower that does not train always makes the same states of an
image, so they can be computed once and stored; the model takes them in place of the image.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Protocol, runtime_checkable

import flax.struct
import jax
from jaxtyping import Float, Int, UInt8

from dqe_jax.method.arrays import Array

# What a tower makes of images or of texts: arrays `[B, ...]` by name.
States = Mapping[str, Array]


@flax.struct.dataclass
class StoredText:
    """Texts whose states are known.

    Attributes:
      ids: int `[..., L]`.
      states: arrays `[..., *]` by name, as `Backbone.text_states` gives them.
    """

    ids: Array
    states: States


@flax.struct.dataclass
class ImageFeatures:
    """What the model knows of images.

    Attributes:
      tokens: `[B, P, D]`, what attribute queries and the composer attend to.
      gallery: gallery embedding `[B, M, d]`, not normalised.
    """

    tokens: Array
    gallery: Array


@flax.struct.dataclass
class TextFeatures:
    """What the model knows of modification texts.

    Attributes:
      ids: int `[B, L]`.
      mask: bool `[B, S]`, false for padding.
      tokens: `[B, S, D]`; `S` is `L` where there is one for each id.
      pooled: `[B, D']`, one vector a text.
    """

    ids: Array
    mask: Array
    tokens: Array
    pooled: Array


def given_spec(backbone: Backbone, kind: str, *axes: int) -> Mapping[str, jax.ShapeDtypeStruct]:
    """Shapes of the states of images or texts `[*axes]` that come from outside; none if none do."""
    shapes = backbone.given_states(kind)
    return {n: jax.ShapeDtypeStruct((*axes, *x.shape), x.dtype) for n, x in shapes.items()}


def has_common_space(backbone: Backbone) -> bool:
    """Whether images and texts of a backbone share a space before anything trains, as in CLIP.

    Its class says so by `COMMON_SPACE = True`: `TextFeatures.pooled` is then of the space of the
    first token of `ImageFeatures.gallery`.
    """
    return bool(getattr(backbone, "COMMON_SPACE", False))


@runtime_checkable
class Backbone(Protocol):
    """A Flax module over images and token ids.

    Attributes:
      PARTS: patterns of the paths of the parameters that form a part, by its name; a part can be
        frozen.
      TOWERS: the parts that make the states of an "image" and of a "text"; nothing else does.
    """

    PARTS: ClassVar[Mapping[str, tuple[str, ...]]]
    TOWERS: ClassVar[Mapping[str, tuple[str, ...]]]

    @property
    def embed_dim(self) -> int:
        """`d`."""

    def given_states(self, kind: str) -> Mapping[str, jax.ShapeDtypeStruct]:
        """Shapes of the states of one "image" or "text" that come from outside the model.

        Empty where a tower of the model makes them.
        """

    def random_towers(self) -> frozenset[str]:
        """Towers, of `TOWERS`, with dropout: in training their states are never the same."""

    def image_states(self, image: UInt8[Array, "B H W 3"], train: bool = False) -> States:
        """What the tower makes of images; `train` says whether dropout is on."""

    def image_features(self, states: States, train: bool = False) -> ImageFeatures:
        """The features of images, made of their states."""

    def text_states(self, ids: Int[Array, "B L"], train: bool = False) -> States:
        """What the tower makes of texts."""

    def text_features(
        self, ids: Int[Array, "B L"], states: States, train: bool = False
    ) -> TextFeatures:
        """The features of texts, made of their states."""

    def compose(
        self,
        image: ImageFeatures,
        text: TextFeatures,
        train: bool = False,
        rows: Int[Array, " B"] | None = None,
    ) -> Float[Array, "B d"]:
        """Composed embedding `h`, not normalised, of R images and B texts.

        What depends on the image alone is computed once.

        Args:
          image: of the references.
          text: of the queries.
          train: whether dropout is on.
          rows: the image of each text; None where each has `B / R`, side by side.
        """
