"""The training step: loss, gradients and update of one device, mapped over the axis `mesh.AXIS`.

Training, the benchmark and the planner compile the same program.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol, cast

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax import lax

from dqe_jax.config import RunConfig
from dqe_jax.data.packing import BatchShape
from dqe_jax.distributed import mesh, twin
from dqe_jax.method.arrays import Array, Params
from dqe_jax.method.batch import Batch
from dqe_jax.method.mining import Bank, MiningRule
from dqe_jax.method.objective import Metrics, Objective, TrainForward
from dqe_jax.method.settings import NegativesConfig
from dqe_jax.models import freeze
from dqe_jax.models.dqe import DQE
from dqe_jax.training import zero
from dqe_jax.training.average import moved
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


def _all_train(params: Params) -> tuple[Params, Params]:
    return params, {}


@dataclasses.dataclass(frozen=True)
class StepParts:
    """A step of one device in its two parts; all that they close over is here.

    A step whose loss, gradients or new parameters are not finite changes no parameter
    (`optimizer.make_optimizer`); `bad_steps` counts them.

    Attributes:
      loss_fn: as `method.objective.Objective`, over `mesh.AXIS`.
      tx: the optimiser.
      seed: of everything random in the step.
      split: parameters to those that train and those that do not, as `freeze.split`; the optimiser
        and the backward pass see the first alone.
      shard_state: whether the optimiser's state is of the device's slices (`zero.py`).
      ema_decay: of the moving average; 0 for none (`average.py`).
    """

    loss_fn: Loss
    tx: optax.GradientTransformationExtraArgs
    seed: int
    split: Splitter = _all_train
    shard_state: bool = False
    ema_decay: float = 0.0

    def gradients(
        self,
        step: Array,
        params: Params,
        batch: Batch,
        bank: Bank | None = None,
        index: Array | None = None,
    ) -> tuple[Params, Metrics]:
        """This device's part of the gradients, and metrics that are global means.

        Args:
          step: int32 scalar, steps taken before.
          params: all of the model.
          batch: of this device.
          bank: this device's part.
          index: of the batch among those of a step; None where it is the only one.
        """
        key = jax.random.fold_in(jax.random.key(self.seed), step)
        if index is not None:
            key = jax.random.fold_in(key, index)
        training, frozen = self.split(params)

        def loss_of(training: Params) -> tuple[Array, Metrics]:
            return self.loss_fn(freeze.merge(training, frozen), batch, key, bank)

        (_, metrics), grads = jax.value_and_grad(loss_of, has_aux=True)(training)
        return grads, metrics

    def added_up(self, grads: Params) -> Params:
        """Gradients of all devices: of large ones the own slice if the state is sharded."""
        # A sum: the losses of the devices add up to the global mean.
        return zero.scatter(grads) if self.shard_state else lax.psum(grads, mesh.AXIS)

    def update(self, state: TrainState, grads: Params, metrics: Metrics, stop: Array) -> StepOutput:
        """The step's result, from gradients as `added_up` gives them."""
        training, frozen = self.split(state.params)
        # A loss that is not finite may have finite gradients, which are just as useless.
        sound = jnp.isfinite(metrics["loss"])
        norm = zero.global_norm(grads, training) if self.shard_state else optax.tree.norm(grads)
        held = zero.own(training) if self.shard_state else training
        size = largest(training)
        updates, opt_state = self.tx.update(
            grads, state.opt_state, held, sound=sound, norm=norm, size=size
        )
        bad, applied = jnp.zeros((), jnp.int32), jnp.array(True)
        if isinstance(opt_state, optax.ApplyIfFiniteState):
            metrics["bad_steps"] = opt_state.total_notfinite
            bad, applied = opt_state.notfinite_count, opt_state.last_finite
        average = state.average
        if average is not None:
            new = optax.apply_updates(held, updates)
            average = moved(average, new, self.ema_decay, state.step, applied)
        if self.shard_state:
            updates = zero.gather(updates, training)
        params = freeze.merge(optax.apply_updates(training, updates), frozen)
        metrics["grad_norm"] = norm
        control = Control(lax.pmax(stop.max(), mesh.AXIS), bad, jnp.isfinite(size))
        return StepOutput(TrainState(state.step + 1, params, opt_state, average), metrics, control)


def make_train_step(parts: StepParts) -> DeviceStep:
    """The per-device step `(state, batch, stop, bank=None) -> StepOutput` of one batch."""

    def step(
        state: TrainState, batch: Batch, stop: Array, bank: Bank | None = None, /
    ) -> StepOutput:
        grads, metrics = parts.gradients(state.step, state.params, batch, bank)
        return parts.update(state, parts.added_up(grads), metrics, stop)

    return step


def parts_of_step(config: RunConfig, model: DQE, made: Optimizer, *, bank: bool) -> StepParts:
    """The parts of a config's step; arguments as of `make_step`."""
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
    return StepParts(
        loss_fn=objective,
        tx=optax.with_extra_args_support(made.tx),
        seed=config.seed,
        split=splitter(config.model),
        shard_state=config.optimizer.shard_state,
        ema_decay=config.optimizer.ema_decay,
    )


def axes_of(made: Optimizer) -> tuple[TrainState | None, StepOutput]:
    """Axes of a state and of a step's output, for `mesh.pmap`."""
    # These hold axes where the types say arrays.
    state_axes: Callable[..., TrainState] = TrainState
    output_axes: Callable[..., StepOutput] = StepOutput
    average = None if made.average is None else 0
    axes = None if made.axes is None else state_axes(None, None, made.axes, average)
    return axes, output_axes(axes, None, None)


def make_step(
    config: RunConfig,
    model: DQE,
    made: Optimizer,
    devices: Sequence[jax.Device],
    *,
    bank: bool = False,
) -> Step:
    """The mapped step of one batch, which donates the state.

    `accumulate.py` makes that of several (`config.batch.accumulate`).

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
    state_axes, output_axes = axes_of(made)
    return twin.mapper(config.mapping)(
        make_train_step(parts_of_step(config, model, made, bank=bank)),
        in_axes=(state_axes, 0, 0, 0) if bank else (state_axes, 0, 0),
        out_axes=output_axes,
        donate_argnums=(0,),
        devices=devices,
    )
