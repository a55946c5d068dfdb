"""A run's model as files that need no run: for `dqe_jax.load`, and its encoders for PyTorch."""

from __future__ import annotations

import os
import pathlib
from typing import TYPE_CHECKING

from absl import logging

from dqe_jax.checkpoints import exported, store
from dqe_jax.checkpoints.fingerprint import fingerprint_of
from dqe_jax.checkpoints.merging import merged
from dqe_jax.method.arrays import Params
from dqe_jax.models.weights import sizes as size_files
from dqe_jax.utils.errors import UserError
from dqe_jax.utils.files import JsonObject
from dqe_jax.utils.paths import is_remote

if TYPE_CHECKING:
    import orbax.checkpoint as ocp  # slow to import


def export_run(
    directory: str | os.PathLike[str], output: str | os.PathLike[str], *, step: int | None = None
) -> pathlib.Path:
    """Writes the model of a checkpoint, of any backbone: see `exported.py` for the files.

    Adapters (`config.model.lora`) are merged into their kernels.

    Args:
      directory: a workdir, or its `checkpoints` directory.
      output: directory to write.
      step: of the checkpoint; None for the newest.

    Returns:
      The directory that was written.

    Raises:
      UserError: there is no such checkpoint, or `output` is not writable or in a bucket.
    """
    if is_remote(output):
        raise UserError(f"--output={output}: name a directory of this machine, and copy it there.")
    manager = store.open_for_reading(directory)
    step, (meta, params) = store.read_chosen(manager, step, lambda number: _read(manager, number))
    config, params = merged(exported.config_of(meta["config"]), params)
    meta = meta | {"config": config.to_dict()}
    sizes = meta["sizes"] and size_files.from_json(config.model.backbone, meta["sizes"])
    fingerprint = fingerprint_of(config, sizes, params)
    written = pathlib.Path(output).expanduser()
    try:
        counts = exported.write(written, params, meta, step=step, fingerprint=fingerprint)
    except OSError as error:
        raise UserError(
            f"--output: cannot write to {written} ({error.strerror}); name a writable directory."
        ) from error
    logging.info(
        "%s, step %d%s: %d tensors for transformers, and %d of our own. Fingerprint: %s.",
        *(written, step, ", moving average" if store.has_average(meta) else "", *counts),
        fingerprint,
    )
    return written


def _read(manager: ocp.CheckpointManager, step: int) -> tuple[JsonObject, Params]:
    """The meta and the parameters of a checkpoint; raises as `store.read_meta`."""
    meta = store.read_meta(manager, step)
    with store.told_damaged(manager, step):
        backbone = meta["config"]["model"]["backbone"]
        if meta["sizes"] is not None:
            size_files.from_json(backbone, meta["sizes"])
        exported.config_of(meta["config"])
    params = store.restore_params(manager, step)
    return meta, store.with_average(manager, step, meta, params)
