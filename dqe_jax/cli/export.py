"""Exports a run's encoders to safetensors in Hugging Face layout, for PyTorch.

python -m dqe_jax.export --workdir=runs/fiq --output=DIR [--step=N]

Writes `model.safetensors` and `config.json`, which `CLIPModel` or `Blip2ForImageTextRetrieval` of
`transformers` load, `tokenizer.json`, and `dqe.safetensors` with the parameters that no model of
theirs has (attribute weights, temperature, CLIP's composer), named by their paths.
"""

from __future__ import annotations

from collections.abc import Sequence

from absl import flags, logging

from dqe_jax.utils.errors import UserError

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.")
_STEP = flags.DEFINE_integer("step", None, "Step of the checkpoint; default: the newest.")
_OUTPUT = flags.DEFINE_string("output", None, "Directory to write.")
REQUIRED = ("workdir", "output")


def main(argv: Sequence[str]) -> None:
    """Reads the checkpoint and writes the files."""
    del argv
    import pathlib

    from dqe_jax.checkpoints import store
    from dqe_jax.models.weights import hugging_face

    manager = store.open_for_reading(_WORKDIR.value)
    step = store.choose_step(manager, _STEP.value)
    meta = store.read_meta(manager, step)
    backbone = meta["config"]["model"]["backbone"]
    if backbone == "tiny":
        raise UserError(
            f"{manager.directory} is of the backbone 'tiny', which has no counterpart in "
            "Hugging Face transformers: export runs of 'clip' or 'blip2'."
        )
    params = store.restore_params(manager, step)
    directory = pathlib.Path(_OUTPUT.value).expanduser()
    try:
        counts = hugging_face.write(directory, params, meta)
    except OSError as error:
        raise UserError(
            f"--output: cannot write to {directory} ({error.strerror}); name a writable directory."
        ) from error
    logging.info("%s, step %d: %d tensors, and %d of our own.", directory, step, *counts)
