"""Packs the queries of a split into batches of one shape with hardly any padding.

Many references have a single query: with a fixed number of rows for each reference a third of a
batch of FashionIQ would be padding. Here a batch has `B` queries and `R` slots for references, and
each query says which slot is its own.

- The queries of a reference are cut into **groups** of at most `queries_per_reference`.
- A batch is cut into **units**, all of one shape. A group lies in one unit, and so on one device
  and in one chunk, if the number of devices times chunks divides the units.
- Which sizes of groups make up which unit is worked out once, from the numbers of groups of each
  size. An epoch is then a shuffle: of the groups of a size among their places, and of the units. So
  every epoch has the same number of units, and any unit of any epoch is found directly.

A group is cut further where that fills a unit. All is plain NumPy; nothing depends on the devices.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np

from dqe_jax.utils.errors import UserError

# The share of query rows, and of reference slots, that may be padding; also the share of images
# that are encoded beside those that any packing must encode.
LIMIT = 0.03
# Units can be shared among so many devices wherever the references of a batch can.
DEVICES = 8


@dataclasses.dataclass(frozen=True)
class BatchShape:
    """The shape of a batch over all devices.

    Attributes:
      queries: `B`, rows of queries.
      references: `R`, slots of references.
      units: equal parts of a batch; no group of queries lies in two of them.
      even: whether each slot has `B / R` rows, side by side, so that no index is needed.
    """

    queries: int
    references: int
    units: int
    even: bool = True

    @property
    def of_unit(self) -> tuple[int, int]:
        """Rows of queries and slots of references of a unit."""
        return self.queries // self.units, self.references // self.units

    def part(self, parts: int) -> BatchShape:
        """The shape of one of some equal parts, whose number divides the units."""
        return BatchShape(
            self.queries // parts, self.references // parts, self.units // parts, self.even
        )


@dataclasses.dataclass(frozen=True)
class Padding:
    """Shares of the rows of an epoch that are padding, 0 to 1.

    Attributes:
      queries: of the rows of queries.
      references: of the slots of references.
    """

    queries: float
    references: float


@dataclasses.dataclass(frozen=True)
class Units:
    """Some units, `b` rows and `r` slots each.

    Attributes:
      query: int32 `[n, b]`, positions of queries; padding repeats one, as the mask says.
      slot: int32 `[n, b]`, the slot of each query's reference in its unit, ascending.
      mask: bool `[n, b]`, false for padding.
      reference: int32 `[n, r]`, the position of a query of the slot's reference.
      used: bool `[n, r]`, false for a slot that is padding.
    """

    query: np.ndarray
    slot: np.ndarray
    mask: np.ndarray
    reference: np.ndarray
    used: np.ndarray


@dataclasses.dataclass(frozen=True)
class _Template:
    """Which places of a unit the groups take; groups are numbered by size.

    Attributes:
      group: int32 `[U, b]`, -1 for padding.
      offset: int32 `[U, b]`, the place of the query in its group.
      slot: int32 `[U, b]`.
      slots: int32 `[U]`, how many are used.
    """

    group: np.ndarray
    offset: np.ndarray
    slot: np.ndarray
    slots: np.ndarray


class Packing:
    """The endless stream of units of a split; it depends on the seed alone.

    Attributes:
      shape: of a batch.
      units: of an epoch.
      padding: over an epoch.
    """

    def __init__(
        self, reference: np.ndarray, references: int, queries_per_reference: int, seed: int = 0
    ):
        """Works out the shape of the batches.

        Args:
          reference: int `[n]`, the reference of each query, n at least 1.
          references: of a batch where each brings `queries_per_reference` queries. A batch has
            `references * queries_per_reference` queries, and slots for as many references as these
            have on average.
          queries_per_reference: of a group at the most.
          seed: of the order.
        """
        self._seed, most = seed, queries_per_reference
        self._line = np.argsort(reference, kind="stable").astype(np.int32)
        _, starts, counts = np.unique(reference[self._line], return_index=True, return_counts=True)
        self._start, self._count = np.repeat(starts, counts), np.repeat(counts, counts)
        self._place = np.arange(len(reference)) - self._start  # among those of its reference
        self._rotations, self._of = counts, np.repeat(np.arange(len(counts)), counts)
        begins = np.flatnonzero(self._place % most == 0)
        sizes = np.diff([*begins, len(reference)])
        by_size = np.argsort(sizes, kind="stable")
        self._begins, self._sizes = begins[by_size], sizes[by_size]
        self.shape, self._template = _choose(
            np.bincount(sizes, minlength=most + 1), references, most
        )
        self.units = len(self._template.slots)
        rows, slots = self.shape.of_unit
        self.padding = Padding(
            1 - len(reference) / (self.units * rows),
            1 - int(self._template.slots.sum()) / (self.units * slots),
        )
        self._epoch = functools.lru_cache(maxsize=2)(self._shuffled)

    def take(self, first: int, count: int) -> Units:
        """The units `first` to `first + count` of the endless stream."""
        where = np.arange(first, first + count)
        epochs = where // self.units
        parts = [
            self._of_epoch(int(epoch), where[epochs == epoch] % self.units)
            for epoch in np.unique(epochs)
        ]
        columns = ([getattr(part, f.name) for part in parts] for f in dataclasses.fields(Units))
        return Units(*(np.concatenate(column) for column in columns))

    def _of_epoch(self, epoch: int, at: np.ndarray) -> Units:
        """Units of an epoch at these places of its order."""
        line, groups, order = self._epoch(epoch)
        which, template, slots = order[at], self._template, self.shape.of_unit[1]
        group, slot, used = template.group[which], template.slot[which], template.slots[which]
        mask = group >= 0
        query = line[self._begins[groups[group]] + template.offset[which]]
        query = np.where(mask, query, query[:, :1])  # the first row is never padding
        # The first row of each slot; slots that are padding repeat the first one.
        first = np.argmax(slot[:, None, :] == np.arange(slots)[:, None], axis=2)
        is_used = np.arange(slots) < used[:, None]
        reference = np.take_along_axis(query, np.where(is_used, first, 0), axis=1)
        return Units(query, slot, mask, reference, is_used)

    def _shuffled(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The queries in a line, the group at each number, and the order of the units."""
        rng = np.random.default_rng([self._seed, epoch])
        # Each reference's queries are rotated: groups differ from epoch to epoch, and neighbours
        # stay together, since builders record edits that contrast in neighbouring pairs.
        turn = rng.integers(self._rotations)[self._of]
        line = self._line[self._start + (self._place + turn) % self._count]
        groups = rng.permutation(len(self._sizes))
        groups = groups[np.argsort(self._sizes[groups], kind="stable")]
        return line, groups, rng.permutation(self.units)


