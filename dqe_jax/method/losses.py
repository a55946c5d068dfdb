"""The loss terms of DQE-CIR (method, section 3). Arrays in, one value a query out, float32 `[B]`.

Averaging over queries, and the weights of the terms, belong to the training step, which knows what
is padding. `tau` is the learned temperature. Masked-out negatives contribute nothing; a query
without any has the value 0.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def _masked_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean over the last axis of what the mask keeps, 0 where it keeps nothing."""
    return jnp.where(mask, values, 0).sum(-1) / jnp.maximum(mask.sum(-1), 1)


def _gap(target_score: jax.Array, scores: jax.Array) -> jax.Array:
    """`s_t - s` in float32: `[B], [B, N] -> [B, N]`."""
    return target_score.astype(jnp.float32)[:, None] - scores.astype(jnp.float32)


def info_nce(
    target_score: jax.Array, scores: jax.Array, negative: jax.Array, tau: jax.Array
) -> jax.Array:
    """`-log exp(s_t / tau) / (exp(s_t / tau) + sum_n exp(s_n / tau))`, query to gallery.

    Args:
      target_score: `[B]`, `s_t`.
      scores: `[B, N]`.
      negative: bool `[B, N]`, which candidates count as negatives.
      tau: scalar.
    """
    # Relative to the target's score: no difference of large numbers at small tau.
    logits = jnp.where(negative, -_gap(target_score, scores) / tau, -jnp.inf)
    target = jnp.zeros((len(logits), 1), logits.dtype)
    return jax.nn.logsumexp(jnp.concatenate([target, logits], axis=1), axis=1)


def preference(
    target_score: jax.Array, negative_scores: jax.Array, valid: jax.Array, tau: jax.Array
) -> jax.Array:
    """`L_p = mean_n KL(onehot(target) || softmax([s_t, s_n] / tau)) = mean_n softplus(-margin)`.

    Args:
      target_score: `[B]`.
      negative_scores: `[B, n]` of the sampled negatives.
      valid: bool `[B, n]`.
      tau: scalar.
    """
    return _masked_mean(-jax.nn.log_sigmoid(_gap(target_score, negative_scores) / tau), valid)


def margin_ranking(
    target_score: jax.Array, negative_scores: jax.Array, valid: jax.Array, margin: float
) -> jax.Array:
    """`L_m = mean_n max(0, margin - (s_t - s_n))`; arguments as in `preference`."""
    return _masked_mean(jax.nn.relu(margin - _gap(target_score, negative_scores)), valid)


def attribute_intent(weights: jax.Array, mentions: jax.Array) -> jax.Array:
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
    weights: jax.Array, query_features: jax.Array, target_features: jax.Array
) -> jax.Array:
    """`sum_k w_k (1 - cos(a_k(query), a_k(target))) / sum_k w_k`.

    Args:
      weights: `[B, K]`.
      query_features: `[B, K, d]` attribute features of the reference image.
      target_features: `[B, K, d]` attribute features of the target image under the same text.
    """
    cosine = jnp.sum(_unit(query_features) * _unit(target_features), -1)
    w = weights.astype(jnp.float32)
    return jnp.sum(w * (1 - cosine), -1) / jnp.maximum(w.sum(-1), 1e-2)


def _unit(x: jax.Array) -> jax.Array:
    """The last axis at length 1; next to zero it is left short, so that gradients stay bounded."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(x * x, -1, keepdims=True) + 1e-12)
