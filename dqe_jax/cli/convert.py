"""Converts pretrained weights to an Orbax directory that a config can name.

python -m dqe_jax.convert --source=DIR_OR_FILE_OR_HUB_ID --output=DIR

`--config.model.weights=DIR` then starts a run from them. On a TPU pod every host reads weights and
tokenizer from one bucket; neither a network nor Hugging Face files are needed.
"""

from __future__ import annotations

from collections.abc import Sequence

from absl import flags, logging

from dqe_jax.cli.command_line import given

_SOURCE = flags.DEFINE_string("source", None, "Safetensors file, model directory, or hub id.")
_OUTPUT = flags.DEFINE_string("output", None, "Directory to write; local or gs://.")
_BACKBONE = flags.DEFINE_enum(
    "backbone",
    None,
    ["clip", "siglip", "dino", "blip2"],
    "Backbone; default: what config.json says.",
)
_VARIANT = flags.DEFINE_string(
    "variant", "auto", "Variant of the backbone; default: the sizes of config.json."
)
_TEXT_SOURCE = flags.DEFINE_string(
    "text_source", "", "Of DINO: the CLIP or SigLIP model whose text tower is taken."
)
REQUIRED = ("source", "output")


def main(argv: Sequence[str]) -> None:
    """Reads, checks and writes."""
    del argv
    from dqe_jax.models.weights.conversion import convert  # importing JAX takes seconds

    made = convert(
        given(_SOURCE),
        given(_OUTPUT),
        backbone=_BACKBONE.value,
        variant=_VARIANT.value,
        text_source=_TEXT_SOURCE.value,
    )
    words = "with a" if made.has_tokenizer else "without"
    logging.info(
        "%s: %s parameters of %s, %s tokenizer.",
        *(made.directory, f"{made.parameters:,}", made.backbone, words),
    )
