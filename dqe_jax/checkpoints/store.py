"""Orbax checkpoints of a run, under `workdir/checkpoints/<step>/`.

A checkpoint has the items `params` and `opt_state`, and `meta`: a JSON with the run's config, the
tokenizer, the position of the data iterator, the step of the bank and the time trained so far. One
saved between two refreshes of the bank has also `bank_params`, the trained parameters that the bank
is of. With `config.optimizer.ema_decay` there is also `average`, the moving average of the trained
parameters. Evaluation reads `params`, `average` and `meta`.

A checkpoint appears under its name when it is complete; what a killed run has left half-written is
removed when the run goes on. One that was damaged later, on the disk or while it was copied, is set
aside then, as `<step>.damaged`, and the run goes on from an older one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from types import NoneType
from typing import TYPE_CHECKING, Protocol, TypeVar, cast

import jax
import numpy as np
from absl import logging
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import multihost_utils

from dqe_jax.config import RunConfig
from dqe_jax.distributed import processes
from dqe_jax.method.arrays import Array, Params, Tree
from dqe_jax.utils.errors import UserError, reason_of
from dqe_jax.utils.files import JsonObject, is_regular, move_directory, read_json
from dqe_jax.utils.paths import is_remote, whole_path

if TYPE_CHECKING:
    import orbax.checkpoint as ocp  # slow to import

ITEMS = ("params", "opt_state", "bank_params", "average", "meta")
# Bytes from which Orbax may take an array from several devices at once.
SLICED = 2**20
# What `meta` holds in every checkpoint, and of which types.
_META: dict[str, tuple[type, ...]] = {
    "config": (dict,),
    "tokenizer": (str,),
    "sizes": (dict, NoneType),
    "data_state": (object,),
    "bank_step": (int, NoneType),
    "train_seconds": (int, float),
}
T = TypeVar("T")


class _Saved(Protocol):
    """What Orbax says of a checkpoint."""

    step: int


@dataclasses.dataclass(frozen=True)
class OnSchedule:
    """Keeps the newest `keep` of the checkpoints of steps that are multiples of `every`.

    Others were saved because the run was interrupted: they are needed until the next one alone.
    """

    keep: int
    every: int

    def should_preserve(self, checkpoints: Sequence[_Saved], *, context: object) -> Sequence[bool]:
        """Whether each checkpoint, oldest first, is kept."""
        del context
        planned = [i for i, info in enumerate(checkpoints) if info.step % self.every == 0]
        kept = set(planned[-self.keep :])
        return [i in kept for i in range(len(checkpoints))]


def open_for_training(workdir: epath.Path, config: RunConfig) -> ocp.CheckpointManager:
    """The manager that saves a run's checkpoints, and removes those that need not be kept.

    Kept are the newest, the newest `keep_checkpoints` of those on schedule, those of every
    `keep_period` steps, and the best by the metric `keep_best`.
    """
    import orbax.checkpoint as ocp  # slow
    from orbax.checkpoint.checkpoint_managers import preservation_policy as policies

    best = config.keep_best
    rules = [
        policies.LatestN(1),
        OnSchedule(config.keep_checkpoints, config.checkpoint_every),
    ]
    if config.keep_period:
        rules.append(policies.EveryNSteps(config.keep_period))
    if best:
        _set_metrics_aside(workdir / "checkpoints", best)
        rules.append(
            policies.BestN(
                get_metric_fn=lambda found: found[best],
                n=1,
                keep_checkpoints_without_metrics=False,
            )
        )
    options = ocp.CheckpointManagerOptions(
        create=True,
        cleanup_tmp_directories=True,
        preservation_policy=policies.AnyPreservationPolicy(rules),
        best_fn=(lambda found: found[best]) if best else None,
    )
    return _manager(workdir / "checkpoints", options)


def _manager(root: epath.Path, options: ocp.CheckpointManagerOptions) -> ocp.CheckpointManager:
    """Orbax's manager of a directory.

    Raises:
      UserError: what Orbax has noted of a checkpoint is damaged.
    """
    import orbax.checkpoint as ocp  # slow

    try:
        return ocp.CheckpointManager(root, item_names=ITEMS, options=options)
    except Exception:
        _check_notes(root)
        raise


def _check_notes(root: epath.Path) -> None:
    """Looks for what Orbax cannot read of what it has noted of each checkpoint.

    Raises:
      UserError: there is such a file.
    """
    import orbax.checkpoint as ocp  # slow

    for step in ocp.utils.checkpoint_steps(root):
        path = root / str(step)
        try:
            _ = ocp.path.step.Metadata(step=step, path=path).commit_timestamp_nsecs
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            raise UserError(
                f"{path / '_CHECKPOINT_METADATA'} is damaged ({reason_of(error)}): copy it again, "
                "or remove it, as the model does not need it."
            ) from error


def _set_metrics_aside(root: epath.Path, best: str) -> None:
    """Moves damaged metrics out of their checkpoints, whose models may well be whole.

    Without them a checkpoint is not the best one; with them Orbax would not open the directory.
    """
    import orbax.checkpoint as ocp  # slow

    if processes.leads() and root.is_dir():
        for step in ocp.utils.checkpoint_steps(root):
            held = root / str(step) / "metrics"
            if held.is_dir() and not _has_number(held / "metrics", best):
                aside = _free(root / f"{step}.metrics.damaged")
                move_directory(held, aside)
                logging.warning("%s is damaged; it is kept as %s.", held, aside.name)
    processes.wait_for_all("damaged metrics")


def _has_number(file: epath.Path, name: str) -> bool:
    with contextlib.suppress(UserError):
        return isinstance(read_json(file, dict).get(name), (int, float))
    return False


def _free(path: epath.Path) -> epath.Path:
    """The path, or one with `+` behind it where there is something already."""
    while path.exists():
        path = path.with_name(path.name + "+")
    return path


def open_for_reading(directory: str | os.PathLike[str]) -> ocp.CheckpointManager:
    """The manager of an existing run.

    Args:
      directory: a workdir, or its `checkpoints` directory.

    Raises:
      UserError: there is no checkpoint.
    """
    import orbax.checkpoint as ocp  # slow

    root = whole_path(directory)
    nested = root / "checkpoints"
    root = nested if nested.is_dir() else root
    if not root.is_dir():
        raise UserError(f"there is no directory {root}: name a workdir of dqe_jax.main.")
    options = ocp.CheckpointManagerOptions(read_only=True)
    manager = _manager(root, options)
    if manager.latest_step() is None:
        raise UserError(f"there is no checkpoint in {root}: train first, or name another workdir.")
    return manager


def steps_of(workdir: epath.Path) -> list[int]:
    """Steps of the complete checkpoints of a run, ascending; none if there is no such directory."""
    import orbax.checkpoint as ocp  # slow

    root = workdir / "checkpoints"
    return sorted(ocp.utils.checkpoint_steps(root)) if root.is_dir() else []


def save(
    manager: ocp.CheckpointManager,
    step: int,
    params: Params,
    opt_state: Tree,
    meta: JsonObject,
    *,
    bank_params: Params | None = None,
    average: Params | None = None,
    metrics: dict[str, float] | None = None,
) -> None:
    """Saves a checkpoint, asynchronously: device memory is copied before this returns.

    Args:
      manager: of the run.
      step: of the checkpoint.
      params: replicated.
      opt_state: replicated, or NumPy arrays.
      meta: what JSON can hold.
      bank_params: what the bank is of, as NumPy arrays, if it is not of `params`.
      average: of the trained parameters, replicated or NumPy arrays, where the config asks for one.
      metrics: of this step, to choose the best by.
    """
    import orbax.checkpoint as ocp  # slow

    items = {
        "params": ocp.args.StandardSave(_global(params)),
        "opt_state": ocp.args.StandardSave(_global(opt_state)),
        "meta": ocp.args.JsonSave(meta),
    }
    if bank_params is not None:
        items["bank_params"] = ocp.args.StandardSave(bank_params)
    if average is not None:
        items["average"] = ocp.args.StandardSave(_global(average))
    manager.save(step, args=ocp.args.Composite(**items), metrics=metrics, force=True)


def _global(tree: T) -> T:
    """Replicated arrays of one process's devices as arrays of all devices; NumPy's as they are."""
    if jax.process_count() == 1:
        return jax.tree.map(_of_one_device, tree)
    if all(isinstance(x, np.ndarray) for x in jax.tree.leaves(tree)):
        return tree
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()), ("all",))
    spec = jax.sharding.PartitionSpec()
    return multihost_utils.host_local_array_to_global_array(tree, mesh, spec)


def _of_one_device(x: Array) -> Array:
    """A small replicated array as its first copy; others as they are.

    Of an array with copies on several devices Orbax takes a slice from each, and compiles a program
    for each device and shape. That pays for large arrays alone.
    """
    if isinstance(x, jax.Array) and x.is_fully_replicated and x.nbytes < SLICED:
        return x.addressable_data(0)
    return x


class DamagedError(UserError):
    """A checkpoint is not what was saved."""


@contextlib.contextmanager
def told_damaged(manager: ocp.CheckpointManager, step: int) -> Iterator[None]:
    """Raises a `DamagedError` for what goes wrong while a checkpoint is read."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except PermissionError as error:
        raise UserError(
            f"the checkpoint of step {step} in {manager.directory} cannot be read "
            f"({error.strerror}): make it readable."
        ) from error
    except Exception as error:  # Orbax and TensorStore raise many types
        if "RESOURCE_EXHAUSTED" in str(error):
            raise
        raise DamagedError(
            f"the checkpoint of step {step} in {manager.directory} is damaged "
            f"({reason_of(error)}): copy it again, or take another one by --step."
        ) from error


