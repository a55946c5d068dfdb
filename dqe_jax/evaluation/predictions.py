"""Scores a file of predictions against a benchmark's annotation files: no model, no images.

The file is a JSON object, query id to a list of image ids, best first: what evaluation writes as
ranked lists, or a submission of CIRR or CIRCO. Where there are no annotation files, as of `shapes`
and `fashion_products`, it is scored against prepared data.

-   **Query ids** are those of the readers in `dqe_jax.data.annotations`: `dress-val-17` for
    FashionIQ, the pair id for CIRR, the id for CIRCO. Every query of the split must be there, and
    no other.
-   **Image ids** are strings or integers. A list must not repeat one. They must be of the query's
    gallery, but for CIRCO, whose gallery is not in its annotation files.
-   **Lists** may be of any length; only the first 50 count. One that is shorter than a cut-off
    counts what it has, as in the official scripts: `shortest_list` in the result tells.
-   **CIRR**: with the entry `"metric": "recall_subset"` the lists are of the query's subset and
    give `R_subset@k`; with `"recall"`, or without it, they give `R@k`. The query's own reference,
    where a list holds it, takes a rank and is a miss: `lists_with_reference` tells in how many.
-   **FashionIQ, val protocol**: images that are not in the smaller gallery are struck from the
    lists first. That takes lists that are long enough; `shortest_list` is of what is left.
-   **Other benchmarks whose protocol leaves the reference out**: it is struck from the lists.
-   **GeneCIS**: a list is of the query's own candidates. **FREEDOM, i-CIR**: metrics are of the
    whole ranking, and all of a list counts; a relevant image that it lacks is never found.
-   **Cut lists**: one that is shorter than its gallery and than the largest cut-off of the metrics,
    and lacks an image that counts, may score lower than the whole ranking would. `cut_at` in the
    results is the length of the shortest of these: models that were scored otherwise are not
    compared with such ones.
-   A split **without labels** cannot be scored: the file is checked against the server's rules.
"""

from __future__ import annotations

import json
import os
from collections.abc import Container, Mapping, Sequence
from typing import NoReturn

import numpy as np
from absl import logging
from etils import epath

from dqe_jax.data.datasets import DATASETS
from dqe_jax.data.examples import Queries
from dqe_jax.evaluation import protocols, several_targets, submissions
from dqe_jax.evaluation.asked import Asked, Labels, read_labels
from dqe_jax.evaluation.intervals import query_values
from dqe_jax.evaluation.query_results import SUFFIX, QueryResults, make_results, write_results
from dqe_jax.utils.errors import UserError
from dqe_jax.utils.files import make_directory, read_json, write_json
from dqe_jax.utils.paths import whole_path

PathLike = str | os.PathLike[str]

LONGEST = 20  # digits of an image id


def score_predictions(
    dataset: str,
    split: str,
    path: PathLike,
    raw_dir: PathLike,
    variant: str = "original",
    *,
    output: PathLike | None = None,
) -> dict[str, float]:
    """Metrics of a file of predictions, as `score`; they are logged and written.

    Args:
      dataset: as `score`, and so are all arguments but the last.
      split: any name of it.
      path: of the file.
      raw_dir: the directory with the annotation files.
      variant: of the protocol.
      output: directory for `predictions-<split>.json` and what each query got; None writes nothing.

    Raises:
      UserError: as `score`, or the directory is not writable.
    """
    asked = read_labels(dataset, split, raw_dir)
    return score_asked(dataset, asked, path, variant, output=output)


def score(
    dataset: str, split: str, path: PathLike, raw_dir: PathLike, variant: str = "original"
) -> dict[str, float]:
    """Metrics of a file of predictions.

    Args:
      dataset: one that is read from raw files.
      split: any name of it, such as `validation` or `val`.
      path: of the file, see the module.
      raw_dir: the directory with the annotation files.
      variant: of the protocol, as `protocols.protocol_of`, whose note belongs to the figures.

    Returns:
      The protocol's metrics (CIRR: of the one metric that the file is for), `shortest_list`, and
      `lists_with_reference` for CIRR.

    Raises:
      UserError: the file breaks a rule of the module, the split has no labels, or an annotation
        file cannot be used.
    """
    protocol = protocols.protocol_of(dataset, variant)
    return _Scored(dataset, read_labels(dataset, split, raw_dir), protocol, path).metrics


