"""Exports a run's encoders to safetensors in Hugging Face layout, for PyTorch.

python -m dqe_jax.export --workdir=runs/fiq --output=DIR [--step=N]

Writes `model.safetensors` and `config.json`, which `CLIPModel` or `Blip2ForImageTextRetrieval` of
`transformers` load, `tokenizer.json`, and `dqe.safetensors` with the parameters that these models
do not have (attribute weights, temperature, CLIP's composer), named by their paths.
"""

from __future__ import annotations

from collections.abc import Sequence

from absl import flags

from dqe_jax.cli.command_line import given

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.")
_STEP = flags.DEFINE_integer("step", None, "Step of the checkpoint; default: the newest.")
_OUTPUT = flags.DEFINE_string("output", None, "Directory to write.")
REQUIRED = ("workdir", "output")


def main(argv: Sequence[str]) -> None:
    """Reads the checkpoint and writes the files."""
    del argv
    from dqe_jax.checkpoints.export import export_run  # importing JAX takes seconds

    export_run(given(_WORKDIR), given(_OUTPUT), step=_STEP.value)
