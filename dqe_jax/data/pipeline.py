"""From prepared records to batches, by random access: TFDS data sources read through Grain.

A training batch (`method/batch.py`) holds references with several queries each: siblings are good
negatives, and each reference is encoded once. `packing.py` says which queries are in which batch,
`lengths.py` to how many tokens their texts are padded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import jax
import numpy as np
from absl import logging

from dqe_jax.data import lengths
from dqe_jax.data.packing import Packing
from dqe_jax.data.splits import Split, image_ids_of, known_positive_ids
from dqe_jax.method.arrays import Tree
from dqe_jax.method.batch import Batch
from dqe_jax.utils.files import JsonObject

if TYPE_CHECKING:
    import grain  # slow to import

# At most so many batches in a run: Grain has no data set that is truly endless.
ENDLESS = 2**48
# Which order of queries a saved state counts in. Older states do not say it.
STREAM = 2


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

    def draw_several(self, rows: np.ndarray, rng: np.random.Generator) -> Tree:
        """Images `[n, ...]` in order, each with how it is augmented (`augmentation.py`)."""


class Texts(Protocol):
    """The texts of a split's queries, in one or more wordings."""

    @property
    def wordings(self) -> int:
        """How many each text has."""

    def draw(self, rows: np.ndarray, wording: np.ndarray | int, length: int | None = None) -> Tree:
        """Texts of these queries as the model takes them, each in a wording.

        Token ids are cut to `length`, if it is given.
        """


class TrainBatches:
    """The training batches of a process, see `train_batches`.

    Attributes:
      packing: which queries are in which batch.
      lengths: to how many tokens texts are padded, ascending; none if they are as they come.
    """

    def __init__(
        self,
        packing: Packing,
        lengths: tuple[int, ...],
        batches: grain.DatasetIterator[Batch],
    ):
        """Wraps an iterator over the batches of a process."""
        self.packing, self.lengths, self._batches = packing, lengths, batches

    def __next__(self) -> Batch:
        """As `Batches` says."""
        return next(self._batches)

    def get_state(self) -> JsonObject:
        """As `Batches` says: the number of batches."""
        return {"stream": STREAM, "batches": self._batches.get_state()}

    def set_state(self, state: JsonObject) -> None:
        """As `Batches` says; also takes a state of older versions, which drew otherwise."""
        if "stream" not in state:
            logging.warning(
                "The checkpoint is of an older version, which drew its batches otherwise: the run "
                "goes on with the same number of batches taken, and its order of queries is not "
                "that of a run that was never interrupted."
            )
        self._batches.set_state(state.get("batches", state))


