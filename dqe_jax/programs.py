"""The training step of a config as the program that runs: mapped over the devices.

Training, the benchmark and the planner compile the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax

from dqe_jax import models, parallel, partition
from dqe_jax.train_step import make_loss_fn, make_train_step


def splitter(model_config: Any) -> Callable[[Any], tuple[Any, Any]]:
    """Splits parameters into those that train and those that do not, by `config.model`."""
    parts = models.parts_of(model_config.backbone)
    return lambda params: partition.split(params, model_config.frozen, parts)


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


def make_step(
    config: Any,
    model: Any,
    tx: optax.GradientTransformation,
    devices: Sequence[jax.Device],
    *,
    bank: bool = False,
) -> Any:
    """The mapped step, which donates the state.

    Args:
      config: of the run.
      model: of the config.
      tx: of the config.
      devices: to run on, of all processes.
      bank: whether negatives come from a bank.

    Returns:
      `(state, batch) -> (state, metrics)`, or `(state, batch, bank) -> ...`. State and metrics are
      replicated; arrays of the batch and of the bank have a leading axis of devices.
    """
    loss_fn = make_loss_fn(
        apply_fn=model.apply,
        negatives=config.negatives if bank else warmup_negatives(config.negatives),
        weights=config.loss,
        margin=config.loss.margin_size,
    )
    step = make_train_step(loss_fn=loss_fn, tx=tx, seed=config.seed, split=splitter(config.model))
    in_axes = (None, 0, 0) if bank else (None, 0)
    return parallel.pmap(step, in_axes=in_axes, out_axes=None, donate_argnums=(0,), devices=devices)
