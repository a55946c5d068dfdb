"""Prepares a benchmark, or your own triplets, from raw files: once, before training or evaluation.

python -m dqe_jax.prepare --dataset=fashioniq --raw_dir=DIR --data_dir=DIR [--image_size=224]
"""

from __future__ import annotations

from collections.abc import Sequence

from absl import flags

from dqe_jax.cli.command_line import given
from dqe_jax.data.datasets import DATASETS
from dqe_jax.data.preprocess import PREPROCESS
from dqe_jax.data.settings import IMAGE_FORMATS

_NAMES = sorted(name for name in DATASETS if DATASETS[name].must_be_prepared)
_DATASET = flags.DEFINE_enum("dataset", None, _NAMES, "Data set.")
_RAW_DIR = flags.DEFINE_string(
    "raw_dir", None, "Directory of the raw files, which may be in any folders below it."
)
_DATA_DIR = flags.DEFINE_string("data_dir", "~/.cache/dqe_jax", "Where the prepared data go.")
_IMAGE_SIZE = flags.DEFINE_integer("image_size", 224, "Pixels a side of the stored images.", 8)
_PREPROCESS = flags.DEFINE_enum(
    "preprocess", None, sorted(PREPROCESS), "How photos become square; default: as in the config."
)
_FORMAT = flags.DEFINE_enum(
    "format",
    "png",
    IMAGE_FORMATS,
    "How images are stored; a run then needs the same config.data.image_format.",
)
_SPLITS = flags.DEFINE_list("splits", None, "Splits, such as train,val; default: all.")
_MAX_MISSING = flags.DEFINE_float(
    "max_missing",
    None,
    "Share of a split that may be missing; default: 0.1 for train, 0 for others.",
    0,
    1,
)
_NUM_WORKERS = flags.DEFINE_integer(
    "num_workers", 0, "Processes that decode photos; 0 for one per core.", 0
)
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Prepare again, even if it is prepared already.")
_DOWNLOAD = flags.DEFINE_bool(
    "download",
    False,
    "First fetch photos that --raw_dir lacks, by their addresses: fashioniq alone.",
)
_PER_SECOND = flags.DEFINE_float(
    "per_second", 2.0, "With --download: requests a second, at the most.", 0.01, 100
)
_BEAM_RUNNER = flags.DEFINE_string(
    "beam_runner", None, "Decode photos with this Apache Beam runner, such as DirectRunner."
)
_BEAM_OPTIONS = flags.DEFINE_list("beam_options", [], "Pipeline options of Beam, without dashes.")
REQUIRED = ("dataset", "raw_dir")


def main(argv: Sequence[str]) -> None:
    """Prepares, reports, and ends with an error if too much is missing."""
    del argv
    from dqe_jax.data.prepare import prepare_benchmark  # after the flags: TFDS is slow to import

    prepare_benchmark(
        given(_DATASET),
        given(_RAW_DIR),
        _DATA_DIR.value,
        image_size=_IMAGE_SIZE.value,
        preprocess=_PREPROCESS.value,
        image_format=_FORMAT.value,
        splits=_SPLITS.value or (),
        max_missing=_MAX_MISSING.value,
        num_workers=_NUM_WORKERS.value,
        overwrite=_OVERWRITE.value,
        download=_DOWNLOAD.value,
        per_second=_PER_SECOND.value,
        beam_runner=_BEAM_RUNNER.value,
        beam_options=_BEAM_OPTIONS.value,
    )
