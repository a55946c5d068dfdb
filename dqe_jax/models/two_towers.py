"""What backbones of two pretrained towers share: the composer, and the scores of images and texts.

The composed embedding is the sum of the reference's and the text's own embeddings, each at length
1, plus a residual that starts at zero: an untrained composer is the image + text baseline of the
two towers. The residual comes from patch tokens that attend to the text's tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Float, Int, UInt8

from dqe_jax.method.arrays import Array
from dqe_jax.models.encoder import Compute, ImageSize
from dqe_jax.models.features import ImageFeatures, TextFeatures
from dqe_jax.models.layers import Block, normalize, of_queries

COMPOSER_PART = ("composer_*", "residual/*")


class TwoTowers(nn.Module):
    """The base of a backbone; it lacks the towers and what makes features of them.

    Attributes:
      sizes: of the model.
      image_size: of the images.
      features: which patch tokens attribute queries and composer see, of `settings.FEATURES`.
      composer_width: width of the composer.
      composer_depth: its blocks.
      composer_heads: its attention heads.
      compute: see `encoder.Compute`.
    """

    sizes: Any
    image_size: ImageSize
    features: str = "penultimate"
    composer_width: int = 512
    composer_depth: int = 2
    composer_heads: int = 8
    compute: Compute = Compute()

    @property
    def embed_dim(self) -> int:
        """`d`."""
        width: int = self.sizes.embed_dim
        return width

    def make_composer(self) -> None:
        """Creates the submodules of the composer, in `setup`."""
        dtype = self.compute.dtype
        self.composer_in = nn.Dense(self.composer_width, dtype=dtype)
        self.composer_blocks = [
            Block(self.composer_heads, dtype=dtype) for _ in range(self.composer_depth)
        ]
        self.composer_norm = nn.LayerNorm()
        self.residual = nn.Dense(
            self.embed_dim, use_bias=False, kernel_init=nn.initializers.zeros, dtype=dtype
        )

    def given_states(self, kind: str) -> Mapping[str, jax.ShapeDtypeStruct]:
        """None: towers make them."""
        del kind
        return {}

    def random_towers(self) -> frozenset[str]:
        """None: there is no dropout."""
        return frozenset()

    def compose(
        self,
        image: ImageFeatures,
        text: TextFeatures,
        train: bool = False,
        rows: Int[Array, " B"] | None = None,
    ) -> Float[Array, "B d"]:
        """`h`, float32."""
        del train
        count = len(text.ids)
        x: Array = self.composer_in(image.tokens)
        own = rows
        for block in self.composer_blocks:
            x = block(x, context=text.tokens, context_mask=text.mask, rows=own)
            own = None  # there is a row for each text now
        x = of_queries(x, own, count)  # if no block has
        residual = self.residual(self.composer_norm(x).mean(1))
        reference = of_queries(normalize(image.gallery[:, 0]), rows, count)
        return reference + normalize(text.pooled) + residual

    def cosines(
        self, image: UInt8[Array, "images H W 3"], ids: Int[Array, "texts L"]
    ) -> Float[Array, "images texts"]:
        """Similarity of each image to each text, as the towers were trained for it."""
        images = normalize(self.image_features(self.image_states(image)).gallery[:, 0])
        texts = normalize(self.text_features(ids, self.text_states(ids)).pooled)
        return jnp.asarray(images @ texts.T)
