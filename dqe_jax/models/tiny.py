"""The `tiny` backbone: small enough to train from scratch on a laptop, no pretrained weights.

A ViT over patches, each embedded from its cells; a text transformer over the word-level vocabulary;
and a composer whose blocks let the image tokens attend to the text tokens. The composed embedding
is the reference's own embedding plus a residual, so that an untrained composer already retrieves
look-alikes. Embeddings come from a head over the flattened tokens: it keeps the positions of a
scene, which pooling loses.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Float, Int, Shaped, UInt8

from dqe_jax.method.arrays import Array
from dqe_jax.models.features import ImageFeatures, States, TextFeatures
from dqe_jax.models.layers import Block, masked_mean, normalize, of_queries


class TokenHead(nn.Module):
    """Image tokens `[B, P, D]` to an embedding `[B, d]`, each position with weights of its own."""

    token_dim: int
    embed_dim: int
    dtype: DTypeLike = jnp.float32
    zero_init: bool = False

    @nn.compact
    def __call__(self, tokens: Float[Array, "B P D"]) -> Float[Array, "B d"]:
        """Returns `[B, d]`, not normalised."""
        x = nn.Dense(self.token_dim, dtype=self.dtype, name="token")(nn.LayerNorm()(tokens))
        init = nn.initializers.zeros if self.zero_init else nn.linear.default_kernel_init
        out = nn.Dense(self.embed_dim, dtype=self.dtype, kernel_init=init, name="embedding")
        return out(x.reshape(x.shape[0], -1))  # [B, P * token_dim] -> [B, d]


def split_cells(image: Shaped[Array, "B H W C"], size: int) -> Shaped[Array, "B h w cell"]:
    """Cuts `[B, H, W, C]` into cells of `size` a side: `[B, H/size, W/size, size * size * C]`."""
    batch, height, width, channels = image.shape
    x = image.reshape(batch, height // size, size, width // size, size, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height // size, width // size, -1)


class Tiny(nn.Module):
    """Backbone interface: see `models/features.py`. Word id 0 is padding.

    Attributes:
      vocab_size: size of the text vocabulary; id 0 is padding.
      max_length: longest text, in tokens.
      image_size: pixels a side of the square images.
      pixel_mean: brightness that becomes 0: that of the background, so that patches without content
        do not drown the others.
      pixel_std: brightness that becomes 1.
      patch_size: pixels a side of a patch, a multiple of `cell_size`.
      cell_size: pixels a side of the cells that a patch is embedded from.
      cell_width: width of an embedded cell.
      width: `D`.
      heads: attention heads.
      image_depth: blocks of the image encoder.
      text_depth: blocks of the text encoder.
      composer_depth: blocks of the composer.
      token_dim: width of a token inside the embedding heads.
      embed_dim: `d`.
      dropout: rate on patch and word embeddings, in training only.
      dtype: compute dtype of the matrix products; parameters are float32.
    """

    vocab_size: int
    max_length: int
    image_size: int
    pixel_mean: float = 222.0
    pixel_std: float = 64.0
    patch_size: int = 16
    cell_size: int = 8
    cell_width: int = 64
    width: int = 128
    heads: int = 4
    image_depth: int = 4
    text_depth: int = 2
    composer_depth: int = 2
    token_dim: int = 64
    embed_dim: int = 256
    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32

    PARTS: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "vision": ("cells/*", "patches/*", "image_*"),
        "text": ("words/*", "text_*"),
        "composer": ("composer_*", "residual_head/*"),
        "projections": ("gallery_head/*",),
    }
    TOWERS: ClassVar[Mapping[str, tuple[str, ...]]] = {"image": ("vision",), "text": ("text",)}

    def setup(self) -> None:
        """Creates the submodules."""
        self.cells = nn.Dense(self.cell_width, dtype=self.dtype)
        self.patches = nn.Dense(self.width, dtype=self.dtype)
        self.image_positions = nn.Embed(
            (self.image_size // self.patch_size) ** 2, self.width, dtype=self.dtype
        )
        self.image_blocks = self._blocks(self.image_depth)
        self.words = nn.Embed(self.vocab_size, self.width, dtype=self.dtype)
        self.text_positions = nn.Embed(self.max_length, self.width, dtype=self.dtype)
        self.text_blocks = self._blocks(self.text_depth)
        self.text_norm = nn.LayerNorm()
        self.composer_blocks = self._blocks(self.composer_depth)
        self.gallery_head = TokenHead(self.token_dim, self.embed_dim, self.dtype)
        self.residual_head = TokenHead(self.token_dim, self.embed_dim, self.dtype, zero_init=True)
        self.drop = nn.Dropout(self.dropout)

    def _blocks(self, depth: int) -> list[Block]:
        return [Block(self.heads, dtype=self.dtype) for _ in range(depth)]

    def given_states(self, kind: str) -> Mapping[str, jax.ShapeDtypeStruct]:
        """None: towers make them."""
        del kind
        return {}

    def random_towers(self) -> frozenset[str]:
        """Both or none."""
        return frozenset(self.TOWERS if self.dropout else ())

    def image_states(self, image: UInt8[Array, "B H W 3"], train: bool = False) -> States:
        """Tokens `[B, P, D]`."""
        x = ((image.astype(jnp.float32) - self.pixel_mean) / self.pixel_std).astype(self.dtype)
        x = nn.relu(self.cells(split_cells(x, self.cell_size)))
        x = split_cells(x, self.patch_size // self.cell_size)
        x = self.patches(x.reshape(len(x), -1, x.shape[-1]))  # [B, P, D]
        x = self.drop(x + self.image_positions(jnp.arange(x.shape[1])), deterministic=not train)
        for block in self.image_blocks:
            x = block(x)
        return {"tokens": x}

    def image_features(self, states: States, train: bool = False) -> ImageFeatures:
        """Tokens `[B, P, D]` and gallery embedding `[B, M=1, d]`."""
        del train
        return ImageFeatures(states["tokens"], self.gallery_head(states["tokens"])[:, None])

    def text_states(self, ids: Int[Array, "B L"], train: bool = False) -> States:
        """Tokens `[B, L, D]`."""
        mask = ids > 0
        x = self.words(ids) + self.text_positions(jnp.arange(ids.shape[1]))
        x = self.drop(x, deterministic=not train)
        for block in self.text_blocks:
            x = block(x, mask)
        return {"tokens": self.text_norm(x)}

    def text_features(
        self, ids: Int[Array, "B L"], states: States, train: bool = False
    ) -> TextFeatures:
        """Tokens `[B, L, D]` and their mean `[B, D]`."""
        del train
        mask, tokens = ids > 0, states["tokens"][:, : ids.shape[1]]  # a store has all of them
        return TextFeatures(ids, mask, tokens, masked_mean(tokens, mask))

    def compose(
        self,
        image: ImageFeatures,
        text: TextFeatures,
        train: bool = False,
        rows: Int[Array, " B"] | None = None,
    ) -> Float[Array, "B d"]:
        """Composed embedding `h`, float32."""
        del train
        count = len(text.ids)
        x: Array = of_queries(image.tokens, rows, count)
        for block in self.composer_blocks:
            x = block(x, context=text.tokens, context_mask=text.mask)
        # At length 1 the reference does not outweigh the residual, and edits are learned much
        # sooner.
        reference = of_queries(normalize(image.gallery[:, 0]), rows, count)
        return reference + self.residual_head(x)
