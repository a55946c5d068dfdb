"""A prepared split: its queries, and the images of the gallery that they rank, by random access."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from dqe_jax.data.chosen import captions_of, share_of, without_kinds
from dqe_jax.data.digest import contents_of, digest_of, digests_of_rows
from dqe_jax.data.examples import (
    SPLITS,
    Queries,
    Record,
    Source,
    gallery_split,
    needed_rows,
)
from dqe_jax.data.index import GalleryIndex, read_index
from dqe_jax.data.records import DecodedRecords, read_records
from dqe_jax.data.settings import DataConfig
from dqe_jax.data.transforms import join_captions
from dqe_jax.utils.ahead import read_ahead
from dqe_jax.utils.errors import UserError

if TYPE_CHECKING:
    from tensorflow_datasets.core import DatasetBuilder as Builder


def open_split(data: DataConfig, builder: Builder, name: str) -> Split:
    """A split of the data set of `config.data`, with the queries that it asks for.

    Captions are in order where training draws it.

    Raises:
      UserError: as `load_split`, the gallery states no attributes to make captions of, or
        `config.data.leave_out` names a kind that no query is of.
    """
    order = "forward" if data.captions == "random" else data.captions
    split = load_split(builder, name, data.image_size, data.cache_images, order)
    if data.queries == "captions":
        split = _with_captions(split, builder)
    if name == "train":
        queries = without_kinds(split.queries, data.leave_out)
        split = dataclasses.replace(split, queries=share_of(queries, data.train_share))
    return split


def _with_captions(split: Split, builder: Builder) -> Split:
    """The split with captions of its photos in place of its queries, and a digest of its own."""
    stored = read_records(builder, gallery_split(split.name, builder.info.splits))
    attributes = [
        tuple(pair.decode() for pair in record["attributes"])
        for record in stored
        if len(record["image"])
    ]
    queries = captions_of(attributes, split.gallery.ids)
    if not len(queries):
        raise UserError(
            f"config.data.queries is 'captions': {builder.name} states no attributes of its "
            "photos; take 'triplets'."
        )
    count, gallery = len(queries), len(split.gallery)
    digest = hashlib.sha256(f"captions:{split.digest}".encode()).hexdigest()[:32]
    coverage = Coverage(count, count, gallery, split.coverage.official_gallery)
    return dataclasses.replace(split, queries=queries, pools={}, coverage=coverage, digest=digest)


class Gallery:
    """The images of a gallery that are at hand, read on demand and kept in memory once read.

    Rows are positions among these images, in the order of the stored gallery.

    Attributes:
      ids: of the images.
      image_ids: int32 `[N]`, image ids: copies of a photo share one.
      image_shape: `(H, W, 3)`.
    """

    def __init__(
        self,
        source: Source,
        index: GalleryIndex,
        image_size: int,
        cache: bool = True,
        contents: Callable[[], np.ndarray] | None = None,
    ):
        """Wraps a TFDS data source.

        Args:
          source: of the stored records.
          index: of the gallery.
          image_size: pixels a side.
          cache: whether decoded images are kept (N * H * W * 3 bytes).
          contents: gives digests of the stored images, as `digest.contents_of`.
        """
        self._source, self._contents = source, contents
        self._stored = _present(index)
        at = np.searchsorted(self._stored, index.image_ids[self._stored])
        self.image_ids = at.astype(np.int32)  # the first copy is at hand if any is
        self.ids = [index.ids[row] for row in self._stored]
        self.image_shape = (image_size, image_size, 3)
        self._images = np.empty((len(self), *self.image_shape), np.uint8) if cache else None
        self._read = np.zeros(len(self), bool)

    def __len__(self) -> int:
        return len(self._stored)

    def __getitem__(self, row: int) -> np.ndarray:
        """The image uint8 `[H, W, 3]` of a row."""
        if self._images is None:
            return self._source[int(self._stored[row])]["image"][0]
        if not self._read[row]:
            self._images[row] = self._source[int(self._stored[row])]["image"][0]
            self._read[row] = True  # last: other threads look at it
        return self._images[row]

    def contents(self) -> np.ndarray:
        """Digests of the images, uint8 `[N, CONTENT_BYTES]`: those of equal images are equal."""
        if self._contents is not None:
            return self._contents()[self._stored]
        return digests_of_rows(self[row] for row in range(len(self)))

    def batches(self, rows: np.ndarray, size: int) -> Iterator[np.ndarray]:
        """Images of `rows` in order, `[<= size, H, W, 3]` at a time, read by threads ahead."""
        chunks = [rows[i : i + size] for i in range(0, len(rows), size)]
        return read_ahead(lambda chunk: np.stack([self[int(row)] for row in chunk]), chunks, 4)


def _present(index: GalleryIndex) -> np.ndarray:
    """Stored rows that have an image, ascending."""
    return np.setdiff1d(np.arange(len(index)), list(index.missing))


@dataclasses.dataclass(frozen=True)
class Coverage:
    """How much of the official split is at hand: queries and gallery images, of so many."""

    queries: int
    official_queries: int
    gallery: int
    official_gallery: int

    def __str__(self) -> str:
        def some(used: int, official: int) -> str:
            return f"all {used:,}" if used == official else f"{used:,} of {official:,}"

        queries = some(self.queries, self.official_queries)
        return f"{queries} queries, {some(self.gallery, self.official_gallery)} gallery images"

    @property
    def complete(self) -> bool:
        """Whether nothing is missing."""
        return (self.queries, self.gallery) == (self.official_queries, self.official_gallery)


@dataclasses.dataclass(frozen=True)
class Split:
    """A split: its queries, the gallery they rank, and the parts of it by name.

    A query whose reference or target is not at hand is not among the queries. Of its other
    annotated targets those that are not at hand are left out; of its relevant ones they are counted
    as rows beyond the gallery: no ranking finds them. `digest` is that of `data/digest.py`, "" if
    it is not known. `rejected` are rows that users said are not what a query means, int32 `[n, J]`
    padded with -1; None where there is no log of such (`feedback_split.py`).
    """

    name: str
    queries: Queries
    gallery: Gallery
    pools: dict[str, np.ndarray]
    coverage: Coverage
    digest: str = ""
    rejected: np.ndarray | None = None


def load_split(
    builder: Builder,
    name: str,
    image_size: int,
    cache: bool = True,
    captions: str = "forward",
) -> Split:
    """Reads the queries of a prepared split; images are read later, on demand.

    Args:
      builder: a prepared TFDS builder.
      name: of `examples.SPLITS`.
      image_size: pixels a side of its images.
      cache: whether images stay in memory once read.
      captions: order in which several captions are joined, see `transforms.join_captions`.

    Raises:
      UserError: the data set has no such split, or it has no query.
    """
    splits = builder.info.splits
    gallery = gallery_split(name, splits)
    if name not in splits or gallery not in splits:
        known = [s for s in SPLITS if s in splits]
        raise UserError(f"{builder.name} has no split {name!r}; it has {', '.join(known)}.")
    records = list(read_records(builder, name))
    index = read_index(builder, gallery)
    official = (builder.info.metadata or {}).get("official", {}).get(name, {})
    split = make_split(
        name,
        records,
        DecodedRecords(builder, gallery),
        index,
        image_size,
        cache=cache,
        captions=captions,
        official_queries=official.get("queries"),
        contents=functools.partial(contents_of, builder, gallery),
    )
    if not len(split.queries):
        raise UserError(f"split {name!r} of {builder.name} in {builder.data_dir} has no query.")
    return dataclasses.replace(split, digest=digest_of(builder, name))


def make_split(
    name: str,
    records: Sequence[Record],
    source: Source,
    index: GalleryIndex,
    image_size: int,
    *,
    cache: bool = True,
    captions: str = "forward",
    official_queries: int | None = None,
    contents: Callable[[], np.ndarray] | None = None,
) -> Split:
    """A split of its query records, and its gallery's source and index.

    Args:
      name: of the split.
      records: of the queries, as stored.
      source: of the gallery's records.
      index: of the gallery.
      image_size: pixels a side.
      cache: as for `load_split`.
      captions: as for `load_split`.
      official_queries: how many the published split has; the records' number by default.
      contents: as for `Gallery`.
    """
    gallery = Gallery(source, index, image_size, cache, contents)
    # Maps stored rows to rows at hand. Missing ones get numbers of their own beyond the gallery.
    rows = len(gallery) + np.arange(len(index), dtype=np.int32)
    rows[_present(index)] = np.arange(len(gallery), dtype=np.int32)
    queries = _make_queries(records, index, rows, captions)
    pools = {
        pool: rows[[row for row in stored.tolist() if row not in index.missing]]
        for pool, stored in index.pools.items()
    }
    official = len(records) if official_queries is None else official_queries
    coverage = Coverage(len(queries), official, len(gallery), len(index))
    return Split(name, queries, gallery, pools, coverage)


def gallery_attributes(builder: Builder, name: str) -> list[tuple[str, ...]]:
    """Attributes of the images of a split's gallery as `name=value`, by its rows."""
    stored = gallery_split(name, builder.info.splits)
    index = read_index(builder, stored)
    every = enumerate(read_records(builder, stored))
    kept = (record for row, record in every if row not in index.missing)
    return [tuple(value.decode() for value in record["attributes"]) for record in kept]


