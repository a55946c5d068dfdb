"""Transformer parts shared by the backbones. Normalisation and softmax run in float32.

Symbols: `B` batch, `L` tokens, `S` tokens attended to, `D` width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int, Shaped

from dqe_jax.method.arrays import Array


def of_queries(
    x: Shaped[Array, "R ..."], rows: Int[Array, " B"] | None, count: int
) -> Shaped[Array, "B ..."]:
    """What belongs to each query's reference.

    Args:
      x: of R references.
      rows: each query's reference; None where each has as many, side by side.
      count: `B`.
    """
    if rows is None:
        return x if len(x) == count else jnp.repeat(x, count // len(x), axis=0)
    picked: Array = _picked(jnp.asarray(x), jnp.asarray(rows))
    return picked


@jax.custom_vjp
def _picked(x: jax.Array, rows: jax.Array) -> jax.Array:
    """`x[rows]`; the gradient is a product with ones and zeros.

    It adds up the same numbers as a scatter, in an order that never changes, and GPUs do it faster.
    """
    return x.at[rows].get(mode="promise_in_bounds")


def _picked_forward(x: jax.Array, rows: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return _picked(x, rows), (rows, jnp.zeros((len(x), 0), x.dtype))


def _picked_backward(saved: tuple[jax.Array, ...], cotangent: jax.Array) -> tuple[jax.Array, None]:
    rows, like = saved
    own = (jnp.arange(len(like))[:, None] == rows).astype(cotangent.dtype)  # [R, B]
    flat = cotangent.reshape(len(rows), -1)
    added = jnp.matmul(own, flat, precision=jax.lax.Precision.HIGHEST)
    return added.astype(like.dtype).reshape(len(like), *cotangent.shape[1:]), None


_picked.defvjp(_picked_forward, _picked_backward)


class Attention(nn.Module):
    """Multi-head attention of `x [B, L, D]` over `context [B, S, C]` (itself when None).

    A context of fewer rows, `[R, S, C]`, is that of references, and `x` has a row for each query:
    keys and values of a reference are computed once. It takes no mask then. Where `x` has fewer
    rows, `[R, L, D]`, it is of references and the context of queries: the references' own queries
    are computed once, and the result is `[B, L, D]`.
    """

    heads: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "rows L D"],
        context: Float[Array, "contexts S C"] | None = None,
        mask: Bool[Array, "B S"] | None = None,
        context_rows: Int[Array, " B"] | None = None,
        rows: Int[Array, " B"] | None = None,
    ) -> Float[Array, "B L D"]:
        """`mask` is false for padding.

        `context_rows` is that of `of_queries` for a context of references, `rows` for an `x` of
        references.
        """
        count, width = max(len(x), 0 if context is None else len(context)), x.shape[-1]
        if context is None:
            q, k, v = jnp.split(nn.Dense(3 * width, dtype=self.dtype, name="qkv")(x), 3, axis=-1)
        else:
            asked: Array = nn.Dense(width, dtype=self.dtype, name="query")(x)
            kv: Array = nn.Dense(2 * width, dtype=self.dtype, name="key_value")(context)
            if rows is not None or len(x) < len(context):
                asked = of_queries(asked, rows, count)
            if context_rows is not None:
                kv = of_queries(kv, context_rows, count)
            q = jnp.reshape(asked, (len(kv), -1, width))
            k, v = jnp.split(kv, 2, axis=-1)
        q, k, v = (t.reshape(*t.shape[:2], self.heads, width // self.heads) for t in (q, k, v))
        out = jax.nn.dot_product_attention(
            q, k, v, mask=None if mask is None else mask[:, None, None, :]
        )  # [B, L, heads, D / heads]
        return nn.Dense(width, dtype=self.dtype, name="out")(out.reshape(count, -1, width))


class Block(nn.Module):
    """Pre-norm block: self-attention, cross-attention if a context is given, then an MLP.

    A context may have more rows than `x`, those of queries over references: what comes before the
    cross-attention is computed once a reference, and the result has the rows of the context.
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
        rows: Int[Array, " B"] | None = None,
    ) -> Float[Array, "B L D"]:
        """Masks are false for padding; `rows` is that of `of_queries`."""
        width = x.shape[-1]
        attend = Attention(self.heads, self.dtype, name="self_attention")
        x = x + attend(nn.LayerNorm(name="norm_self")(x), mask=mask)
        if context is not None:
            cross = Attention(self.heads, self.dtype, name="cross_attention")
            asked = cross(nn.LayerNorm(name="norm_cross")(x), context, context_mask, rows=rows)
            x = of_queries(x, rows, len(asked)) + asked
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
