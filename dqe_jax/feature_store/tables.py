"""Where stored rows lie while a job runs, and how a batch gets its own.

On the devices, sharded by rows: a batch holds the numbers of its rows, and a small program of its
own looks them up, so that no step depends on the store. In the memory of the host, or on disk: rows
are copied into the batch as images would be.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
import psutil
from jax import lax

from dqe_jax.distributed import mesh, processes
from dqe_jax.feature_store.shards import RowSpec, Shard, read_rows
from dqe_jax.method.arrays import Array, Tree
from dqe_jax.models.features import States

PLACES = ("device", "host", "disk")
# The share of the free memory that a store may take. Steps and batches need the rest.
SHARE = 0.5
# Bytes that a device may use at a time while rows are exchanged between devices.
EXCHANGE = 64 * 2**20


class Table(Protocol):
    """Rows of a store, numbered from 0."""

    def draw(self, row: int) -> Tree:
        """What stands for a row in a training batch that is being made."""

    def rows(self, rows: np.ndarray) -> States:
        """The rows int `[devices, b]` of this process's devices: arrays `[devices, b, ...]`."""

    def resolve(self, drawn: Tree) -> Tree:
        """What was drawn, `[devices, ...]`, as arrays that the model takes."""


class HostTable:
    """Rows in the memory of the host, or mapped from its disk."""

    def __init__(self, read: Callable[[np.ndarray], dict[str, np.ndarray]]):
        """`read` gives the rows int `[n]` as arrays `[n, ...]`."""
        self._read = read

    def draw(self, row: int) -> Tree:
        """As `Table` says."""
        return {name: array[0] for name, array in self._read(np.array([row])).items()}

    def rows(self, rows: np.ndarray) -> States:
        """As `Table` says."""
        return mesh.shard(self._read(rows.reshape(-1)), len(rows))

    def resolve(self, drawn: Tree) -> Tree:
        """As `Table` says: it is there already."""
        return drawn


class DeviceTable:
    """Rows in the memory of the devices, sharded."""

    def __init__(
        self,
        read: Callable[[np.ndarray], dict[str, np.ndarray]],
        specs: Mapping[str, RowSpec],
        count: int,
        devices: Sequence[jax.Device],
    ):
        """Sends the rows there.

        Args:
          read: gives the rows int `[n]` as arrays `[n, ...]`.
          specs: of the arrays.
          count: of rows.
          devices: of all processes.
        """
        size, own = rows_of_device(count, len(devices)), mesh.own_devices(devices)

        def part(at: int) -> dict[str, np.ndarray]:
            rows = np.arange(at * size, (at + 1) * size)
            return read(np.minimum(rows, count - 1))  # the last ones repeat the last row

        places = range(len(devices))[own]
        parts: dict[str, list[jax.Array]] = {name: [] for name in specs}
        for at in places:  # one device at a time: the host never holds all
            for name, array in part(at).items():
                parts[name].append(jax.device_put(array[None], devices[at]))
        self._table = {name: mesh.joined(arrays, devices) for name, arrays in parts.items()}
        self._look_up = _look_up_program(tuple(devices))

    def draw(self, row: int) -> Tree:
        """As `Table` says: its number."""
        return np.int32(row)

    def rows(self, rows: np.ndarray) -> States:
        """As `Table` says."""
        return self.resolve(rows.astype(np.int32))

    def resolve(self, drawn: Tree) -> Tree:
        """As `Table` says."""
        return self._look_up(self._table, drawn)


