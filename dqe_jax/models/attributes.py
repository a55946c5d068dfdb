"""Learnable attribute weights (method, sections 1 and 9): what a query stresses, or takes over.

The weights `w` are a function of the modification text alone. Which attribute is which is taught by
the intent term of the loss through a lexicon. There are two forms.

`AttributeWeights` adds to the query: `K` attribute queries attend over the tokens of an image,
conditioned on the text, and give the attribute features `a_k`, which `w` weighs.

`AttributeGates` chooses: the embedding is cut into parts, the first of which are the attributes,
and `w_k` says how much of a part is taken from the text instead of the reference.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from dqe_jax.method.arrays import Array
from dqe_jax.models.layers import Attention

ACTIVATIONS = {
    "sigmoid": jax.nn.sigmoid,
    "softmax": lambda logits: jax.nn.softmax(logits, axis=-1),
}


class AttributeWeights(nn.Module):
    """Attribute features and weights, and their sum as a contribution to the query embedding.

    Attributes:
      names: the K attributes.
      embed_dim: `d`.
      width: of the attribute features.
      heads: attention heads of the attribute queries.
      activation: `sigmoid` (independent weights) or `softmax` (weights sum to 1).
      dtype: compute dtype of the matrix products.
    """

    names: Sequence[str]
    embed_dim: int
    width: int
    heads: int
    activation: str = "sigmoid"
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        """Creates the parameters."""
        self.attribute_queries = self.param(
            "attribute_queries", nn.initializers.normal(0.02), (len(self.names), self.width)
        )
        self.text_condition = nn.Dense(self.width, dtype=self.dtype)
        self.attention = Attention(self.heads, self.dtype)
        self.norm = nn.LayerNorm()
        self.weight_hidden = nn.Dense(self.width, dtype=self.dtype)
        self.weight_out = nn.Dense(len(self.names), dtype=self.dtype)
        # Starts at zero: training begins as the plain composer (method, section 7). Without a
        # bias, w = 0 is exactly the composer without attribute weighting.
        self.contribution = nn.Dense(
            self.embed_dim,
            use_bias=False,
            kernel_init=nn.initializers.zeros,
            dtype=self.dtype,
        )

    def weights(self, text: Float[Array, "B D"]) -> Float[Array, "B K"]:
        """`w = activation(MLP(text))`, of the pooled text, float32."""
        logits = self.weight_out(nn.relu(self.weight_hidden(text)))
        return ACTIVATIONS[self.activation](logits.astype(jnp.float32))

    def features(
        self,
        tokens: Float[Array, "R P D"],
        text: Float[Array, "B E"],
        rows: Int[Array, " B"] | None = None,
    ) -> Float[Array, "B K width"]:
        """`a_k` of the tokens of R images and the pooled text; `rows` as for `of_queries`."""
        queries = self.attribute_queries[None] + self.text_condition(text)[:, None]
        return self.norm(queries + self.attention(queries, tokens, context_rows=rows))

    def contribute(
        self, features: Float[Array, "B K width"], weights: Float[Array, "B K"]
    ) -> Float[Array, "B d"]:
        """`sum_k w_k O(a_k)`, what is added to `h`."""
        return self.contribution(jnp.einsum("bk,bkd->bd", weights, features))


class AttributeGates(nn.Module):
    """Weights that choose, part by part, between the reference and the text (method, section 9).

    With `r` the reference's own embedding and `u` what the text asks for, `w_k (u_k - r_k)` is
    added to part k of the composed embedding: `w_k = 0` keeps the reference's attribute, `w_k = 1`
    replaces it by the text's.

    Attributes:
      names: the K attributes, which are the first parts.
      parts: all of them; the others are free. They divide `d`.
      embed_dim: `d`.
      width: of the hidden layer that reads the text.
      dtype: compute dtype of the matrix products.
    """

    names: Sequence[str]
    parts: int
    embed_dim: int
    width: int
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        """Creates the parameters."""
        self.gate = nn.Dense(self.parts, dtype=self.dtype)
        self.asked_hidden = nn.Dense(self.width, dtype=self.dtype)
        self.asked_out = nn.Dense(self.embed_dim, dtype=self.dtype)

    def weights(self, text: Float[Array, "B D"]) -> Float[Array, "B parts"]:
        """`w = sigmoid(Linear(text))`, of the pooled text, float32."""
        return jax.nn.sigmoid(self.gate(text).astype(jnp.float32))

    def contribute(
        self,
        weights: Float[Array, "B parts"],
        reference: Float[Array, "B d"],
        text: Float[Array, "B D"],
    ) -> Float[Array, "B d"]:
        """`w_k (u_k - r_k)` of all parts, what is added to `h`, float32."""
        asked = self.asked_out(nn.relu(self.asked_hidden(text))).astype(jnp.float32)
        return jnp.repeat(weights, self.embed_dim // self.parts, axis=-1) * (asked - reference)

    def named_parts(self, embedding: Float[Array, "B d"]) -> Float[Array, "B K part"]:
        """The parts of an embedding that are attributes."""
        cut = embedding.reshape(len(embedding), self.parts, -1)
        return cut[:, : len(self.names)]
