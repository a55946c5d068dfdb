"""The optimiser of a config: AdamW with warm-up, cosine decay and clipping, from optax."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from dqe_jax.config import OptimizerConfig
from dqe_jax.method.arrays import Params, Tree


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


def clip_by_norm(most: float) -> optax.GradientTransformationExtraArgs:
    """`optax.clip_by_global_norm`, but by a norm that is given: `update` takes `norm`."""

    def update(
        grads: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        *,
        norm: jax.Array,
        **others: object,
    ) -> tuple[optax.Updates, optax.OptState]:
        del params, others
        return jax.tree.map(lambda g: jnp.where(norm < most, g, g / norm * most), grads), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def skip_unsound(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`inner`, but gradients that are not finite change nothing, and are counted.

    The state is that of `optax.apply_if_finite`. That one decides by a condition, which costs a
    small model more than its step on a TPU (copies of the state, a pass for each array); here
    results are selected, and finite is what has a finite norm, which clipping computes anyhow.

    `update` takes `sound`, a bool scalar: whether the gradients may be used at all; default: yes.
    And `norm`, that of all gradients, where these are but a part of them (`zero.py`).
    """
    inner = optax.with_extra_args_support(inner)

    def init(params: optax.Params) -> optax.ApplyIfFiniteState:
        return optax.ApplyIfFiniteState(
            notfinite_count=jnp.zeros([], jnp.int32),
            last_finite=jnp.array(True),
            total_notfinite=jnp.zeros([], jnp.int32),
            inner_state=inner.init(params),
        )

    def update(
        grads: optax.Updates,
        state: optax.ApplyIfFiniteState,
        params: optax.Params | None = None,
        *,
        sound: jax.Array | bool = True,
        norm: jax.Array | None = None,
    ) -> tuple[optax.Updates, optax.ApplyIfFiniteState]:
        norm = optax.tree.norm(grads) if norm is None else norm
        finite = jnp.isfinite(norm) & sound
        updates, inner_state = inner.update(grads, state.inner_state, params, norm=norm)
        return jax.tree.map(lambda u: jnp.where(finite, u, 0), updates), optax.ApplyIfFiniteState(
            notfinite_count=jnp.where(finite, 0, state.notfinite_count + 1),
            last_finite=finite,
            total_notfinite=state.total_notfinite + ~finite,
            inner_state=jax.tree.map(
                lambda new, old: jnp.where(finite, new, old), inner_state, state.inner_state
            ),
        )

    return optax.GradientTransformationExtraArgs(init, update)


def all_finite(tree: Tree) -> jax.Array:
    """Whether all numbers of a tree are finite: bool scalar."""
    return jnp.array([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]).all()


def take_back(
    state: optax.ApplyIfFiniteState, before: optax.ApplyIfFiniteState, bad: jax.Array
) -> optax.ApplyIfFiniteState:
    """The state as it was before an update that turned out `bad`, which is counted; else as it is.

    Finite gradients can give parameters that are not, at a learning rate that is far too high.
    """
    return optax.ApplyIfFiniteState(
        notfinite_count=jnp.where(bad, before.notfinite_count + 1, state.notfinite_count),
        last_finite=state.last_finite & ~bad,
        total_notfinite=jnp.where(bad, before.total_notfinite + 1, state.total_notfinite),
        inner_state=jax.tree.map(
            lambda new, old: jnp.where(bad, old, new), state.inner_state, before.inner_state
        ),
    )


def make_optimizer(
    config: OptimizerConfig,
    total_steps: int,
    *,
    decay: Tree = matrices,
) -> optax.GradientTransformation:
    """AdamW after clipping by the global norm; only matrices decay. See `skip_unsound`.

    Args:
      config: `config.optimizer`.
      total_steps: steps of the whole run.
      decay: which parameters decay, a tree of bool or a function of the parameters to one.
    """
    adamw = optax.chain(
        clip_by_norm(config.clip_norm),
        optax.adamw(
            make_schedule(config, total_steps),
            b1=config.b1,
            b2=config.b2,
            weight_decay=config.weight_decay,
            mask=decay,
        ),
    )
    return skip_unsound(adamw)
