"""Tensors to parameters and back, by the rules of a layout; strict in both directions."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from dqe_jax.method.arrays import Params
from dqe_jax.models.weights.rules import Layout, Rule, layouts_of
from dqe_jax.models.weights.sizes import PretrainedSizes
from dqe_jax.models.weights.source import Source
from dqe_jax.utils.errors import UserError

SHOWN = 8  # names listed in an error


def layout_of(source: Source, backbone: str, sizes: PretrainedSizes) -> Layout:
    """The layout that a source is in; reads no tensor.

    Args:
      source: opened weights.
      backbone: "clip", "siglip" or "blip2".
      sizes: of the model.

    Raises:
      UserError: tensors are missing or unused; the message lists them.
    """
    layout = min(layouts_of(sizes), key=lambda one: len(_needed(one) - set(source.files)))
    needed = _needed(layout)
    unused = [
        name
        for name in source.files
        if name not in needed and not any(fnmatch.fnmatch(name, p) for p in layout.ignored)
    ]
    problems = [
        f"{len(names)} tensors {word}: {listed(names)}"
        for names, word in ((needed - set(source.files), "are missing"), (unused, "are not used"))
        if names
    ]
    if problems:
        raise UserError(
            f"weights {source.origin} do not fit config.model.{backbone} in the layout of "
            f"{layout.name}: {'; '.join(problems)}."
        )
    return layout


def read_backbone(source: Source, backbone: str, sizes: PretrainedSizes) -> Params:
    """The backbone's parameters of a source: float32, layers not scanned.

    Args:
      source: opened weights.
      backbone: "clip", "siglip" or "blip2".
      sizes: of the model.

    Raises:
      UserError: as of `layout_of`, or a tensor is no weight. Sizes are checked by `fit`, which
        knows the model.
    """
    layout = layout_of(source, backbone, sizes)
    flat = {}
    with source.opened() as read:
        for rule in layout.rules:
            tensors = [read(name) for name in rule.names]
            try:
                flat[rule.path] = to_parameter(rule, tensors)
            except ValueError as error:
                shapes = ", ".join(str(tensor.shape) for tensor in tensors)
                raise UserError(
                    f"weights {source.origin}: {', '.join(rule.names)} cannot become {rule.path}: "
                    f"wrong shape {shapes}."
                ) from error
    return unflatten_dict(flat, sep="/")


def _needed(layout: Layout) -> set[str]:
    return {name for rule in layout.rules for name in rule.names}


def listed(names: Iterable[str]) -> str:
    """The first few names, sorted, and how many more there are."""
    names = sorted(names)
    more = f", and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def to_parameter(rule: Rule, tensors: list[np.ndarray]) -> np.ndarray:
    """The parameter of a rule, from its tensors.

    Raises:
      ValueError: their number of axes is not what the rule says.
    """
    for tensor in tensors:
        if tensor.shape[: rule.lead] != (1,) * rule.lead:
            raise ValueError(f"leading axes of {tensor.shape}")
    tensors = [tensor.reshape(tensor.shape[rule.lead :]) for tensor in tensors]
    x = np.concatenate(tensors) if len(tensors) > 1 else tensors[0]
    if rule.kind == "linear":
        out, inside = x.shape
        return np.ascontiguousarray(x.T.reshape(inside, out))
    if rule.kind == "patches":
        x = x.transpose(2, 3, 1, 0)
        return np.ascontiguousarray(x.reshape(-1, x.shape[-1]))
    return x


def to_tensors(rule: Rule, x: np.ndarray, patch_size: int) -> dict[str, np.ndarray]:
    """The tensors of a rule, from its parameter: the inverse of `to_parameter`."""
    if rule.kind == "linear":
        x = x.T
    if rule.kind == "patches":
        x = x.reshape(patch_size, patch_size, -1, x.shape[-1]).transpose(3, 2, 0, 1)
    parts = np.split(x, len(rule.names)) if len(rule.names) > 1 else [x]
    lead = (1,) * rule.lead
    return {
        name: np.array(part.reshape(lead + part.shape), order="C")
        for name, part in zip(rule.names, parts)
    }


def write_backbone(params: Params, sizes: PretrainedSizes) -> dict[str, np.ndarray]:
    """Tensors in the Hugging Face layout, of a backbone's parameters that are not scanned.

    Parameters that the layout does not have (the composer of `clip`) are left out.
    """
    layout = layouts_of(sizes)[0]
    flat = flatten_dict(params, sep="/")
    tensors: dict[str, np.ndarray] = {}
    for rule in layout.rules:
        x = np.asarray(flat[rule.path], np.float32)
        tensors |= to_tensors(rule, x, sizes.vision.patch_size)
    return tensors | {name: np.zeros(shape, np.float32) for name, shape in layout.blank.items()}


def fit(
    params: Params,
    shapes: Params,
    origin: str,
    grid: tuple[int, int] | None = None,
    antialias: bool = False,
) -> dict[str, np.ndarray]:
    """Parameters by path as a model wants them, with positions interpolated to its image size.

    Args:
      params: nested dict of arrays.
      shapes: what the model has at each of these paths, as `jax.ShapeDtypeStruct`s; paths that
        `params` does not have are left to the model.
      origin: where the parameters come from, for errors.
      grid: rows and columns of the patches of an image; None for a square.
      antialias: see `interpolate_positions`.

    Raises:
      UserError: parameters that the model does not have, or that are of another shape.
    """
    flat = flatten_dict(params, sep="/")
    unknown = set(flat) - set(shapes)
    if unknown:
        raise UserError(f"weights {origin} hold what the model does not: {listed(unknown)}.")
    fitted, wrong = {}, []
    for path, x in flat.items():
        want = tuple(shapes[path].shape)
        x = np.asarray(x)
        if path == "vision/positions" and x.ndim == 2:
            lead = int("vision/class_token" in flat)
            side = math.isqrt(max(want[0] - lead, 0))
            if _is_square(len(x) - lead):
                x = interpolate_positions(x, grid or (side, side), lead, antialias)
        if x.shape != want:
            wrong.append(f"{path} is {list(x.shape)}, not {list(want)}")
        fitted[path] = x
    if wrong:
        raise UserError(f"weights {origin} are of another size: {listed(wrong)}.")
    return fitted


def _is_square(count: int) -> bool:
    return count > 0 and math.isqrt(count) ** 2 == count


def interpolate_positions(
    positions: np.ndarray, grid: tuple[int, int], lead: int = 1, antialias: bool = False
) -> np.ndarray:
    """Position embeddings `[lead + g * g, D]` for another grid: `[lead + rows * columns, D]`.

    The rows of the first `lead` tokens, such as a class token, stay. The grid is interpolated
    bicubically as PyTorch does it (kernel with a = -0.75, pixel centres aligned, no antialiasing),
    which is what `transformers` uses for `interpolate_pos_encoding`; with `antialias` as it does it
    with antialiasing (a = -0.5, a kernel as wide as the points lie apart).
    """
    old = math.isqrt(len(positions) - lead)
    if grid == (old, old):
        return positions
    matrix = smooth_bicubic_matrix if antialias else bicubic_matrix
    down, across = (matrix(old, new) for new in grid)
    patches = positions[lead:].reshape(old, old, -1)
    patches = np.einsum("ai,bj,ijd->abd", down, across, patches)
    patches = patches.reshape(-1, patches.shape[-1])
    out = np.concatenate([positions[:lead], patches])
    return out.astype(positions.dtype)


def smooth_bicubic_matrix(old: int, new: int) -> np.ndarray:
    """As `bicubic_matrix` with antialiasing: weights `[new, old]`, which sum to 1 at the border."""
    a, wide = -0.5, max(old / new, 1.0)
    centre = (np.arange(new) + 0.5) * old / new
    first = np.maximum((centre - 2 * wide + 0.5).astype(int), 0)
    last = np.minimum((centre + 2 * wide + 0.5).astype(int), old)
    points = np.arange(old)
    x = np.abs((points + 0.5 - centre[:, None]) / wide)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((x - 5) * x + 8) * x * a - 4 * a
    matrix = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    matrix = np.where((points >= first[:, None]) & (points < last[:, None]), matrix, 0.0)
    return matrix / matrix.sum(1, keepdims=True)


def bicubic_matrix(old: int, new: int) -> np.ndarray:
    """Weights `[new, old]` of each old point in each new one; beyond the border it repeats."""
    a = -0.75
    centre = (np.arange(new) + 0.5) * old / new - 0.5
    first = np.floor(centre).astype(int) - 1
    matrix = np.zeros((new, old))
    for k in range(4):
        x = np.abs(centre - (first + k))
        near = ((a + 2) * x - (a + 3)) * x * x + 1
        far = ((x - 5) * x + 8) * x * a - 4 * a
        place = np.clip(first + k, 0, old - 1)
        np.add.at(matrix, (np.arange(new), place), np.where(x <= 1, near, far))
    return matrix