def score_asked(
    dataset: str,
    asked: Asked,
    path: PathLike,
    variant: str = "original",
    *,
    output: PathLike | None = None,
) -> dict[str, float]:
    """Metrics of a file of predictions for any split; they are logged and written.

    Args:
      dataset: name of the data set.
      asked: the split, from annotation files or from prepared data.
      path: of the file, see the module.
      variant: of the protocol.
      output: as for `score_predictions`.

    Raises:
      UserError: as `score`, or the directory is not writable.
    """
    protocol = protocols.protocol_of(dataset, variant)
    place = None if output is None else whole_path(output)
    if place is not None:
        make_directory(place)
    scored = _Scored(dataset, asked, protocol, path)
    results = scored.results()
    facts = {
        "dataset": dataset,
        "split": asked.name,
        "protocol": protocol.name,
        "cut_at": scored.cut_at,
        "metrics": scored.metrics,
        "intervals": results.intervals(),
    }
    logging.info("%s\n%s", json.dumps(facts, indent=2), protocol.note)
    if place is not None:
        write_json(place / f"predictions-{asked.name}.json", facts)
        write_results(results, place / f"predictions-{asked.name}{SUFFIX}")
    return scored.metrics


class _Scored:
    """A file of predictions that was read and measured."""

    def __init__(self, dataset: str, asked: Asked, protocol: protocols.Protocol, path: PathLike):
        self._dataset, self._asked, self._protocol = dataset, asked, protocol
        self._path = epath.Path(path).expanduser()
        content = read_json(self._path, dict)
        queries = asked.queries
        # A query without labels says nothing, where others have some.
        self._known = protocol.labelled(queries)
        if not len(self._known):
            _refuse_unlabelled(dataset, asked, self._path, content)
        self._metric = _take_metric(content, self._path) if dataset == "cirr" else "recall"
        left_out = max(0, (asked.coverage.official_queries or 0) - asked.coverage.queries)
        lists = _read_lists(content, queries.ids, self._path, left_out, numbers=dataset == "circo")
        if self._listed:
            _check_images(lists, self._allowed(), self._path)
        row_of = {image: row for row, image in enumerate(asked.gallery.ids)}
        for found in lists.values():
            for image in found:
                row_of.setdefault(image, len(row_of))
        ranked = [[row_of[image] for image in lists[query]] for query in queries.ids]
        if protocol.exclude_reference and dataset != "cirr":
            own = queries.reference.tolist()
            ranked = [[row for row in rows if row != mine] for rows, mine in zip(ranked, own)]
        pools = asked.pools or {"": np.arange(len(asked.gallery))}
        self._pools = protocols.pool_rows(protocol, queries, pools)
        if protocol.gallery_of_queries:
            ranked = _restricted(ranked, self._pools, queries)
        rows = _as_rows(ranked)
        self._rows, self._labelled = rows[self._known], queries.take(self._known)
        places = None
        if protocol.whole_ranking:
            places = several_targets.listed_places(ranked, queries.relevant)
        self._places = None if places is None else places[self._known]
        self.metrics = _measure(protocol, queries, rows, places, self._metric)
        wanted = _wanted(protocol, queries, self._metric)
        self.cut_at = self._cut_at(ranked, wanted)
        self.metrics |= _facts(dataset, queries, ranked, wanted)
        if self.cut_at is not None:
            logging.warning(
                "Lists end before all that counts (the shortest holds %d images): what they lack "
                "counts as never found, so that the metrics may be lower than those of whole "
                "rankings, and dqe-jax compare sets them beside no run.",
                self.cut_at,
            )

    @property
    def _listed(self) -> bool:
        """Whether all images of the gallery are known."""
        return not isinstance(self._asked, Labels) or self._asked.listed

    def _cut_at(self, ranked: Sequence[Sequence[int]], wanted: int | None) -> int | None:
        """Length of the shortest list that is cut, see the module; None if none is."""
        queries, size = self._asked.queries, len(self._asked.gallery)
        leaves_out = self._protocol.exclude_reference
        found = []
        for i in self._known.tolist():
            held = len(ranked[i])
            most = [] if wanted is None else [wanted]
            if self._metric == "recall_subset" or self._protocol.own_gallery:
                most.append(len(queries.subset[i]) - leaves_out)
            elif self._listed:
                most.append(len(self._pools[queries.pools[i]]) - leaves_out)
            counting = [queries.relevant[i], queries.target[i : i + 1]]
            if len(queries.negatives):
                counting.append(queries.negatives[i])
            rows = np.concatenate(counting)
            # Photos that are not at hand are in no ranking.
            rows = rows[(rows >= 0) & (rows < size)]
            if held < min(most, default=held + 1) and not np.isin(rows, ranked[i]).all():
                found.append(held)
        return min(found, default=None)

    def _allowed(self) -> dict[str, Container[str]]:
        """Which images may be listed, by query."""
        ids, queries = self._asked.gallery.ids, self._asked.queries
        if self._metric == "recall_subset" or self._protocol.own_gallery:
            return {
                query: frozenset(ids[row] for row in rows)
                for query, rows in zip(queries.ids, queries.subset)
            }
        every = self._asked.pools or {"": np.arange(len(ids))}
        pools = {name: frozenset(ids[row] for row in rows) for name, rows in every.items()}
        return {query: pools[pool] for query, pool in zip(queries.ids, queries.pools)}

    def results(self) -> QueryResults:
        """What each query got."""
        inside = self._metric == "recall_subset"
        values = query_values(
            self._protocol,
            self._labelled,
            np.full_like(self._rows, -1) if inside else self._rows,
            self._rows if inside else None,
            self._places,
        )
        return make_results(
            self._asked,
            self._protocol,
            {
                key: values[key]
                for key in self._protocol.columns(self.metrics)
                if key in values and key.startswith("R_subset") == inside
            },
            self._known,
            name=self._path.name.partition(".")[0],
            dataset=self._dataset,
            pools=self._pools if self._listed else None,
            cut_at=self.cut_at,
        )


