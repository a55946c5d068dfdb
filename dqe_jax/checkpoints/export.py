"""A run's encoders as safetensors in Hugging Face layout, for PyTorch."""

from __future__ import annotations

import os
import pathlib

import orbax.checkpoint as ocp
from absl import logging

from dqe_jax.checkpoints import store
from dqe_jax.method.arrays import Params
from dqe_jax.models.build import VARIANTS
from dqe_jax.models.weights import hugging_face
from dqe_jax.models.weights import sizes as size_files
from dqe_jax.utils.errors import UserError
from dqe_jax.utils.files import JsonObject


def export_run(
    directory: str | os.PathLike[str], output: str | os.PathLike[str], *, step: int | None = None
) -> pathlib.Path:
    """Writes the parameters of a checkpoint as `hugging_face.write` does.

    Args:
      directory: a workdir, or its `checkpoints` directory.
      output: directory to write.
      step: of the checkpoint; None for the newest.

    Returns:
      The directory that was written.

    Raises:
      UserError: there is no such checkpoint, its backbone is not a pretrained one, or `output` is
        not writable.
    """
    manager = store.open_for_reading(directory)
    step, (meta, params) = store.read_chosen(manager, step, lambda number: _read(manager, number))
    backbone = meta["config"]["model"]["backbone"]
    if backbone not in VARIANTS:
        raise UserError(
            f"{manager.directory} is of the backbone {backbone!r}, which has no counterpart in "
            "Hugging Face transformers: export runs of 'clip' or 'blip2'."
        )
    written = pathlib.Path(output).expanduser()
    try:
        counts = hugging_face.write(written, params, meta)
    except OSError as error:
        raise UserError(
            f"--output: cannot write to {written} ({error.strerror}); name a writable directory."
        ) from error
    logging.info("%s, step %d: %d tensors, and %d of our own.", written, step, *counts)
    return written


def _read(manager: ocp.CheckpointManager, step: int) -> tuple[JsonObject, Params]:
    """The meta and the parameters of a checkpoint; raises as `store.read_meta`."""
    meta = store.read_meta(manager, step)
    with store.told_damaged(manager, step):
        backbone = meta["config"]["model"]["backbone"]
        if backbone in size_files.SIZES:
            size_files.from_json(backbone, meta["sizes"])
    return meta, store.restore_params(manager, step)
