"""Indexes a folder of images for search with a trained model.

dqe-jax index --model=runs/shapes --images=DIR --output=DIR2 [--table=FILE]

All JPEG, PNG and WebP images in the folder and below it are embedded. Run the same command again
after images were added, changed, renamed or removed: only what is new is embedded. The command may
be interrupted at any time. `--store` keeps the
embeddings in Milvus. `--table` names a CSV file with columns for filters: its first line
names them, and the column `image` or `id` says which image a line is of.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from absl import flags

from dqe_jax.cli.command_line import given, pairs_of

_MODEL = flags.DEFINE_string(
    "model", None, "Directory of a run, or of a model that dqe-jax export wrote."
)
_STEP = flags.DEFINE_integer("step", None, "Step of the checkpoint; default: the newest.")
_IMAGES = flags.DEFINE_string("images", None, "Folder of the images.")
_OUTPUT = flags.DEFINE_string("output", None, "Directory of the index.")
_TABLE = flags.DEFINE_string("table", None, "CSV file with a line for each image.")
_STORE = flags.DEFINE_string(
    "store",
    None,
    "For millions of images: a file such as index.db (Milvus Lite), or a Milvus server's address.",
)
_KEEP = flags.DEFINE_boolean(
    "keep_features",
    None,
    "Keep what searches read of a reference image; default: as the index does, and a new one if it "
    "is at most 32 KiB an image.",
)
_BATCH = flags.DEFINE_integer(
    "batch_size", None, "Images embedded at a time; default: that of the run, at most 64.", 1
)
_ENCODERS = flags.DEFINE_multi_string(
    "encoder",
    [],
    "NAME=package.module:function, the encoder of imported features that do not name their own.",
)
REQUIRED = ("model", "images", "output")


def main(argv: Sequence[str]) -> None:
    """Makes the index or brings it up to date."""
    del argv
    from dqe_jax.distributed import compiled  # importing JAX takes seconds
    from dqe_jax.search.loading import load

    compiled.keep_programs()
    model = load(
        given(_MODEL),
        step=_STEP.value,
        batch_size=_BATCH.value,
        encoders=pairs_of("encoder", _ENCODERS.value),
    )
    index = model.index(
        given(_IMAGES),
        output=given(_OUTPUT),
        table=_TABLE.value,
        store=_STORE.value,
        keep_features=_KEEP.value,
    )
    sys.stdout.write(f"{index.directory}: {index.report}.\n")
