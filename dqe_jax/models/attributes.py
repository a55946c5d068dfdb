"""Learnable attribute weights (method, section 1): which features of an image a query stresses.

`K` attribute queries attend over the tokens of an image, conditioned on the modification text, and
give the attribute features `a_k`; the weights `w` are a function of the text alone. Which attribute
is which is taught by the intent term of the loss through a lexicon.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn

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
    dtype: jnp.dtype = jnp.float32

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

    def weights(self, text: jax.Array) -> jax.Array:
        """`w = activation(MLP(text))`: pooled text `[B, D]` to float32 `[B, K]`."""
        logits = self.weight_out(nn.relu(self.weight_hidden(text)))
        return ACTIVATIONS[self.activation](logits.astype(jnp.float32))

    def features(self, tokens: jax.Array, text: jax.Array) -> jax.Array:
        """`a_k`: tokens `[R, P, D]` of R images and pooled text `[B, D']` to `[B, K, width]`.

        `B = R * Q`: the texts of an image stand together, Q each.
        """
        queries = self.attribute_queries[None] + self.text_condition(text)[:, None]
        return self.norm(queries + self.attention(queries, tokens))

    def contribute(self, features: jax.Array, weights: jax.Array) -> jax.Array:
        """`sum_k w_k O(a_k)`, what is added to `h`: `[B, K, width], [B, K] -> [B, d]`."""
        return self.contribution(jnp.einsum("bk,bkd->bd", weights, features))
