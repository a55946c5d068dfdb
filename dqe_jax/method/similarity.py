"""The score of the method, `s(q, T) = max_m <q, T_m>`, in the forms that it is computed in.

Products are in float32 at the highest precision. The forms differ in shapes and in the order in
which a device reads its arrays; each keeps the order of its sums, so that a score does not depend
on where it is computed. No form makes a `[B, N, M]` array of a pool or of a bank.

Symbols: `B` queries, `N` candidates, `M` tokens of a gallery embedding, `d` its width. Queries and
tokens are L2-normalised.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float, Int

from dqe_jax.method.arrays import Array

_Pair = tuple[jax.Array, jax.Array]


def _product(form: str, *arrays: Array) -> jax.Array:
    return jnp.einsum(
        form, *arrays, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )


# ------------------------------------------------------------------------------------ in the batch


def _best_token(
    query: Float[Array, "B d"], gallery: Float[Array, "N M d"]
) -> tuple[Float[Array, "B N"], Int[Array, "B N"]]:
    """Score and index of the best token, both `[B, N]`: one product a token, a running maximum."""
    tokens = jnp.moveaxis(gallery, 1, 0)  # [M, N, d]
    first = _product("bd,nd->bn", query, tokens[0])

    def step(carry: _Pair, item: _Pair) -> tuple[_Pair, None]:
        (best, index), (m, token) = carry, item
        scores = _product("bd,nd->bn", query, token)
        return (jnp.maximum(best, scores), jnp.where(scores > best, m, index)), None

    start = first, jnp.zeros(first.shape, jnp.int32)
    return lax.scan(step, start, (jnp.arange(1, len(tokens)), tokens[1:]))[0]


@jax.custom_vjp
def similarity(query: Float[Array, "B d"], gallery: Float[Array, "N M d"]) -> Float[Array, "B N"]:
    """`s(q, T)` of every query with every candidate of a batch, with gradients.

    No `[B, N, M]` array, in the backward pass neither: it keeps the index of the best token (the
    first of equals, which gets the whole gradient).

    Args:
      query: `[B, d]`.
      gallery: `[N, M, d]`.

    Returns:
      float32 `[B, N]`.
    """
    return _best_token(query, gallery)[0]


def _similarity_forward(query: Array, gallery: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    best, index = _best_token(query, gallery)
    return best, (query, gallery, index)


def _similarity_backward(saved: tuple[Array, Array, Array], cotangent: Array) -> _Pair:
    query, gallery, index = saved

    def step(query_grad: jax.Array, item: _Pair) -> _Pair:
        m, token = item
        own = jnp.where(index == m, cotangent, 0)  # [B, N], what this token was the best for
        query_grad += _product("bn,nd->bd", own, token.astype(jnp.float32))
        token_grad = _product("bn,bd->nd", own, query.astype(jnp.float32))
        return query_grad, token_grad.astype(token.dtype)

    items = jnp.arange(gallery.shape[1]), jnp.moveaxis(gallery, 1, 0)
    query_grad, token_grads = lax.scan(step, jnp.zeros(query.shape, jnp.float32), items)
    return query_grad.astype(query.dtype), jnp.moveaxis(token_grads, 0, 1)


similarity.defvjp(_similarity_forward, _similarity_backward)


def paired_similarity(
    query: Float[Array, "B d"], target: Float[Array, "B M d"]
) -> Float[Array, " B"]:
    """`s(q_i, T_i)` of each query with its own embedding, float32."""
    return _product("bd,bmd->bm", query, target).max(axis=-1)


def target_relative_similarity(
    query: Float[Array, "B d"],
    gallery: Float[Array, "N M d"],
    target: Float[Array, "B M d"],
) -> Float[Array, "B N"]:
    """`delta[i, c] = s(q_i, T_{t_i}) - s(q_i, T_c)` (method, section 2).

    Target and gallery must be embeddings of the same parameters: a fresh target against a stale
    gallery lets a model lower its loss by drifting away from the gallery.

    Args:
      query: `[B, d]` query embeddings.
      gallery: `[N, M, d]` embeddings of the candidates.
      target: `[B, M, d]` embedding of each query's target.

    Returns:
      float32 `[B, N]`; negative where a candidate beats the target.
    """
    return paired_similarity(query, target)[:, None] - similarity(query, gallery)


# --------------------------------------------------------------------------- against a bank's rows


def chunk_similarity(
    query: Float[Array, "B d"], tokens: Float[Array, "C M d"]
) -> Float[Array, "B C"]:
    """`s(q, T)` with a chunk of a bank, float32."""
    # Tokens first: this order is 1.5 times as fast on a CPU.
    return _product("smd,bd->smb", tokens, query).max(axis=1).T


def best_token(query: Float[Array, " d"], tokens: Float[Array, "M d"]) -> Float[Array, " d"]:
    """The token that a query scores best."""
    return tokens[_product("d,md->m", query, tokens).argmax()]


def token_similarity(
    query: Float[Array, "B d"], tokens: Float[Array, "B n d"]
) -> Float[Array, "B n"]:
    """`<q_i, t_in>` with tokens that were chosen before, float32."""
    return _product("bd,bnd->bn", query, tokens)


# ------------------------------------------------------------------------------------- for ranking


def ranking_similarity(
    query: Float[Array, "B d"], gallery: Float[Array, "C M d"]
) -> Float[Array, "B C"]:
    """`s(q, T)` with a chunk of a gallery, float32."""
    return _product("cd,rmd->crm", query, gallery).max(axis=-1)


def listed_similarity(
    query: Float[Array, "B d"], listed: Float[Array, "B S M d"]
) -> Float[Array, "B S"]:
    """`s(q_i, T_is)` with images of each query's own, float32."""
    return _product("cd,csmd->csm", query, listed).max(axis=-1)
