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


# Products `<q, T_m>` that are held at a time, for a part of the candidates: 16 MiB.
AT_ONCE = 2**22


def _part(query: Array, gallery: Array) -> int:
    """How many candidates are compared at a time: one product for all of them and their tokens."""
    return min(len(gallery), max(1, AT_ONCE // (len(query) * gallery.shape[1])))


def _best_token(
    query: Float[Array, "B d"], gallery: Float[Array, "N M d"]
) -> tuple[Float[Array, "N B"], Int[Array, "N B"]]:
    """Score and index of the best token, candidates first; the first of equal ones."""

    def of_one(tokens: Array) -> _Pair:
        scores = _product("md,bd->mb", tokens, query)
        best, number = scores.max(axis=0), jnp.arange(len(tokens), dtype=jnp.int32)[:, None]
        # As argmax, but a plain minimum is quicker.
        return best, jnp.where(scores == best, number, len(tokens)).min(axis=0)

    return lax.map(of_one, gallery, batch_size=_part(query, gallery))


@jax.custom_vjp
def similarity(query: Float[Array, "B d"], gallery: Float[Array, "N M d"]) -> Float[Array, "B N"]:
    """`s(q, T)` of every query with every candidate of a batch, with gradients.

    No more than `AT_ONCE` products are held, in the backward pass neither: it keeps the index of
    the best token (the first of equals, which gets the whole gradient).

    Args:
      query: `[B, d]`.
      gallery: `[N, M, d]`.

    Returns:
      float32 `[B, N]`.
    """
    return _best_token(query, gallery)[0].T


def _similarity_forward(query: Array, gallery: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    best, index = _best_token(query, gallery)
    return best.T, (query, gallery, index)


def _similarity_backward(saved: tuple[Array, Array, Array], cotangent: Array) -> _Pair:
    query, gallery, index = saved
    part, wide = _part(query, gallery), query.astype(jnp.float32)
    number = jnp.arange(gallery.shape[1], dtype=jnp.int32)[:, None]

    def step(query_grad: jax.Array, item: tuple[Array, Array, Array]) -> _Pair:
        tokens, best, own = item
        # [part, M, B]: each gradient at the token that scored best.
        own = jnp.where(best[:, None] == number, own[:, None], 0)
        query_grad += _product("nmb,nmd->bd", own, tokens.astype(jnp.float32))
        return query_grad, _product("nmb,bd->nmd", own, wide).astype(tokens.dtype)

    items, whole = (gallery, index, cotangent.T), len(gallery) // part * part
    parts = jax.tree.map(lambda x: x[:whole].reshape(-1, part, *x.shape[1:]), items)
    query_grad, token_grads = lax.scan(step, jnp.zeros(query.shape, jnp.float32), parts)
    token_grads = token_grads.reshape(-1, *gallery.shape[1:])
    if whole < len(gallery):
        rest = jax.tree.map(lambda x: x[whole:], items)
        query_grad, last = step(query_grad, rest)
        token_grads = jnp.concatenate([token_grads, last])
    return query_grad.astype(query.dtype), token_grads


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
    # Tokens first: the maximum is then one of whole rows.
    return _product("rmd,cd->rmc", gallery, query).max(axis=1).T


def listed_similarity(
    query: Float[Array, "B d"], listed: Float[Array, "B S M d"]
) -> Float[Array, "B S"]:
    """`s(q_i, T_is)` with images of each query's own, float32."""
    return _product("cd,csmd->csm", query, listed).max(axis=-1)
