"""Data sets by name: opens the TFDS builder that a config names.

`shapes` and `fashion_products` are prepared on first use; the benchmarks and a user's own triplets
by `python -m dqe_jax.prepare`, since that can take long and ends in a report to be read.
"""

from __future__ import annotations

import os
from typing import Any

from etils import epath

from dqe_jax.data import annotations, preparation
from dqe_jax.data.examples import SPLITS
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
    relevance = {"plain": "fine", "coarse": "coarse"}.get(data.variant)
    if relevance is None:
        raise UserError(
            f"config.data.variant is {data.variant!r}: fashion_products has 'plain' and 'coarse'."
        )
    return fashion_products.make_builder(
        raw_dir=data.data_dir,
        prepared_dir=prepared_dir,
        image_size=data.image_size,
        preprocess=data.preprocess,
        max_bad_fraction=data.max_bad_fraction,
        relevance=relevance,
    )


def _benchmark(data: Any, prepared_dir: str) -> Any:
    """A benchmark, which must be prepared: in `data.data_dir` if that is given."""
    from dqe_jax.data.builders import benchmarks

    where = os.fspath(epath.Path(data.data_dir).expanduser()) if data.data_dir else prepared_dir
    builder = benchmarks.make_builder(
        data.dataset, where, image_size=data.image_size, preprocess=data.preprocess
    )
    command = (
        f"python -m dqe_jax.prepare --dataset={data.dataset} --raw_dir=DIR --data_dir={where} "
        f"--image_size={data.image_size} --preprocess={data.preprocess}"
    )
    complaints = preparation.read_complaints(builder)
    if not preparation.is_prepared(builder) or complaints is None:
        root = epath.Path(where) / data.dataset
        others = sorted(p.name for p in root.iterdir()) if root.is_dir() else []
        held = f" (it has {', '.join(others)})" if others else ""
        raise UserError(
            f"{data.dataset} with {data.image_size} pixels and preprocessing {data.preprocess!r} "
            f"is not prepared in {where}{held}: run `{command}`."
        )
    if complaints:
        raise UserError(
            f"{data.dataset} in {where} is not complete ({'; '.join(complaints)}): add the files "
            f"and run `{command} --overwrite`, or accept it with --max_missing."
        )
    return builder


DATASETS = {
    "shapes": _shapes,
    "fashion_products": _fashion_products,
    "fashioniq": _benchmark,
    "cirr": _benchmark,
    "circo": _benchmark,
    "triplets": _benchmark,
}


def split_of(dataset: str, name: str) -> str:
    """Our name of a split that a user names, such as `validation` for `val`.

    Raises:
      UserError: the data set has no such split.
    """
    if dataset in annotations.BENCHMARKS:
        return annotations.split_of(dataset, name)
    ours = {"val": "validation"}.get(name, name)
    if ours not in SPLITS:
        raise UserError(f"{dataset} has no split {name!r}; it has {', '.join(SPLITS)}.")
    return ours


def find_dataset(data: Any) -> Any:
    """The TFDS builder of `config.data`, checked, and perhaps not prepared yet: takes no time.

    Raises:
      UserError: the raw data or the directory for prepared data cannot be used, or the data set has
        to be prepared by a command of its own.
    """
    prepared_dir = epath.Path(data.prepared_dir).expanduser()
    try:
        prepared_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"config.data.prepared_dir: cannot make {prepared_dir} ({error.strerror}); name a "
            "directory that is writable."
        ) from error
    return DATASETS[data.dataset](data, os.fspath(prepared_dir))


def open_dataset(data: Any) -> Any:
    """The prepared TFDS builder of `config.data`; raises as `find_dataset`."""
    builder = find_dataset(data)
    preparation.prepare(builder)
    return builder
