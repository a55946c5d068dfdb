"""From prepared records to batches, by random access: TFDS data sources read through Grain.

A training batch holds `R` references with `Q` queries each (siblings are good negatives, and each
reference is encoded once), as NumPy arrays:

| key | array | |
| --- | --- | --- |
| `reference_image` | uint8 `[R, H, W, 3]` | |
| `reference_photo` | int32 `[R]` | image id; copies of a photo share one |
| `text` | int32 `[R, Q, L]` | |
| `target_image` | uint8 `[R, Q, H, W, 3]` | |
| `target_photo` | int32 `[R, Q]` | |
| `known_positives` | int32 `[R, Q, P]` | image ids that are never negatives, -1 for none |
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

from dqe_jax.data.examples import gallery_split
from dqe_jax.data.transforms import AUGMENTATIONS, join_captions
from dqe_jax.utils.errors import UserError

READ_CHUNK = 256


@dataclasses.dataclass(frozen=True)
class Queries:
    """The queries of a split, as columns of length `n`; rows index the split's gallery."""

    ids: Sequence[str]
    texts: Sequence[str]
    reference: np.ndarray  # int32 [n]
    target: np.ndarray  # int32 [n]
    targets: Sequence[np.ndarray]  # n arrays of rows: annotated targets
    valid: Sequence[np.ndarray]  # n arrays of rows: all that are in truth valid
    kinds: Sequence[str]

    def __len__(self) -> int:
        return len(self.ids)


class Gallery:
    """The images of a gallery split, read on demand and kept in memory once read.

    Attributes:
      image_shape: `(H, W, 3)`.
    """

    def __init__(self, source: Any, image_size: int, cache: bool = True):
        """Wraps a TFDS data source; `cache` keeps decoded images (N * H * W * 3 bytes)."""
        self._source = source
        self.image_shape = (image_size, image_size, 3)
        self._photos = np.full(len(source), -1, np.int32)
        self._images = np.empty((len(source), *self.image_shape), np.uint8) if cache else None

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, row: int) -> tuple[np.ndarray, int]:
        """The image uint8 `[H, W, 3]` of a row, and its image id."""
        if self._images is None or self._photos[row] < 0:
            record = self._source[row]
            if self._images is None:
                return record["image"][0], int(record["photo"])
            self._images[row] = record["image"][0]
            self._photos[row] = record["photo"]  # last: it marks the row as read
        return self._images[row], int(self._photos[row])

    def batches(self, rows: np.ndarray, size: int) -> Iterator[np.ndarray]:
        """Images of `rows` in order, `[<= size, H, W, 3]` at a time, read by threads ahead."""
        with ThreadPoolExecutor(4) as pool:
            chunks = [rows[i : i + size] for i in range(0, len(rows), size)]
            read = lambda chunk: np.stack([self[int(row)][0] for row in chunk])  # noqa: E731
            ahead = [pool.submit(read, chunk) for chunk in chunks[:2]]
            for i in range(len(chunks)):
                if i + 2 < len(chunks):
                    ahead.append(pool.submit(read, chunks[i + 2]))
                yield ahead[i].result()
                ahead[i] = None  # at most three chunks are held


@dataclasses.dataclass(frozen=True)
class Split:
    """A split: its queries and the gallery they rank."""

    name: str
    queries: Queries
    gallery: Gallery


