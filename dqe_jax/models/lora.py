"""LoRA (Hu et al., ICLR 2022): small trained matrices beside kernels that do not train.

A kernel `W [D, E]` of a frozen part gets two matrices, `A [D, r]` and `B [r, E]`, and its layer
gives `x W + (alpha / r) (x A) B`. `B` starts at zero, so that a model starts as it was. The product
`A B` is never made in a step, nor is a gradient of `W`. Kernels that hold several projections side
by side (`qkv`) get matrices for each projection that is asked for.

Adapters are parameters beside the kernel, `lora_a_<projection>` and `lora_b_<projection>`, and form
the part "lora" of a model. `begin` makes them, `computed` lets the layers of a model use
them, whatever its backbone is, and `merged` adds them to their kernels.
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import math
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from dqe_jax.method.arrays import Array, Params
from dqe_jax.models import freeze
from dqe_jax.models.settings import LoraConfig
from dqe_jax.utils.errors import UserError

_T = TypeVar("_T")
A, B = "lora_a_", "lora_b_"
# The projections that lie side by side in a kernel, by the name of its layer.
FUSED = {"qkv": ("query", "key", "value"), "key_value": ("key", "value")}
# A layer of a stack, `layers_3` or `image_blocks_3`, and what is before it.
_NUMBERED = re.compile(r"(?P<stack>.*(?:layers|blocks))_(?P<number>\d+)/.*")
# A stack that is scanned: its kernels have a leading axis of layers.
_SCANNED = re.compile(r".*/layers/.*")


def projections_of(layer: str) -> tuple[str, ...]:
    """The projections in the kernel of a layer of this name: several, or the layer itself."""
    return FUSED.get(layer, (layer,))


def find_targets(
    shapes: Mapping[str, Any],
    config: LoraConfig,
    frozen: Sequence[str],
    parts: Mapping[str, Sequence[str]],
) -> dict[str, tuple[str, ...]]:
    """The layers that get adapters, with the projections that do.

    Args:
      shapes: parameters of a model by path, or their shapes.
      config: `config.model.lora`.
      frozen: `config.model.frozen`.
      parts: as `build.parts_of` gives.

    Raises:
      UserError: adapters are asked for and no kernel of a frozen part is meant.
    """
    if not config.rank:
        return {}
    depths: dict[str, int] = {}
    for path in shapes:
        if found := _NUMBERED.fullmatch(path):
            depths[found["stack"]] = max(depths.get(found["stack"], 0), int(found["number"]) + 1)
    targets = {}
    for path, x in shapes.items():
        layer, _, leaf = path.rpartition("/")
        axes = 3 if _SCANNED.fullmatch(path) else 2
        if leaf != "kernel" or len(x.shape) != axes:
            continue
        if config.layers:
            found = _NUMBERED.fullmatch(path)
            if not found or int(found["number"]) < depths[found["stack"]] - config.layers:
                continue
        place, _, name = layer.removeprefix("backbone/").rpartition("/")
        meant = tuple(
            own
            for own in projections_of(name)
            if any(_matches(f"{place}/{own}", pattern) for pattern in config.targets)
        )
        if meant and freeze.part_of(path, parts) in frozen:
            targets[layer] = meant
    if not targets:
        raise UserError(
            f"config.model.lora.targets is {config.targets!r}: no kernel of the frozen parts, "
            f"config.model.frozen = {tuple(frozen)!r}, has such a name; name a part with "
            "attention there, or other targets."
        )
    return targets


def _matches(path: str, pattern: str) -> bool:
    """Whether a projection is meant: by its name alone, or by its path where there is a slash."""
    own = path if "/" in pattern else path.rpartition("/")[2]
    return fnmatch.fnmatchcase(own, pattern)


def begin(
    flat: Mapping[str, Array], targets: Mapping[str, Sequence[str]], rank: int, key: jax.Array
) -> dict[str, Array]:
    """Adapters of layers, by path, that change nothing yet; float32.

    Args:
      flat: parameters of the model by path.
      targets: as `find_targets` gives them.
      rank: `r`.
      key: of what is random: `A`, uniform up to `1 / sqrt(D)` as PEFT draws it.
    """
    made: dict[str, Array] = {}
    for layer, projections in targets.items():
        *stack, inside, outside = flat[f"{layer}/kernel"].shape
        width = outside // len(projections_of(layer.rpartition("/")[2]))
        bound = 1 / math.sqrt(inside)
        for own in projections:
            path = f"{layer}/{A}{own}"
            # By its name: it does not depend on which others there are.
            draw = jax.random.fold_in(key, zlib.crc32(path.encode()))
            made[path] = jax.random.uniform(
                draw, (*stack, inside, rank), minval=-bound, maxval=bound
            )
            made[f"{layer}/{B}{own}"] = jnp.zeros((*stack, rank, width))
    return made


def computed(scale: float) -> contextlib.AbstractContextManager[None]:
    """A context in which layers of a model use the adapters among their parameters.

    Args:
      scale: `alpha / r`; 0 for a model without adapters.
    """
    if not scale:
        return contextlib.nullcontext()
    return nn.intercept_methods(functools.partial(_with_adapter, scale))


def with_adapters(method: Callable[..., _T]) -> Callable[..., _T]:
    """A method of a module whose layers use their adapters, scaled by its `lora_scale`."""

    @functools.wraps(method)
    def adapted(self: Any, *args: Any, **kwargs: Any) -> _T:
        with computed(self.lora_scale):
            return method(self, *args, **kwargs)

    return adapted


def _with_adapter(
    scale: float,
    call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    context: nn.module.InterceptorContext,
) -> Any:
    y = call(*args, **kwargs)
    layer = context.module
    if not isinstance(layer, nn.Dense) or context.method_name != "__call__":
        return y
    names = projections_of(str(layer.name))
    own = [name for name in names if layer.has_variable("params", A + name)]
    if not own:
        return y
    inner = jnp.concatenate([layer.get_variable("params", A + name) for name in own], axis=1)
    outer = block_rows({name: layer.get_variable("params", B + name) for name in own}, names)
    x = args[0].astype(y.dtype)
    return y + ((x @ inner.astype(y.dtype)) @ outer.astype(y.dtype)) * jnp.asarray(scale, y.dtype)


def block_rows(held: Mapping[str, Array], names: Sequence[str]) -> Array:
    """The matrices `B [r, E / n]` of some of n projections as one, `[r * number held, E]`.

    Each has rows of its own and stands in the columns of its projection; the rest is zero.
    """
    rows = []
    for name, x in held.items():
        before = names.index(name) * x.shape[-1]
        after = (len(names) - 1) * x.shape[-1] - before
        rows.append(jnp.pad(x, ((0, 0), (before, after))))
    return jnp.concatenate(rows, axis=0)


def is_adapter(path: str) -> bool:
    """Whether a parameter is part of an adapter."""
    return path.rpartition("/")[2].startswith((A, B))


def merged(params: Params, scale: float) -> Params:
    """Parameters without adapters, which are added to their kernels; those become float32.

    Args:
      params: of the whole model, NumPy arrays.
      scale: `alpha / r`.
    """
    flat = flatten_dict(params, sep="/")
    out = {path: x for path, x in flat.items() if not is_adapter(path)}
    for path, a in flat.items():
        layer, _, leaf = path.rpartition("/")
        if not leaf.startswith(A):
            continue
        own, names = leaf.removeprefix(A), projections_of(layer.rpartition("/")[2])
        b, kernel = flat[f"{layer}/{B}{own}"], np.array(out[f"{layer}/kernel"], np.float32)
        start = names.index(own) * b.shape[-1]
        part = kernel[..., start : start + b.shape[-1]]
        # In float64, so that the processor does not matter.
        change = scale * (np.asarray(a, np.float64) @ np.asarray(b, np.float64))
        kernel[..., start : start + b.shape[-1]] = part + change
        out[f"{layer}/kernel"] = kernel
    return unflatten_dict(out, sep="/")
