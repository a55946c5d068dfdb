"""The moving average of the parameters that train (EMA), which is evaluated in their place.

After update `n` of a run, counted from 1, with `d = config.optimizer.ema_decay`:

    average = d_n average + (1 - d_n) parameters,        d_n = min(d, (1 + n) / (10 + n)).

The smaller decay of the first updates is that of TensorFlow's `ExponentialMovingAverage`: without
it a short run would be averaged with its random beginning. An update that is left out because
something was not finite leaves the average as it is.

The average is float32. It is replicated as the parameters are; where the optimiser's state is
sharded (`zero.py`), it is sharded as the moments are. Training does not read it, nor does the bank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from dqe_jax.config import RunConfig
from dqe_jax.distributed import mesh
from dqe_jax.method.arrays import Array, Params
from dqe_jax.models import freeze
from dqe_jax.training import zero
from dqe_jax.training.state import Optimizer, TrainState, splitter


def moved(
    average: Params, params: Params, decay: float, step: Array, applied: Array | bool
) -> Params:
    """The average after an update; per device, in a step.

    Args:
      average: before, float32.
      params: after the update, or the device's slices of them, in the same shapes.
      decay: `config.optimizer.ema_decay`.
      step: int32 scalar, updates before this one.
      applied: bool scalar, whether the parameters were updated.
    """
    number = step.astype(jnp.float32) + 1
    kept = jnp.where(applied, jnp.minimum(decay, (1 + number) / (10 + number)), 1.0)
    return jax.tree.map(
        lambda old, new: kept * old + (1 - kept) * new.astype(jnp.float32), average, params
    )


def begun(
    config: RunConfig,
    made: Optimizer,
    state: TrainState,
    devices: Sequence[jax.Device],
    saved: Params | None = None,
) -> TrainState:
    """The state with its average, placed; as it is if the config asks for none.

    Args:
      config: of the run.
      made: its optimiser.
      state: that the run starts or goes on with.
      devices: of all processes.
      saved: the average of a checkpoint, NumPy arrays; None starts from the state's parameters.
    """
    if not config.optimizer.ema_decay:
        return state
    if saved is None:
        # Copies: the step writes into parameters and average.
        training = jax.device_get(splitter(config.model)(state.params)[0])
        saved = jax.tree.map(lambda x: x.astype(jnp.float32), training)
    if made.axes is None:
        return dataclasses.replace(state, average=mesh.replicate(saved, devices))
    return dataclasses.replace(state, average=zero.cut(saved, 0, devices))


def average_to_save(
    made: Optimizer, state: TrainState, devices: Sequence[jax.Device]
) -> Params | None:
    """The average in the shapes of the parameters, replicated or NumPy arrays; None without one."""
    if state.average is None or made.axes is None:
        return state.average
    return zero.join(state.average, 0, made.average, len(devices))


def evaluated(
    config: RunConfig, made: Optimizer, state: TrainState, devices: Sequence[jax.Device]
) -> Params:
    """All parameters of the model, replicated, with the average of those that have one."""
    average = average_to_save(made, state, devices)
    if average is None:
        return state.params
    training, frozen = splitter(config.model)(state.params)
    if made.axes is not None:
        average = mesh.replicate(average, devices)
    return freeze.merge(
        jax.tree.map(lambda x, like: x.astype(like.dtype), average, training), frozen
    )
