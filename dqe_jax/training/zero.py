"""The optimiser's state sharded over the devices: ZeRO, stage 1 (Rajbhandari et al., 2020).

Of each large array that trains a device holds the moments of one slice, an equal part of its
elements. In a step the gradients are added up slice by slice (reduce-scatter, not all-reduce), each
device updates its slice, and the updates of all are gathered: as much is sent as without it, and a
device keeps `1 / D` of the moments. Parameters and small arrays stay replicated.

Symbols: `D` devices; a slice is `[r, 128]`, the shape that TPUs scatter without a detour, and its
last elements may be padding (zeros). Checkpoints hold the moments in the shapes of the parameters,
as those of a run that does not shard them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.experimental import multihost_utils

from dqe_jax.distributed import mesh
from dqe_jax.method.arrays import Array, Params, Tree

LANES = 128
# Elements of the smallest slice, a tile of a TPU: arrays with fewer for each device are replicated.
LEAST = 8 * LANES


class Shaped(Protocol):
    """An array, or what stands for one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Lengths of its axes."""


def is_sharded(x: Shaped, num_devices: int) -> bool:
    """Whether the moments of an array are sharded over so many devices."""
    return math.prod(x.shape) >= num_devices * LEAST


def _shape(x: Shaped, num_devices: int) -> tuple[int, int, int]:
    """`[D, r, 128]` of an array."""
    return num_devices, -(-math.prod(x.shape) // (num_devices * LANES)), LANES


def _slices(x: Array, num_devices: int) -> jax.Array:
    """All slices of an array, `[D, r, 128]`."""
    shape = _shape(x, num_devices)
    return jnp.pad(x.reshape(-1), (0, math.prod(shape) - x.size)).reshape(shape)


# --------------------------------------------------------------------------- per device, in a step


def global_norm(slices: Params, like: Params) -> jax.Array:
    """Norm of arrays in the shapes of `like`, of which a device holds what `scatter` leaves it."""
    num_devices = lax.axis_size(mesh.AXIS)
    own_part, whole = jnp.zeros(()), jnp.zeros(())
    for array, x in zip(jax.tree.leaves(like), jax.tree.leaves(slices), strict=True):
        square = jnp.square(x).sum()
        if is_sharded(array, num_devices):
            own_part += square
        else:
            whole += square
    return jnp.sqrt(lax.psum(own_part, mesh.AXIS) + whole)


def scatter(grads: Params) -> Params:
    """Gradients added up over the devices: of large ones the own slice, the others whole."""
    num_devices = lax.axis_size(mesh.AXIS)

    def one(x: jax.Array) -> jax.Array:
        if not is_sharded(x, num_devices):
            return lax.psum(x, mesh.AXIS)
        return lax.psum_scatter(_slices(x, num_devices), mesh.AXIS)

    return jax.tree.map(one, grads)


def own(params: Params) -> Params:
    """The own slice of each large replicated array; the others as they are."""
    num_devices, index = lax.axis_size(mesh.AXIS), lax.axis_index(mesh.AXIS)

    def one(x: jax.Array) -> jax.Array:
        if not is_sharded(x, num_devices):
            return x
        return lax.dynamic_index_in_dim(_slices(x, num_devices), index, keepdims=False)

    return jax.tree.map(one, params)


def gather(slices: Params, like: Params) -> Params:
    """Arrays in the shapes of `like`, of the slices of all devices."""
    num_devices = lax.axis_size(mesh.AXIS)

    def one(x: jax.Array, whole: jax.Array) -> jax.Array:
        if not is_sharded(whole, num_devices):
            return x
        everything = lax.all_gather(x, mesh.AXIS).reshape(-1)
        return everything[: whole.size].reshape(whole.shape)

    return jax.tree.map(one, slices, like)


# -------------------------------------------------------------------------------------- on the host


def _held(x: Shaped, num_devices: int) -> tuple[int, ...]:
    """The shape of an array's moments on one device."""
    return _shape(x, num_devices)[1:] if is_sharded(x, num_devices) else x.shape


