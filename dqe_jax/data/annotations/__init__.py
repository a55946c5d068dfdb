"""Readers of published benchmarks and of a user's own triplets.

`BENCHMARKS` names them. A reader takes the files of a raw directory and a split, and gives its
queries and galleries by image id, see `schema.Annotations`; no image is opened. What each file
holds, and what happens with records that are not sound, is told by the reader's module.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from dqe_jax.data.annotations import circo, cirr, fashioniq, triplets
from dqe_jax.data.annotations.schema import Annotations
from dqe_jax.data.raw_files import RawFiles
from dqe_jax.utils.errors import UserError


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """How a data set is read.

    Attributes:
      read: gives the annotations of a split, by our name of it.
      splits: our names of its splits, each with the official one.
      shared_gallery: whether all splits rank one gallery.
      stem: of an image id, what `RawFiles.image` is asked for.
      preprocess: how its photos become square by default, a name of `preprocess.PREPROCESS`.
    """

    read: Callable[[RawFiles, str], Annotations]
    splits: Mapping[str, str]
    shared_gallery: bool
    stem: Callable[[str], str]
    preprocess: str


BENCHMARKS = {
    "fashioniq": Benchmark(
        fashioniq.read, fashioniq.SPLITS, shared_gallery=False, stem=str, preprocess="target_pad"
    ),
    "cirr": Benchmark(cirr.read, cirr.SPLITS, shared_gallery=False, stem=str, preprocess="squash"),
    "circo": Benchmark(
        circo.read, circo.SPLITS, shared_gallery=True, stem=circo.stem, preprocess="squash"
    ),
    "triplets": Benchmark(
        triplets.read, triplets.SPLITS, shared_gallery=True, stem=str, preprocess="pad"
    ),
}


def split_of(dataset: str, name: str) -> str:
    """Our name of a split.

    Args:
      dataset: a key of `BENCHMARKS`.
      name: ours (`validation`), the official one (`test1`), or `val`.

    Raises:
      UserError: there is no such data set, or it has no such split.
    """
    if dataset not in BENCHMARKS:
        raise UserError(f"There is no data set {dataset!r}; known are {', '.join(BENCHMARKS)}.")
    splits = BENCHMARKS[dataset].splits
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


def read_labels(dataset: str, files: RawFiles, split: str) -> Annotations:
    """The annotations of a split where the gallery may be unknown: to score files of predictions.

    Only CIRCO differs from `BENCHMARKS[dataset].read`: COCO's list of images is not read, and the
    pool is the images that the queries name.

    Args:
      dataset: a key of `BENCHMARKS`.
      files: of the raw directory.
      split: any name that `split_of` knows.

    Raises:
      UserError: as `split_of` and the reader.
    """
    ours = split_of(dataset, split)
    if dataset == "circo":
        return circo.read(files, ours, gallery=False)
    return BENCHMARKS[dataset].read(files, ours)
