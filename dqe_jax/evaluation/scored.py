"""Measures a ranking by scores of one's own, of any formula: of each query with its whole gallery.

`evaluator.py` ranks by products of embeddings, on the devices. Here scores come from a function, in
NumPy, some queries at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from dqe_jax.data.splits import Split
from dqe_jax.evaluation import metrics, protocols
from dqe_jax.evaluation.protocols import Protocol
from dqe_jax.evaluation.ranking import order_of_subset

# Numbers in an array of scores, at the most.
SCORES = 2**24
# Of queries int `[q]` and gallery rows int `[n]`: float `[q, n]`.
Score = Callable[[np.ndarray, np.ndarray], np.ndarray]


def pools_of(split: Split, protocol: Protocol) -> dict[str, np.ndarray]:
    """The gallery rows that the queries of each pool rank; raises as `protocols.pool_rows`."""
    pools = split.pools or {"": np.arange(len(split.gallery))}
    return protocols.pool_rows(protocol, split.queries, pools)


def parts_of(split: Split, protocol: Protocol) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Queries, some at a time, with the gallery rows that they rank; int arrays."""
    names = np.asarray(split.queries.pools, dtype=object)
    for name, pool in pools_of(split, protocol).items():
        mine = np.flatnonzero(names == name)
        size = max(1, SCORES // max(1, len(pool)))
        for start in range(0, len(mine), size):
            yield mine[start : start + size], pool


def measure_scores(split: Split, protocol: Protocol, top_k: int, score: Score) -> dict[str, float]:
    """Metrics of the ranking by `score`, equal scores by gallery row; none without labels.

    Args:
      split: queries and gallery.
      protocol: what is ranked and measured. It says whether the reference is left out.
      top_k: length of the ranked lists.
      score: of queries with gallery rows.
    """
    queries, size = split.queries, len(split.gallery)
    if not len(protocol.labelled(queries)):
        return {}
    rows = np.full((len(queries), top_k), -1, np.int32)
    inside = protocols.subsets_of(protocol, queries)
    relevant = [np.unique(own[own < size]) for own in queries.relevant]
    places = np.full((len(queries), max(map(len, relevant))), -1, np.int32)
    for mine, pool in parts_of(split, protocol):
        place = np.full(len(split.gallery), -1, np.int64)
        place[pool] = np.arange(len(pool))
        scores = np.array(score(mine, pool))
        if inside.size:
            at = place[inside[mine]]
            given = np.take_along_axis(scores, np.where(inside[mine] < 0, 0, at), axis=1)
            last = queries.target[mine] if protocol.own_gallery else None
            order = order_of_subset(inside[mine], given, last)
            inside[mine] = np.take_along_axis(inside[mine], order, axis=1)
        if protocol.exclude_reference:
            at = place[queries.reference[mine]]
            scores[np.flatnonzero(at >= 0), at[at >= 0]] = -np.inf
        order = np.argsort(-scores, axis=1, kind="stable")
        if protocol.whole_ranking:
            standing = np.empty_like(order)
            np.put_along_axis(standing, order, np.arange(len(pool))[None], axis=1)
            for i, own in zip(mine, standing):
                places[i, : len(relevant[i])] = np.sort(own[place[relevant[i]]])
        order = order[:, :top_k]
        out = np.isneginf(np.take_along_axis(scores, order, axis=1))
        rows[mine, : order.shape[1]] = np.where(out, -1, pool[order])
    if protocol.own_gallery:
        rows = metrics.pad_lists(inside, top_k)
    return protocol.metrics(queries, rows, inside if inside.size else None, places)
