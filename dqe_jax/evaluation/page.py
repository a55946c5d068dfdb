"""`report.html`: what a run found, to be looked at query by query in any browser.

The page is one file that asks no host for anything. It holds the metrics with their confidence
intervals, every query with its attribute weights, its reference, its target and the ten best
images, and each image once, as a small JPEG. A second run can stand beside the first: its ranked
lists are read from where it was evaluated.
"""

from __future__ import annotations

import base64
import html
import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from absl import logging
from etils import epath
from PIL import Image

from dqe_jax.data.splits import Split
from dqe_jax.evaluation import metrics, protocols
from dqe_jax.evaluation.comparison import align, differences, find_results
from dqe_jax.evaluation.gain import gain_line
from dqe_jax.evaluation.intervals import Interval, intervals
from dqe_jax.evaluation.query_results import SUFFIX, QueryResults, make_results, read_results
from dqe_jax.evaluation.report import results_of
from dqe_jax.utils.errors import UserError
from dqe_jax.utils.files import cannot_write, read_json
from dqe_jax.utils.paths import whole_path

if TYPE_CHECKING:
    from dqe_jax.evaluation.evaluator import EmbeddingEvaluator, Result

FILE = "report.html"
SHOWN = 10
THUMBNAIL = 80  # pixels of the longer side
_QUALITY = 70
_MARKS = {"": 0, "target": 1, "valid": 2, "reference": 3}
_KIND_KEYS = 3  # headline metrics that are shown by kind


class Compared:
    """What another run found on the same split.

    Attributes:
      name: what it is called.
      rows: int `[Q, K]`, gallery rows, -1 where a list ends.
      results: what each query got; None for a split without labels.
    """

    def __init__(self, name: str, rows: np.ndarray, results: QueryResults | None):
        self.name, self.rows, self.results = name, rows, results


def read_compared(
    directory: str | os.PathLike[str], evaluator: EmbeddingEvaluator, dataset: str
) -> Compared:
    """Another run, from the files of its newest evaluation on a split.

    Args:
      directory: of the run, or of its results; or a file of results.
      evaluator: by which the first run is evaluated.
      dataset: name of the data set.

    Raises:
      UserError: it was not evaluated on this split, or not in the same way.
    """
    split, known = evaluator.split, evaluator.labelled
    results = None
    try:
        if len(known):
            path = find_results(directory, split.name)
            results, stem = read_results(path), path.name.removesuffix(SUFFIX)
            own = make_results(
                split,
                evaluator.protocol,
                {},
                known,
                name="this one",
                dataset=dataset,
                pools=evaluator.pools,
            )
            results = align(results, own)
        else:
            path, stem = _newest(directory, split.name)
    except UserError as error:
        raise UserError(f"--report_against: {error}") from error
    ranked = path.parent / f"{stem}.ranked.json"
    lists = read_json(ranked, dict, "evaluate that run again")
    row_of = {image: row for row, image in enumerate(split.gallery.ids)}
    rows = np.full((len(split.queries), protocols.TOP_K), -1, np.int32)
    for i, query in enumerate(split.queries.ids):
        own_list = lists.get(query)
        if not isinstance(own_list, list) or not all(image in row_of for image in own_list):
            raise UserError(f"{ranked} lacks query {query!r}; evaluate that run again.")
        rows[i, : len(own_list)] = [row_of[image] for image in own_list[: protocols.TOP_K]]
    name = f"{whole_path(directory).name}, {stem}" if results is None else results.name
    return Compared(name, rows, results)


def _newest(directory: str | os.PathLike[str], split: str) -> tuple[epath.Path, str]:
    """The newest ranked lists of a split without labels, and their name without its end."""
    root, end = whole_path(directory), ".ranked.json"
    found = [
        (int(match[1]), path)
        for place in (root / "eval", root)
        for path in (place.glob(f"{split}-*{end}") if place.is_dir() else ())
        if (match := re.fullmatch(rf"{split}-(\d+){re.escape(end)}", path.name))
    ]
    if not found:
        raise UserError(
            f"{root} has no results on {split}: evaluate that run with --split={split} first."
        )
    path = max(found, key=lambda one: one[0])[1]
    return path, path.name.removesuffix(end)


