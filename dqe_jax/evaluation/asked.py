"""What a split asks: its queries, and the ids of the images that they rank, without the images.

It comes from prepared data, as a `Split`, or from a benchmark's annotation files alone, as
`Labels`: scoring what other models found needs no image.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np
from absl import logging

from dqe_jax.data import datasets, splits
from dqe_jax.data.annotations.schema import Annotations
from dqe_jax.data.datasets import DATASETS
from dqe_jax.data.examples import Queries
from dqe_jax.data.raw_files import RawFiles
from dqe_jax.data.settings import DataConfig
from dqe_jax.data.splits import Coverage
from dqe_jax.utils.errors import UserError


class Named(Protocol):
    """Images by their ids."""

    @property
    def ids(self) -> list[str]:
        """One for each row."""

    def __len__(self) -> int:
        """How many."""


class Asked(Protocol):
    """Queries and the gallery that they rank; see `splits.Split`, which is one."""

    @property
    def name(self) -> str:
        """Of the split."""

    @property
    def queries(self) -> Queries:
        """Rows index the gallery; rows beyond it are images that are not at hand."""

    @property
    def gallery(self) -> Named:
        """The images."""

    @property
    def pools(self) -> Mapping[str, np.ndarray]:
        """Rows of the parts of the gallery by name; none where there is one part, `""`."""

    @property
    def coverage(self) -> Coverage:
        """How much of the published split is at hand."""

    @property
    def digest(self) -> str:
        """Of prepared data; "" where there are none."""


@dataclasses.dataclass(frozen=True)
class Ids:
    """Ids of images."""

    ids: list[str]

    def __len__(self) -> int:
        return len(self.ids)


@dataclasses.dataclass(frozen=True)
class Labels:
    """A split from its annotation files: see `Asked`.

    Attributes:
      listed: whether the annotations list the gallery. If not, it holds the images that the
        queries name, and whatever else is ranked.
    """

    name: str
    queries: Queries
    gallery: Ids
    pools: Mapping[str, np.ndarray]
    coverage: Coverage
    digest: str = ""
    listed: bool = True

    def with_images(self, images: Iterable[str]) -> Labels:
        """The same with a gallery that holds these images too; only where it is not listed."""
        assert not self.listed, "the annotations list the gallery"
        ids = list(dict.fromkeys([*self.gallery.ids, *images]))
        coverage = dataclasses.replace(self.coverage, gallery=len(ids), official_gallery=len(ids))
        pools = {name: np.arange(len(ids), dtype=np.int32) for name in self.pools}
        return dataclasses.replace(self, gallery=Ids(ids), pools=pools, coverage=coverage)


def read_labels(
    dataset: str, split: str, raw_dir: str | os.PathLike[str], *, gallery: bool = False
) -> Labels:
    """A split from its annotation files.

    Args:
      dataset: one that is read from raw files.
      split: any name of it, such as `val`.
      raw_dir: the directory with the annotation files.
      gallery: whether to read the list of the gallery where the annotations do without it, if that
        file is there.

    Raises:
      UserError: there are no such files for this data set, they cannot be used, or hold no query.
    """
    raw = DATASETS[dataset].raw if dataset in DATASETS else None
    if raw is None:
        known = ", ".join(name for name, info in DATASETS.items() if info.raw)
        raise UserError(
            f"{dataset} has no annotation files: leave out --raw_dir; {known} have them."
        )
    name, files = datasets.split_of(dataset, split), RawFiles(raw_dir)
    listed = raw.read == raw.read_labels
    if not listed and gallery and all(map(files.has, raw.files(name))):
        listed = True
        labels = raw.read(files, name)
    else:
        labels = raw.read_labels(files, name)
    left_out = labels.official_queries - len(labels.queries)
    if left_out:
        logging.warning("%d records of %s are not sound and left out.", left_out, raw_dir)
    if not labels.queries:
        raise UserError(
            f"{raw_dir} has no sound record of {split} of {dataset}: get the annotation file again."
        )
    images = labels.images
    row_of = {image: row for row, image in enumerate(images)}
    return Labels(
        name=name,
        queries=_queries(labels, row_of),
        gallery=Ids(images),
        pools={
            pool: np.array([row_of[image] for image in members], np.int32)
            for pool, members in labels.pools.items()
        },
        coverage=Coverage(len(labels.queries), labels.official_queries, len(images), len(images)),
        listed=listed,
    )


def read_prepared(data: DataConfig, split: str) -> splits.Split:
    """A split of prepared data: the images that are at hand are its gallery.

    Args:
      data: `config.data`.
      split: any name of it.

    Raises:
      UserError: the data cannot be used, or must be prepared by a command of its own.
    """
    name = datasets.split_of(data.dataset, split)
    datasets.find_dataset(data, name)
    return splits.open_split(data, datasets.open_dataset(data, name), name)


def _queries(labels: Annotations, row_of: Mapping[str, int]) -> Queries:
    """The annotated queries, with images by row; -1 for no target."""

    def rows(images: Sequence[str]) -> np.ndarray:
        return np.array([row_of.get(image, -1) for image in images], np.int32)

    queries = labels.queries
    return Queries(
        ids=[query.id for query in queries],
        texts=[" ".join(query.texts) for query in queries],
        reference=rows([query.reference for query in queries]),
        target=rows([query.target for query in queries]),
        known_positives=[rows(query.known_positives) for query in queries],
        relevant=[rows(query.relevant) for query in queries],
        kinds=[query.kinds for query in queries],
        attributes=[query.attributes for query in queries],
        pools=[query.pool for query in queries],
        subset=[rows(query.subset) for query in queries],
        references=[rows(query.references) for query in queries],
        negatives=[rows(query.negatives) for query in queries],
    )


# --- Identity -------------------------------------------------------------------------------------


def questions_of(asked: Asked) -> str:
    """A digest of what is asked and which images are right, by ids: equal ones can be compared.

    It does not depend on the order of queries and images, nor on where the labels come from.
    Relevant images that are not at hand have no id, and count by their number. Further references
    and explicit negatives count where there are any.
    """
    ids, queries = asked.gallery.ids, asked.queries

    def name(row: int) -> str:
        return ids[row] if 0 <= row < len(ids) else ""

    def more(column: Sequence[np.ndarray], i: int) -> list[str]:
        return sorted(map(name, column[i].tolist())) if len(column) else []

    extras = (queries.references, queries.negatives)
    held = [column for column in extras if any(map(len, column))]
    lines = sorted(
        [
            query,
            name(int(queries.reference[i])),
            name(int(queries.target[i])),
            sorted(map(name, np.unique(queries.relevant[i]).tolist())),
            sorted(map(name, np.unique(queries.subset[i]).tolist())),
            queries.pools[i],
            *([more(column, i) for column in extras] if held else []),
        ]
        for i, query in enumerate(queries.ids)
    )
    return _digest(lines)


def gallery_of(asked: Asked, pools: Mapping[str, np.ndarray]) -> str:
    """A digest of the images that are ranked, by ids.

    Args:
      asked: what is asked.
      pools: the rows that queries of each pool rank, as `protocols.pool_rows` gives them.
    """
    ids = asked.gallery.ids
    return _digest(sorted([name, sorted(ids[row] for row in rows)] for name, rows in pools.items()))


def _digest(content: object) -> str:
    text = json.dumps(content, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]
