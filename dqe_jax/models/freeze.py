"""Which parameters train: parts of a model by name, and splitting parameters by them."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence

from flax.traverse_util import flatten_dict, unflatten_dict

from dqe_jax.method.arrays import Params
from dqe_jax.utils.errors import UserError

# The part of adapters (`lora.py`).
ADAPTERS = "lora"


def part_of(path: str, parts: Mapping[str, Sequence[str]]) -> str:
    """The part that a parameter belongs to.

    Args:
      path: of the parameter, `backbone/vision/positions`.
      parts: patterns of paths by part, as `build.parts_of` gives.

    Raises:
      ValueError: it belongs to none.
    """
    for part, patterns in parts.items():
        if any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns):
            return part
    raise ValueError(f"parameter {path} belongs to no part of {', '.join(parts)}")


def check_frozen(
    frozen: Sequence[str], parts: Mapping[str, Sequence[str]], *, adapters: bool = False
) -> None:
    """Raises a `UserError` if `frozen` names an unknown part, or leaves nothing to train.

    Args:
      frozen: `config.model.frozen`.
      parts: as `build.parts_of` gives; adapters are one of them, and always train.
      adapters: whether there are any.
    """
    own = [part for part in parts if part != ADAPTERS]
    for name in frozen:
        if name not in own:
            raise UserError(
                f"config.model.frozen names {name!r}: the parts of this model are {', '.join(own)}."
            )
    if set(frozen) == set(own) and not adapters:
        raise UserError("config.model.frozen names every part of the model: nothing would train.")


def split(
    params: Params, frozen: Sequence[str], parts: Mapping[str, Sequence[str]]
) -> tuple[Params, Params]:
    """Parameters that train and parameters that do not, as trees without the others' branches."""
    flat = flatten_dict(params, sep="/")
    held = {path for path in flat if frozen and part_of(path, parts) in frozen}
    training = {path: x for path, x in flat.items() if path not in held}
    frozen_ones = {path: flat[path] for path in flat if path in held}
    return unflatten_dict(training, sep="/"), unflatten_dict(frozen_ones, sep="/")


def merge(one: Params, other: Params) -> Params:
    """What `split` took apart, put together again."""
    flat = flatten_dict(one, sep="/") | flatten_dict(other, sep="/")
    return unflatten_dict(flat, sep="/")
