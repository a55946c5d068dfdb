"""A step of several batches: their gradients are averaged before one update.

Each batch has its own negatives, as a step of its own would, at the parameters that all of them
share; GradCache (`chunks.py`) is for more negatives. Devices add up their own gradients, and
exchange them once, before the update; with a sharded optimiser they exchange after each batch, and
hold sums of their own slices alone.

`optax.MultiSteps` would run the optimiser over all parameters after each batch, and count batches
as steps. Here a step is an update: schedules, checkpoints and logs mean by steps what they mean
without this, and no checkpoint lies between two batches of an update.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dqe_jax.config import RunConfig
from dqe_jax.distributed import mesh, twin
from dqe_jax.method.arrays import Array, Params, Tree
from dqe_jax.method.batch import Batch
from dqe_jax.method.mining import Bank
from dqe_jax.method.objective import Metrics
from dqe_jax.models.dqe import DQE
from dqe_jax.training import zero
from dqe_jax.training.state import Optimizer, TrainState
from dqe_jax.training.step import StepOutput, axes_of, parts_of_step


@dataclasses.dataclass(frozen=True)
class Accumulation:
    """The programs of a step of several batches, mapped over the devices.

    Sums of gradients have a leading axis of devices.

    Attributes:
      batches: how many a step takes.
      zeros: `(params, stop) -> sums`.
      add: `(sums, step, params, batch, index, [bank]) -> (sums, metrics)`; donates the sums.
      update: `(state, sums, metrics of all batches, stop) -> StepOutput`; donates the state.
    """

    batches: int
    zeros: mesh.Program[..., Params]
    add: mesh.Program[..., tuple[Params, Metrics]]
    update: mesh.Program[..., StepOutput]

    def run(
        self, state: TrainState, following: Callable[[Tree], Batch], stop: np.ndarray, *bank: Bank
    ) -> StepOutput:
        """Takes a step.

        Args:
          state: before it.
          following: gives the next batch, and is told what the devices are still computing.
          stop: as of `make_step`.
          *bank: the bank, if there is one.
        """
        sums, found = self.zeros(state.params, stop), []
        for index in range(self.batches):
            batch = following(sums)
            sums, metrics = self.add(sums, state.step, state.params, batch, np.int32(index), *bank)
            found.append(metrics)
        return self.update(state, sums, tuple(found), stop)


def make_accumulation(
    config: RunConfig,
    model: DQE,
    made: Optimizer,
    devices: Sequence[jax.Device],
    *,
    bank: bool = False,
) -> Accumulation:
    """The step of `config.batch.accumulate` batches; arguments as of `step.make_step`."""
    parts = parts_of_step(config, model, made, bank=bank)
    number = config.batch.accumulate

    def zeros(params: Params, stop: Array) -> Params:
        del stop  # mapped functions need a mapped argument
        training = parts.split(params)[0]
        return jax.tree.map(jnp.zeros_like, zero.own(training) if parts.shard_state else training)

    def add(
        sums: Params,
        step: Array,
        params: Params,
        batch: Batch,
        index: Array,
        bank: Bank | None = None,
    ) -> tuple[Params, Metrics]:
        grads, metrics = parts.gradients(step, params, batch, bank, index)
        if parts.shard_state:
            grads = parts.added_up(grads)
        return jax.tree.map(jnp.add, sums, grads), metrics

    def update(
        state: TrainState, sums: Params, metrics: tuple[Metrics, ...], stop: Array
    ) -> StepOutput:
        grads = sums if parts.shard_state else parts.added_up(sums)
        grads, means = jax.tree.map(
            lambda x: x / number, (grads, jax.tree.map(lambda *xs: sum(xs), *metrics))
        )
        return parts.update(state, grads, means, stop)

    state_axes, output_axes = axes_of(made)
    mapped = twin.mapper(config.mapping)
    return Accumulation(
        batches=number,
        zeros=mapped(zeros, in_axes=(None, 0), out_axes=0, devices=devices),
        add=mapped(
            add,
            in_axes=(0, None, None, 0, None, *([0] if bank else [])),
            out_axes=(0, None),
            donate_argnums=(0,),
            devices=devices,
        ),
        update=mapped(
            update,
            in_axes=(state_axes, 0, None, 0),
            out_axes=output_axes,
            donate_argnums=(0,),
            devices=devices,
        ),
    )