def write_page(
    evaluator: EmbeddingEvaluator,
    result: Result,
    directory: epath.Path,
    *,
    run: str,
    dataset: str,
    step: int | None,
    attributes: Sequence[str],
    against: Compared | None = None,
) -> epath.Path:
    """Writes `report.html`.

    Args:
      evaluator: that gave the result, of a split with its images.
      result: of its `run`, with baselines.
      directory: where it goes.
      run: what the run is called.
      dataset: name of the data set.
      step: of the checkpoint; None for a file of embeddings.
      attributes: names of the model's attributes; none without attribute weights.
      against: another run on the same split.

    Returns:
      Its path.

    Raises:
      UserError: it cannot be written.
    """
    split, name = cast(Split, evaluator.split), run if step is None else f"{run}, step {step}"
    rows = metrics.pad_lists(result.rows, SHOWN)
    lists = [rows] if against is None else [rows, against.rows]
    images = _Images(split)
    gain = gain_line(result.composition_gain) if result.composition_gain else ""
    content: dict[str, Any] = {
        "title": f"{run}: {split.name} of {dataset}",
        "about": f"{'Embeddings' if step is None else f'Step {step}'}; {split.coverage}.",
        "run": name if against is not None else "value",
        "other": against and against.name,
        "note": " ".join(filter(None, [f"{evaluator.protocol.note}. {_INTERVALS}", gain])),
        "depth": min(found.shape[1] for found in lists),
        "labelled": bool(len(evaluator.labelled)),
        "attributes": list(attributes),
        **_figures(evaluator, result, against),
    }
    kinds = sorted({kind for own in split.queries.kinds for kind in own})
    content["kinds"] = kinds
    content["queries"] = [
        _query(split, i, lists, kinds, images, result.attribute_weights if attributes else None)
        for i in range(len(split.queries))
    ]
    content["names"] = images.names
    path = directory / FILE
    try:
        path.write_text(_filled(content, images.pictures()), encoding="utf-8")
    except OSError as error:
        raise cannot_write(directory, error) from error
    logging.info("Report of %d queries: %s", len(split.queries), path)
    return path


_INTERVALS = (
    "Intervals are bootstrap percentiles over the reference images, with all queries of each; they "
    "tell how much a figure depends on the choice of queries, not how runs with other seeds differ"
    "."
)


def _filled(content: Mapping[str, Any], pictures: Sequence[str]) -> str:
    """The page with its data."""
    template = (Path(__file__).parent / "report_page.html").read_text(encoding="utf-8")
    # Inside a script nothing may look like its end.
    text = json.dumps(content, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    parts = {"@TITLE@": html.escape(content["title"]), "@DATA@": text}
    parts["@PICTURES@"] = "\n".join(pictures)
    # Not one after the other: a text of a query may hold the name of a place.
    return re.sub("@(?:TITLE|DATA|PICTURES)@", lambda match: parts[match[0]], template)


# --- Queries --------------------------------------------------------------------------------------


class _Images:
    """The gallery images that the page shows, numbered in the order of first mention."""

    def __init__(self, split: Split):
        self._split = split
        self._numbers: dict[int, int] = {}

    def number(self, row: int) -> int:
        """The number of a gallery row; -1 for none."""
        return self._numbers.setdefault(row, len(self._numbers)) if row >= 0 else -1

    @property
    def names(self) -> list[str]:
        return [self._split.gallery.ids[row] for row in self._numbers]

    def pictures(self) -> list[str]:
        return [thumbnail(self._split.gallery[row]) for row in self._numbers]


def thumbnail(image: np.ndarray) -> str:
    """An image uint8 `[H, W, 3]` as a small JPEG in base64."""
    picture = Image.fromarray(np.ascontiguousarray(image))
    picture.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.BICUBIC, reducing_gap=2.0)
    encoded = io.BytesIO()
    picture.save(encoded, "JPEG", quality=_QUALITY)
    return base64.b64encode(encoded.getvalue()).decode()