def _refuse_unlabelled(
    dataset: str, asked: Asked, path: epath.Path, content: Mapping[str, object]
) -> NoReturn:
    """Raises an error: of a server's rule that the file breaks, else where to send the file."""
    server = DATASETS[dataset].server
    if server is None:
        raise UserError(f"{dataset} {asked.name} has no labels; score predictions of validation.")
    listed = not isinstance(asked, Labels) or asked.listed
    submissions.check_submission(
        dataset,
        content,
        asked.queries,
        asked.gallery.ids if listed else None,
        num_queries=asked.coverage.official_queries,
    )
    raise UserError(
        f"The labels of {dataset} {asked.name} are not public; {path} keeps the rules for "
        f"submissions, so send it to {server}."
    )


# --- Reading --------------------------------------------------------------------------------------


def _take_metric(content: dict[str, object], path: epath.Path) -> str:
    """Removes CIRR's special entries, where there are any; the metric."""
    version = content.pop("version", submissions.CIRR_VERSION)
    metric = content.pop("metric", "recall")
    if version != submissions.CIRR_VERSION:
        raise UserError(
            f"{path}: 'version' is {version!r}; only {submissions.CIRR_VERSION!r} can be scored."
        )
    if not isinstance(metric, str) or metric not in submissions.CIRR_LENGTHS:
        known = " or ".join(map(repr, submissions.CIRR_LENGTHS))
        raise UserError(f"{path}: 'metric' is {metric!r}; it must be {known}.")
    return metric


def _read_lists(
    content: Mapping[str, object],
    query_ids: Sequence[str],
    path: epath.Path,
    left_out: int,
    *,
    numbers: bool,
) -> dict[str, list[str]]:
    """Image ids as strings, by query; without leading zeros if they are `numbers`.

    `left_out` records of the split are not sound: a query that is unknown may be one of them.
    """
    missing = [query for query in query_ids if query not in content]
    _reject(path, missing, "queries of the split that are not in the file", "add them")
    known = frozenset(query_ids)
    unknown = [query for query in content if query not in known]
    remedy = "remove them"
    if left_out:
        remedy = (
            f"the split's own files have {left_out} records that are not sound: get those again, "
            "or remove these queries"
        )
    _reject(path, unknown, "queries of the file that are not in the split", remedy)
    bad = [query for query, values in content.items() if not _are_ids(values, numbers)]
    words = "integers" if numbers else "strings or integers"
    _reject(path, bad, f"queries without a list of image ids ({words})", "correct them")
    lists = {
        query: [str(int(v)) if numbers else str(v) for v in values]
        for query, values in content.items()
        if isinstance(values, list)
    }
    repeated = [query for query, images in lists.items() if len(set(images)) < len(images)]
    _reject(path, repeated, "queries whose list holds an image twice", "remove the repetitions")
    return lists


