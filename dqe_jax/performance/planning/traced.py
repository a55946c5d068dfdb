"""Facts from a traced program, before any compiler: FLOP with loops included, large arrays."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jax.extend.core import Jaxpr, JaxprEqn


@dataclasses.dataclass(frozen=True)
class Arrays:
    """Arrays of one shape that a program computes.

    Attributes:
      shape: `bfloat16[24,16,257,257]`.
      bytes: of one.
      count: how many, those of a loop in each round.
      module: of the model, where most of them are computed.
    """

    shape: str
    bytes: int
    count: int
    module: str


def matrix_flops(jaxpr: Jaxpr) -> float:
    """FLOP of the matrix products; a multiplication with an addition counts as two.

    What is recomputed counts again. XLA's own count takes a loop for one round of it.

    Args:
      jaxpr: of a traced program; of a mapped one, the result is that of one device.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            operand: Any = equation.invars[0].aval
            result: Any = equation.outvars[0].aval
            inner = math.prod(operand.shape[axis] for axis in contracted)
            total += 2.0 * inner * math.prod(result.shape)
            continue
        parts = [matrix_flops(part) for part in _parts(equation)]
        if equation.primitive.name == "cond":
            total += max(parts, default=0.0)
        else:
            total += sum(parts) * _rounds(equation)
    return total


def largest_arrays(jaxpr: Jaxpr, number: int = 3) -> tuple[Arrays, ...]:
    """The shapes that take most bytes in all, of what a program computes on one device.

    The compiler fuses some of them away and frees others: a hint, not a count of memory.

    Args:
      jaxpr: of a traced program.
      number: of shapes.
    """
    counts: dict[str, int] = collections.Counter()
    modules: dict[str, dict[str, int]] = collections.defaultdict(collections.Counter)
    sizes: dict[str, int] = {}

    def visit(inner: Jaxpr, times: int) -> None:
        for equation in inner.eqns:
            parts = list(_parts(equation))
            for part in parts:
                visit(part, times * _rounds(equation))
            if parts:
                continue
            for variable in equation.outvars:
                aval: Any = variable.aval
                if not getattr(aval, "shape", None) or not hasattr(aval.dtype, "itemsize"):
                    continue
                name = f"{aval.dtype.name}[{','.join(map(str, aval.shape))}]"
                sizes[name] = math.prod(aval.shape) * aval.dtype.itemsize
                counts[name] += times
                modules[name][_module_of(equation)] += times

    visit(jaxpr, 1)
    order = sorted(counts, key=lambda name: -sizes[name] * counts[name])[:number]
    return tuple(
        Arrays(name, sizes[name], counts[name], max(modules[name], key=modules[name].__getitem__))
        for name in order
    )


def _parts(equation: JaxprEqn) -> Iterator[Jaxpr]:
    """The programs inside an operation."""
    for value in equation.params.values():
        for one in value if isinstance(value, (tuple, list)) else (value,):
            inner: Any = getattr(one, "jaxpr", one)
            if hasattr(inner, "eqns"):
                yield inner


def _rounds(equation: JaxprEqn) -> int:
    """How often an operation runs what is inside it; 1 where that is not known."""
    return equation.params["length"] if equation.primitive.name == "scan" else 1


def _module_of(equation: JaxprEqn) -> str:
    """`backbone/vision`: the module of the model that computes an array."""
    names = str(equation.source_info.name_stack).replace("(", "/").replace(")", "").split("/")
    kept = [n for n in names if n and n not in ("jvp", "transpose", "vmap", "checkpoint", "DQE")]
    return "/".join(name.split(".")[0] for name in kept[:3])