def read_chosen(
    manager: ocp.CheckpointManager, step: int | None, read: Callable[[int], T]
) -> tuple[int, T]:
    """What `read` gives of a checkpoint: of a step, or of the newest one that is whole.

    With several processes all of them read the same.

    Args:
      manager: of the run.
      step: of the checkpoint; None for the newest. One that is damaged is then named in the log and
        passed over.
      read: of a step.

    Returns:
      The step, and what was read.

    Raises:
      UserError: there is no checkpoint of that step, it is damaged, or none is whole.
    """
    steps = sorted(manager.all_steps(), reverse=True)
    if step is not None:
        if step not in steps:
            known = ", ".join(map(str, reversed(steps)))
            raise UserError(f"--step={step}: {manager.directory} has checkpoints of steps {known}.")
        return step, read(step)
    first = None
    for candidate in steps:
        found, problem = None, None
        try:
            found = read(candidate)
        except DamagedError as error:
            problem = error
        if processes.all_agree(problem is None):
            return candidate, cast(T, found)
        first = first or problem
        logging.warning("Step %d is passed over: %s", candidate, problem or "it is damaged.")
    raise UserError(
        f"none of the {len(steps)} checkpoints in {manager.directory} is whole; the newest one: "
        f"{first}"
    )


def set_aside(manager: ocp.CheckpointManager, newest: int) -> None:
    """Renames the checkpoints of steps after `newest`, which are damaged: nothing is lost."""
    damaged = [step for step in manager.all_steps() if step > newest]
    if not damaged:
        return
    if processes.leads():
        for step in damaged:
            path = epath.Path(manager.directory) / str(step)
            free = _free(path.with_name(f"{step}.damaged"))
            move_directory(path, free)
            logging.warning("%s is damaged; it is kept as %s.", path, free.name)
    processes.wait_for_all("damaged checkpoints")
    manager.reload()


