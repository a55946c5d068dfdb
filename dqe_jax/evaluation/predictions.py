"""Scores a file of predictions against a benchmark's annotation files: no model, no images.

The file is a JSON object, query id to a list of image ids, best first: what evaluation writes as
ranked lists, or a submission of CIRR or CIRCO.

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

from dqe_jax.data.annotations.schema import Annotations
from dqe_jax.data.datasets import DATASETS, split_of
from dqe_jax.data.examples import Queries
from dqe_jax.data.raw_files import RawFiles
from dqe_jax.evaluation import protocols, several_targets, submissions
from dqe_jax.utils.errors import UserError
from dqe_jax.utils.files import read_json, write_json
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
      output: directory for `predictions-<split>.json`; None writes nothing.

    Raises:
      UserError: as `score`, or the directory is not writable.
    """
    split = split_of(dataset, split)
    found = score(dataset, split, path, raw_dir, variant)
    protocol = protocols.protocol_of(dataset, variant)
    facts = {"dataset": dataset, "split": split, "protocol": protocol.name, "metrics": found}
    logging.info("%s\n%s", json.dumps(facts, indent=2), protocol.note)
    if output is not None:
        write_json(whole_path(output) / f"predictions-{split}.json", facts)
    return found


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
    raw = DATASETS[dataset].raw if dataset in DATASETS else None
    if raw is None:
        known = ", ".join(name for name, info in DATASETS.items() if info.raw)
        raise UserError(f"{dataset} is not scored from files of predictions; {known} are.")
    protocol = protocols.protocol_of(dataset, variant)
    labels = raw.read_labels(RawFiles(raw_dir), split_of(dataset, split))
    path = epath.Path(path).expanduser()
    content = read_json(path, dict)
    left_out = labels.official_queries - len(labels.queries)
    if left_out:
        logging.warning("%d records of %s are not sound and left out.", left_out, raw_dir)

    row_of = {image: row for row, image in enumerate(labels.images)}
    queries = _queries(labels, row_of)
    if not len(queries):
        raise UserError(
            f"{raw_dir} has no sound record of {split} of {dataset}: get the annotation file again."
        )
    if not len(protocol.labelled(queries)):
        _refuse_unlabelled(dataset, split, path, content, queries, labels)

    metric = _take_metric(content, path) if dataset == "cirr" else "recall"
    lists = _read_lists(content, queries.ids, path, numbers=dataset == "circo")
    if dataset != "circo":
        own = metric == "recall_subset" or protocol.own_gallery
        _check_images(lists, _allowed(labels, within_subset=own), path)
    for found in lists.values():
        for image in found:
            row_of.setdefault(image, len(row_of))
    ranked = [[row_of[image] for image in lists[query]] for query in queries.ids]
    if protocol.exclude_reference and dataset != "cirr":
        asked = queries.reference.tolist()
        ranked = [[row for row in rows if row != own] for rows, own in zip(ranked, asked)]
    if protocol.gallery_of_queries:
        ranked = _restricted(ranked, protocol, queries, labels, row_of)
    return _measure(protocol, queries, ranked, metric) | _facts(dataset, queries, ranked, metric)


def _queries(labels: Annotations, row_of: Mapping[str, int]) -> Queries:
    """The annotated queries, with images by row; -1 for no target."""

    def rows(images: Sequence[str]) -> np.ndarray:
        return np.array([row_of.get(image, -1) for image in images], np.int32)

    queries = labels.queries
    return Queries(
        ids=[query.id for query in queries],
        texts=[" ".join(query.texts) for query in queries],
        reference=rows([query.reference for query in queries]),
        target=rows([query.target for query in queries]),
        known_positives=[rows(query.known_positives) for query in queries],
        relevant=[rows(query.relevant) for query in queries],
        kinds=[query.kinds for query in queries],
        attributes=[query.attributes for query in queries],
        pools=[query.pool for query in queries],
        subset=[rows(query.subset) for query in queries],
        references=[rows(query.references) for query in queries],
        negatives=[rows(query.negatives) for query in queries],
    )


def _refuse_unlabelled(
    dataset: str,
    split: str,
    path: epath.Path,
    content: Mapping[str, object],
    queries: Queries,
    labels: Annotations,
) -> NoReturn:
    """Raises an error: of a server's rule that the file breaks, else where to send the file."""
    server = DATASETS[dataset].server
    if server is None:
        raise UserError(f"{dataset} {split} has no labels; score predictions of validation.")
    gallery_ids = None if dataset == "circo" else labels.images
    submissions.check_submission(
        dataset, content, queries, gallery_ids, num_queries=labels.official_queries
    )
    raise UserError(
        f"The labels of {dataset} {split} are not public; {path} keeps the rules for submissions, "
        f"so send it to {server}."
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
    content: Mapping[str, object], query_ids: Sequence[str], path: epath.Path, *, numbers: bool
) -> dict[str, list[str]]:
    """Image ids as strings, by query; without leading zeros if they are `numbers`."""
    missing = [query for query in query_ids if query not in content]
    _reject(path, missing, "queries of the split that are not in the file", "add them")
    known = frozenset(query_ids)
    unknown = [query for query in content if query not in known]
    _reject(path, unknown, "queries of the file that are not in the split", "remove them")
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


def _allowed(labels: Annotations, *, within_subset: bool) -> dict[str, Container[str]]:
    """Which images may be listed, by query."""
    if within_subset:
        return {query.id: frozenset(query.subset) for query in labels.queries}
    pools = {name: frozenset(images) for name, images in labels.pools.items()}
    return {query.id: pools[query.pool] for query in labels.queries}


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
    ranked: Sequence[Sequence[int]],
    protocol: protocols.Protocol,
    queries: Queries,
    labels: Annotations,
    row_of: Mapping[str, int],
) -> list[list[int]]:
    """The lists, less the images that the protocol does not rank."""
    pools = {
        name: np.array([row_of[image] for image in images], np.int32)
        for name, images in labels.pools.items()
    }
    kept = {
        name: frozenset(rows.tolist())
        for name, rows in protocols.pool_rows(protocol, queries, pools).items()
    }
    return [[row for row in rows if row in kept[pool]] for rows, pool in zip(ranked, queries.pools)]


def _measure(
    protocol: protocols.Protocol, queries: Queries, ranked: Sequence[Sequence[int]], metric: str
) -> dict[str, float]:
    k = protocols.TOP_K
    rows = np.full((len(ranked), k), -1, np.int32)
    for line, found in zip(rows, ranked):
        line[: len(found)] = found[:k]
    if metric == "recall_subset":
        return protocols.cirr_subset_recall(queries, rows)
    if protocol.name == "cirr":
        # Unlike `measure`, this takes lists that hold the reference.
        return protocols.cirr_recall(queries, rows)
    if protocol.whole_ranking:
        places = several_targets.listed_places(ranked, queries.relevant)
        return protocol.measure(queries, rows, places=places)
    return protocol.measure(queries, rows)


def _facts(
    dataset: str, queries: Queries, ranked: Sequence[Sequence[int]], metric: str
) -> dict[str, int]:
    """What the metrics depend on, and warnings of it."""
    facts = {"shortest_list": min(map(len, ranked))}
    wanted = submissions.CIRR_LENGTHS[metric]
    if facts["shortest_list"] < wanted:
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
