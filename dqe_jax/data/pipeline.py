"""From prepared records to batches, by random access: TFDS data sources read through Grain.

A training batch holds `R` references with `Q` queries each (siblings are good negatives, and each
reference is encoded once), as NumPy arrays:

| key | array | |
| --- | --- | --- |
| `reference_image` | uint8 `[R, H, W, 3]` | |
| `reference_photo` | int32 `[R]` | image id; copies of a photo share one |
| `query` | int32 `[R, Q]` | position among the split's queries |
| `text` | int32 `[R, Q, L]` | |
| `target_image` | uint8 `[R, Q, H, W, 3]` | |
| `target_photo` | int32 `[R, Q]` | |
| `target_row` | int32 `[R, Q]` | row of the gallery |
| `known_positives` | int32 `[R, Q, P]` | image ids that are never negatives, -1 for none |
| `truth` | int32 `[R, Q, V]` | image ids in truth valid, -1 for none: for log and oracles |
| `mentions` | float32 `[R, Q, K]` | attributes that the text mentions |
| `valid` | bool `[R, Q]` | false for padding: a reference with fewer than `Q` queries |
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grain
import numpy as np

from dqe_jax.data.examples import SPLITS, Queries, gallery_split
from dqe_jax.data.index import GalleryIndex, read_index
from dqe_jax.data.transforms import AUGMENTATIONS, join_captions
from dqe_jax.utils.errors import UserError

READ_CHUNK = 256
# References of a training run, at most: Grain cannot take parts of a truly endless data set.
ENDLESS = 2**48


class Gallery:
    """The images of a gallery that are at hand, read on demand and kept in memory once read.

    Rows are positions among these images, in the order of the stored gallery.

    Attributes:
      ids: of the images.
      photo: int32 `[N]`, image ids: copies of a photo share one.
      image_shape: `(H, W, 3)`.
    """

    def __init__(self, source: Any, index: GalleryIndex, image_size: int, cache: bool = True):
        """Wraps a TFDS data source; `cache` keeps decoded images (N * H * W * 3 bytes)."""
        self._source = source
        self._stored = _present(index)
        at = np.searchsorted(self._stored, index.photo[self._stored])
        self.photo = at.astype(np.int32)  # the first copy is at hand if any is
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

    def batches(self, rows: np.ndarray, size: int) -> Iterator[np.ndarray]:
        """Images of `rows` in order, `[<= size, H, W, 3]` at a time, read by threads ahead."""
        with ThreadPoolExecutor(4) as pool:
            chunks = [rows[i : i + size] for i in range(0, len(rows), size)]
            read = lambda chunk: np.stack([self[int(row)] for row in chunk])  # noqa: E731
            ahead = [pool.submit(read, chunk) for chunk in chunks[:2]]
            for i in range(len(chunks)):
                if i + 2 < len(chunks):
                    ahead.append(pool.submit(read, chunks[i + 2]))
                yield ahead[i].result()
                ahead[i] = None  # at most three chunks are held


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
        return (
            f"{self.queries:,} of {self.official_queries:,} queries, "
            f"{self.gallery:,} of {self.official_gallery:,} gallery images"
        )

    @property
    def complete(self) -> bool:
        """Whether nothing is missing."""
        return (self.queries, self.gallery) == (self.official_queries, self.official_gallery)


@dataclasses.dataclass(frozen=True)
class Split:
    """A split: its queries, the gallery they rank, and the parts of it by name.

    A query whose reference or target is not at hand is not among the queries. Of its other
    annotated targets those that are not at hand are left out; of its valid rows they are counted,
    as rows beyond the gallery: no ranking finds them.
    """

    name: str
    queries: Queries
    gallery: Gallery
    pools: dict[str, np.ndarray]
    coverage: Coverage


def load_split(
    builder: Any, name: str, image_size: int, cache: bool = True, captions: str = "forward"
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
    source = builder.as_data_source(split=name)
    records = []
    for start in range(0, len(source), READ_CHUNK):
        rows = list(range(start, min(start + READ_CHUNK, len(source))))
        records.extend(source.__getitems__(rows))
    index = read_index(builder, gallery)
    official = (builder.info.metadata or {}).get("official", {}).get(name, {})
    split = make_split(
        name,
        records,
        builder.as_data_source(split=gallery),
        index,
        image_size,
        cache=cache,
        captions=captions,
        official_queries=official.get("queries"),
    )
    if not len(split.queries):
        raise UserError(f"split {name!r} of {builder.name} in {builder.data_dir} has no query.")
    return split


def make_split(
    name: str,
    records: Sequence[dict[str, Any]],
    source: Any,
    index: GalleryIndex,
    image_size: int,
    *,
    cache: bool = True,
    captions: str = "forward",
    official_queries: int | None = None,
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
    """
    gallery = Gallery(source, index, image_size, cache)
    # Stored rows to rows at hand; others lie beyond the gallery, each at a place of its own.
    rows = len(gallery) + np.arange(len(index), dtype=np.int32)
    rows[_present(index)] = np.arange(len(gallery), dtype=np.int32)

    def at_hand(row: int) -> bool:
        return row not in index.missing

    kept = [r for r in records if at_hand(r["reference"]) and at_hand(r["target"])]

    def row_arrays(field: str, *, known: bool) -> list[np.ndarray]:
        """Rows of a field; `known` leaves out those that are not at hand."""
        stored = [np.asarray(record[field], np.int32) for record in kept]
        return [rows[x[list(map(at_hand, x.tolist()))] if known else x] for x in stored]

    def words(field: str) -> list[tuple[str, ...]]:
        return [tuple(value.decode() for value in record[field]) for record in kept]

    target, all_captions = np.array([r["target"] for r in kept], np.int32), words("texts")
    queries = Queries(
        ids=[r["id"].decode() for r in kept],
        texts=[join_captions(each, captions) for each in all_captions],
        reference=rows[np.array([r["reference"] for r in kept], np.int32)],
        target=np.where(target < 0, -1, rows[target]).astype(np.int32),
        targets=row_arrays("targets", known=True),
        valid=row_arrays("valid", known=False),
        kinds=words("kinds"),
        attributes=words("attributes"),
        pools=["".join(pools[:1]) for pools in words("pools")],
        subset=row_arrays("subset", known=True),
        captions=all_captions,
    )
    pools = {
        pool: rows[[row for row in stored.tolist() if at_hand(row)]]
        for pool, stored in index.pools.items()
    }
    official = len(records) if official_queries is None else official_queries
    coverage = Coverage(len(kept), official, len(gallery), len(index))
    return Split(name, queries, gallery, pools, coverage)


