"""A model in numbers: parameters by part."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from flax.traverse_util import flatten_dict

from dqe_jax.method.arrays import Params
from dqe_jax.models import freeze
from dqe_jax.models.build import parts_of
from dqe_jax.models.settings import ModelConfig


def count_parameters(params: Params, parts: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """Number of parameters of each part, in the order of `parts`; parts without any are left out.

    Args:
      params: of a model, or their shapes.
      parts: as `build.parts_of` gives.
    """
    counts = dict.fromkeys(parts, 0)
    for path, leaf in flatten_dict(params, sep="/").items():
        counts[freeze.part_of(path, parts)] += math.prod(leaf.shape)
    return {part: count for part, count in counts.items() if count}


def parameter_table(params: Params, config: ModelConfig) -> str:
    """Parameters of each part and whether they train, as lines of text.

    Args:
      params: of a model, or their shapes.
      config: `config.model`.
    """
    counts = count_parameters(params, parts_of(config.backbone))
    frozen = set(config.frozen) & set(counts)
    rows = [(p, f"{n:,}", "frozen" if p in frozen else "trains") for p, n in counts.items()]
    training = sum(n for part, n in counts.items() if part not in frozen)
    rows.append(("total", f"{sum(counts.values()):,}", f"{training:,} train"))
    widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
    lines = [f"  {a:<{widths[0]}}  {b:>{widths[1]}}  {c}" for a, b, c in rows]
    return "\n".join(["Parameters:", *lines])