def _query(
    split: Split,
    i: int,
    lists: Sequence[np.ndarray],
    kinds: Sequence[str],
    images: _Images,
    weights: np.ndarray | None,
) -> list[Any]:
    """A query as the page reads it, in a list to be short; the page says what is where."""
    queries = split.queries
    reference, target = int(queries.reference[i]), int(queries.target[i])
    relevant = {int(row) for row in queries.relevant[i]}
    found = []
    for rows in lists:
        ranked = [int(row) for row in rows[i] if row >= 0]
        marks = [
            "target"
            if row == target
            else "reference"
            if row == reference
            else "valid"
            if row in relevant
            else ""
            for row in ranked[:SHOWN]
        ]
        found.append(
            (
                ranked.index(target) + 1 if target in ranked else 0,
                [images.number(row) for row in ranked[:SHOWN]],
                "".join(str(_MARKS[mark]) for mark in marks),
                next((at for at, row in enumerate(ranked, 1) if row in relevant), 0),
            )
        )
    rank, numbers, marked, first = found[0]
    line: list[Any] = [
        queries.ids[i],
        queries.texts[i],
        [kinds.index(kind) for kind in queries.kinds[i]],
        images.number(reference),
        images.number(target),
        rank,
        numbers,
        marked,
        [] if weights is None else [round(100 * float(x)) for x in np.nan_to_num(weights[i])],
        first,
    ]
    for other in found[1:]:
        line += other[:3]
    return line


# --- Figures --------------------------------------------------------------------------------------


def _figures(
    evaluator: EmbeddingEvaluator, result: Result, against: Compared | None
) -> dict[str, Any]:
    """The metrics with intervals, in all and by kind; and the baselines."""
    known = evaluator.labelled
    if not len(known):
        return {"metrics": [], "groups": [], "baselines": []}
    queries = evaluator.split.queries.take(known)
    columns = evaluator.protocol.columns(result.metrics)
    results = results_of(evaluator, result, run="", dataset="", step=None)
    assert results is not None, "there are labels"
    own = results.values
    reference, strata = results.groups
    beside = None if against is None else against.results
    other = {} if beside is None else {k: beside.values[k] for k in columns if k in beside.values}

    def of(values: Mapping[str, np.ndarray], members: np.ndarray) -> dict[str, list[float]]:
        chosen = {key: value[members] for key, value in values.items()}
        found = intervals(chosen, reference[members], strata[members])
        return {key: _listed(interval) for key, interval in found.items()}

    everyone = np.ones(len(queries), bool)
    whole, others = (of(x, everyone) for x in (own, other))
    apart = {}
    if beside is not None:
        apart = {key: _listed(one) for key, one in differences(results, beside).items()}
    listed = [
        {
            "key": key,
            "value": result.metrics[key],
            "interval": whole.get(key),
            "other": others.get(key),
            "difference": apart.get(key),
        }
        for key in columns
    ]
    keys = [key for key in columns if key in own][:_KIND_KEYS]
    groups = []
    for kind, members in metrics.group_members(queries.kinds).items():
        few = {key: own[key] for key in keys}
        line = {"name": kind, "queries": int(members.sum()), "values": of(few, members)}
        if against is not None:
            line["other"] = of({key: other[key] for key in keys if key in other}, members)
        groups.append(line)
    baselines = [
        {
            "name": name.replace("_", " "),
            "values": {key: values[key] for key in columns if key in values},
        }
        for name, values in (result.baselines or {}).items()
    ]
    return {"metrics": listed, "groups": groups, "baselines": baselines}


def _listed(interval: Interval) -> list[float]:
    return [round(x, 5) for x in (interval.value, interval.low, interval.high)]
