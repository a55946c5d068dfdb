"""Orbax checkpoints of a run, under `workdir/checkpoints/<step>/`.

A checkpoint has the items `params` and `opt_state`, and `meta`: a JSON with the run's config, the
tokenizer, the position of the data iterator and the time trained so far. Evaluation reads `params`
and `meta` alone.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from dqe_jax.utils.errors import UserError

ITEMS = ("params", "opt_state", "meta")


def open_for_training(workdir: epath.Path, keep: int) -> ocp.CheckpointManager:
    """The manager that saves a run's checkpoints and keeps the newest `keep`."""
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
    return ocp.CheckpointManager(workdir / "checkpoints", item_names=ITEMS, options=options)


def open_for_reading(directory: str | epath.Path) -> ocp.CheckpointManager:
    """The manager of an existing run.

    Args:
      directory: a workdir, or its `checkpoints` directory.

    Raises:
      UserError: there is no checkpoint.
    """
    root = epath.Path(directory).expanduser().absolute()
    nested = root / "checkpoints"
    root = nested if nested.is_dir() else root
    if not root.is_dir():
        raise UserError(f"there is no directory {root}: name a workdir of dqe_jax.main.")
    options = ocp.CheckpointManagerOptions(read_only=True)
    manager = ocp.CheckpointManager(root, item_names=ITEMS, options=options)
    if manager.latest_step() is None:
        raise UserError(f"there is no checkpoint in {root}: train first, or name another workdir.")
    return manager


def save(
    manager: ocp.CheckpointManager, step: int, params: Any, opt_state: Any, meta: dict[str, Any]
) -> None:
    """Saves a checkpoint, asynchronously: device memory is copied before this returns."""
    manager.save(
        step,
        args=ocp.args.Composite(
            params=ocp.args.StandardSave(params),
            opt_state=ocp.args.StandardSave(opt_state),
            meta=ocp.args.JsonSave(meta),
        ),
    )


def choose_step(manager: ocp.CheckpointManager, step: int | None) -> int:
    """`step`, or the newest step if it is None.

    Raises:
      UserError: there is no checkpoint of that step.
    """
    steps = manager.all_steps()
    if step is None:
        return manager.latest_step()
    if step not in steps:
        known = ", ".join(map(str, sorted(steps)))
        raise UserError(f"--step={step}: {manager.directory} has checkpoints of steps {known}.")
    return step


def read_meta(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    """The JSON stored with a checkpoint."""
    return manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]


def restore(manager: ocp.CheckpointManager, step: int, **like: Any) -> dict[str, Any]:
    """Restores items of a checkpoint.

    Args:
      manager: of the run.
      step: one of its steps.
      **like: item name to a tree of arrays or `ShapeDtypeStruct`s that says shapes and shardings.
    """
    args = {
        name: ocp.args.StandardRestore(jax.tree.map(ocp.utils.to_shape_dtype_struct, tree))
        for name, tree in like.items()
    }
    return dict(manager.restore(step, args=ocp.args.Composite(**args)))


def restore_params(manager: ocp.CheckpointManager, step: int) -> Any:
    """The parameters of a checkpoint as NumPy arrays, whatever their shapes."""
    args = ocp.args.Composite(params=ocp.args.StandardRestore())
    return jax.tree.map(np.asarray, manager.restore(step, args=args)["params"])
