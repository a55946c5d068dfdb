"""The training step: loss, gradients and update of one device, mapped over the axis `mesh.AXIS`.

Training, the benchmark and the planner compile the same program.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, cast

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax import lax

from dqe_jax.config import RunConfig
from dqe_jax.data.packing import BatchShape
from dqe_jax.distributed import mesh
from dqe_jax.method.arrays import Array, Params
from dqe_jax.method.batch import Batch
from dqe_jax.method.mining import Bank, MiningRule
from dqe_jax.method.objective import Metrics, Objective, TrainForward
from dqe_jax.method.settings import NegativesConfig
from dqe_jax.models import freeze
from dqe_jax.models.dqe import DQE
from dqe_jax.training import zero
from dqe_jax.training.chunks import in_chunks
from dqe_jax.training.optimizer import largest
from dqe_jax.training.state import Optimizer, Splitter, TrainState, splitter

Loss = Callable[[Params, Batch, jax.Array, Bank | None], tuple[Array, Metrics]]


@flax.struct.dataclass
class Control:
    """Scalars that must be the same in all processes, so that they act alike; int32 but the last.

    Attributes:
      stop: the largest number that any device was told by `stop`: that of a signal, 0 for none.
      bad_in_a_row: steps up to this one, one after the other, that were not finite.
      whole: bool, whether all parameters that train were finite before the step.
    """

    stop: Array
    bad_in_a_row: Array
    whole: Array


@flax.struct.dataclass
class StepOutput:
    """What a step gives.

    Attributes:
      state: after it.
      metrics: global means, by name.
      control: see `Control`.
    """

    state: TrainState
    metrics: Metrics
    control: Control


class DeviceStep(Protocol):
    """A step of one device."""

    def __call__(
        self, state: TrainState, batch: Batch, stop: Array, bank: Bank | None = None, /
    ) -> StepOutput:
        """`stop` is int32 `[n]`: numbers of signals, 0 for none."""


class Step(DeviceStep, Protocol):
    """A mapped step."""

    def lower(
        self, state: TrainState, batch: Batch, stop: Array, bank: Bank | None = None, /
    ) -> jax.stages.Lowered:
        """Its code for arguments of these shapes; nothing runs."""


def warmup_rule(negatives: NegativesConfig) -> MiningRule | None:
    """The rule of steps without a bank: what `negatives.warmup` says, or the config's own."""
    if not uses_bank(negatives) or negatives.warmup == "rule":
        return MiningRule.of(negatives)
    return MiningRule.of(negatives, negatives.warmup)


def uses_bank(negatives: NegativesConfig) -> bool:
    """Whether negatives are mined from a bank, by `config.negatives`."""
    return negatives.rule != "in_batch" and negatives.pool == "bank"


def batch_spec(config: RunConfig, shape: BatchShape) -> Batch:
    """Shape and dtype of every array of a training batch, see `Batch.spec`.

    Args:
      config: of a run.
      shape: of the batch, or of a device's part.
    """
    return Batch.spec(
        queries=shape.queries,
        references=shape.references,
        even=shape.even,
        image_size=config.data.image_size,
        max_length=config.data.max_length,
        attributes=len(config.model.attributes.names),
    )


def make_train_step(
    *,
    loss_fn: Loss,
    tx: optax.GradientTransformation,
    seed: int,
    split: Splitter = lambda params: (params, {}),
    shard_state: bool = False,
) -> DeviceStep:
    """Makes the per-device step `(state, batch, stop, bank=None) -> StepOutput`.

    All that it closes over is here. A step whose loss, gradients or new parameters are not finite
    changes no parameter (`optimizer.make_optimizer`); `bad_steps` counts them.

    Args:
      loss_fn: as `method.objective.Objective`, over `mesh.AXIS`.
      tx: the optimiser.
      seed: of everything random in the step.
      split: parameters to those that train and those that do not, as `freeze.split`; the optimiser
        and the backward pass see the first alone.
      shard_state: whether the optimiser's state is of the device's slices (`zero.py`).
    """
    tx = optax.with_extra_args_support(tx)

    def step(
        state: TrainState, batch: Batch, stop: Array, bank: Bank | None = None, /
    ) -> StepOutput:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        training, frozen = split(state.params)

        def loss_of(training: Params) -> tuple[Array, Metrics]:
            return loss_fn(freeze.merge(training, frozen), batch, key, bank)

        (_, metrics), grads = jax.value_and_grad(loss_of, has_aux=True)(training)
        # A sum: the losses of the devices add up to the global mean.
        grads = zero.scatter(grads) if shard_state else lax.psum(grads, mesh.AXIS)
        # A loss that is not finite may have finite gradients, which are just as useless.
        sound = jnp.isfinite(metrics["loss"])
        norm = zero.global_norm(grads, training) if shard_state else optax.tree.norm(grads)
        held = zero.own(training) if shard_state else training
        size = largest(training)
        updates, opt_state = tx.update(
            grads, state.opt_state, held, sound=sound, norm=norm, size=size
        )
        if shard_state:
            updates = zero.gather(updates, training)
        params = freeze.merge(optax.apply_updates(training, updates), frozen)
        metrics["grad_norm"] = norm
        bad = jnp.zeros((), jnp.int32)
        if isinstance(opt_state, optax.ApplyIfFiniteState):
            metrics["bad_steps"] = opt_state.total_notfinite
            bad = opt_state.notfinite_count
        control = Control(lax.pmax(stop.max(), mesh.AXIS), bad, jnp.isfinite(size))
        return StepOutput(TrainState(state.step + 1, params, opt_state), metrics, control)

    return step


def make_step(
    config: RunConfig,
    model: DQE,
    made: Optimizer,
    devices: Sequence[jax.Device],
    *,
    bank: bool = False,
) -> Step:
    """The mapped step, which donates the state.

    Args:
      config: of the run.
      model: of the config.
      made: its optimiser.
      devices: to run on, of all processes.
      bank: whether negatives come from a bank.

    Returns:
      `(state, batch, stop) -> StepOutput`, or `(state, batch, stop, bank) -> ...`. State, metrics
      and control are replicated; arrays of the batch, of the bank, of `stop` and of an optimiser's
      state that is sharded have a leading axis of devices.
    """
    apply_fn = cast(TrainForward, model.apply)  # Flax' hints name no result
    if config.batch.chunks > 1:
        apply_fn = in_chunks(apply_fn, config.batch.chunks)
    objective = Objective(
        apply_fn=apply_fn,
        rule=MiningRule.of(config.negatives) if bank else warmup_rule(config.negatives),
        oracle=config.negatives.oracle,
        weights=config.loss,
        axis=mesh.AXIS,
    )
    step = make_train_step(
        loss_fn=objective,
        tx=made.tx,
        seed=config.seed,
        split=splitter(config.model),
        shard_state=config.optimizer.shard_state,
    )
    # These hold axes where the types say arrays.
    state_axes: Callable[..., TrainState] = TrainState
    output_axes: Callable[..., StepOutput] = StepOutput
    axes = None if made.axes is None else state_axes(None, None, made.axes)
    return mesh.pmap(
        step,
        in_axes=(axes, 0, 0, 0) if bank else (axes, 0, 0),
        out_axes=output_axes(axes, None, None),
        donate_argnums=(0,),
        devices=devices,
    )