def photo_ids(split: Split, rows: Sequence[np.ndarray]) -> np.ndarray:
    """Image ids of ragged gallery rows, int32 `[n, longest]`, padded with -1.

    Rows beyond the gallery, of images that are not at hand, are left out. A row may be a copy of
    another row's photo: the two share an id.
    """
    kept = [values[values < len(split.gallery)] for values in rows]
    ids = np.full((len(kept), max(map(len, kept), default=0)), -1, np.int32)
    for line, values in zip(ids, kept):
        line[: len(values)] = split.gallery.photo[values]
    return ids


def known_positives(split: Split) -> np.ndarray:
    """Image ids that are never negatives of a query: int32 `[n, P]`, the target's first."""
    return np.concatenate(
        [
            split.gallery.photo[split.queries.target][:, None],
            photo_ids(split, split.queries.targets),
        ],
        axis=1,
    )


def batch_shapes(
    config: Any, references: int, *, known: int = 2, truth: int = 0
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of each array of a training batch.

    Args:
      config: of a run.
      references: `R`.
      known: `P`, which the data set decides: the target, and the most targets that a query has.
      truth: `V`, likewise.
    """
    R, Q, size = references, config.batch.queries_per_reference, config.data.image_size
    return {
        "reference_image": ("uint8", (R, size, size, 3)),
        "reference_photo": ("int32", (R,)),
        "query": ("int32", (R, Q)),
        "text": ("int32", (R, Q, config.data.max_length)),
        "target_image": ("uint8", (R, Q, size, size, 3)),
        "target_photo": ("int32", (R, Q)),
        "target_row": ("int32", (R, Q)),
        "known_positives": ("int32", (R, Q, known)),
        "truth": ("int32", (R, Q, truth)),
        "mentions": ("float32", (R, Q, len(config.model.attributes.names))),
        "valid": ("bool", (R, Q)),
    }


class _Loader:
    """Makes one reference's part of a batch; called by Grain's threads."""

    def __init__(
        self,
        split: Split,
        text: np.ndarray,
        mentions: np.ndarray,
        positives: np.ndarray,
        truth: np.ndarray,
        per_reference: int,
        augment: Callable[[np.ndarray, np.random.Generator], np.ndarray],
    ):
        self.split, self.text, self.mentions = split, text, mentions
        self.positives, self.truth = positives, truth
        self.per_reference, self.augment = per_reference, augment

    def __call__(self, group: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
        gallery, queries, Q = self.split.gallery, self.split.queries, self.per_reference
        # Neighbours in the data set stay together: builders record edits that contrast in pairs.
        chosen = np.roll(group, -rng.integers(len(group)))[:Q]
        valid = np.arange(Q) < len(chosen)
        chosen = np.resize(chosen, Q)  # padding repeats what is there; `valid` masks it
        reference, targets = queries.reference[chosen[0]], queries.target[chosen]
        target_photo = gallery.photo[targets]
        order = rng.integers(self.text.shape[1], size=Q) if self.text.shape[1] > 1 else 0
        return {
            "reference_image": self.augment(gallery[reference], rng),
            "reference_photo": gallery.photo[reference],
            "query": chosen.astype(np.int32),
            "text": self.text[chosen, order],
            "target_image": np.stack([self.augment(gallery[row], rng) for row in targets]),
            "target_photo": target_photo,
            "target_row": targets,
            "known_positives": self.positives[chosen],
            "truth": self.truth[chosen],
            "mentions": self.mentions[chosen],
            "valid": valid,
        }


def train_batches(
    split: Split,
    *,
    text: np.ndarray,
    mentions: np.ndarray,
    references: int,
    queries_per_reference: int,
    augment: str,
    seed: int,
    num_threads: int = 4,
    prefetch: int = 4,
    process: int = 0,
    num_processes: int = 1,
) -> grain.DatasetIterator:
    """An endless iterator over training batches whose state can be saved and restored.

    The batches of several processes are consecutive parts of one batch: together they are what one
    process alone would read. The state counts batches, so it holds for any number of processes.

    References are shuffled anew in every epoch; each brings up to `queries_per_reference`
    consecutive ones of its queries from a random start. The stream depends on the seed alone.

    Args:
      split: the training split.
      text: int32 `[n, V, L]`, ids of each query's text in `V` wordings, one of which is drawn.
      mentions: float32 `[n, K]`.
      references: `R`, of the whole batch.
      queries_per_reference: `Q`.
      augment: a name of `transforms.AUGMENTATIONS`.
      seed: of shuffling, drawing and augmentation.
      num_threads: readers.
      prefetch: batches read ahead.
      process: which part of the batch is read.
      num_processes: parts; `references` is a multiple.
    """
    order = np.argsort(split.queries.reference, kind="stable")
    _, starts = np.unique(split.queries.reference[order], return_index=True)
    groups = np.split(order, starts[1:])
    load = _Loader(
        split,
        text,
        mentions,
        known_positives(split),
        photo_ids(split, split.queries.valid),
        queries_per_reference,
        AUGMENTATIONS[augment],
    )
    dataset = (
        grain.MapDataset.source(groups)
        .seed(seed)
        .shuffle()
        .repeat(ENDLESS // len(groups))
        .random_map(load)
        .batch(references // num_processes)
        .slice(slice(process, None, num_processes))
        .to_iter_dataset(grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch))
    )
    return iter(dataset)
