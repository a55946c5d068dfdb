"""A run's encoders as safetensors in Hugging Face layout, for PyTorch."""

from __future__ import annotations

import os
import pathlib

from absl import logging

from dqe_jax.checkpoints import store
from dqe_jax.models.weights import hugging_face
from dqe_jax.utils.errors import UserError


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
      UserError: there is no such checkpoint, its backbone is `tiny`, or `output` is not writable.
    """
    manager = store.open_for_reading(directory)
    step, (meta, params) = store.read_chosen(
        manager,
        step,
        lambda number: (store.read_meta(manager, number), store.restore_params(manager, number)),
    )
    if meta["config"]["model"]["backbone"] == "tiny":
        raise UserError(
            f"{manager.directory} is of the backbone 'tiny', which has no counterpart in "
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
