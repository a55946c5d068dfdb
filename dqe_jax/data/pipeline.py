"""From prepared records to batches, by random access: TFDS data sources read through Grain.

A training batch (`method/batch.py`) holds references with several queries each: siblings are good
negatives, and each reference is encoded once.
"""

from __future__ import annotations

from typing import Protocol

import grain
import numpy as np

from dqe_jax.data.splits import Split, image_ids_of, known_positive_ids
from dqe_jax.method.arrays import Tree
from dqe_jax.method.batch import Batch
from dqe_jax.utils.files import JsonObject

# At most so many references in a run: Grain cannot slice a data set that is truly endless.
ENDLESS = 2**48


class Batches(Protocol):
    """An endless iterator over training batches whose state can be saved and restored."""

    def __next__(self) -> Batch:
        """The next batch, of NumPy arrays."""

    def get_state(self) -> JsonObject:
        """Where it is; JSON holds it."""

    def set_state(self, state: JsonObject) -> None:
        """Goes to where `get_state` was called."""


class Images(Protocol):
    """The images of a split's gallery, for training."""

    def draw(self, row: int, rng: np.random.Generator) -> Tree:
        """One image as the model takes it, or with how it is augmented (`augmentation.py`)."""

    def draw_several(self, rows: np.ndarray, rng: np.random.Generator) -> Tree:
        """Images as `draw` gives them, one after the other, with a leading axis."""


class Texts(Protocol):
    """The texts of a split's queries, in one or more wordings."""

    @property
    def wordings(self) -> int:
        """How many each text has."""

    def draw(self, rows: np.ndarray, wording: np.ndarray | int) -> Tree:
        """Texts of these queries as the model takes them, each in a wording."""


class _Loader:
    """Makes one reference's part of a batch; called by Grain's threads."""

    def __init__(
        self,
        split: Split,
        images: Images,
        texts: Texts,
        mentions: np.ndarray,
        positives: np.ndarray,
        relevant: np.ndarray,
        per_reference: int,
    ):
        self.split, self.images, self.texts, self.mentions = split, images, texts, mentions
        self.positives, self.relevant = positives, relevant
        self.per_reference = per_reference

    def __call__(self, group: np.ndarray, rng: np.random.Generator) -> Batch:
        gallery, queries, Q = self.split.gallery, self.split.queries, self.per_reference
        # Neighbours in the data set stay together: builders record edits that contrast in pairs.
        chosen = np.roll(group, -rng.integers(len(group)))[:Q]
        query_mask = np.arange(Q) < len(chosen)
        chosen = np.resize(chosen, Q)  # padding repeats what is there; the mask says so
        reference, targets = queries.reference[chosen[0]], queries.target[chosen]
        wordings = self.texts.wordings
        order = rng.integers(wordings, size=Q) if wordings > 1 else 0
        return Batch(
            reference_image=self.images.draw(int(reference), rng),
            reference_id=gallery.image_ids[reference],
            query=chosen.astype(np.int32),
            text=self.texts.draw(chosen, order),
            target_image=self.images.draw_several(targets, rng),
            target_id=gallery.image_ids[targets],
            target_row=targets,
            known_positives=self.positives[chosen],
            relevant=self.relevant[chosen],
            mentions=self.mentions[chosen],
            query_mask=query_mask,
        )


def train_batches(
    split: Split,
    *,
    images: Images,
    texts: Texts,
    mentions: np.ndarray,
    references: int,
    queries_per_reference: int,
    seed: int,
    num_threads: int = 4,
    prefetch: int = 4,
    process: int = 0,
    num_processes: int = 1,
) -> Batches:
    """The training batches.

    The batches of several processes are consecutive parts of one batch: together they are what one
    process alone would read. The state counts batches, so it holds for any number of processes.

    References are shuffled anew in every epoch; each brings up to `queries_per_reference`
    consecutive ones of its queries from a random start. The stream depends on the seed alone.

    Args:
      split: the training split.
      images: of its gallery.
      texts: of its queries; one wording of each is drawn.
      mentions: float32 `[n, K]`.
      references: `R`, of the whole batch.
      queries_per_reference: `Q`.
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
        images,
        texts,
        mentions,
        known_positive_ids(split),
        image_ids_of(split, split.queries.relevant),
        queries_per_reference,
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