def slice_shapes(training: Params, num_devices: int) -> Params:
    """What the devices hold of arrays: slices `[D, r, 128]`; small arrays `[D, ...]`, all alike."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((num_devices, *_held(x, num_devices)), x.dtype), training
    )


def state_shapes(
    tx: optax.GradientTransformation, training: Params, num_devices: int
) -> tuple[Tree, Tree]:
    """The sharded state: its shapes, and its axes for `mesh.pmap`.

    All moments have a leading axis of devices: slices `[D, r, 128]`, small arrays `[D, ...]`, the
    same for each device. Counts are replicated.

    Args:
      tx: the optimiser.
      training: shapes of the parameters that train.
      num_devices: how many there are.

    Returns:
      Two trees. The second ends where the moments begin (it must be hashable), with 0, and has None
      for what is replicated.
    """
    shapes = jax.eval_shape(tx.init, slice_shapes(training, num_devices))
    kind: object = jax.tree.structure(training)

    def are_moments(part: Tree) -> bool:
        return kind == jax.tree.structure(part)

    axes = jax.tree.map(lambda part: 0 if are_moments(part) else None, shapes, is_leaf=are_moments)
    return shapes, axes


def shapes_of_device(shapes: Tree, axes: Tree) -> Tree:
    """The part of `state_shapes` that one device holds."""

    def one(axis: int | None, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape if axis is None else x.shape[1:], x.dtype)

    return _with_axes(one, axes, shapes)


def _with_axes(fn: Callable[..., object], axes: Tree, *trees: Tree) -> Tree:
    """`fn(axis, *leaves)` for all leaves of a state."""

    def part(axis: int | None, *parts: Tree) -> Tree:
        return jax.tree.map(functools.partial(fn, axis), *parts)

    return jax.tree.map(part, axes, *trees, is_leaf=lambda x: x is None)


def _shardings(state: Tree, axes: Tree, devices: Sequence[jax.Device]) -> Tree:
    """How a step leaves a state on the devices of this process."""
    here = np.asarray(devices[mesh.own_devices(devices)])
    own_mesh = jax.sharding.Mesh(here, (mesh.AXIS,))

    def one(axis: int | None, _: Array) -> jax.sharding.NamedSharding:
        spec = jax.sharding.PartitionSpec(*([] if axis is None else [mesh.AXIS]))
        return jax.sharding.NamedSharding(own_mesh, spec)

    return _with_axes(one, axes, state)


def init(tx: optax.GradientTransformation, training: Params, devices: Sequence[jax.Device]) -> Tree:
    """A fresh sharded state, placed: the moments of the own devices.

    Args:
      tx: the optimiser.
      training: the parameters that train, or their shapes: AdamW starts from nothing else.
      devices: of all processes.
    """
    num_devices, count = len(devices), mesh.count_own(devices)

    def fresh() -> Tree:
        def zeros(x: jax.ShapeDtypeStruct) -> jax.Array:
            return jnp.zeros((count, *_held(x, num_devices)), x.dtype)

        return tx.init(jax.tree.map(zeros, training))

    return jax.jit(
        fresh, out_shardings=_shardings(*state_shapes(tx, training, num_devices), devices)
    )()


def cut(state: Tree, axes: Tree, devices: Sequence[jax.Device]) -> Tree:
    """A state in the shapes of the parameters, sharded and placed.

    Args:
      state: NumPy arrays, the same in all processes.
      axes: from `state_shapes`.
      devices: of all processes.
    """
    here, num_devices = mesh.own_devices(devices), len(devices)

    def one(axis: int | None, x: np.ndarray) -> np.ndarray:
        if axis is None:
            return x
        if not is_sharded(x, num_devices):
            return np.broadcast_to(x, (mesh.count_own(devices), *x.shape))
        slices = np.zeros(_shape(x, num_devices), x.dtype)
        slices.reshape(-1)[: x.size] = x.reshape(-1)
        return slices[here]

    return jax.device_put(_with_axes(one, axes, state), _shardings(state, axes, devices))


def join(state: Tree, axes: Tree, like: Tree, num_devices: int) -> Tree:
    """The inverse of `cut`: NumPy arrays, the same in all processes.

    Args:
      state: as a step leaves it.
      axes: from `state_shapes`.
      like: the state in the shapes of the parameters.
      num_devices: how many there are.
    """

    def one(axis: int | None, x: jax.Array, whole: jax.ShapeDtypeStruct) -> np.ndarray:
        if axis is None:
            return np.asarray(x)
        if not is_sharded(whole, num_devices):
            # Indexing `x` itself would compile a program for each shape.
            return np.array(np.asarray(x.addressable_data(0))[0])
        slices = np.asarray(x)
        if jax.process_count() > 1:  # one array after the other: a device never holds all
            slices = multihost_utils.process_allgather(slices, tiled=True)
        return np.array(slices.reshape(-1)[: math.prod(whole.shape)].reshape(whole.shape))

    return _with_axes(one, axes, state, like)
