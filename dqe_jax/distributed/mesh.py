"""Devices: the one place that says `pmap`.

Functions that run on devices are written per device, against the named axis `AXIS`: they see their
own shard of the batch and gather over the axis what must be global. Parameters and other replicated
values keep their plain shape (`in_axes=None`, `out_axes=None`), so that nothing has to be stacked
for the devices or unstacked for a checkpoint.

With several processes (hosts) every one of them runs the same programs on the same list of devices,
of which it owns some: a mapped argument holds the rows of its own devices, and so does a mapped
result. A replicated one is the same in all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import ParamSpec, Protocol, TypeVar

import jax
import numpy as np
from jax import lax

from dqe_jax.utils.errors import UserError

AXIS = "devices"
# Programs that are remembered, of each kind: another run of the same process does not trace and
# compile them again. A handful of models in a process is many.
REMEMBERED = 16

_Array = jax.Array | np.ndarray
_In = ParamSpec("_In")
_Out = TypeVar("_Out")
_Out_co = TypeVar("_Out_co", covariant=True)
_Tree = TypeVar("_Tree")


class Program(Protocol[_In, _Out_co]):
    """A mapped function: its sharded arguments and results have a leading axis of devices."""

    def __call__(self, *args: _In.args, **kwargs: _In.kwargs) -> _Out_co:
        """Runs it on all devices."""

    def lower(self, *args: _In.args, **kwargs: _In.kwargs) -> jax.stages.Lowered:
        """Its code for arguments of these shapes; nothing runs."""


def pmap(
    fn: Callable[_In, _Out],
    *,
    in_axes: Sequence[object],
    out_axes: object,
    donate_argnums: Sequence[int] = (),
    devices: Sequence[jax.Device] | None = None,
) -> Program[_In, _Out]:
    """`jax.pmap` over `AXIS`. Axis 0 marks what is sharded, None what is replicated."""
    return jax.pmap(
        fn,
        axis_name=AXIS,
        in_axes=tuple(in_axes),
        out_axes=out_axes,
        donate_argnums=tuple(donate_argnums),
        devices=devices,
    )


def placer(devices: Sequence[jax.Device]) -> Program[[_Array], _Array]:
    """A program that gives an array `[devices, ...]` as it lies on them: it is sent there once."""
    return _placer(tuple(devices))


@functools.lru_cache(REMEMBERED)
def _placer(devices: tuple[jax.Device, ...]) -> Program[[_Array], _Array]:
    def same(x: _Array) -> _Array:
        return x

    return pmap(same, in_axes=(0,), out_axes=0, devices=devices)


def joined(parts: Sequence[jax.Array], devices: Sequence[jax.Device]) -> jax.Array:
    """Arrays `[1, ...]`, one on each own device, as one `[own devices, ...]` that maps take."""
    held = devices[own_devices(devices)]
    sharding = jax.sharding.NamedSharding(
        jax.sharding.Mesh(np.asarray(held), (AXIS,)), jax.sharding.PartitionSpec(AXIS)
    )
    shape = (len(parts), *parts[0].shape[1:])
    return jax.make_array_from_single_device_arrays(shape, sharding, list(parts))


def shard(tree: _Tree, num_devices: int) -> _Tree:
    """Splits the leading axis of arrays: `[B, ...]` to `[num_devices, B / num_devices, ...]`."""
    # The lengths are given in full, because -1 would be ambiguous for an array without elements.
    return jax.tree.map(lambda x: x.reshape(num_devices, len(x) // num_devices, *x.shape[1:]), tree)


def place(tree: _Tree, devices: Sequence[jax.Device]) -> _Tree:
    """Sends the rows `[b, ...]` of this process to its devices: arrays `[own devices, ...]`.

    They lie as mapped arguments do, so that a program takes them as they are. Returns at once,
    while they are on their way.
    """
    held = devices[own_devices(devices)]
    mesh = jax.sharding.Mesh(np.asarray(held), (AXIS,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(AXIS))
    return jax.device_put(shard(tree, len(held)), sharding)


def unshard(tree: _Tree) -> _Tree:
    """Undoes `shard`: `[num_devices, B / num_devices, ...]` to `[B, ...]`, as NumPy arrays."""
    return jax.tree.map(
        lambda x: np.asarray(x).reshape(x.shape[0] * x.shape[1], *x.shape[2:]), tree
    )


def pad_rows(array: np.ndarray, multiple: int) -> np.ndarray:
    """Repeats the last row until the leading axis is a multiple of `multiple`: `[B', ...]`.

    The caller keeps the true length and masks what was added.
    """
    missing = -len(array) % multiple
    return np.concatenate([array, np.repeat(array[-1:], missing, axis=0)]) if missing else array


def all_devices() -> list[jax.Device]:
    """The devices of all processes, those of a process side by side."""
    return sorted(jax.devices(), key=lambda device: (device.process_index, device.id))


def devices_of(num_devices: int) -> list[jax.Device]:
    """The first `num_devices` devices; all of all processes for 0.

    Raises:
      UserError: there are fewer, or several processes that would not all take part.
    """
    devices = all_devices()
    if num_devices > len(devices):
        raise UserError(
            f"config.num_devices is {num_devices}: this run has {len(devices)} devices."
        )
    if num_devices not in (0, len(devices)) and jax.process_count() > 1:
        raise UserError(
            f"config.num_devices is {num_devices}: with several processes all {len(devices)} "
            "devices take part; set it to 0."
        )
    return devices[:num_devices] if num_devices else devices


def own_devices(devices: Sequence[jax.Device]) -> slice:
    """Positions of this process's devices in `devices`, where they are neighbours."""
    own = [i for i, device in enumerate(devices) if device.process_index == jax.process_index()]
    return slice(own[0], own[-1] + 1)


