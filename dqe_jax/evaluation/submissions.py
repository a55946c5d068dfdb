"""Ranked lists as files, for the servers of benchmarks whose labels are not public."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import numpy as np

from dqe_jax.data.datasets import DATASETS
from dqe_jax.data.examples import Queries
from dqe_jax.evaluation.protocols import SUBSET_KS, TOP_K, without_reference
from dqe_jax.utils.errors import UserError

CIRR_VERSION = "rc2"
# CIRR's two metrics, with the length of their lists.
CIRR_LENGTHS = {"recall": TOP_K, "recall_subset": max(SUBSET_KS)}
MAX_BYTES = 5_000_000


def rankings(
    queries: Queries, gallery_ids: Sequence[str], rows: np.ndarray, k: int = TOP_K
) -> dict[str, list[str]]:
    """Ids of the images found for each query, best first, at most `k` of them, by query id."""
    return {
        query: [gallery_ids[row] for row in found if row >= 0]
        for query, found in zip(queries.ids, np.asarray(rows)[:, :k].tolist())
    }


def make_submissions(
    dataset: str,
    queries: Queries,
    gallery_ids: Sequence[str],
    rows: np.ndarray,
    subset_rows: np.ndarray | None = None,
) -> dict[str, Mapping[str, object]]:
    """What the data set's server takes: file names to contents, none if there is no server.

    Run `check_submission` on each before it is written, as `json.dumps`.

    Raises:
      ValueError: `subset_rows` are missing for CIRR.
    """
    if dataset == "circo":
        found = rankings(queries, gallery_ids, rows)
        return {"circo.json": {query: [int(image) for image in v] for query, v in found.items()}}
    if dataset != "cirr":
        return {}
    if subset_rows is None:
        raise ValueError("CIRR's submissions need subset_rows")
    lists = {"recall": rows, "recall_subset": subset_rows}
    return {
        f"cirr_{metric}.json": {
            "version": CIRR_VERSION,
            "metric": metric,
            **rankings(queries, gallery_ids, without_reference(queries, found), length),
        }
        for (metric, length), found in zip(CIRR_LENGTHS.items(), lists.values())
    }


def check_submission(
    dataset: str,
    content: Mapping[str, object],
    queries: Queries,
    gallery_ids: Sequence[str] | None,
    *,
    num_queries: int | None = None,
) -> None:
    """Checks a submission against the rules of its server.

    CIRR (github.com/Cuberick-Orion/CIRR, Test-split_server.md): the entries `version` and `metric`;
    the pair id of each query, a string, with exactly 50 (`recall`) or 3 (`recall_subset`) image
    names, of the query's subset for the latter; at most 5 MB. CIRCO (github.com/miccunifi/CIRCO):
    the query ids from "0" on, each with exactly 50 integers. In both no image twice in a list and
    all of the gallery, which must hold that many. We never submit a query's own reference to CIRR.

    Args:
      dataset: one that has a server.
      content: the object that is to be written.
      queries: of the split; their rows index `gallery_ids`.
      gallery_ids: ids of all images. None for CIRCO where the gallery is not known.
      num_queries: how many the published split has, if some may have been left out of `queries`.

    Raises:
      UserError: a rule is broken; it names the first and how many queries break it.
      ValueError: the data set has no server, or CIRR's gallery is not given.
    """
    if DATASETS[dataset].server is None:
        raise ValueError(f"{dataset} has no submissions")
    lists, length, metric = dict(content), TOP_K, ""
    if dataset == "cirr":
        metric = _take_cirr_entries(lists)
        length = CIRR_LENGTHS[metric]
    _check_answers(dataset, lists, queries.ids, num_queries or len(queries))
    ranked = _check_lists(dataset, lists, length, gallery_ids)
    if dataset == "cirr":
        if gallery_ids is None:
            raise ValueError("CIRR's rules need the ids of its gallery")
        _check_cirr_members(ranked, queries, gallery_ids, within_subset=metric == "recall_subset")
    size = len(json.dumps(content)) + 1  # a line end
    if size > MAX_BYTES:
        raise UserError(
            f"{dataset} submission: it has {size} bytes; at most {MAX_BYTES} are taken."
        )


def _take_cirr_entries(lists: dict[str, object]) -> str:
    """Removes CIRR's two special entries from the content; the metric."""
    version, metric = lists.pop("version", None), lists.pop("metric", None)
    if version != CIRR_VERSION:
        raise UserError(f"cirr submission: 'version' is {version!r}; it must be {CIRR_VERSION!r}.")
    if not isinstance(metric, str) or metric not in CIRR_LENGTHS:
        known = " or ".join(map(repr, CIRR_LENGTHS))
        raise UserError(f"cirr submission: 'metric' is {metric!r}; it must be {known}.")
    return metric