def rows_of_device(count: int, num_devices: int) -> int:
    """Rows that each device holds."""
    return -(-count // num_devices)


@functools.lru_cache(mesh.REMEMBERED)
def _look_up_program(devices: tuple[jax.Device, ...]) -> mesh.Program[[Tree, Tree], Tree]:
    return mesh.pmap(look_up, in_axes=(0, 0), out_axes=0, devices=devices)


def look_up(table: Mapping[str, Array], wanted: Tree) -> Tree:
    """Per device: for each array of row numbers in a tree, the arrays of these rows.

    Every device picks what it has of the rows that any device wants. Sums bring them to whom they
    belong: of the summands of a row all but one are zero.

    Args:
      table: the device's arrays `[S, ...]`.
      wanted: tree of int32 arrays `[...]`.

    Returns:
      The tree with `{name: [..., *]}` in place of the arrays.
    """
    leaves, treedef = jax.tree.flatten(wanted)
    rows = jnp.concatenate([leaf.reshape(-1) for leaf in leaves])
    found = {name: _look_up(array, rows) for name, array in table.items()}
    ends = np.cumsum([leaf.size for leaf in leaves])[:-1]
    cut = {name: jnp.split(array, ends) for name, array in found.items()}
    made = [
        {name: parts[i].reshape(*leaf.shape, *parts[i].shape[1:]) for name, parts in cut.items()}
        for i, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(treedef, made)


def _look_up(array: Array, rows: Array) -> Array:
    """Rows int32 `[b]` of all devices' arrays `[S, ...]`."""
    if lax.axis_size(mesh.AXIS) == 1:
        return jnp.asarray(array)[rows]
    size, me = len(array), lax.axis_index(mesh.AXIS)

    def some(part: Array) -> Array:
        asked = lax.all_gather(part, mesh.AXIS, tiled=True)
        mine = asked // size == me
        picked = jnp.asarray(array)[jnp.where(mine, asked % size, 0)]
        mask = mine.reshape(-1, *(1,) * (picked.ndim - 1))
        return lax.psum_scatter(jnp.where(mask, picked, 0), mesh.AXIS, tiled=True)

    whole = lax.axis_size(mesh.AXIS) * array[0].size * array.dtype.itemsize
    most = max(1, EXCHANGE // max(whole, 1))
    step = max(n for n in range(1, len(rows) + 1) if len(rows) % n == 0 and n <= most)
    found = lax.map(some, rows.reshape(-1, step))
    return found.reshape(len(rows), *array.shape[1:])


@dataclasses.dataclass(frozen=True)
class Part:
    """Some of the arrays of a table: rows of a store.

    Attributes:
      shards: of the store.
      specs: of its arrays.
      rows: int64 `[n]`, as `shards.find_rows` counts them.
      names: of the arrays in the table, by their names in the store.
    """

    shards: Sequence[Shard]
    specs: Mapping[str, RowSpec]
    rows: np.ndarray
    names: Mapping[str, str]

    def read(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """The rows int `[n]` of the table as arrays `[n, ...]` by their names there."""
        found = {}
        for name, spec in self.specs.items():
            out = np.empty((len(numbers), *spec.shape), spec.dtype)
            read_rows(self.shards, name, spec, self.rows[numbers], out)
            found[self.names[name]] = out
        return found


def make_table(place: str, parts: Sequence[Part], devices: Sequence[jax.Device]) -> Table:
    """The table of some rows of one store or of several.

    Args:
      place: of `PLACES`.
      parts: each with the same rows, at least one.
      devices: of all processes.
    """
    count = len(parts[0].rows)

    def read(numbers: np.ndarray) -> dict[str, np.ndarray]:
        return {name: array for part in parts for name, array in part.read(numbers).items()}

    if place == "device":
        specs = {part.names[name]: spec for part in parts for name, spec in part.specs.items()}
        return DeviceTable(read, specs, count, devices)
    if place == "disk":
        mapped = [_Mapped(part) for part in parts]
        return HostTable(lambda rows: {n: a for m in mapped for n, a in m.read(rows).items()})
    held = read(np.arange(count))
    return HostTable(lambda numbers: {name: array[numbers] for name, array in held.items()})


class _Mapped:
    """Rows that stay on disk."""

    def __init__(self, part: Part):
        starts = np.cumsum([0, *(len(shard.keys) for shard in part.shards)])
        self._shard = np.searchsorted(starts, part.rows, side="right") - 1
        self._at = part.rows - starts[self._shard]
        self._names = part.names
        self._arrays = [
            {name: shard.array(name, spec) for name, spec in part.specs.items()}
            for shard in part.shards
        ]

    def read(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """The rows int `[n]`."""
        places = [(self._arrays[self._shard[n]], self._at[n]) for n in numbers]
        return {
            self._names[name]: np.stack([held[name][at] for held, at in places])
            for name in self._names
        }


def choose_place(asked: str, nbytes: int, devices: Sequence[jax.Device]) -> str:
    """The place, of `PLACES`, where rows are kept; it is the same in all processes.

    Args:
      asked: a place, or "auto": on the devices if these say how much memory they have and half of
        what is free is enough; else in the host's memory if half of that is; else on disk.
      nbytes: of all rows.
      devices: of all processes.
    """
    if asked != "auto":
        return asked
    own = devices[mesh.own_devices(devices)]
    if processes.all_agree(has_room(nbytes / len(devices), min(map(_free_of, own)))):
        return "device"
    if processes.all_agree(has_room(nbytes, psutil.virtual_memory().available)):
        return "host"
    return "disk"


def has_room(nbytes: float, free: float) -> bool:
    """Whether "auto" puts so many bytes where so many are free."""
    return nbytes <= SHARE * free


def _free_of(device: jax.Device) -> float:
    """Bytes of memory that a device has free; 0 where it does not say."""
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        return 0
    return float(stats["bytes_limit"] - stats.get("bytes_in_use", 0))
