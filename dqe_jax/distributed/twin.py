"""The twin of `mesh.pmap`: the same programs by `jax.shard_map`, for the day that `jax.pmap` goes.

Its arguments and results are those of `mesh.pmap`, and so are the functions that it maps: they see
their own shard without the axis of devices, and name `mesh.AXIS`. What it computes is the same to
the bit. `config.mapping` chooses between the two for the training step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar, cast

import jax
import numpy as np
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from dqe_jax.distributed import mesh

_In = ParamSpec("_In")
_Out = TypeVar("_Out")


def mapper(name: str) -> Callable[..., mesh.Program[..., Any]]:
    """`mesh.pmap` or `shard_map`, by its name, as `config.mapping` says it."""
    return {"pmap": mesh.pmap, "shard_map": shard_map}[name]


def shard_map(
    fn: Callable[_In, _Out],
    *,
    in_axes: Sequence[object],
    out_axes: object,
    donate_argnums: Sequence[int] = (),
    devices: Sequence[jax.Device] | None = None,
) -> mesh.Program[_In, _Out]:
    """As `mesh.pmap`: axis 0 marks what is sharded, None what is replicated.

    Args:
      fn: of one device.
      in_axes: of its positional arguments, as trees that end where their axes are the same.
      out_axes: of its result, likewise.
      donate_argnums: positions of arguments whose memory the result may take.
      devices: of all processes; None for all there are.
    """
    held = np.asarray(mesh.all_devices() if devices is None else list(devices))
    over = jax.sharding.Mesh(held, (mesh.AXIS,))
    in_axes = tuple(in_axes)
    in_specs, out_specs = _specs(in_axes), _specs(out_axes)

    def of_device(*args: object) -> object:
        own = _with_axes(lambda x: lax.squeeze(x, (0,)), in_axes, args)
        result = cast(Callable[..., _Out], fn)(*own)
        return _with_axes(lambda x: lax.expand_dims(x, (0,)), out_axes, result)

    # Which results are replicated is said by `out_axes`, as `pmap` is told; nothing checks it.
    mapped = jax.shard_map(
        of_device, mesh=over, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )
    placed = functools.partial(jax.tree.map, lambda spec: NamedSharding(over, spec))
    run = jax.jit(
        mapped,
        donate_argnums=tuple(donate_argnums),
        in_shardings=placed(in_specs),
        out_shardings=placed(out_specs),
    )
    if over.is_multi_process:
        return cast(mesh.Program[_In, _Out], _OfProcesses(run, over, in_specs, out_specs))
    return run


class _OfProcesses:
    """A program of several processes, each of which gives and gets the rows of its own devices."""

    def __init__(
        self,
        run: jax.stages.Wrapped,
        over: jax.sharding.Mesh,
        in_specs: tuple[object, ...],
        out_specs: object,
    ):
        self._run, self._over, self._in, self._out = run, over, in_specs, out_specs

    def __call__(self, *args: object) -> object:
        whole = multihost_utils.host_local_array_to_global_array(args, self._over, self._in)
        return multihost_utils.global_array_to_host_local_array(
            self._run(*whole), self._over, self._out
        )

    def lower(self, *args: object) -> jax.stages.Lowered:
        """Its code for arguments of these shapes, which are those of all devices."""
        return self._run.lower(*args)


def _specs(axes: object) -> Any:
    """How arrays of these axes lie on the devices."""
    return jax.tree.map(
        lambda axis: PartitionSpec() if axis is None else PartitionSpec(mesh.AXIS),
        axes,
        is_leaf=lambda x: x is None,
    )


def _with_axes(fn: Callable[[jax.Array], jax.Array], axes: object, tree: object) -> Any:
    """`fn` of all arrays that are sharded; the others as they are."""

    def part(axis: int | None, own: object) -> object:
        return own if axis is None else jax.tree.map(fn, own)

    return jax.tree.map(part, axes, tree, is_leaf=lambda x: x is None)
