"""Prepares a benchmark, or a user's own triplets, from raw files."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence

from absl import logging

from dqe_jax.data import bucket, downloads, preparation
from dqe_jax.data.annotations import fashioniq
from dqe_jax.data.builders.benchmarks import (
    BUILDERS,
    Benchmark,
    make_builder,
    read_splits,
    require_files,
)
from dqe_jax.data.datasets import DATASETS, split_of
from dqe_jax.data.raw_files import RawFiles
from dqe_jax.utils.errors import UserError

PathLike = str | os.PathLike[str]


def prepare_benchmark(
    dataset: str,
    raw_dir: PathLike,
    data_dir: PathLike,
    *,
    image_size: int = 224,
    preprocess: str | None = None,
    image_format: str = "png",
    splits: Sequence[str] = (),
    max_missing: float | None = None,
    num_workers: int = 0,
    overwrite: bool = False,
    download: bool = False,
    per_second: float = 2.0,
    beam_runner: str | None = None,
    beam_options: Sequence[str] = (),
) -> preparation.Report:
    """Prepares what is not prepared yet, says what is at hand, and writes `preparation.json`.

    Args:
      dataset: one of `datasets.DATASETS` that must be prepared.
      raw_dir: directory of the raw files, in any folders below.
      data_dir: where the prepared data go.
      image_size: pixels a side of the stored images.
      preprocess: how photos become square, a name of `preprocess.PREPROCESS`; None for the data
        set's own.
      image_format: how images are stored, of `settings.IMAGE_FORMATS`.
      splits: any names of them, such as `val`; none for all.
      max_missing: share of a split that may be missing; None for `preparation.MAX_MISSING`.
      num_workers: processes that decode photos; 0 for one a core.
      overwrite: whether to prepare again what is prepared.
      download: whether to fetch photos that the raw directory lacks, by their published addresses:
        of fashioniq alone.
      per_second: requests a second, at the most.
      beam_runner: of Apache Beam, to decode photos by; None for processes of this machine.
      beam_options: pipeline options of Beam, without dashes.

    Returns:
      What is at hand, as `preparation.report` gives it.

    Raises:
      UserError: the raw data cannot be used, the directory cannot be written, or too much is
        missing (what is prepared stays).
    """
    names = splits or DATASETS[dataset].splits
    wanted = tuple(dict.fromkeys(split_of(dataset, name) for name in names))
    if download:
        download_photos(dataset, raw_dir, wanted, per_second=per_second)
    make = functools.partial(
        make_builder,
        dataset,
        os.fspath(bucket.local_of(data_dir)),
        image_size=image_size,
        preprocess=preprocess or BUILDERS[dataset].raw.preprocess,
        image_format=image_format,
        raw_dir=os.fspath(raw_dir),
        splits=wanted,
        num_workers=num_workers,
        beam=beam_runner is not None,
    )
    beam = {} if beam_runner is None else _beam_fields(beam_runner, beam_options)
    bucket.fetch(data_dir, dataset)
    builder = _open_builder(make, overwrite=overwrite, needed=wanted if splits else ())
    preparation.prepare(builder, **beam)
    try:
        found = _report(builder, max_missing)
    finally:  # what is prepared stays, whatever is missing
        bucket.send(data_dir, dataset)
    stored = "" if image_format == "png" else f" --config.data.image_format={image_format}"
    logging.info("Use it with --data_dir=%s%s.", data_dir, stored)
    return found


def download_photos(
    dataset: str, raw_dir: PathLike, splits: Sequence[str], *, per_second: float
) -> downloads.Overview:
    """Fetches what the raw directory lacks of the photos of splits, into its folder `images`.

    Args:
      dataset: `fashioniq`.
      raw_dir: with the annotations and the lists of addresses.
      splits: our names.
      per_second: requests a second, at the most.

    Raises:
      UserError: the data set has no list of addresses, or as `downloads.fetch`.
    """
    if dataset != "fashioniq":
        raise UserError(
            f"--download: {dataset} has no list of addresses; get its photos as its source says."
        )
    files = RawFiles(raw_dir)
    read = read_splits(dataset, files, splits)
    listed, malformed = fashioniq.read_addresses(files)
    if malformed:
        more = f"{len(malformed):,} lines of the lists of addresses are malformed"
        logging.warning("%s and left out; the first is %s.", more, malformed[0])
    wanted = dict.fromkeys(image for part in read.values() for image in part.images)
    addresses = {image: listed.get(image, "") for image in wanted}
    return downloads.fetch(
        addresses,
        files.root / "images",
        lambda image: files.image(image) is not None,
        per_second=per_second,
    )


def _report(builder: Benchmark, max_missing: float | None) -> preparation.Report:
    """Writes and logs what is at hand.

    Raises:
      UserError: too much is missing.
    """
    found = preparation.report(builder)
    complaints = preparation.write_report(builder, found, max_missing)
    logging.info("%s in %s:\n%s", builder.name, builder.data_dir, preparation.table(found))
    for line in preparation.examples_of(found):
        logging.info("  %s", line)
    logging.info("Report: %s", builder.data_path / preparation.REPORT)
    if complaints:
        raise UserError(
            f"{'; '.join(complaints)}: add the files and run again with --overwrite, or accept it "
            "with --max_missing (what is prepared stays)."
        )
    return found


def _open_builder(
    make: Callable[[], Benchmark], *, overwrite: bool, needed: Sequence[str]
) -> Benchmark:
    """The builder; what is prepared is removed if it is to be overwritten.

    Raises:
      UserError: what is prepared lacks a needed split, or the raw data cannot be used.
    """
    builder = make()
    for path in preparation.leftovers(builder):
        logging.warning("An interrupted run left %s: remove it.", path)
    config = builder.builder_config
    if not preparation.is_prepared(builder):
        # Before TFDS begins to write.
        require_files(builder.name, RawFiles(config.raw_dir), config.splits)
        return builder
    if overwrite:
        read_splits(builder.name, RawFiles(config.raw_dir), config.splits)  # before it removes
        builder.data_path.rmtree()
        return make()
    lacking = [split for split in needed if split not in builder.info.splits]
    if lacking:
        raise UserError(
            f"{builder.data_dir} was prepared without {', '.join(lacking)}: run again with "
            "--overwrite and all the splits that you want."
        )
    logging.info("%s is prepared already; --overwrite prepares it again.", builder.data_dir)
    return builder


def _beam_fields(runner: str, options: Sequence[str]) -> dict[str, object]:
    """What TFDS hands to Beam.

    Raises:
      UserError: Beam is not installed, or has no such runner.
    """
    try:
        from apache_beam.options.pipeline_options import PipelineOptions
        from apache_beam.runners import create_runner
    except ImportError as error:
        raise UserError("--beam_runner needs Apache Beam: pip install apache-beam.") from error
    try:
        made = create_runner(runner)
    except (ValueError, ImportError, AttributeError) as error:
        raise UserError(f"--beam_runner={runner}: {error}") from error
    return {
        "beam_runner": made,
        "beam_options": PipelineOptions([f"--{option}" for option in options]),
    }
