"""Exports a run's model to files that need no run: for search, or for PyTorch.

python -m dqe_jax.export --workdir=runs/fiq --output=DIR [--step=N]

`dqe_jax.load` and `dqe-jax index` open the directory: `dqe.json` says how the model was trained and
how photos are preprocessed, `tokenizer.json` is its tokenizer, and `dqe.safetensors` has parameters
by their paths. Of a pretrained backbone, `model.safetensors` and `config.json` hold what its class
of `transformers` loads (`CLIPModel`, `SiglipModel` and others; the text tower of DINO is in
`text/`), and `dqe.safetensors` only what that does not have (attribute weights, temperature,
composer).
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
