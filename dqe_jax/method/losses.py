"""The loss terms of DQE-CIR (method, section 3). Arrays in, one value a query out, float32 `[B]`.

Averaging over queries, and the weights of the terms, belong to `objective.py`, which knows what is
padding. `tau` is the learned temperature. Masked-out negatives contribute nothing; a query
without any has the value 0.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Float, Int, Shaped

from dqe_jax.method.arrays import Array, Scalar


def _masked_mean(values: Array, mask: Array) -> Array:
    """Mean over the last axis of what the mask keeps, 0 where it keeps nothing."""
    return jnp.where(mask, values, 0).sum(-1) / jnp.maximum(mask.sum(-1), 1)


def _gap(target_score: Array, scores: Array) -> Array:
    """`s_t - s` in float32: `[B], [B, N] -> [B, N]`."""
    return target_score.astype(jnp.float32)[:, None] - scores.astype(jnp.float32)


def info_nce(
    target_score: Float[Array, " B"],
    scores: Float[Array, "B N"],
    negative: Bool[Array, "B N"],
    tau: Scalar,
) -> Float[Array, " B"]:
    """`-log exp(s_t / tau) / (exp(s_t / tau) + sum_n exp(s_n / tau))`, query to gallery.

    Args:
      target_score: `[B]`, `s_t`.
      scores: `[B, N]`.
      negative: bool `[B, N]`, which candidates count as negatives.
      tau: scalar.
    """
    # Scores are taken relative to the target's: at small tau that avoids subtracting large numbers.
    logits = jnp.where(negative, -_gap(target_score, scores) / tau, -jnp.inf)
    target = jnp.zeros((len(logits), 1), logits.dtype)
    return jax.nn.logsumexp(jnp.concatenate([target, logits], axis=1), axis=1)


def sigmoid_pairs(
    target_score: Float[Array, " B"],
    scores: Float[Array, "B N"],
    negative: Bool[Array, "B N"],
    tau: Scalar,
    bias: Scalar,
) -> Float[Array, " B"]:
    """`-log sigmoid(s_t / tau + b) - sum_n log sigmoid(-(s_n / tau + b))`: each pair by itself.

    Zhai et al., "Sigmoid Loss for Language Image Pre-Training", ICCV 2023.

    Args:
      target_score: `[B]`, `s_t`.
      scores: `[B, N]`.
      negative: bool `[B, N]`, which candidates count as negatives.
      tau: scalar, the temperature.
      bias: scalar, `b`; far below 0 at the start, where nearly all pairs are negatives.
    """
    matching = -jax.nn.log_sigmoid(target_score.astype(jnp.float32) / tau + bias)
    other = -jax.nn.log_sigmoid(-(scores.astype(jnp.float32) / tau + bias))
    return matching + jnp.where(negative, other, 0).sum(-1)


def column_info_nce(
    scores: Float[Array, "B T"],
    target_score: Float[Array, " B"],
    own: Int[Array, " B"],
    negative: Bool[Array, "B T"],
    axis: str,
) -> Float[Array, " B"]:
    """InfoNCE of each local target against the queries of all devices, gallery to query.

    Every device holds the rows of its own queries; the columns' sums are taken over the axis, so
    that the scores need not be computed twice.

    Args:
      scores: `[B, T]` with the targets of all devices, already divided by tau.
      target_score: `[B]`, likewise.
      own: int `[B]`, column of each query's target.
      negative: bool `[B, T]`, which queries count as negatives of a target.
      axis: the mapped axis.
    """
    positive = jnp.arange(scores.shape[1])[None, :] == own[:, None]
    logits = jnp.where(positive, target_score[:, None], scores)
    kept = positive | negative
    highest = lax.stop_gradient(jnp.where(kept, logits, -jnp.inf).max(0))
    highest = lax.pmax(highest, axis)
    highest = jnp.where(jnp.isfinite(highest), highest, 0.0)
    total = jnp.where(kept, jnp.exp(jnp.where(kept, logits, 0) - highest), 0.0).sum(0)
    total = lax.psum(total, axis)
    return jnp.log(total[own]) + highest[own] - target_score


def preference(
    target_score: Float[Array, " B"],
    negative_scores: Float[Array, "B n"],
    negative_mask: Bool[Array, "B n"],
    tau: Scalar,
) -> Float[Array, " B"]:
    """`L_p = mean_n KL(onehot(target) || softmax([s_t, s_n] / tau)) = mean_n softplus(-margin)`.

    Args:
      target_score: `[B]`.
      negative_scores: `[B, n]` of the sampled negatives.
      negative_mask: bool `[B, n]`, which of them are there.
      tau: scalar.
    """
    values = -jax.nn.log_sigmoid(_gap(target_score, negative_scores) / tau)
    return _masked_mean(values, negative_mask)


def margin_ranking(
    target_score: Float[Array, " B"],
    negative_scores: Float[Array, "B n"],
    negative_mask: Bool[Array, "B n"],
    margin: Scalar,
) -> Float[Array, " B"]:
    """`L_m = mean_n max(0, margin - (s_t - s_n))`; arguments as in `preference`."""
    return _masked_mean(jax.nn.relu(margin - _gap(target_score, negative_scores)), negative_mask)


def attribute_intent(
    weights: Float[Array, "B K"], mentions: Shaped[Array, "B K"]
) -> Float[Array, " B"]:
    """Binary cross-entropy between the attribute weights and what the text mentions.

    A text that mentions no attribute of the lexicon gives no signal.

    Args:
      weights: `[B, K]` in (0, 1).
      mentions: `[B, K]`, 1 where a word of the attribute's lexicon is in the text, else 0.
    """
    w = jnp.clip(weights.astype(jnp.float32), 1e-6, 1 - 1e-6)
    entropy = -(mentions * jnp.log(w) + (1 - mentions) * jnp.log1p(-w))
    return jnp.where(mentions.any(-1), entropy.mean(-1), 0.0)


def attribute_alignment(
    weights: Float[Array, "B K"],
    query_features: Float[Array, "B K width"],
    target_features: Float[Array, "B K width"],
) -> Float[Array, " B"]:
    """`sum_k w_k (1 - cos(a_k(query), a_k(target))) / sum_k w_k`.

    Args:
      weights: `[B, K]`.
      query_features: `[B, K, d]` attribute features of the reference image.
      target_features: `[B, K, d]` attribute features of the target image under the same text.
    """
    cosine = jnp.sum(_unit(query_features) * _unit(target_features), -1)
    w = weights.astype(jnp.float32)
    return jnp.sum(w * (1 - cosine), -1) / jnp.maximum(w.sum(-1), 1e-2)


def _unit(x: Array) -> Array:
    """The last axis at length 1; next to zero it is left short, so that gradients stay bounded."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(x * x, -1, keepdims=True) + 1e-12)
