"""BLIP-2 stage 1 (Li et al., ICML 2023) as a backbone: vision tower, Q-Former, projections.

The Q-Former is a BERT in which learned query tokens attend to the image tokens in every second
layer. It runs in three ways: on the text alone, on the queries alone (the gallery embedding,
M = 32 tokens), and on queries and text together, which composes a CIR query: `h` is the mean of the
projected query tokens (method, section 5).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Bool, Float, Int, UInt8

from dqe_jax.method.arrays import Array
from dqe_jax.models.encoder import ACTIVATIONS, Compute, VisionSizes, VisionTower, attend
from dqe_jax.models.features import ImageFeatures, States, TextFeatures
from dqe_jax.models.layers import normalize, of_queries


@dataclasses.dataclass(frozen=True)
class Blip2Sizes:
    """Sizes of a BLIP-2 stage-1 model.

    Attributes:
      vision: of the vision tower.
      width: of the Q-Former.
      depth: its layers.
      heads: its attention heads.
      mlp_dim: width inside its MLPs.
      activation: a name of `ACTIVATIONS`.
      epsilon: of its norms.
      cross_every: every so many layers, from the first, queries attend to the image.
      num_queries: `M`.
      vocab_size: of the text embeddings.
      max_length: positions of the text embeddings.
      embed_dim: `d`.
    """

    vision: VisionSizes
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_dim: int = 3072
    activation: str = "gelu"
    epsilon: float = 1e-12
    cross_every: int = 2
    num_queries: int = 32
    vocab_size: int = 30523
    max_length: int = 512
    embed_dim: int = 256


# The Q-Former is BERT-base with one word more (Li et al., 2023, section 3.1).
VARIANTS = {
    # EVA ViT-g/14: Salesforce/blip2-itm-vit-g and -coco.
    "vit_g_14": Blip2Sizes(
        VisionSizes(
            image_size=224,
            patch_size=14,
            width=1408,
            depth=39,
            heads=16,
            mlp_dim=6144,
            activation="gelu",
            epsilon=1e-6,
            pre_norm=False,
            patch_bias=True,
        )
    ),
    # CLIP ViT-L/14 without its last layer, as in LAVIS' `pretrain_vitL`, which QuRe uses.
    "vit_l_14": Blip2Sizes(
        VisionSizes(
            image_size=224,
            patch_size=14,
            width=1024,
            depth=23,
            heads=16,
            mlp_dim=4096,
            activation="quick_gelu",
            epsilon=1e-5,
            pre_norm=True,
            patch_bias=False,
        )
    ),
}


class QFormerAttention(nn.Module):
    """Post-norm attention of `x [B, L, D]` over a context (itself when None).

    A context of R images is asked by the rows of B texts: keys and values are computed once.
    """

    sizes: Blip2Sizes
    dropout: float
    compute: Compute

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B L D"],
        context: Float[Array, "R S C"] | None,
        mask: Bool[Array, "B keys"] | None,
        train: bool,
        rows: Int[Array, " B"] | None = None,
    ) -> Float[Array, "B L D"]:
        """`mask` is over the keys; `rows` is that of `layers.of_queries`."""
        s, dtype = self.sizes, self.compute.dtype
        if context is None:
            q, k, v = jnp.split(nn.Dense(3 * s.width, dtype=dtype, name="qkv")(x), 3, axis=-1)
        else:
            q = nn.Dense(s.width, dtype=dtype, name="query")(x)
            kv = nn.Dense(2 * s.width, dtype=dtype, name="key_value")(context)
            if rows is not None:
                kv = of_queries(kv, rows, len(x))
            q = q.reshape(len(kv), -1, s.width)
            k, v = jnp.split(kv, 2, axis=-1)
        y = attend(q, k, v, s.heads, self.compute, mask=mask)
        y = nn.Dense(s.width, dtype=dtype, name="out")(y.reshape(x.shape))
        y = nn.Dropout(self.dropout, deterministic=not train)(y)
        return nn.LayerNorm(s.epsilon, dtype=dtype, name="norm")(x + y)


class QFormerMlp(nn.Module):
    """Post-norm MLP."""

    sizes: Blip2Sizes
    dropout: float
    compute: Compute

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"], train: bool) -> Float[Array, "B L D"]:
        """Token by token."""
        s, dtype = self.sizes, self.compute.dtype
        y = nn.Dense(s.mlp_dim, dtype=dtype, name="mlp_in")(x)
        y = nn.Dense(s.width, dtype=dtype, name="mlp_out")(ACTIVATIONS[s.activation](y))
        y = nn.Dropout(self.dropout, deterministic=not train)(y)
        return nn.LayerNorm(s.epsilon, dtype=dtype, name="norm")(x + y)


class QFormerLayer(nn.Module):
    """A layer: self-attention of all, cross-attention of the queries, an MLP for each kind."""

    sizes: Blip2Sizes
    cross: bool
    dropout: float
    compute: Compute

    def setup(self) -> None:
        """Creates the submodules."""
        arguments = (self.sizes, self.dropout, self.compute)
        self.attention = QFormerAttention(*arguments)
        if self.cross:
            self.cross_attention = QFormerAttention(*arguments)
        self.query_mlp = QFormerMlp(*arguments)
        self.text_mlp = QFormerMlp(*arguments)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        queries: int,
        image: Float[Array, "R P C"] | None,
        mask: Bool[Array, "B T"] | None,
        train: bool,
        rows: Int[Array, " B"] | None = None,
    ) -> Float[Array, "B T D"]:
        """`T = queries + L` tokens, the queries first, over image tokens."""
        x = self.attention(x, None, mask, train)
        parts = []
        if queries:
            q = x[:, :queries]
            if self.cross:
                q = self.cross_attention(q, image, None, train, rows)
            parts.append(self.query_mlp(q, train))
        if x.shape[1] > queries:
            parts.append(self.text_mlp(x[:, queries:], train))
        return jnp.concatenate(parts, axis=1)


class QFormer(nn.Module):
    """The Q-Former without its embeddings."""

    sizes: Blip2Sizes
    dropout: float = 0.0
    compute: Compute = Compute()

    def setup(self) -> None:
        """Creates the submodules."""
        s = self.sizes
        # The layer's integers and flags are arguments 2 and 5, counted after the module itself.
        layer = nn.remat(QFormerLayer, static_argnums=(2, 5)) if self.compute.remat else None
        self.norm = nn.LayerNorm(s.epsilon, dtype=self.compute.dtype)
        self.drop = nn.Dropout(self.dropout)
        self.layers = [
            (layer or QFormerLayer)(s, i % s.cross_every == 0, self.dropout, self.compute)
            for i in range(s.depth)
        ]

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        queries: int = 0,
        image: Float[Array, "R P C"] | None = None,
        mask: Bool[Array, "B T"] | None = None,
        train: bool = False,
        rows: Int[Array, " B"] | None = None,
    ) -> Float[Array, "B T D"]:
        """`T = queries + L` embeddings, the queries first, to outputs of that shape.

        Args:
          x: query tokens, or text embeddings, or both.
          queries: how many of the tokens are queries.
          image: image tokens; needed with queries.
          mask: false for padding.
          train: whether dropout is on.
          rows: the image of each row; None where each has `B / R`, side by side.
        """
        x = self.drop(self.norm(x), deterministic=not train)
        for layer in self.layers:
            x = layer(x, queries, image, mask, train, rows)
        return x


class TextEmbeddings(nn.Module):
    """Word and position embeddings of the Q-Former's text."""

    sizes: Blip2Sizes
    compute: Compute = Compute()

    @nn.compact
    def __call__(self, ids: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        """Ids to embeddings."""
        s, dtype = self.sizes, self.compute.dtype
        words = nn.Embed(s.vocab_size, s.width, dtype=dtype, name="words")(ids)
        positions = self.param("positions", nn.initializers.normal(0.02), (s.max_length, s.width))
        return words + positions[: ids.shape[1]].astype(dtype)


class Blip2(nn.Module):
    """Backbone interface: see `models/features.py`. Token id 0 is padding, as in BERT.

    Attributes:
      sizes: a row of `VARIANTS`, or of any model of this shape.
      image_size: pixels a side of the images.
      dropout: of the Q-Former, in training; attention probabilities are not dropped.
      compute: see `encoder.Compute`; the Q-Former's layers are never scanned.
    """

    sizes: Blip2Sizes
    image_size: int
    dropout: float = 0.1
    compute: Compute = Compute()

    PARTS: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "vision": ("vision/*",),
        "text": ("text/*",),
        "qformer": ("qformer/*", "query_tokens"),
        "projections": ("vision_projection/*", "text_projection/*"),
        "itm_head": ("itm_kernel", "itm_bias"),
    }
    TOWERS: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "image": ("vision",),
        "text": ("text", "qformer"),
    }

    @property
    def embed_dim(self) -> int:
        """`d`."""
        return self.sizes.embed_dim

    def setup(self) -> None:
        """Creates the submodules."""
        s, dtype = self.sizes, self.compute.dtype
        normal = nn.initializers.normal(0.02)
        self.vision = VisionTower(s.vision, self.image_size, self.compute)
        self.text = TextEmbeddings(s, self.compute)
        self.qformer = QFormer(s, self.dropout, self.compute)
        self.query_tokens = self.param("query_tokens", normal, (s.num_queries, s.width))
        self.vision_projection = nn.Dense(s.embed_dim, dtype=dtype)
        self.text_projection = nn.Dense(s.embed_dim, dtype=dtype)
        # Image-text matching: not part of composed retrieval, kept for scores and for export.
        self.itm_kernel = self.param("itm_kernel", normal, (s.width, 2))
        self.itm_bias = self.param("itm_bias", nn.initializers.zeros, (2,))

    def _queries(self, batch: int) -> Float[Array, "B M D"]:
        tokens = self.query_tokens.astype(self.compute.dtype)
        return jnp.broadcast_to(tokens, (batch, *tokens.shape))

    def given_states(self, kind: str) -> Mapping[str, jax.ShapeDtypeStruct]:
        """None: towers make them."""
        del kind
        return {}

    def random_towers(self) -> frozenset[str]:
        """The text passes the Q-Former, which has dropout."""
        return frozenset({"text"} if self.dropout else ())

    def image_states(self, image: UInt8[Array, "B H W 3"], train: bool = False) -> States:
        """Tokens `[B, 1 + P, D]` behind the tower's norm, the class token first."""
        del train
        return {"tokens": self.vision.norm(self.vision(image)[0])}

    def image_features(self, states: States, train: bool = False) -> ImageFeatures:
        """Tokens `[B, 1 + P, D]` and gallery embedding `[B, M, d]`."""
        tokens, M = states["tokens"], self.sizes.num_queries
        out = self.qformer(self._queries(len(tokens)), queries=M, image=tokens, train=train)
        return ImageFeatures(tokens, self.vision_projection(out))

    def text_states(self, ids: Int[Array, "B L"], train: bool = False) -> States:
        """Tokens `[B, L, D]` of the text alone."""
        return {"tokens": self.qformer(self.text(ids), mask=ids > 0, train=train)}

    def text_features(
        self, ids: Int[Array, "B L"], states: States, train: bool = False
    ) -> TextFeatures:
        """Tokens `[B, L, D]` of the text alone, and its projected first token, `[B, d]`."""
        del train
        tokens = states["tokens"][:, : ids.shape[1]]  # a store has all of them
        return TextFeatures(ids, ids > 0, tokens, self.text_projection(tokens[:, 0]))

    def fuse(
        self,
        tokens: Float[Array, "R P C"],
        ids: Int[Array, "B L"],
        train: bool = False,
        rows: Int[Array, " B"] | None = None,
    ) -> Float[Array, "B M D"]:
        """Queries and text over image tokens: the outputs of the queries."""
        M = self.sizes.num_queries
        x = jnp.concatenate([self._queries(len(ids)), self.text(ids)], axis=1)
        mask = jnp.concatenate([jnp.ones((len(ids), M), bool), ids > 0], axis=1)
        out = self.qformer(x, queries=M, image=tokens, mask=mask, train=train, rows=rows)
        return out[:, :M]

    def compose(
        self,
        image: ImageFeatures,
        text: TextFeatures,
        train: bool = False,
        rows: Int[Array, " B"] | None = None,
    ) -> Float[Array, "B d"]:
        """`h`, float32: the mean of the projected query tokens."""
        out = self.vision_projection(self.fuse(image.tokens, text.ids, train, rows))
        return out.astype(jnp.float32).mean(1)

    def __call__(
        self, image: UInt8[Array, "images H W 3"], ids: Int[Array, "texts L"]
    ) -> tuple[Float[Array, "images texts"], Float[Array, "texts 2"]]:
        """BLIP-2's own scores: contrastive ones, and matching logits.

        The matching logits are of each image with the text at its place; as many of both.
        """
        features = self.image_features(self.image_states(image))
        texts = normalize(self.text_features(ids, self.text_states(ids)).pooled)
        contrast = jnp.einsum("imd,td->itm", normalize(features.gallery), texts).max(-1)
        fused = self.fuse(features.tokens, ids)
        logits = fused.astype(jnp.float32) @ self.itm_kernel + self.itm_bias
        return contrast, logits.mean(1)