def read_meta(manager: ocp.CheckpointManager, step: int) -> JsonObject:
    """The JSON stored with a checkpoint.

    Raises:
      DamagedError: it cannot be read, or is not what was saved.
    """
    import orbax.checkpoint as ocp  # slow

    with told_damaged(manager, step):
        _check_files(epath.Path(manager.directory) / str(step))
        restored = manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))
        meta = restored["meta"]
        for name, kinds in _META.items():
            if not isinstance(meta[name], kinds):
                raise TypeError(f"meta has a {type(meta[name]).__name__} for {name}")
        if not isinstance(meta.get("data"), (dict, NoneType)):  # older ones have none
            raise TypeError(f"meta has a {type(meta['data']).__name__} for data")
        return meta


def _check_files(checkpoint: epath.Path) -> None:
    """Raises an OSError if a pipe, a device or a link to nothing is among the files."""
    if is_remote(checkpoint):
        return
    for folder, _, names in os.walk(checkpoint):
        for name in names:
            if not is_regular(os.path.join(folder, name)):  # it would be read for ever
                raise OSError(f"{os.path.join(folder, name)} is no regular file")


def restore(manager: ocp.CheckpointManager, step: int, **like: Tree) -> dict[str, Tree]:
    """Restores items of a checkpoint.

    Args:
      manager: of the run.
      step: one of its steps.
      **like: item name to a tree of arrays or `ShapeDtypeStruct`s that says the shapes.

    Returns:
      The items, as NumPy arrays in every process.

    Raises:
      DamagedError: they cannot be read.
    """
    import orbax.checkpoint as ocp  # slow

    # One copy in each process.
    devices = jax.devices() if jax.process_count() > 1 else jax.local_devices()[:1]
    mesh = jax.sharding.Mesh(np.asarray(devices), ("all",))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def described(x: Array | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere)

    args = {
        name: ocp.args.StandardRestore(jax.tree.map(described, tree)) for name, tree in like.items()
    }
    with told_damaged(manager, step):
        found = manager.restore(step, args=ocp.args.Composite(**args))
        return {name: jax.tree.map(np.asarray, found[name]) for name in like}


