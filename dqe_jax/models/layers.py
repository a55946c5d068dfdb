"""Transformer parts shared by the backbones. Normalisation and softmax run in float32.

Symbols: `B` batch, `L` tokens, `S` tokens attended to, `D` width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Bool, Float

from dqe_jax.method.arrays import Array


class Attention(nn.Module):
    """Multi-head attention of `x [B, L, D]` over `context [B, S, C]` (itself when None).

    A context of fewer rows, `[R, S, C]` with `B = R * Q`, is that of `Q` consecutive rows of `x`
    each: its keys and values are computed once. It takes no mask then. Where `x` has fewer rows,
    `[R, L, D]`, each is asked by `Q` consecutive rows of the context: its queries are computed
    once, and the result is `[B, L, D]`.
    """

    heads: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "rows L D"],
        context: Float[Array, "contexts S C"] | None = None,
        mask: Bool[Array, "B S"] | None = None,
    ) -> Float[Array, "B L D"]:
        """`mask` is false for padding."""
        rows, width = max(len(x), 0 if context is None else len(context)), x.shape[-1]
        if context is None:
            q, k, v = jnp.split(nn.Dense(3 * width, dtype=self.dtype, name="qkv")(x), 3, axis=-1)
        else:
            q = nn.Dense(width, dtype=self.dtype, name="query")(x)
            if len(x) < rows:
                q = jnp.repeat(q, rows // len(x), axis=0)
            q = q.reshape(len(context), -1, width)
            k, v = jnp.split(
                nn.Dense(2 * width, dtype=self.dtype, name="key_value")(context), 2, axis=-1
            )
        q, k, v = (t.reshape(*t.shape[:2], self.heads, width // self.heads) for t in (q, k, v))
        out = jax.nn.dot_product_attention(
            q, k, v, mask=None if mask is None else mask[:, None, None, :]
        )  # [B, L, heads, D / heads]
        return nn.Dense(width, dtype=self.dtype, name="out")(out.reshape(rows, -1, width))


class Block(nn.Module):
    """Pre-norm block: self-attention, cross-attention if a context is given, then an MLP.

    A context may have more rows than `x`, Q for each: what comes before the cross-attention is
    computed once for all Q, and the result has the rows of the context.
    """

    heads: int
    mlp_ratio: int = 4
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "R L D"],
        mask: Bool[Array, "R L"] | None = None,
        context: Float[Array, "B S C"] | None = None,
        context_mask: Bool[Array, "B S"] | None = None,
    ) -> Float[Array, "B L D"]:
        """Masks are false for padding."""
        width = x.shape[-1]
        attend = Attention(self.heads, self.dtype, name="self_attention")
        x = x + attend(nn.LayerNorm(name="norm_self")(x), mask=mask)
        if context is not None:
            cross = Attention(self.heads, self.dtype, name="cross_attention")
            asked = cross(nn.LayerNorm(name="norm_cross")(x), context, context_mask)
            x = jnp.repeat(x, len(asked) // len(x), axis=0) + asked
        y = nn.LayerNorm(name="norm_mlp")(x)
        y = nn.Dense(self.mlp_ratio * width, dtype=self.dtype, name="mlp_in")(y)
        # ReLU: on CPUs the tanh of GELU costs a fifth of a training step.
        return x + nn.Dense(width, dtype=self.dtype, name="mlp_out")(nn.relu(y))


def normalize(x: Float[Array, "*axes d"]) -> Float[Array, "*axes d"]:
    """L2-normalises the last axis in float32; a zero vector stays zero, with a finite gradient."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, -1, keepdims=True), 1e-12))


def masked_mean(x: Float[Array, "B L D"], mask: Bool[Array, "B L"]) -> Float[Array, "B D"]:
    """Mean over the tokens that the mask keeps."""
    weights = mask[..., None].astype(x.dtype)
    return (x * weights).sum(1) / jnp.maximum(weights.sum(1), 1)
