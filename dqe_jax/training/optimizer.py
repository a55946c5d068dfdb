"""The optimiser of a config: AdamW with warm-up, cosine decay and clipping, from optax."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import optax

from dqe_jax.config import OptimizerConfig
from dqe_jax.method.arrays import Params, Tree

# Of AdamW, beside the root of the second moment.
EPSILON = 1e-8


def make_schedule(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
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


def matrices(params: Params) -> Tree:
    """Which parameters are matrices: those decay."""
    return jax.tree.map(lambda x: x.ndim > 1, params)


def largest(tree: Tree) -> jax.Array:
    """The largest absolute value in a tree, float32; NaN where one is NaN."""
    sizes = [jnp.abs(x).max(initial=0) for x in jax.tree.leaves(tree)]
    return functools.reduce(jnp.maximum, sizes, jnp.zeros(()))


def make_optimizer(
    config: OptimizerConfig,
    total_steps: int,
    *,
    decay: Tree = matrices,
) -> optax.GradientTransformationExtraArgs:
    """AdamW after clipping by the global norm; only matrices decay.

    A step whose gradients are not finite, or whose new parameters might not be, changes nothing
    and is counted. The state is that of `optax.apply_if_finite`. That one decides by a condition,
    which costs a small model more than its step on a TPU; here scalars decide before any array is
    written, so that moments and parameters are each updated in place.

    `update` takes `sound`, a bool scalar: whether the gradients may be used at all; default: yes.
    And `norm` and `size`, the norm of all gradients and `largest` of all parameters: needed where
    those that it is given are but a part of them (`zero.py`), else computed.

    Args:
      config: `config.optimizer`.
      total_steps: steps of the whole run.
      decay: which parameters decay, a tree of bool or a function of the parameters to one.
    """
    schedule = make_schedule(config, total_steps)

    def adamw(b1: jax.typing.ArrayLike, b2: jax.typing.ArrayLike) -> optax.GradientTransformation:
        # The first part of the state is that of clipping, which has none.
        return optax.chain(
            optax.identity(),
            optax.adamw(
                schedule, b1=b1, b2=b2, eps=EPSILON, weight_decay=config.weight_decay, mask=decay
            ),
        )

    def init(params: optax.Params) -> optax.ApplyIfFiniteState:
        return optax.ApplyIfFiniteState(
            notfinite_count=jnp.zeros([], jnp.int32),
            last_finite=jnp.array(True),
            total_notfinite=jnp.zeros([], jnp.int32),
            inner_state=adamw(config.b1, config.b2).init(params),
        )

    def update(
        grads: optax.Updates,
        state: optax.ApplyIfFiniteState,
        params: optax.Params | None = None,
        *,
        sound: jax.Array | bool = True,
        norm: jax.Array | None = None,
        size: jax.Array | None = None,
    ) -> tuple[optax.Updates, optax.ApplyIfFiniteState]:
        norm = optax.tree.norm(grads) if norm is None else norm
        size = largest(params) if size is None else size
        # The mean of clipped gradients is at most the norm, and it is divided by epsilon or more.
        rate = schedule(state.inner_state[1][0].count)
        reach = size * (1 + rate * config.weight_decay) + rate * (config.clip_norm / EPSILON)
        finite = jnp.isfinite(norm) & jnp.isfinite(reach) & sound
        scale = jnp.where(norm < config.clip_norm, 1.0, config.clip_norm / norm)
        grads = jax.tree.map(lambda g: jnp.where(finite, g * scale, 0), grads)
        # With betas of 1 the moments stay as they are.
        betas = (jnp.where(finite, beta, 1.0) for beta in (config.b1, config.b2))
        updates, inner_state = adamw(*betas).update(grads, state.inner_state, params)

        def kept(new: jax.Array, old: jax.Array) -> jax.Array:
            is_count = jnp.issubdtype(new.dtype, jnp.integer)
            return jnp.where(finite, new, old) if is_count else new

        return jax.tree.map(lambda u: jnp.where(finite, u, 0), updates), optax.ApplyIfFiniteState(
            notfinite_count=jnp.where(finite, 0, state.notfinite_count + 1),
            last_finite=finite,
            total_notfinite=state.total_notfinite + ~finite,
            inner_state=jax.tree.map(kept, inner_state, state.inner_state),
        )

    return optax.GradientTransformationExtraArgs(init, update)