def restore_params(manager: ocp.CheckpointManager, step: int, item: str = "params") -> Params:
    """The parameters of a checkpoint as NumPy arrays, whatever their shapes and devices.

    Args:
      manager: of the run.
      step: one of its steps.
      item: "params", or another item that holds parameters.

    Raises:
      DamagedError: they cannot be read.
    """
    import orbax.checkpoint as ocp  # slow

    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    args = ocp.args.Composite(**{item: ocp.args.StandardRestore(fallback_sharding=here)})
    with told_damaged(manager, step):
        return jax.tree.map(np.asarray, manager.restore(step, args=args)[item])


def has_average(meta: JsonObject) -> bool:
    """Whether a checkpoint has a moving average of the trained parameters, by its meta."""
    return meta["config"].get("optimizer", {}).get("ema_decay", 0.0) > 0


def with_average(
    manager: ocp.CheckpointManager, step: int, meta: JsonObject, params: Params
) -> Params:
    """The parameters that are evaluated: with the average of those that trained, if there is one.

    Args:
      manager: of the run.
      step: of the checkpoint.
      meta: of the checkpoint.
      params: of the checkpoint, NumPy arrays.

    Raises:
      DamagedError: the average cannot be read, or is not one of these parameters.
    """
    with told_damaged(manager, step):
        if not has_average(meta):
            return params
        flat = flatten_dict(params, sep="/")
        for path, x in flatten_dict(restore_params(manager, step, "average"), sep="/").items():
            if flat[path].shape != x.shape:
                raise ValueError(f"the average of {path} has shape {x.shape}")
            flat[path] = x.astype(flat[path].dtype)
        return unflatten_dict(flat, sep="/")
