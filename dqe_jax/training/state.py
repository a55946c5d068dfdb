"""The state of a run: parameters and the optimiser's state, made, placed and saved."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import flax.struct
import jax
import jax.numpy as jnp
import optax

from dqe_jax.config import RunConfig
from dqe_jax.distributed import mesh
from dqe_jax.method.arrays import Array, Params, Tree
from dqe_jax.models import freeze
from dqe_jax.models.build import parts_of
from dqe_jax.models.settings import ModelConfig
from dqe_jax.training import optimizer, zero

# Splits parameters into those that train and those that do not.
Splitter = Callable[[Params], tuple[Params, Params]]


def splitter(model_config: ModelConfig) -> Splitter:
    """Splits parameters into those that train and those that do not, by `config.model`."""
    parts = parts_of(model_config.backbone)
    return lambda params: freeze.split(params, model_config.frozen, parts)


@flax.struct.dataclass
class TrainState:
    """What training changes. Randomness is not in it: it is the seed folded with `step`.

    Attributes:
      step: int32 scalar, the steps taken.
      params: of the model, those that do not train included.
      opt_state: of the optimiser, for those that train; see `zero.py` for a sharded one.
      average: moving average of those that train, see `average.py`; None without one.
    """

    step: Array
    params: Params
    opt_state: Tree
    average: Params | None = None


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """The optimiser of a config. Its state may be sharded, on the devices alone (`zero.py`).

    Attributes:
      tx: its functions.
      saved: shapes of its state in a checkpoint, whether it is sharded or not.
      shapes: on the devices, with a leading axis of devices where it is sharded.
      axes: for `mesh.pmap`; None if nothing is sharded.
      average: shapes of the moving average in a checkpoint; None without one (`average.py`).
      average_shapes: on the devices, with a leading axis of devices where it is sharded.
    """

    tx: optax.GradientTransformation
    saved: Tree
    shapes: Tree
    axes: Tree
    average: Params | None = None
    average_shapes: Params | None = None

    def bytes_of_device(self) -> int:
        """Bytes of the state on a device, and of the moving average."""
        held = self.shapes, self.average_shapes
        if self.axes is not None:
            held = zero.shapes_of_device(held, (self.axes, 0))
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(held))


def make_optimizer(config: RunConfig, params: Params, num_devices: int) -> Optimizer:
    """The optimiser of a config.

    Args:
      config: of the run.
      params: all parameters of the model, or their shapes.
      num_devices: how many there are.
    """
    training = splitter(config.model)(params)[0]
    # Which arrays decay is decided by their whole shapes, not by those of slices.
    tx = optimizer.make_optimizer(
        config.optimizer, config.total_steps, decay=optimizer.matrices(training)
    )
    saved = jax.eval_shape(tx.init, training)
    average = None
    if config.optimizer.ema_decay:
        average = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), training)
    if not config.optimizer.shard_state:
        return Optimizer(tx, saved, saved, None, average, average)
    shapes, axes = zero.state_shapes(tx, training, num_devices)
    held = None if average is None else zero.slice_shapes(average, num_devices)
    return Optimizer(tx, saved, shapes, axes, average, held)


def init_state(
    config: RunConfig, made: Optimizer, params: Params, devices: Sequence[jax.Device]
) -> TrainState:
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
    return dataclasses.replace(state, opt_state=zero.init(made.tx, training, devices))


def place_state(
    made: Optimizer, step: int, params: Params, saved: Tree, devices: Sequence[jax.Device]
) -> TrainState:
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
        return mesh.replicate(dataclasses.replace(state, opt_state=saved), devices)
    moments = zero.cut(saved, made.axes, devices)
    return dataclasses.replace(mesh.replicate(state, devices), opt_state=moments)


def state_to_save(made: Optimizer, opt_state: Tree, devices: Sequence[jax.Device]) -> Tree:
    """The optimiser's state in the shapes of `made.saved`: replicated, or NumPy arrays."""
    if made.axes is None:
        return opt_state
    return zero.join(opt_state, made.axes, made.saved, len(devices))
