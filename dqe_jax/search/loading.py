"""`dqe_jax.load`: a trained model by its path."""

from __future__ import annotations

import os
from collections.abc import Mapping

from dqe_jax.checkpoints.opened import open_model
from dqe_jax.search.model import Model


def load(
    path: str | os.PathLike[str],
    *,
    step: int | None = None,
    num_devices: int = 0,
    batch_size: int | None = None,
    encoders: Mapping[str, str] | None = None,
) -> Model:
    """Loads a trained model of any backbone, for search.

    Args:
      path: the workdir of a run, or a directory that `dqe-jax export` wrote; also in a bucket
        (`gs://`); or a model on the Hugging Face hub, `hf://OWNER/NAME` or
        `hf://OWNER/NAME@REVISION`.
      step: of the checkpoint of a workdir; None for the newest that is whole.
      num_devices: how many devices to use; 0 for all.
      batch_size: images embedded at a time over all devices; None for a size that fits most.
      encoders: only for a model of the backbone `features` whose imported features do not say what
        made them: encoders as `package.module:function`, by the names of the features.

    Raises:
      UserError: there is no model, it is damaged, or an encoder that it needs is not there.
    """
    opened = open_model(path, step=step, num_devices=num_devices)
    return Model(opened, encoder_names=encoders, batch_size=batch_size)