def check_parts(shape: BatchShape, num_devices: int, chunks: int) -> None:
    """Raises a `UserError` if the units of a batch do not divide by the devices and chunks.

    Args:
      shape: of the batch.
      num_devices: of all processes.
      chunks: `config.batch.chunks`.
    """
    if shape.units % (num_devices * chunks):
        raise UserError(
            f"config.batch.chunks is {chunks}, on {num_devices} devices: many references of this "
            f"data set have few queries, and a batch can be cut into {shape.units} equal parts "
            "that hold whole references; the number of devices times chunks must divide that. "
            f"Take more config.batch.references, in multiples of {4 * num_devices * chunks}."
        )


def even_shape(references: int, queries_per_reference: int) -> BatchShape:
    """The shape where every reference has enough queries."""
    return BatchShape(references * queries_per_reference, references, references)


def shape_for(sizes: Sequence[int], references: int, queries_per_reference: int) -> BatchShape:
    """The shape of the batches of a data set.

    Args:
      sizes: how many references have 1 query, 2 queries, ...
      references: as for `Packing`.
      queries_per_reference: as for `Packing`.
    """
    counts = np.zeros(queries_per_reference + 1, int)
    for queries, number in enumerate(sizes, 1):
        whole, rest = divmod(queries, queries_per_reference)
        counts[queries_per_reference] += whole * number
        counts[rest] += number
    counts[0] = 0
    return _choose(counts, references, queries_per_reference)[0]