def count_own(devices: Sequence[jax.Device]) -> int:
    """How many of `devices` are this process's."""
    return sum(device.process_index == jax.process_index() for device in devices)


def own_rows(rows: np.ndarray, batch: int, devices: Sequence[jax.Device]) -> np.ndarray:
    """The part of this process's devices in rows that are sharded batch by batch.

    Args:
      rows: `[k * batch, ...]`.
      batch: a multiple of the number of devices.
      devices: of all processes.
    """
    by_device = rows.reshape(-1, len(devices), batch // len(devices), *rows.shape[1:])
    own = by_device[:, own_devices(devices)]
    return own.reshape(-1, *rows.shape[1:])


def gather_rows(
    fn: Callable[..., _Tree], *, columns: int, devices: Sequence[jax.Device]
) -> Program[..., _Tree]:
    """The mapped program of `map_rows`: its arrays have a leading axis of devices."""
    return _gather_rows(fn, columns, tuple(devices))


@functools.lru_cache(REMEMBERED)
def _gather_rows(
    fn: Callable[..., _Tree], columns: int, devices: tuple[jax.Device, ...]
) -> Program[..., _Tree]:
    def gathered(params: object, *arrays: jax.Array) -> _Tree:
        return jax.tree.map(lambda x: lax.all_gather(x, AXIS, tiled=True), fn(params, *arrays))

    in_axes = (None,) + (0,) * columns
    return pmap(gathered, in_axes=in_axes, out_axes=None, devices=devices)


def map_rows(
    fn: Callable[..., _Tree], *, columns: int, devices: Sequence[jax.Device]
) -> Callable[..., _Tree]:
    """Maps `fn(params, *columns)` over rows, and gives the results of all rows to every process.

    Args:
      fn: of parameters and of `columns` arrays `[rows of a device, ...]`, to a tree of such arrays.
      columns: how many arrays.
      devices: to run on.

    Returns:
      A function of replicated parameters and arrays `[b, ...]`, the rows of this process's devices,
      to a tree of NumPy arrays `[B, ...]` of the rows of all.
    """

    mapped = gather_rows(fn, columns=columns, devices=devices)

    def call(params: object, *arrays: np.ndarray) -> _Tree:
        return jax.tree.map(np.asarray, mapped(params, *shard(arrays, count_own(devices))))

    return call


def replicate(tree: _Tree, devices: Sequence[jax.Device]) -> _Tree:
    """Places a copy of every array on each own device, as `pmap`'s replicated outputs are placed.

    Without it the first step of a run would be compiled for other placements than the second.
    """
    mesh = jax.sharding.Mesh(np.asarray(devices[own_devices(devices)]), (AXIS,))
    return jax.device_put(tree, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
