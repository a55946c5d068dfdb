"""A tower of images in two parts: what enters its last layers, and what they make of it.

Where adapters are in the last layers alone, the layers below never change: what leaves them can be
computed once and stored. Any backbone whose tower is one `encoder.Stack` can be cut so, without a
line of its own: the layers are watched, and later entered in the middle.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from flax import linen as nn

from dqe_jax.method.arrays import Array
from dqe_jax.models.encoder import EncoderLayer, Stack

# The state of an image that is cut so: tokens `[B, T, D]`.
ENTERING = "entering"


@contextlib.contextmanager
def watched(upper: int) -> Iterator[dict[tuple[str, ...], Array]]:
    """A context that notes what enters the last `upper` layers of each stack, by its path."""
    caught: dict[tuple[str, ...], Array] = {}
    with nn.intercept_methods(functools.partial(_watch, upper, caught)):
        yield caught


def resumed(upper: int, tokens: Array) -> contextlib.AbstractContextManager[None]:
    """A context in which stacks begin with their last `upper` layers, and take `tokens`.

    What comes before is not computed: nothing depends on it.
    """
    return nn.intercept_methods(functools.partial(_resume, upper, tokens))


def _place(layer: nn.Module, method: str, upper: int) -> int | None:
    """The place of a layer among the last ones, negative below; None for any other module."""
    stack = layer.parent
    if not isinstance(layer, EncoderLayer) or not isinstance(stack, Stack) or method != "__call__":
        return None
    number = str(layer.name).rpartition("_")[2]
    return int(number) - max(0, stack.depth - upper) if number.isdigit() else None


def _watch(
    upper: int,
    caught: dict[tuple[str, ...], Array],
    call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    context: nn.module.InterceptorContext,
) -> Any:
    layer = context.module
    if _place(layer, context.method_name, upper) == 0 and isinstance(layer.parent, Stack):
        caught.setdefault(layer.parent.path, args[0])
    return call(*args, **kwargs)


def _resume(
    upper: int,
    tokens: Array,
    call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    context: nn.module.InterceptorContext,
) -> Any:
    layer = context.module
    place = _place(layer, context.method_name, upper)
    if place is None or place > 0:
        return call(*args, **kwargs)
    # They stand for what the layer below makes: the stack also gives that to others. The first
    # layer of all has none below.
    enters = tokens.astype(args[0].dtype)
    if place < 0:
        return enters if place == -1 else args[0]
    return call(enters, *args[1:], **kwargs)