def _choose(counts: np.ndarray, references: int, most: int) -> tuple[BatchShape, _Template]:
    """The finest units that waste little, or else those that waste least.

    Args:
      counts: int `[most + 1]`, how many groups there are of each size.
      references: of a batch, if each had `most` queries.
      most: queries of a group at the most.
    """
    queries, groups = int(counts @ np.arange(most + 1)), int(counts.sum())
    best: tuple[float, BatchShape, int] | None = None
    least = math.gcd(references, DEVICES)
    for units in range(references, 0, -1):
        if references % units or units % least:
            continue
        rows = references * most // units
        # Either the rows or the slots of an epoch are filled to the last.
        share = rows * groups / queries
        for slots in sorted({max(1, math.floor(share)), min(rows, math.ceil(share))}):
            number = max(-(-queries // rows), -(-groups // slots))
            cost = number * (rows + slots) / (queries + groups) - 1
            shape = BatchShape(rows * units, slots * units, units, even=slots in (1, rows))
            if best is None or cost < best[0]:
                best = cost, shape, number
            # The last unit of an epoch cannot be full, which matters where an epoch has few.
            if cost <= LIMIT + 1 / number and queries / (number * rows) > 1 - LIMIT - 1 / number:
                return shape, _fill(counts, shape, number)
    assert best is not None, "there is at least the unit of a whole batch"
    return best[1], _fill(counts, best[1], best[2])


def _fill(counts: np.ndarray, shape: BatchShape, units: int) -> _Template:
    """Places the groups in at least so many units."""
    while True:
        template, missing = _try_to_fill(counts, *shape.of_unit, units)
        if template is not None:
            return template
        units += -(-missing // shape.of_unit[1])


def _try_to_fill(
    counts: np.ndarray, rows: int, slots: int, units: int
) -> tuple[_Template | None, int]:
    """Places the groups in so many units, or says how many slots are missing.

    A group takes a slot and, beyond its first query, extra rows: a unit has `rows - slots` of them.
    Units are filled with extra rows first, by groups of all sizes in turn, and by a part of a group
    where none fits; then single queries take the other slots.
    """
    most = len(counts) - 1
    ends = np.cumsum(counts)
    # Groups and parts of groups of each size that have no place yet: (group, offset).
    waiting: list[list[tuple[int, int]]] = [
        [(int(g), 0) for g in range(ends[size] - counts[size], ends[size])][::-1]
        for size in range(most + 1)
    ]
    whole = [max(1, len(each)) for each in waiting]
    places: list[tuple[int, int, int, int]] = []  # unit, group, offset, size
    free = np.full(units, slots)
    for unit in range(units):
        extra, left = rows - slots, slots
        while extra and left:
            # The rest of the slots must be able to take the rest of the extra rows.
            known = [size for size in range(2, most + 1) if waiting[size]]
            if not known:
                break
            fits = [size for size in known if size - 1 <= extra]
            ample = [s for s in fits if extra - (s - 1) <= (left - 1) * (known[-1] - 1)]
            if fits:
                size = max(ample or fits[-1:], key=lambda s: len(waiting[s]) / whole[s])
                group, offset = waiting[size].pop()
            else:
                size = extra + 1
                group, offset = waiting[known[0]].pop()
                waiting[known[0] - size].append((group, offset + size))
            places.append((unit, group, offset, size))
            extra, left = extra - (size - 1), left - 1
        free[unit] = left
    alone = waiting[1][::-1]
    for size in range(2, most + 1):
        alone += [(group, offset + i) for group, offset in waiting[size] for i in range(size)]
    missing = len(alone) - int(free.sum())
    if missing > 0:
        return None, missing
    homes = np.repeat(np.arange(units), free)[: len(alone)].tolist()
    places += [(unit, group, offset, 1) for unit, (group, offset) in zip(homes, alone)]
    return _laid_out(np.array(places), rows, slots, units), 0


def _laid_out(places: np.ndarray, rows: int, slots: int, units: int) -> _Template:
    """The template with these pieces: int `[n, 4]` of unit, group, offset and size."""
    unit, group, offset, size = places[np.argsort(places[:, 0], kind="stable")].T
    used = np.bincount(unit, minlength=units)
    number = np.arange(len(unit)) - np.repeat(np.cumsum(used) - used, used)  # the slot in its unit
    piece = np.repeat(np.arange(len(unit)), size)
    within = np.arange(len(piece)) - np.repeat(np.cumsum(size) - size, size)
    filled = np.bincount(unit, weights=size, minlength=units).astype(int)
    column = np.arange(len(piece)) - np.repeat(np.cumsum(filled) - filled, filled)
    # Rows that are padding belong to the last slot, or each to its own where all slots are single.
    last = np.arange(rows) if slots == rows else np.full(rows, slots - 1)
    template = _Template(
        group=np.full((units, rows), -1, np.int32),
        offset=np.zeros((units, rows), np.int32),
        slot=np.tile(last.astype(np.int32), (units, 1)),
        slots=used.astype(np.int32),
    )
    at = unit[piece], column
    template.group[at] = group[piece]
    template.offset[at] = offset[piece] + within
    template.slot[at] = number[piece]
    return template