class _Loader:
    """Makes a process's part of a batch, given its number; called by Grain's threads."""

    def __init__(
        self,
        split: Split,
        images: Images,
        texts: Texts,
        mentions: np.ndarray,
        packing: Packing,
        needed: np.ndarray | None,
        lengths: tuple[int, ...],
        seed: int,
        part: slice,
    ):
        self.split, self.images, self.texts, self.mentions = split, images, texts, mentions
        self.positives = known_positive_ids(split)
        self.relevant = image_ids_of(split, split.queries.relevant)
        self.packing, self.needed, self.lengths = packing, needed, lengths
        self.seed, self.part = seed, part

    def __call__(self, number: int) -> Batch:
        gallery, queries, shape = self.split.gallery, self.split.queries, self.packing.shape
        first = int(number) * shape.units
        units, length = self.packing.take(first, shape.units), None
        if self.needed is not None:  # that of the whole batch, so that all processes agree
            length = lengths.length_for(self.needed[units.query], self.lengths)
        own = range(shape.units)[self.part]
        query, reference = units.query[self.part], units.reference[self.part]
        slot = units.slot[self.part] + shape.of_unit[1] * np.array(own)[:, None]
        target, source = queries.target[query], queries.reference[reference]
        wording = np.zeros(query.shape, int)
        drawn: list[tuple[Tree, Tree]] = []
        for i, unit in enumerate(own):
            # Each unit has draws of its own: they depend on no process and no thread.
            rng = np.random.default_rng([self.seed, first + unit, 1])
            wording[i] = rng.integers(self.texts.wordings, size=query.shape[1])
            drawn.append(tuple(self.images.draw_several(x[i], rng) for x in (source, target)))
        reference_image, target_image = jax.tree.map(lambda *x: np.concatenate(x), *drawn)
        rows = query.ravel()
        return Batch(
            reference_image=reference_image,
            reference_id=gallery.image_ids[source.ravel()],
            reference_mask=units.used[self.part].ravel(),
            reference=None if shape.even else slot.ravel().astype(np.int32),
            query=rows.astype(np.int32),
            text=self.texts.draw(rows, wording.ravel(), length),
            target_image=target_image,
            target_id=gallery.image_ids[target.ravel()],
            target_row=target.ravel(),
            known_positives=self.positives[rows],
            relevant=self.relevant[rows],
            mentions=self.mentions[rows],
            query_mask=units.mask[self.part].ravel(),
            rejected=None if self.split.rejected is None else self.split.rejected[rows],
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
    needed: np.ndarray | None = None,
    max_length: int = 0,
    num_threads: int = 4,
    prefetch: int = 4,
    process: int = 0,
    num_processes: int = 1,
) -> TrainBatches:
    """The training batches.

    The batches of several processes are consecutive parts of one batch: together they are what one
    process alone would read. The state counts batches, so it holds for any number of processes.

    Each query comes once in an epoch. Epochs follow one another without a gap: the last batch of an
    epoch is filled up with the first queries of the next. The stream depends on the seed alone.

    Args:
      split: the training split.
      images: of its gallery.
      texts: of its queries; one wording of each is drawn.
      mentions: float32 `[n, K]`.
      references: of a batch where each brings `queries_per_reference` queries: a batch has
        `references * queries_per_reference` queries, see `packing.py`.
      queries_per_reference: of a reference in a batch, at the most.
      seed: of shuffling, drawing and augmentation.
      needed: int `[n]`, tokens that each text needs; None leaves texts as they come.
      max_length: of the texts, with `needed`.
      num_threads: readers.
      prefetch: batches read ahead.
      process: which part of the batch is read.
      num_processes: parts; they divide the units of a batch.
    """
    import grain  # slow

    packing = Packing(split.queries.reference, references, queries_per_reference, seed)
    shape, few = packing.shape, tuple[int, ...]()
    if needed is not None:
        few = lengths.choose_lengths(needed, shape.queries, max_length)
    of_process = shape.units // num_processes
    part = slice(process * of_process, (process + 1) * of_process)
    load = _Loader(split, images, texts, mentions, packing, needed, few, seed, part)
    dataset = (
        grain.MapDataset.range(ENDLESS)
        .map(load)
        .to_iter_dataset(grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch))
    )
    return TrainBatches(packing, few, iter(dataset))


def describe(batches: TrainBatches, needed: np.ndarray | None, max_length: int) -> str:
    """What a run's batches are like, in two sentences: their rows and padding, and their texts.

    Args:
      batches: of `train_batches`.
      needed: as given there.
      max_length: of the config.
    """
    packing, shape = batches.packing, batches.packing.shape
    words = (
        f"A batch has {shape.queries} queries over {shape.references} references, an epoch "
        f"{packing.units / shape.units:.1f} batches; {packing.padding.queries:.1%} of the rows of "
        f"queries and {packing.padding.references:.1%} of those of references are padding."
    )
    if needed is None:
        return words
    *shorter, longest = batches.lengths
    words += f" Texts are padded to {longest} tokens"
    for length in shorter:
        share = lengths.share_of_batches(needed, shape.queries, length)
        words += f", to {length} in about {share:.0%} of the batches: each length is compiled once"
    return f"{words} (config.data.max_length is {max_length})."