def _check_answers(
    dataset: str, lists: Mapping[str, object], query_ids: Sequence[str], num_queries: int
) -> None:
    """Every query of the published split is answered, and nothing else."""
    ids = [str(i) for i in range(num_queries)] if dataset == "circo" else list(query_ids)
    missing = [query for query in ids if query not in lists]
    _keep(dataset, "every query of the split must be answered", missing)
    known = frozenset(ids)
    unknown = [query for query in lists if query not in known]
    _keep(dataset, "all keys must be query ids of the split, as strings", unknown)
    if len(lists) != num_queries:
        raise UserError(
            f"{dataset} submission: all {num_queries} queries of the published split must be "
            f"answered, {num_queries - len(lists)} are not: they were left out of the data set."
        )


def _check_lists(
    dataset: str, lists: Mapping[str, object], length: int, gallery_ids: Sequence[str] | None
) -> dict[str, list[str]]:
    """Checks each list for itself, and gives them: of integers for CIRCO, else of strings."""
    ranked = {q: v for q, v in lists.items() if isinstance(v, list) and len(v) == length}
    why = ""
    if gallery_ids is not None and len(gallery_ids) < length + (dataset == "cirr"):
        why = f", for the gallery has only {len(gallery_ids)} images, which are too few"
    of_length = [query for query in lists if query not in ranked]
    _keep(dataset, f"each query needs a list of exactly {length} images", of_length, why)

    kind, words = (int, "integers") if dataset == "circo" else (str, "strings")
    typed = [q for q, v in ranked.items() if not all(type(image) is kind for image in v)]
    _keep(dataset, f"image ids must be {words}", typed)
    repeated = [q for q, v in ranked.items() if len(set(v)) < len(v)]
    _keep(dataset, "a list must not hold an image twice", repeated)
    if gallery_ids is not None:
        known = frozenset(map(kind, gallery_ids))
        foreign = [q for q, v in ranked.items() if not known.issuperset(v)]
        _keep(dataset, "all images must be of the split's gallery", foreign)
    return ranked


def _check_cirr_members(
    lists: Mapping[str, Sequence[str]],
    queries: Queries,
    gallery_ids: Sequence[str],
    within_subset: bool,
) -> None:
    """No reference; of the subset only."""
    references = (gallery_ids[row] for row in queries.reference)
    holding = [q for q, image in zip(queries.ids, references) if image in lists[q]]
    _keep("cirr", "a query's own reference must be left out", holding)
    if within_subset:
        subsets = ({gallery_ids[row] for row in rows if row >= 0} for rows in queries.subset)
        outside = [q for q, subset in zip(queries.ids, subsets) if not subset.issuperset(lists[q])]
        _keep("cirr", "'recall_subset' takes only images of the query's subset", outside)


def _keep(dataset: str, rule: str, breaking: Sequence[str], why: str = "") -> None:
    if breaking:
        raise UserError(
            f"{dataset} submission: {rule}; queries that break this rule: {len(breaking)} "
            f"(first: {breaking[0]!r}){why}."
        )
