"""The data sets: what is known of each, and how the TFDS builder that a config names is opened.

`DATASETS` is the one place that lists them. `shapes` and `fashion_products` are prepared on first
use; the benchmarks and a user's own triplets by `python -m dqe_jax.prepare`, since that can take
long and ends in a report to be read.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from etils import epath

from dqe_jax.data import bucket, preparation
from dqe_jax.data.annotations import (
    circled,
    circo,
    cirr,
    domain_conversion,
    edir,
    fashion200k,
    fashioniq,
    genecis,
    icir,
    lasco,
    pinpoint,
    shoes,
    triplets,
)
from dqe_jax.data.annotations.schema import RawFormat
from dqe_jax.data.examples import SPLITS, WHOLE
from dqe_jax.data.made.settings import read_facts
from dqe_jax.data.packing import BatchShape, even_shape, shape_for
from dqe_jax.data.settings import BatchConfig, DataConfig
from dqe_jax.utils.errors import UserError, reason_of

if TYPE_CHECKING:
    import tensorflow_datasets as tfds  # slow to import, and not needed to score predictions


def _shapes(data: DataConfig, prepared_dir: str) -> tfds.core.DatasetBuilder:
    from dqe_jax.data.builders import shapes

    builder = shapes.make_builder(variant=data.variant, prepared_dir=prepared_dir)
    size = builder.builder_config.image_size
    if data.image_size != size:
        raise UserError(
            f"config.data.image_size is {data.image_size}: shapes has images of {size} pixels "
            "a side."
        )
    if data.image_format != "png":
        raise UserError(
            f"config.data.image_format is {data.image_format!r}: shapes are drawn, and stored "
            "without loss; take 'png'."
        )
    return builder


def _fashion_products(
    data: DataConfig, prepared_dir: str, *, whole: bool = False
) -> tfds.core.DatasetBuilder:
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
        image_format=data.image_format,
        whole=whole,
    )


def _benchmark(data: DataConfig, prepared_dir: str) -> tfds.core.DatasetBuilder:
    """A benchmark, which must be prepared: in `data.data_dir` if that is given."""
    from dqe_jax.data.builders import benchmarks

    where = prepared_dir
    if data.data_dir:
        bucket.fetch(data.data_dir, data.dataset)
        where = os.fspath(bucket.local_of(data.data_dir))
    builder = benchmarks.make_builder(
        data.dataset,
        where,
        image_size=data.image_size,
        preprocess=data.preprocess,
        image_format=data.image_format,
    )
    stored = "" if data.image_format == "png" else f" --format={data.image_format}"
    command = (
        f"python -m dqe_jax.prepare --dataset={data.dataset} --raw_dir=DIR --data_dir={where} "
        f"--image_size={data.image_size} --preprocess={data.preprocess}{stored}"
    )
    how = f"run `{command}`"
    if data.dataset == "triplets" and read_facts(where) is not None:
        how = (
            "run the `dqe-jax triplets` command that made it again, with "
            f"--image_size={data.image_size} --preprocess={data.preprocess}{stored}"
        )
    complaints = preparation.read_complaints(builder)
    if not preparation.is_prepared(builder) or complaints is None:
        root = epath.Path(where) / data.dataset
        folders = root.iterdir() if root.is_dir() else []
        pattern = f"*/{preparation.REPORT}"  # the last thing that is written
        others = sorted(p.name for p in folders if any(p.glob(pattern)))
        held = f" (it has {', '.join(others)})" if others else ""
        raise UserError(
            f"{data.dataset} with {data.image_size} pixels and preprocessing {data.preprocess!r}, "
            f"stored as {data.image_format}, is not prepared in {where}{held}: {how}."
        )
    if complaints:
        raise UserError(
            f"{data.dataset} in {where} is not complete ({'; '.join(complaints)}): add the files "
            f"and run `{command} --overwrite`, or accept it with --max_missing."
        )
    return builder


@dataclasses.dataclass(frozen=True)
class SplitSize:
    """How large a split is, as published or generated at the most.

    Attributes:
      images: of its gallery.
      queries: None where that is not known.
      references: how many references have 1 query, 2 queries, ...; empty where each has as many as
        a batch takes, or that is not known.
    """

    images: int
    queries: int | None = None
    references: Sequence[int] = ()


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
    """What is known of a data set.

    Attributes:
      name: by which `config.data.dataset` calls it.
      open: its TFDS builder, of `config.data` and the directory of prepared data.
      splits: our names of its splits, each with the official one.
      protocols: names of the protocols of `evaluation/protocols.py` by which it is measured, by
        `config.eval.protocol`; "original" is what is usual.
      has_truth: whether all images that are truly relevant for a training query are known.
      sizes: of its splits, by our names; without those that are not known, or that each user has
        another of.
      server: where ranked lists are scored if labels are not public; None if they all are.
      raw: how `dqe_jax.prepare` reads its raw files; None for what is prepared on first use.
      open_whole: as `open`, with all rows of its directory as the one split `examples.WHOLE`; None
        where that cannot be had.
    """

    name: str
    open: Callable[[DataConfig, str], tfds.core.DatasetBuilder]
    splits: Mapping[str, str]
    protocols: Mapping[str, str]
    has_truth: bool = False
    sizes: Mapping[str, SplitSize] = dataclasses.field(default_factory=dict)
    server: str | None = None
    raw: RawFormat | None = None
    open_whole: Callable[[DataConfig, str], tfds.core.DatasetBuilder] | None = None

    @property
    def must_be_prepared(self) -> bool:
        """Whether `dqe_jax.prepare` has to run before the data set is used."""
        return self.raw is not None


DATASETS = {
    info.name: info
    for info in (
        DatasetInfo(
            name="shapes",
            open=_shapes,
            splits={split: split for split in SPLITS},
            protocols={"original": "plain"},
            has_truth=True,
            sizes={"train": SplitSize(45_000)},
        ),
        DatasetInfo(
            name="fashion_products",
            open=_fashion_products,
            splits={split: split for split in SPLITS},
            protocols={"original": "plain"},
            has_truth=True,
            sizes={"train": SplitSize(44_000)},
            open_whole=functools.partial(_fashion_products, whole=True),
        ),
        DatasetInfo(
            name="fashioniq",
            open=_benchmark,
            splits=fashioniq.SPLITS,
            protocols={"original": "fashioniq-original", "val": "fashioniq-val"},
            sizes={
                "train": SplitSize(
                    45_429,
                    18_000,
                    (8_969, 2_416, 729, 236, 90, 34, 25, 11, 8, 3, 3, 0, 0, 0, 0, 1),
                ),
                "validation": SplitSize(15_415, 6_016),
                "test": SplitSize(15_417, 6_118),
            },
            raw=fashioniq.RAW,
        ),
        DatasetInfo(
            name="cirr",
            open=_benchmark,
            splits=cirr.SPLITS,
            protocols={"original": "cirr"},
            sizes={
                "train": SplitSize(16_939, 28_225),
                "validation": SplitSize(2_297, 4_181),
                "test": SplitSize(2_315, 4_148),
            },
            server="http://cirr.cecs.anu.edu.au",
            raw=cirr.RAW,
        ),
        DatasetInfo(
            name="circo",
            open=_benchmark,
            splits=circo.SPLITS,
            protocols={"original": "circo"},
            server="https://circo.micc.unifi.it",
            raw=circo.RAW,
        ),
        DatasetInfo(
            name="triplets",
            open=_benchmark,
            splits=triplets.SPLITS,
            protocols={"original": "plain"},
            raw=triplets.RAW,
        ),
        DatasetInfo(
            name="shoes",
            open=_benchmark,
            splits=shoes.SPLITS,
            protocols={"original": "shoes"},
            sizes={"train": SplitSize(10_000, 8_990), "validation": SplitSize(4_658, 1_761)},
            raw=shoes.RAW,
        ),
        DatasetInfo(
            name="lasco",
            open=_benchmark,
            splits=lasco.SPLITS,
            protocols={"original": "lasco"},
            sizes={"train": SplitSize(81_653, 359_268), "validation": SplitSize(39_826, 30_037)},
            raw=lasco.RAW,
        ),
        *(
            DatasetInfo(
                name=name,
                open=_benchmark,
                splits={"test": "test"},
                protocols={"original": protocol},
                raw=raw,
            )
            for name, protocol, raw in (
                ("genecis", "genecis", genecis.RAW),
                ("pinpoint", "pinpoint", pinpoint.RAW),
                ("pic2word", "pic2word", domain_conversion.RAW_PIC2WORD),
                ("imagenet_r", "freedom", domain_conversion.RAW_IMAGENET_R),
                ("nico", "freedom", domain_conversion.RAW_NICO),
                ("minidn", "freedom", domain_conversion.RAW_MINIDN),
                ("ltll", "freedom", domain_conversion.RAW_LTLL),
                ("fashion200k", "fashion200k", fashion200k.RAW),
                ("icir", "icir", icir.RAW),
                ("edir", "edir", edir.RAW),
            )
        ),
        DatasetInfo(
            name="circled",
            open=_benchmark,
            splits=circled.SPLITS,
            protocols={"original": "circled"},
            raw=circled.RAW,
        ),
    )
}


def require_training(dataset: str) -> None:
    """Checks that a data set has a split to train on.

    Args:
      dataset: a key of `DATASETS`.

    Raises:
      UserError: it is a benchmark to evaluate on alone.
    """
    if "train" not in DATASETS[dataset].splits:
        raise UserError(
            f"{dataset} is a benchmark without training data: train on another data set, and "
            f"evaluate that run on {dataset} with dqe_jax.evaluate --checkpoint=DIR."
        )


def split_of(dataset: str, name: str) -> str:
    """Our name of a split.

    Args:
      dataset: a key of `DATASETS`.
      name: ours (`validation`), the official one (`test1`), `val`, or `all` where all rows can be
        one split.

    Raises:
      UserError: there is no such data set, or it has no such split.
    """
    if dataset not in DATASETS:
        raise UserError(f"There is no data set {dataset!r}; known are {', '.join(DATASETS)}.")
    info = DATASETS[dataset]
    splits = info.splits if info.open_whole is None else {**info.splits, WHOLE: "all"}
    names = {official: ours for ours, official in splits.items()}
    if "validation" in splits:
        names["val"] = "validation"
    names |= {ours: ours for ours in splits}
    if name not in names:
        known = ", ".join(
            ours if ours == official else f"{ours} ({official})"
            for ours, official in splits.items()
        )
        raise UserError(f"{dataset} has no split {name!r}; it has {known}.")
    return names[name]


def expected_shape(dataset: str, batch: BatchConfig) -> BatchShape:
    """The shape of the training batches, before there are data: that of the published split.

    Where it is not known how many queries references have, each has as many as a batch takes.

    Args:
      dataset: a key of `DATASETS`.
      batch: `config.batch`.
    """
    size = DATASETS[dataset].sizes.get("train")
    if size is None or not size.references:
        return even_shape(batch.references, batch.queries_per_reference)
    return shape_for(size.references, batch.references, batch.queries_per_reference)


def find_dataset(data: DataConfig, split: str = "train") -> tfds.core.DatasetBuilder:
    """The TFDS builder of `config.data`, checked, and perhaps not prepared yet: takes no time.

    Args:
      data: `config.data`.
      split: as `split_of` gives it; `whole` is of a builder of its own, which has no other.

    Raises:
      UserError: the raw data or the directory for prepared data cannot be used, or the data set has
        to be prepared by a command of its own.
    """
    prepared_dir = bucket.local_of(data.prepared_dir)
    try:
        prepared_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"config.data.prepared_dir: cannot make {prepared_dir} ({error.strerror}); name a "
            "directory that is writable."
        ) from error
    bucket.fetch(data.prepared_dir, data.dataset)
    info = DATASETS[data.dataset]
    held = prepared_dir
    if info.must_be_prepared and data.data_dir:
        held = bucket.local_of(data.data_dir)
    preparation.check_regular(held / data.dataset)
    whole = info.open_whole if split == WHOLE else None
    try:
        return (whole or info.open)(data, os.fspath(prepared_dir))
    except UserError:
        raise
    except preparation.unreadable_info() as error:
        if not any((held / data.dataset).glob("*/*/dataset_info.json")):
            raise  # nothing is prepared that could be damaged
        raise UserError(
            f"the prepared data of {data.dataset} in {held} are damaged: a dataset_info.json "
            f"cannot be read ({reason_of(error)}). Remove its directory, and prepare them again."
        ) from error


def open_dataset(data: DataConfig, split: str = "train") -> tfds.core.DatasetBuilder:
    """The prepared TFDS builder of `config.data`; arguments and errors as of `find_dataset`."""
    builder = find_dataset(data, split)
    fresh = not preparation.is_prepared(builder)
    preparation.prepare(builder)
    if fresh:
        bucket.send(data.prepared_dir, data.dataset)
    return builder
