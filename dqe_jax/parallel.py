"""Devices: the one place that says `pmap`.

Functions that run on devices are written per device, against the named axis `AXIS`: they see their
own shard of the batch and gather over the axis what must be global. Parameters and other replicated
values keep their plain shape (`in_axes=None`, `out_axes=None`), so that nothing has to be stacked
for the devices or unstacked for a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

AXIS = "devices"


def pmap(
    fn: Callable[..., Any],
    *,
    in_axes: Sequence[int | None],
    out_axes: Any,
    donate_argnums: Sequence[int] = (),
    devices: Sequence[jax.Device] | None = None,
) -> Callable[..., Any]:
    """`jax.pmap` over `AXIS`. Axis 0 marks what is sharded, None what is replicated."""
    return jax.pmap(
        fn,
        axis_name=AXIS,
        in_axes=tuple(in_axes),
        out_axes=out_axes,
        donate_argnums=tuple(donate_argnums),
        devices=devices,
    )


def shard(tree: Any, num_devices: int) -> Any:
    """Splits the leading axis of arrays: `[B, ...]` to `[num_devices, B / num_devices, ...]`."""
    # Lengths are spelled out: with -1 an array without elements would be ambiguous.
    return jax.tree.map(lambda x: x.reshape(num_devices, len(x) // num_devices, *x.shape[1:]), tree)


def unshard(tree: Any) -> Any:
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


def replicate(tree: Any, devices: Sequence[jax.Device]) -> Any:
    """Places a copy of every array on each device, as `pmap`'s replicated outputs are placed.

    Without it the first step of a run would be compiled for other placements than the second.
    """
    mesh = jax.sharding.Mesh(np.asarray(devices), (AXIS,))
    return jax.device_put(tree, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
