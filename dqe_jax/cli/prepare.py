"""Prepares a benchmark, or your own triplets, from raw files: once, before training or evaluation.

python -m dqe_jax.prepare --dataset=fashioniq --raw_dir=DIR --data_dir=DIR [--image_size=224]
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from absl import flags, logging

from dqe_jax.data.datasets import DATASETS, split_of
from dqe_jax.data.preprocess import PREPROCESS
from dqe_jax.utils.errors import UserError

_NAMES = sorted(name for name in DATASETS if DATASETS[name].must_be_prepared)
_DATASET = flags.DEFINE_enum("dataset", None, _NAMES, "Data set.")
_RAW_DIR = flags.DEFINE_string("raw_dir", None, "Directory of the raw files, in any folders below.")
_DATA_DIR = flags.DEFINE_string("data_dir", "~/.cache/dqe_jax", "Where the prepared data go.")
_IMAGE_SIZE = flags.DEFINE_integer("image_size", 224, "Pixels a side of the stored images.", 8)
_PREPROCESS = flags.DEFINE_enum(
    "preprocess", None, sorted(PREPROCESS), "How photos become square; default: as in the config."
)
_SPLITS = flags.DEFINE_list("splits", None, "Splits, such as train,val; default: all.")
_MAX_MISSING = flags.DEFINE_float(
    "max_missing", None, "Share of a split that may be missing; default: train .1, others 0.", 0, 1
)
_NUM_WORKERS = flags.DEFINE_integer("num_workers", 0, "Processes; 0: one a core.", 0)
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Prepare again what is prepared already.")
_BEAM_RUNNER = flags.DEFINE_string(
    "beam_runner", None, "Decode photos by this Apache Beam runner, such as DirectRunner."
)
_BEAM_OPTIONS = flags.DEFINE_list("beam_options", [], "Pipeline options of Beam, without dashes.")
REQUIRED = ("dataset", "raw_dir")


def main(argv: Sequence[str]) -> None:
    """Prepares, reports, and ends with an error if too much is missing."""
    del argv
    from dqe_jax.data import preparation
    from dqe_jax.data.builders import benchmarks
    from dqe_jax.data.raw_files import RawFiles

    dataset = _DATASET.value
    names = _SPLITS.value or DATASETS[dataset].splits
    splits = tuple(dict.fromkeys(split_of(dataset, name) for name in names))
    make = functools.partial(
        benchmarks.make_builder,
        dataset,
        _DATA_DIR.value,
        image_size=_IMAGE_SIZE.value,
        preprocess=_PREPROCESS.value or benchmarks.BUILDERS[dataset].raw.preprocess,
        raw_dir=_RAW_DIR.value,
        splits=splits,
        num_workers=_NUM_WORKERS.value,
        beam=_BEAM_RUNNER.value is not None,
    )
    builder = make()
    for path in preparation.leftovers(builder):
        logging.warning("An interrupted run left %s: remove it.", path)
    if preparation.is_prepared(builder) and _OVERWRITE.value:
        benchmarks.read_splits(dataset, RawFiles(_RAW_DIR.value), splits)  # before it removes
        builder.data_path.rmtree()
        builder = make()
    elif preparation.is_prepared(builder):
        lacking = [split for split in splits if split not in builder.info.splits]
        if lacking and _SPLITS.value:
            raise UserError(
                f"{builder.data_dir} was prepared without {', '.join(lacking)}: run again with "
                "--overwrite and all the splits that you want."
            )
        logging.info("%s is prepared already; --overwrite prepares it again.", builder.data_dir)
    preparation.prepare(builder, **_beam())
    found = preparation.report(builder)
    complaints = preparation.write_report(builder, found, _MAX_MISSING.value)
    logging.info("%s in %s:\n%s", dataset, builder.data_dir, preparation.table(found))
    for line in preparation.examples_of(found):
        logging.info("  %s", line)
    logging.info("Report: %s", builder.data_path / preparation.REPORT)
    if complaints:
        raise UserError(
            f"{'; '.join(complaints)}: add the files and run again with --overwrite, or accept it "
            "with --max_missing (what is prepared stays)."
        )
    logging.info("Use it with --data_dir=%s.", _DATA_DIR.value)


def _beam() -> dict[str, object]:
    """What TFDS hands to Beam; nothing without --beam_runner."""
    if _BEAM_RUNNER.value is None:
        return {}
    try:
        from apache_beam.options.pipeline_options import PipelineOptions
        from apache_beam.runners import create_runner
    except ImportError as error:
        raise UserError("--beam_runner needs Apache Beam: pip install apache-beam.") from error
    try:
        runner = create_runner(_BEAM_RUNNER.value)
    except (ValueError, ImportError, AttributeError) as error:
        raise UserError(f"--beam_runner={_BEAM_RUNNER.value}: {error}") from error
    options = PipelineOptions([f"--{option}" for option in _BEAM_OPTIONS.value])
    return {"beam_runner": runner, "beam_options": options}
