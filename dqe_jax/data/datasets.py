"""Data sets by name: opens the TFDS builder that a config names, preparing it on first use."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from absl import logging
from etils import epath

from dqe_jax.utils.errors import UserError


def _shapes(data: Any, prepared_dir: str) -> Any:
    from dqe_jax.data.builders import shapes

    builder = shapes.make_builder(variant=data.variant, prepared_dir=prepared_dir)
    size = builder.builder_config.image_size
    if data.image_size != size:
        raise UserError(
            f"config.data.image_size is {data.image_size}: shapes has images of {size} pixels "
            "a side."
        )
    return builder


def _fashion_products(data: Any, prepared_dir: str) -> Any:
    from dqe_jax.data.builders import fashion_products

    if not data.data_dir:
        raise UserError(
            "fashion_products needs the public photos: pass --data_dir=DIR, a directory with "
            "styles.csv and images/ or images.tar."
        )
    return fashion_products.make_builder(
        raw_dir=data.data_dir,
        prepared_dir=prepared_dir,
        image_size=data.image_size,
        preprocess=data.preprocess,
        max_bad_fraction=data.max_bad_fraction,
    )


def _not_yet(data: Any, prepared_dir: str) -> Any:
    raise UserError(
        f"config.data.dataset {data.dataset!r} cannot be read yet: its builder is not written; try "
        "the same model with the config's variant 'products', or --config.data.dataset=shapes."
    )


DATASETS = {
    "shapes": _shapes,
    "fashion_products": _fashion_products,
    "fashioniq": _not_yet,
    "cirr": _not_yet,
}


def open_dataset(data: Any) -> Any:
    """The prepared TFDS builder of `config.data`.

    Raises:
      UserError: the raw data or the directory for prepared data cannot be used.
    """
    prepared_dir = epath.Path(data.prepared_dir).expanduser()
    try:
        prepared_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"config.data.prepared_dir: cannot make {prepared_dir} ({error.strerror}); name a "
            "directory that is writable."
        ) from error
    # Imported when asked for, as the builders are: TFDS is slow to import.
    import tensorflow_datasets as tfds

    builder = DATASETS[data.dataset](data, os.fspath(prepared_dir))
    if not (builder.data_path / "dataset_info.json").exists():
        logging.info("Preparing %s in %s, once.", data.dataset, builder.data_dir)
        start = time.time()
        if not sys.stderr.isatty():
            tfds.disable_progress_bar()
        builder.download_and_prepare()
        logging.info("Prepared in %.0f s.", time.time() - start)
    return builder
