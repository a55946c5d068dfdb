"""Puts a model on the Hugging Face hub, with a card that says what it is.

dqe-jax push runs/shapes --repo=OWNER/NAME [--license=apache-2.0] [--public]

Needs a token that may write: set HF_TOKEN, or run `hf auth login`. The run is exported first; the
directory of an export can be named too. Safetensors, JSON and the card are all that is sent. Paths
of this machine are left out. `dqe_jax.load("hf://OWNER/NAME")` opens the model, and every command
that takes a model by its path.
"""

from __future__ import annotations

from collections.abc import Sequence

from absl import flags

from dqe_jax.cli.command_line import given
from dqe_jax.utils.errors import UserError

_REPO = flags.DEFINE_string("repo", None, "OWNER/NAME of the repository on the hub.")
_STEP = flags.DEFINE_integer("step", None, "Step of the checkpoint; default: the newest.")
_LICENSE = flags.DEFINE_string(
    "license", "", "Licence of the model, as the hub names it, such as apache-2.0."
)
_PUBLIC = flags.DEFINE_bool("public", False, "A new repository is for all to see.")
_REVISION = flags.DEFINE_string("revision", None, "A branch; default: the main one.")
REQUIRED = ("repo",)
ARGUMENTS = 1


def main(argv: Sequence[str]) -> None:
    """Exports the run and sends the files."""
    if len(argv) < 2:
        raise UserError("name the run: dqe-jax push runs/shapes --repo=OWNER/NAME.")
    from dqe_jax.checkpoints.push import push  # importing JAX takes seconds

    push(
        argv[1],
        given(_REPO),
        step=_STEP.value,
        public=_PUBLIC.value,
        license_id=_LICENSE.value,
        revision=_REVISION.value,
    )