def _are_ids(values: object, numbers: bool) -> bool:
    def is_id(value: object) -> bool:
        if type(value) is int:
            return not numbers or 0 <= value < 10**LONGEST
        if not isinstance(value, str):
            return False
        # Other scripts have decimal digits too, which `int` would read.
        return not numbers or (value.isascii() and value.isdecimal() and len(value) <= LONGEST)

    return isinstance(values, list) and all(map(is_id, values))


def _check_images(
    lists: Mapping[str, Sequence[str]], allowed: Mapping[str, Container[str]], path: epath.Path
) -> None:
    for query, images in lists.items():
        for image in images:
            if image not in allowed[query]:
                others = [q for q, v in lists.items() if not all(i in allowed[q] for i in v)]
                raise UserError(
                    f"{path}: queries that list images that are not in their gallery: "
                    f"{len(others)} (first: {image!r} for {query!r}); remove those."
                )


def _reject(path: epath.Path, queries: Sequence[str], fault: str, remedy: str) -> None:
    if queries:
        raise UserError(f"{path}: {fault}: {len(queries)} (first: {queries[0]!r}); {remedy}.")


# --- Measuring ------------------------------------------------------------------------------------


def _restricted(
    ranked: Sequence[Sequence[int]], pools: Mapping[str, np.ndarray], queries: Queries
) -> list[list[int]]:
    """The lists, less the images that the protocol does not rank."""
    kept = {name: frozenset(rows.tolist()) for name, rows in pools.items()}
    return [[row for row in rows if row in kept[pool]] for rows, pool in zip(ranked, queries.pools)]


def _as_rows(ranked: Sequence[Sequence[int]]) -> np.ndarray:
    """Lists as int32 `[n, TOP_K]`."""
    rows = np.full((len(ranked), protocols.TOP_K), -1, np.int32)
    for line, found in zip(rows, ranked):
        line[: len(found)] = found[: protocols.TOP_K]
    return rows


def _measure(
    protocol: protocols.Protocol,
    queries: Queries,
    rows: np.ndarray,
    places: np.ndarray | None,
    metric: str,
) -> dict[str, float]:
    if metric == "recall_subset":
        return protocols.cirr_subset_recall(queries, rows)
    if protocol.name == "cirr":
        # Unlike `measure`, this takes lists that hold the reference.
        return protocols.cirr_recall(queries, rows)
    if protocol.whole_ranking:
        return protocol.metrics(queries, rows, places=places)
    return protocol.measure(queries, rows)


def _wanted(protocol: protocols.Protocol, queries: Queries, metric: str) -> int | None:
    """How many images of a list count; None for all."""
    if protocol.whole_ranking:
        return None
    wanted = submissions.CIRR_LENGTHS[metric]
    if protocol.own_gallery:  # there is no more to list
        wanted = min(wanted, *map(len, queries.subset))
    return wanted


def _facts(
    dataset: str, queries: Queries, ranked: Sequence[Sequence[int]], wanted: int | None
) -> dict[str, int]:
    """What the metrics depend on, and warnings of it."""
    facts = {"shortest_list": min(map(len, ranked))}
    if wanted is not None and facts["shortest_list"] < wanted:
        logging.warning(
            "The shortest list holds %d images: metrics at larger cut-offs, up to %d, count what "
            "there is.",
            facts["shortest_list"],
            wanted,
        )
    if dataset == "cirr":
        holding = sum(reference in rows for reference, rows in zip(queries.reference, ranked))
        facts["lists_with_reference"] = holding
        if holding:
            logging.warning(
                "%d lists hold the query's own reference, which takes a rank: leave it out.",
                holding,
            )
    return facts