def _make_queries(
    records: Sequence[Record], index: GalleryIndex, rows: np.ndarray, captions: str
) -> Queries:
    """The queries whose reference and target are at hand; `rows` are those of the stored rows."""

    def at_hand(row: int) -> bool:
        return row not in index.missing

    kept = [r for r in records if all(map(at_hand, needed_rows(r)))]

    def row_arrays(field: str, *, known: bool) -> list[np.ndarray]:
        """Rows of a field; `known` leaves out those that are not at hand."""
        stored = [np.asarray(record[field], np.int32) for record in kept]
        return [rows[x[list(map(at_hand, x.tolist()))] if known else x] for x in stored]

    def extra(field: str) -> list[np.ndarray]:
        """Rows of a field of `EXTRAS`, -1 where none is named; none at all without the field."""
        if not any(field in record for record in kept):
            return []
        stored = [np.asarray(record.get(field, ()), np.int32) for record in kept]
        return [np.where(x < 0, -1, rows[x]).astype(np.int32) for x in stored]

    def words(field: str) -> list[tuple[str, ...]]:
        return [tuple(value.decode() for value in record[field]) for record in kept]

    target, all_captions = np.array([r["target"] for r in kept], np.int32), words("texts")
    return Queries(
        ids=[r["id"].decode() for r in kept],
        texts=[join_captions(each, captions) for each in all_captions],
        reference=rows[np.array([r["reference"] for r in kept], np.int32)],
        target=np.where(target < 0, -1, rows[target]).astype(np.int32),
        known_positives=row_arrays("targets", known=True),
        relevant=row_arrays("valid", known=False),
        kinds=words("kinds"),
        attributes=words("attributes"),
        pools=["".join(pools[:1]) for pools in words("pools")],
        subset=row_arrays("subset", known=True),
        captions=all_captions,
        references=extra("references"),
        negatives=extra("negatives"),
    )


def image_ids_of(split: Split, rows: Sequence[np.ndarray]) -> np.ndarray:
    """Image ids of ragged gallery rows, int32 `[n, longest]`, padded with -1.

    Rows beyond the gallery, of images that are not at hand, are left out. A row may be a copy of
    another row's photo: the two share an id.
    """
    kept = [values[values < len(split.gallery)] for values in rows]
    ids = np.full((len(kept), max(map(len, kept), default=0)), -1, np.int32)
    for line, values in zip(ids, kept):
        line[: len(values)] = split.gallery.image_ids[values]
    return ids


def known_positive_ids(split: Split) -> np.ndarray:
    """Image ids that are never negatives of a query: int32 `[n, P]`, the target's first."""
    return np.concatenate(
        [
            split.gallery.image_ids[split.queries.target][:, None],
            image_ids_of(split, split.queries.known_positives),
        ],
        axis=1,
    )
