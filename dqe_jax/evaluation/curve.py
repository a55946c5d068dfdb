"""Points of a run's curve: what each query of a split got at a step, kept in files of their own.

`curve/<split>-<step>.npz` holds the headline metrics of every query with labels, so that two runs
can be compared query by query.
"""

from __future__ import annotations

import dataclasses
import io
import re
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from dqe_jax.evaluation.evaluator import Result, RetrievalEvaluator
from dqe_jax.evaluation.intervals import query_values, strata_of
from dqe_jax.utils.errors import UserError, reason_of
from dqe_jax.utils.files import write_at_once

FOLDER = "curve"
JOINED = "; "  # between the kinds of a query


@dataclasses.dataclass(frozen=True)
class Point:
    """What `n` queries got at a step.

    Attributes:
      step: of the run.
      epochs: how often the run had seen its queries by then.
      values: float64 `[n]` by metric, NaN for a query that does not count in it.
      reference: int `[n]`, the reference image of each query.
      strata: int `[n]`, as `intervals.strata_of` gives it.
      kinds: of change, `n` names; several of a query are joined by "; ". None in points of older
        versions.
    """

    step: int
    epochs: float
    values: Mapping[str, np.ndarray]
    reference: np.ndarray
    strata: np.ndarray
    kinds: np.ndarray | None = None

    def of_kind(self, kind: str) -> Point:
        """The queries of a kind of change alone.

        Raises:
          UserError: none is of this kind, or the point does not say the kinds.
        """
        if self.kinds is None:
            raise UserError(
                f"--kind={kind}: a run of an older version does not say the kinds of its queries; "
                "train it again in another --workdir."
            )
        rows = [row for row, own in enumerate(self.kinds) if kind in own.split(JOINED)]
        if not rows:
            known = sorted({name for own in self.kinds for name in own.split(JOINED) if name})
            raise UserError(
                f"--kind={kind}: no query is of this kind; there are "
                f"{', '.join(known) or 'no kinds'}."
            )
        values = {name: x[rows] for name, x in self.values.items()}
        return dataclasses.replace(
            self,
            values=values,
            reference=self.reference[rows],
            strata=self.strata[rows],
            kinds=self.kinds[rows],
        )


def path_of(directory: epath.Path, split: str, step: int) -> epath.Path:
    """Where the point of a run's directory lies."""
    return directory / FOLDER / f"{split}-{step}.npz"


def write_point(
    evaluator: RetrievalEvaluator, result: Result, directory: epath.Path, step: int, epochs: float
) -> None:
    """Keeps what the queries with labels got; a file is whole or not there.

    Args:
      evaluator: of the split.
      result: that it gave.
      directory: of the run.
      step: of the run.
      epochs: how often the run had seen its queries by then.
    """
    split, known = evaluator.split, evaluator.labelled
    queries = split.queries.take(known)
    subset = None if result.subset_rows is None else result.subset_rows[known]
    places = None if result.places is None else result.places[known]
    values = query_values(evaluator.protocol, queries, result.rows[known], subset, places)
    columns: dict[str, Any] = {f"value/{name}": x.astype(np.float32) for name, x in values.items()}
    content = io.BytesIO()
    np.savez_compressed(
        content,
        **columns,
        reference=queries.reference.astype(np.int32),
        strata=strata_of(evaluator.protocol, queries).astype(np.int32),
        epochs=np.float64(epochs),
        kinds=np.array([JOINED.join(own) for own in queries.kinds], np.str_),
    )
    path = path_of(directory, split.name, step)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_at_once(path, content.getvalue())


def steps_of(directory: epath.Path, split: str) -> list[int]:
    """Steps of a run's points on a split, ascending."""
    folder = directory / FOLDER
    names = (path.name for path in folder.glob(f"{split}-*.npz")) if folder.is_dir() else ()
    found = (re.fullmatch(rf"{re.escape(split)}-(\d+)\.npz", name) for name in names)
    return sorted(int(match[1]) for match in found if match)


def read_point(directory: epath.Path, split: str, step: int) -> Point:
    """A point of a run.

    Raises:
      UserError: it is not there, or damaged.
    """
    path = path_of(directory, split, step)
    try:
        with np.load(io.BytesIO(path.read_bytes())) as held:
            values = {
                name.removeprefix("value/"): held[name].astype(np.float64)
                for name in held.files
                if name.startswith("value/")
            }
            kinds = held["kinds"] if "kinds" in held.files else None
            point = Point(
                step, float(held["epochs"]), values, held["reference"], held["strata"], kinds
            )
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path} cannot be read ({reason_of(error)}): remove {directory} to train it again."
        ) from error
    return point
