"""The optimiser of a config: AdamW with warm-up, cosine decay and clipping, from optax."""

from __future__ import annotations

from typing import Any

import jax
import optax

_ALWAYS = 2**31 - 1


def make_schedule(config: Any, total_steps: int) -> optax.Schedule:
    """Learning rate by step: linear warm-up to `learning_rate`, then cosine decay to 0.

    Args:
      config: `config.optimizer`.
      total_steps: steps of the whole run.
    """
    warmup = min(config.warmup_steps, total_steps // 2)
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if warmup else config.learning_rate,
        peak_value=config.learning_rate,
        warmup_steps=warmup,
        decay_steps=total_steps,
    )


def make_optimizer(config: Any, total_steps: int) -> optax.GradientTransformation:
    """AdamW after clipping by the global norm; only matrices decay.

    Gradients that are not finite change nothing but the counts of the state, an
    `optax.ApplyIfFiniteState`.

    Args:
      config: `config.optimizer`.
      total_steps: steps of the whole run.
    """
    adamw = optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            make_schedule(config, total_steps),
            b1=config.b1,
            b2=config.b2,
            weight_decay=config.weight_decay,
            mask=lambda params: jax.tree.map(lambda x: x.ndim > 1, params),
        ),
    )
    return optax.apply_if_finite(adamw, _ALWAYS)
