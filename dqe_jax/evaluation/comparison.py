"""Compares what several models got for the same queries.

Models are compared only where they were measured alike: on the same data set and split, by the same
protocol, with the reference in the ranking or left out of it, with the same labels, in the same
gallery, and from rankings that go as deep. Intervals are those of `intervals.py`; the difference of
two models is drawn query by query, the same draws for all.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence

import numpy as np
from absl import logging
from etils import epath

from dqe_jax.evaluation.intervals import Interval, intervals
from dqe_jax.evaluation.query_results import SUFFIX, QueryResults, read_results
from dqe_jax.utils.errors import UserError
from dqe_jax.utils.paths import whole_path

PathLike = str | os.PathLike[str]
# Fields that must be equal, and what they are called.
_ALIKE = {
    "dataset": "data set",
    "split": "split",
    "protocol": "protocol",
    "reference": "policy for the reference",
}


@dataclasses.dataclass(frozen=True)
class Line:
    """A model in a table.

    Attributes:
      name: what it is called.
      values: its metrics.
      differences: from those of the first model; None for that one.
    """

    name: str
    values: Mapping[str, Interval]
    differences: Mapping[str, Interval] | None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Models that were measured alike.

    Attributes:
      dataset: name of the data set.
      split: name of the split.
      protocol: name of the protocol.
      queries: how many were compared.
      images: how many were ranked; None where that is not known.
      cut_at: as in `QueryResults`, of all models.
      keys: metrics that all models have, in their order.
      lines: of the models; the first is what the others are compared with.
    """

    dataset: str
    split: str
    protocol: str
    queries: int
    images: int | None
    cut_at: int | None
    keys: tuple[str, ...]
    lines: Sequence[Line]


def compare(results: Sequence[QueryResults]) -> Comparison:
    """Compares models with the first of them.

    Args:
      results: of two models or more, with names of their own.

    Raises:
      UserError: there are fewer, two have one name, they were not measured alike, or they have no
        metric in common.
    """
    if len(results) < 2:
        raise UserError("name two models or more to compare.")
    first, names = results[0], [one.name for one in results]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{names.count(name)} models are called {name!r}: give NAME=PATH.")
    aligned = [first, *(align(one, first) for one in results[1:])]
    keys = tuple(key for key in first.values if all(key in one.values for one in aligned))
    if not keys:
        raise UserError(
            f"{' and '.join(map(repr, names))} have no metric in common: evaluate them alike."
        )
    lines = []
    for one in aligned:
        values = intervals({key: one.values[key] for key in keys}, *first.groups)
        apart = None if one is first else differences(one, first)
        lines.append(Line(one.name, values, apart))
    kept = tuple(key for key in keys if all(key in line.values for line in lines))
    images = next((one.images for one in aligned if one.images is not None), None)
    head = (first.dataset, first.split, first.protocol, len(first.ids))
    return Comparison(*head, images, first.cut_at, kept, lines)


def differences(own: QueryResults, other: QueryResults) -> dict[str, Interval]:
    """By how much a model is above another one, by metric, with intervals.

    Args:
      own: of the model.
      other: of the other model, with its queries in the same order: see `align`.
    """
    apart = {key: own.values[key] - other.values[key] for key in own.values if key in other.values}
    return intervals(apart, *own.groups)


def align(results: QueryResults, first: QueryResults) -> QueryResults:
    """Results with their queries in the order of others.

    Args:
      results: of one model.
      first: of another one.

    Raises:
      UserError: the two were not measured alike.
    """
    check_alike(results, first)
    place = {query: i for i, query in enumerate(results.ids)}
    missing = [query for query in first.ids if query not in place]
    if missing or len(results.ids) != len(first.ids):
        raise UserError(
            f"{results.name!r} has other queries than {first.name!r} ({len(results.ids):,} and "
            f"{len(first.ids):,}): evaluate both on the same data."
        )
    return results.take(np.array([place[query] for query in first.ids], np.int64))


def check_alike(results: QueryResults, first: QueryResults) -> None:
    """Checks that two models were measured alike.

    Raises:
      UserError: they were not; it says what differs.
    """
    for field, words in _ALIKE.items():
        own, other = getattr(results, field), getattr(first, field)
        if own != other:
            raise UserError(
                f"{results.name!r} and {first.name!r} cannot be compared: the {words} is {own!r} "
                f"and {other!r}; evaluate both alike."
            )
    if results.questions != first.questions:
        raise UserError(
            f"{results.name!r} and {first.name!r} cannot be compared: their queries or labels "
            f"differ ({len(results.ids):,} and {len(first.ids):,} queries); evaluate both on the "
            "same data."
        )
    if results.cut_at != first.cut_at:
        cut, depths = results, []
        for one in (results, first):
            whole = one.cut_at is None
            depths.append("whole rankings" if whole else f"lists cut at {one.cut_at:,} images")
            cut = cut if whole else one
        raise UserError(
            f"{results.name!r} and {first.name!r} cannot be compared: they were scored from "
            f"{depths[0]} and from {depths[1]}; evaluate {cut.name!r} by --embeddings, or by "
            "--predictions of whole rankings."
        )
    if None in (results.gallery, first.gallery):
        logging.warning(
            "%r and %r are taken to rank the same gallery: of one of them not all images are "
            "known.",
            *(results.name, first.name),
        )
    elif results.gallery != first.gallery:
        raise UserError(
            f"{results.name!r} and {first.name!r} cannot be compared: they rank other images "
            f"({results.images:,} and {first.images:,}); evaluate both on the same data."
        )


# --- Files ----------------------------------------------------------------------------------------


def find_results(path: PathLike, split: str | None = None) -> epath.Path:
    """The file of results that a user means: see `query_results.py`.

    Args:
      path: the file, or the directory of a run or of its results.
      split: of whose results; None where there are those of one split alone.

    Returns:
      Of a run the newest.

    Raises:
      UserError: there is none, or there are several.
    """
    root = whole_path(path)
    if not root.is_dir():
        if not root.name.endswith(SUFFIX):
            raise UserError(
                f"{root} is no directory and no file of results: name a run, or a file that ends "
                f"in {SUFFIX}, which dqe-jax evaluate writes."
            )
        return root
    found: dict[str, dict[str, epath.Path]] = {}
    for place in (root / "eval", root):
        for file in sorted(place.glob(f"*{SUFFIX}")) if place.is_dir() else ():
            named, _, name = file.name.removesuffix(SUFFIX).partition("-")
            if split is None or named == split:
                found.setdefault(named, {}).setdefault(name, file)
    which = "" if split is None else f" on {split}"
    if not found:
        raise UserError(
            f"{root} has no results{which}: evaluate that run with --split={split or 'test'} first."
        )
    if len(found) > 1:
        raise UserError(f"{root} has results on {', '.join(sorted(found))}: choose by --split=.")
    ((_, files),) = found.items()
    steps = [name for name in files if re.fullmatch(r"\d+", name)]
    if steps:
        return files[max(steps, key=int)]
    if len(files) > 1:
        raise UserError(f"{root} has results of {', '.join(sorted(files))}: name one file of them.")
    return next(iter(files.values()))


def read_models(named: Sequence[tuple[str, PathLike]], split: str | None) -> list[QueryResults]:
    """The results of several models.

    Args:
      named: what each is to be called, "" for what its file says, and its path.
      split: as for `find_results`.

    Raises:
      UserError: as `find_results` and `read_results`.
    """
    models = []
    for name, path in named:
        results = read_results(find_results(path, split))
        models.append(dataclasses.replace(results, name=name or results.name))
    return models
