"""What each query of a split got, in a file: what two models are compared by.

Every evaluation of a split with labels writes `<name>.queries.json`, an object:

| field | |
| --- | --- |
| `name` | what is compared: a run with its step, or a file |
| `dataset`, `split`, `protocol` | what it was measured on and how |
| `reference` | `stays` in the ranking, or `left out` |
| `questions` | digest of queries and labels, by ids |
| `gallery` | digest of the images that were ranked, by ids; null where they are not known |
| `images` | how many they are; null where they are not known |
| `cut_at` | length of the shortest of the cut lists that were scored; null for whole rankings |
| `queries` | `id`, `reference` (id of the image) and `stratum` of each query: lists |
| `values` | for each headline metric a list, null for a query that does not count in it |

A stratum is what means are taken over before they are averaged: categories of
FashionIQ, tasks of GeneCIS, domains of domain conversion, else one. A list is cut if it ends before
an image that counts, and before the largest cut-off of the metrics: see `predictions.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
from etils import epath

from dqe_jax.evaluation import asked as asking
from dqe_jax.evaluation.asked import Asked
from dqe_jax.evaluation.intervals import Interval, intervals, strata_names
from dqe_jax.evaluation.protocols import Protocol
from dqe_jax.utils.errors import UserError
from dqe_jax.utils.files import JsonObject, read_json, write_json

SUFFIX = ".queries.json"
_AGAIN = "evaluate that model again"
_STRINGS = ("name", "dataset", "split", "protocol", "reference", "questions")
_OPTIONAL = {"gallery": str, "images": int, "cut_at": int}
_COLUMNS = ("id", "reference", "stratum")


@dataclasses.dataclass(frozen=True)
class QueryResults:
    """What `n` queries got; see the module for what the fields are.

    Attributes:
      ids: of the queries.
      references: ids of their reference images; "" for one that is not in the gallery.
      strata: names.
      values: float64 `[n]` by metric, NaN for a query that does not count in it.
    """

    name: str
    dataset: str
    split: str
    protocol: str
    reference: str
    questions: str
    gallery: str | None
    images: int | None
    cut_at: int | None
    ids: list[str]
    references: list[str]
    strata: list[str]
    values: Mapping[str, np.ndarray]

    @property
    def groups(self) -> tuple[np.ndarray, np.ndarray]:
        """Reference and stratum of each query as numbers, int `[n]`, as `intervals` takes them."""
        # A query whose reference has no id is alone with it.
        named = [reference or f"\0{query}" for reference, query in zip(self.references, self.ids)]
        reference, strata = (
            np.unique(column, return_inverse=True)[1].reshape(-1)
            for column in (np.array(named, object), np.array(self.strata, object))
        )
        return reference, strata

    def measured(self) -> dict[str, Interval]:
        """The metrics with their bootstrap intervals; none without queries."""
        return intervals(self.values, *self.groups) if self.ids else {}

    def intervals(self) -> dict[str, list[float]]:
        """Low and high end of the interval of each metric."""
        return {key: [one.low, one.high] for key, one in self.measured().items()}

    def take(self, order: np.ndarray) -> QueryResults:
        """The same, with its queries in another order: int `[n]`."""
        return dataclasses.replace(
            self,
            ids=[self.ids[i] for i in order],
            references=[self.references[i] for i in order],
            strata=[self.strata[i] for i in order],
            values={key: value[order] for key, value in self.values.items()},
        )


def make_results(
    asked: Asked,
    protocol: Protocol,
    values: Mapping[str, np.ndarray],
    known: np.ndarray,
    *,
    name: str,
    dataset: str,
    pools: Mapping[str, np.ndarray] | None,
    cut_at: int | None = None,
) -> QueryResults:
    """What the queries of a split got.

    Args:
      asked: the split.
      protocol: by which it was measured.
      values: float `[n]` by metric, of the queries with labels.
      known: int `[n]`, these queries.
      name: what is compared.
      dataset: name of the data set.
      pools: the rows that queries of each pool rank; None where not all of the images are known.
      cut_at: as the field; None for whole rankings.
    """
    queries, ids = asked.queries.take(known), asked.gallery.ids
    return QueryResults(
        name=name,
        dataset=dataset,
        split=asked.name,
        protocol=protocol.name,
        reference="left out" if protocol.exclude_reference else "stays",
        questions=asking.questions_of(asked),
        gallery=None if pools is None else asking.gallery_of(asked, pools),
        images=None if pools is None else len(np.unique(np.concatenate([*pools.values()]))),
        cut_at=cut_at,
        ids=list(queries.ids),
        references=[ids[row] if 0 <= row < len(ids) else "" for row in queries.reference.tolist()],
        strata=strata_names(protocol, queries),
        values={key: np.asarray(value, np.float64) for key, value in values.items()},
    )


def write_results(results: QueryResults, path: epath.Path) -> None:
    """Writes the file of the module.

    Raises:
      UserError: it cannot be written.
    """
    held = {name: getattr(results, name) for name in (*_STRINGS, *_OPTIONAL)}
    held["queries"] = {
        "id": results.ids,
        "reference": results.references,
        "stratum": results.strata,
    }
    held["values"] = {key: value.tolist() for key, value in results.values.items()}
    write_json(path, held, indent=None)


def read_results(path: epath.Path) -> QueryResults:
    """Reads the file of the module.

    Raises:
      UserError: it cannot be read, or is not such a file.
    """
    held = read_json(path, dict, _AGAIN)
    for name in _STRINGS:
        if not isinstance(held.get(name), str):
            raise UserError(f"{path}: {name!r} must be a string; {_AGAIN}.")
    for name, kind in _OPTIONAL.items():
        if not isinstance(held.get(name), kind | None):
            raise UserError(f"{path}: {name!r} is {held[name]!r}; {_AGAIN}.")
    ids, references, strata = _columns(path, held)
    if len(set(ids)) < len(ids):
        raise UserError(f"{path}: 'queries' holds an id twice; {_AGAIN}.")
    return QueryResults(
        name=held["name"],
        dataset=held["dataset"],
        split=held["split"],
        protocol=held["protocol"],
        reference=held["reference"],
        questions=held["questions"],
        gallery=held.get("gallery"),
        images=held.get("images"),
        cut_at=held.get("cut_at"),
        ids=ids,
        references=references,
        strata=strata,
        values=_values(path, held, len(ids)),
    )


def _columns(path: epath.Path, held: JsonObject) -> list[list[str]]:
    queries = held.get("queries")
    columns = [queries.get(n) if isinstance(queries, dict) else None for n in _COLUMNS]
    for name, column in zip(_COLUMNS, columns):
        if not isinstance(column, list) or not all(isinstance(x, str) for x in column):
            raise UserError(f"{path}: 'queries' must hold a list {name!r} of strings; {_AGAIN}.")
    found = [column for column in columns if column is not None]
    if not found[0] or len({len(column) for column in found}) > 1:
        raise UserError(f"{path}: 'queries' is empty, or its lists are not alike; {_AGAIN}.")
    return found


def _values(path: epath.Path, held: JsonObject, count: int) -> dict[str, np.ndarray]:
    values = held.get("values")
    if not isinstance(values, dict) or not values:
        raise UserError(f"{path}: 'values' must hold a list for each metric; {_AGAIN}.")
    found = {}
    for key, column in values.items():
        numbers = isinstance(column, list) and all(
            x is None or (isinstance(x, (int, float)) and not isinstance(x, bool)) for x in column
        )
        if not numbers or len(column) != count:
            raise UserError(
                f"{path}: {key!r} of 'values' must be a list of {count} numbers; {_AGAIN}."
            )
        found[key] = np.array([np.nan if x is None else x for x in column], np.float64)
    return found
