"""The training step of a config as the program that runs: mapped over the devices.

Training, the benchmark and the planner compile the same.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dqe_jax import models
from dqe_jax.distributed import mesh
from dqe_jax.models import freeze
from dqe_jax.training import optimizer, zero
from dqe_jax.training.step import TrainState, make_loss_fn, make_train_step


def splitter(model_config: Any) -> Callable[[Any], tuple[Any, Any]]:
    """Splits parameters into those that train and those that do not, by `config.model`."""
    parts = models.parts_of(model_config.backbone)
    return lambda params: freeze.split(params, model_config.frozen, parts)


def uses_bank(negatives: Any) -> bool:
    """Whether negatives are mined from a bank, by `config.negatives`."""
    return negatives.rule != "in_batch" and negatives.pool == "bank"


def warmup_negatives(negatives: Any) -> Any:
    """`config.negatives` of steps without a bank: what `warmup` says, or the config's own."""
    if not uses_bank(negatives) or negatives.warmup == "rule":
        return negatives
    changed = negatives.copy_and_resolve_references()
    changed.rule = negatives.warmup
    return changed


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """The optimiser of a config. Its state may be sharded, on the devices alone (`zero.py`).

    Attributes:
      tx: its functions.
      saved: shapes of its state in a checkpoint, whether it is sharded or not.
      shapes: on the devices, with a leading axis of devices where it is sharded.
      axes: for `mesh.pmap`; None if nothing is sharded.
    """

    tx: optax.GradientTransformation
    saved: Any
    shapes: Any
    axes: Any

    def bytes_of_device(self) -> int:
        """Bytes of the state on a device."""
        shapes = self.shapes if self.axes is None else zero.shapes_of_device(self.shapes, self.axes)
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(shapes))


def make_optimizer(config: Any, params: Any, number: int) -> Optimizer:
    """The optimiser of a config.

    Args:
      config: of the run.
      params: all parameters of the model, or their shapes.
      number: devices.
    """
    training = splitter(config.model)(params)[0]
    # What decays is decided by the whole arrays, not by slices.
    tx = optimizer.make_optimizer(
        config.optimizer, config.total_steps, decay=optimizer.matrices(training)
    )
    saved = jax.eval_shape(tx.init, training)
    if not config.optimizer.shard_state:
        return Optimizer(tx, saved, saved, None)
    return Optimizer(tx, saved, *zero.state_shapes(tx, training, number))


def init_state(config: Any, made: Optimizer, params: Any, devices: Sequence[jax.Device]) -> Any:
    """The state that a run starts with, placed.

    Args:
      config: of the run.
      made: its optimiser.
      params: all parameters.
      devices: of all processes.
    """
    training = splitter(config.model)(params)[0]
    if made.axes is None:
        return place_state(made, 0, params, jax.jit(made.tx.init)(training), devices)
    state = mesh.replicate(TrainState(jnp.zeros((), jnp.int32), params, None), devices)
    return state.replace(opt_state=zero.init(made.tx, training, devices))


def place_state(
    made: Optimizer, step: int, params: Any, saved: Any, devices: Sequence[jax.Device]
) -> Any:
    """The state that a run goes on with, placed.

    Args:
      made: the optimiser of the run.
      step: the steps taken.
      params: all parameters.
      saved: the optimiser's state, as `state_to_save` gives it.
      devices: of all processes.
    """
    state = TrainState(jnp.asarray(step, jnp.int32), params, None)
    if made.axes is None:
        return mesh.replicate(state.replace(opt_state=saved), devices)
    moments = zero.cut(saved, made.axes, devices)
    return mesh.replicate(state, devices).replace(opt_state=moments)


def state_to_save(made: Optimizer, opt_state: Any, devices: Sequence[jax.Device]) -> Any:
    """The optimiser's state in the shapes of `made.saved`: replicated, or NumPy arrays."""
    if made.axes is None:
        return opt_state
    return zero.join(opt_state, made.axes, made.saved, len(devices))


def make_step(
    config: Any,
    model: Any,
    made: Optimizer,
    devices: Sequence[jax.Device],
    *,
    bank: bool = False,
) -> Any:
    """The mapped step, which donates the state.

    Args:
      config: of the run.
      model: of the config.
      made: its optimiser.
      devices: to run on, of all processes.
      bank: whether negatives come from a bank.

    Returns:
      `(state, batch) -> (state, metrics)`, or `(state, batch, bank) -> ...`. State and metrics are
      replicated; arrays of the batch, of the bank and of an optimiser's state that is sharded have
      a leading axis of devices.
    """
    loss_fn = make_loss_fn(
        apply_fn=model.apply,
        negatives=config.negatives if bank else warmup_negatives(config.negatives),
        weights=config.loss,
        margin=config.loss.margin_size,
    )
    step = make_train_step(
        loss_fn=loss_fn,
        tx=made.tx,
        seed=config.seed,
        split=splitter(config.model),
        shard_state=config.optimizer.shard_state,
    )
    axes = None if made.axes is None else TrainState(None, None, made.axes)
    return mesh.pmap(
        step,
        in_axes=(axes, 0, 0) if bank else (axes, 0),
        out_axes=(axes, None),
        donate_argnums=(0,),
        devices=devices,
    )
