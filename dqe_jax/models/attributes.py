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
from jax.typing import DTypeLike
from jaxtyping import Float

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
        self, tokens: Float[Array, "R P D"], text: Float[Array, "B E"]
    ) -> Float[Array, "B K width"]:
        """`a_k` of the tokens of R images and the pooled text.

        `B = R * Q`: the texts of an image stand together, Q each.
        """
        queries = self.attribute_queries[None] + self.text_condition(text)[:, None]
        return self.norm(queries + self.attention(queries, tokens))

    def contribute(
        self, features: Float[Array, "B K width"], weights: Float[Array, "B K"]
    ) -> Float[Array, "B d"]:
        """`sum_k w_k O(a_k)`, what is added to `h`."""
        return self.contribution(jnp.einsum("bk,bkd->bd", weights, features))
