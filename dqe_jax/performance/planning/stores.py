"""What is stored of frozen towers: how large it is, where it lies, and what a step reads of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from dqe_jax.config import RunConfig
from dqe_jax.feature_store import tables

UNDECIDED = "auto"


@dataclasses.dataclass(frozen=True)
class Counts:
    """Images and texts of a data set; 0 where the number is not known.

    Attributes:
      images: of the training gallery, which are the rows of the bank.
      texts: of training queries.
      eval_images: of the galleries that a run evaluates on.
      eval_texts: of their queries.
    """

    images: int
    texts: int = 0
    eval_images: int = 0
    eval_texts: int = 0


@dataclasses.dataclass(frozen=True)
class Machines:
    """Where rows may lie.

    Attributes:
      hosts: how many.
      device_memory: bytes of each device; None if not known.
      host_memory: bytes of each host; None if not known.
    """

    hosts: int = 1
    device_memory: int | None = None
    host_memory: int | None = None


@dataclasses.dataclass(frozen=True)
class Kind:
    """Rows of one tower, before they have a place.

    Attributes:
      name: "images" or "texts".
      training: rows that training looks up, all different at the most.
      evaluation: rows that only evaluation looks up.
      row_bytes: of one.
      read: bytes of the rows that a device takes in a step.
    """

    name: str
    training: int
    evaluation: int
    row_bytes: int
    read: int


@dataclasses.dataclass(frozen=True)
class Stored:
    """What a frozen tower makes of a data set, and where it lies.

    Attributes:
      kind: what it is made of.
      asked: `config.features.place`.
      devices: of all hosts.
      hosts: how many.
      places: of `tables.PLACES`: where it lies, or the places that are left where that depends on
        memory of unknown size.
      free_device: bytes that are free on a device before; None if not known.
      free_host: bytes that are free in the memory of a host before; None if not known.
    """

    kind: Kind
    asked: str
    devices: int
    hosts: int
    places: tuple[str, ...]
    free_device: float | None
    free_host: float | None

    @property
    def place(self) -> str:
        """One of `tables.PLACES`, or `UNDECIDED`."""
        return self.places[0] if len(self.places) == 1 else UNDECIDED

    @property
    def rows(self) -> int:
        """All rows; 0 if their number is not known."""
        return self.kind.training + self.kind.evaluation

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return self.rows * self.kind.row_bytes

    @property
    def of_device(self) -> int:
        """Bytes on each device, if they lie there."""
        return tables.rows_of_device(self.rows, self.devices) * self.kind.row_bytes

    @property
    def too_large(self) -> bool:
        """Whether it is to lie on the devices, and is larger than what they have free."""
        free = self.free_device
        return self.place == "device" and free is not None and self.of_device > free

    @property
    def read_by_host(self) -> int:
        """Bytes of the rows that the devices of a host take in a step."""
        return self.kind.read * self.devices // self.hosts

    @property
    def searched(self) -> int:
        """Bytes that a device reads of its part in a step, to find what all devices ask for."""
        return self.kind.read * self.devices

    @property
    def sent(self) -> int:
        """Bytes that a device sends to others in a step, if the rows lie on the devices."""
        return self.kind.read * (self.devices - 1)


def kind_of(config: RunConfig, name: str, counts: Counts, *, row_bytes: int, read: int) -> Kind:
    """The rows that a run stores of images or texts.

    Args:
      config: of the run.
      name: "images" or "texts".
      counts: of the data set.
      row_bytes: of one row.
      read: bytes that a device takes in a step.
    """
    if name == "images":
        views = 2 if config.data.augment == "flip" else 1
        return Kind(name, counts.images * views, counts.eval_images, row_bytes, read)
    orders = 2 if config.data.captions == "random" else 1
    return Kind(name, counts.texts * orders, counts.eval_texts, row_bytes, read)


def place_all(
    kinds: Sequence[Kind], asked: str, devices: int, machines: Machines, held: int
) -> tuple[Stored, ...]:
    """Where the stores of a run lie, in the order in which it fills them.

    "auto" is decided as `tables.choose_place` does, with nothing else in the memory of the devices
    than what is held, and nothing in that of the hosts.

    Args:
      kinds: of the stores.
      asked: `config.features.place`.
      devices: of all hosts.
      machines: that they are of.
      held: bytes of a device that parameters, moments and the bank take.
    """
    free_device: float | None = machines.device_memory
    if free_device is not None:
        free_device = max(free_device - held, 0)
    free_host: float | None = machines.host_memory
    found: list[Stored] = []
    for kind in kinds:
        one = Stored(kind, asked, devices, machines.hosts, ("",), free_device, free_host)
        places = _places(one)
        one = dataclasses.replace(one, places=places)
        found.append(one)
        if "device" in places and free_device is not None:
            free_device -= one.of_device
        if "host" in places and free_host is not None:
            free_host -= one.nbytes
    return tuple(found)


def _places(stored: Stored) -> tuple[str, ...]:
    """The places where it can lie: one, if all that decides is known."""
    if stored.asked != "auto":
        return (stored.asked,)
    if not stored.rows:
        return tables.PLACES
    left = []
    needed = {"device": stored.nbytes / stored.devices, "host": stored.nbytes}
    free = {"device": stored.free_device, "host": stored.free_host}
    for place, nbytes in needed.items():
        room = free[place]
        if room is None:
            left.append(place)
        elif tables.has_room(nbytes, room):
            return (*left, place)
    return (*left, "disk")