def load_split(builder: Any, name: str, image_size: int, cache: bool = True) -> Split:
    """Reads the queries of a prepared split; images are read later, on demand.

    Raises:
      UserError: the data set has no such split, or it has no query.
    """
    if name not in builder.info.splits or gallery_split(name) not in builder.info.splits:
        known = [s for s in builder.info.splits if f"{s}_gallery" in builder.info.splits]
        raise UserError(f"{builder.name} has no split {name!r}; it has {', '.join(known)}.")
    source = builder.as_data_source(split=name)
    if len(source) == 0:
        raise UserError(f"split {name!r} of {builder.name} in {builder.data_dir} has no query.")
    records = []
    for start in range(0, len(source), READ_CHUNK):
        rows = list(range(start, min(start + READ_CHUNK, len(source))))
        records.extend(source.__getitems__(rows))
    queries = Queries(
        ids=[r["id"].decode() for r in records],
        texts=[join_captions([t.decode() for t in r["texts"]]) for r in records],
        reference=np.array([r["reference"] for r in records], np.int32),
        target=np.array([r["target"] for r in records], np.int32),
        targets=[np.asarray(r["targets"], np.int32) for r in records],
        valid=[np.asarray(r["valid"], np.int32) for r in records],
        kinds=[r["kind"].decode() for r in records],
    )
    images = builder.as_data_source(split=gallery_split(name))
    return Split(name, queries, Gallery(images, image_size, cache))


class _Loader:
    """Makes one reference's part of a batch; called by Grain's threads."""

    def __init__(
        self,
        split: Split,
        text: np.ndarray,
        mentions: np.ndarray,
        positives: np.ndarray,
        per_reference: int,
        augment: Callable[[np.ndarray, np.random.Generator], np.ndarray],
    ):
        self.split, self.text, self.mentions = split, text, mentions
        self.positives, self.per_reference, self.augment = positives, per_reference, augment

    def __call__(self, group: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
        gallery, queries, Q = self.split.gallery, self.split.queries, self.per_reference
        # Neighbours in the data set stay together: builders record edits that contrast in pairs.
        chosen = np.roll(group, -rng.integers(len(group)))[:Q]
        valid = np.arange(Q) < len(chosen)
        chosen = np.resize(chosen, Q)  # padding repeats what is there; `valid` masks it
        reference, reference_photo = gallery[queries.reference[chosen[0]]]
        targets = [gallery[queries.target[i]] for i in chosen]
        target_photo = np.array([photo for _, photo in targets], np.int32)
        # Rows to image ids: an annotated target may be a copy of another row's photo.
        others = [
            [gallery[r][1] if r >= 0 else -1 for r in rows] for rows in self.positives[chosen]
        ]
        return {
            "reference_image": self.augment(reference, rng),
            "reference_photo": np.int32(reference_photo),
            "text": self.text[chosen],
            "target_image": np.stack([self.augment(image, rng) for image, _ in targets]),
            "target_photo": target_photo,
            "known_positives": np.concatenate(
                [target_photo[:, None], np.array(others, np.int32)], axis=1
            ),
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
    prefetch: int = 64,
) -> grain.DatasetIterator:
    """An endless iterator over training batches whose state can be saved and restored.

    References are shuffled anew in every epoch; each brings up to `queries_per_reference`
    consecutive ones of its queries from a random start. The stream depends on the seed alone.

    Args:
      split: the training split.
      text: int32 `[n, L]`, ids of each query's text.
      mentions: float32 `[n, K]`.
      references: `R`, of the whole batch.
      queries_per_reference: `Q`.
      augment: a name of `transforms.AUGMENTATIONS`.
      seed: of shuffling, drawing and augmentation.
      num_threads: readers.
      prefetch: references read ahead.
    """
    order = np.argsort(split.queries.reference, kind="stable")
    _, starts = np.unique(split.queries.reference[order], return_index=True)
    groups = np.split(order, starts[1:])
    longest = max(len(rows) for rows in split.queries.targets)
    positives = np.full((len(split.queries), longest), -1, np.int32)
    for row, targets in enumerate(split.queries.targets):
        positives[row, : len(targets)] = targets
    load = _Loader(split, text, mentions, positives, queries_per_reference, AUGMENTATIONS[augment])
    dataset = (
        grain.MapDataset.source(groups)
        .seed(seed)
        .shuffle()
        .repeat()
        .random_map(load)
        .to_iter_dataset(grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch))
        .batch(references)
    )
    return iter(dataset)
