"""Confidence intervals of metrics, by a bootstrap over the reference images of a split.

Queries of one reference are alike, so references are drawn, with all their queries, and not single
queries: the intervals would be too narrow otherwise. Where a metric is an unweighted mean over
categories (FashionIQ), each category is drawn from by itself. An interval is that between
percentiles of the metric over the draws (Efron and Tibshirani, An Introduction to the Bootstrap,
1993, chapter 13). Two runs are compared query by query, over the same draws.

Where a variant was trained with several seeds, seeds are drawn first, and then references, the same
ones for all seeds: the test queries are one sample that all runs share. With two or three seeds
their part of the interval is rough.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from dqe_jax.data.examples import Queries
from dqe_jax.evaluation import metrics, protocols
from dqe_jax.evaluation.protocols import Protocol

DRAWS = 1000
LEVEL = 0.95
_AT_A_TIME = 2_000_000  # numbers of a matrix of draws


@dataclasses.dataclass(frozen=True)
class Interval:
    """A metric and its confidence interval."""

    value: float
    low: float
    high: float


def query_values(
    protocol: Protocol,
    queries: Queries,
    rows: np.ndarray,
    subset_rows: np.ndarray | None = None,
    places: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Headline metrics of every query, whose mean (see `means`) is what the protocol gives.

    Args:
      protocol: of the data set.
      queries: with labels.
      rows: int `[Q, K]`, ranked gallery rows, -1 where a list ends.
      subset_rows: as `Result.subset_rows`, of these queries.
      places: as `Result.places`, of these queries; without them there are no metrics of the whole
        ranking.

    Returns:
      Float64 `[Q]` by the metric's name; NaN for a query that does not count in it.
    """
    rows = metrics.pad_lists(rows, protocols.TOP_K)
    if protocol.query_values is not None:
        got = protocol.query_values(queries, rows, places)
        return {key: got[key] for key in protocol.headline if key in got}
    known = np.array([len(relevant) > 0 for relevant in queries.relevant], bool)
    values: dict[str, np.ndarray] = {}
    for key in protocol.headline:
        name, _, k = key.partition("@")
        if name == "R":
            values[key] = metrics.recall_at_k(rows, queries.target, int(k))
        elif name == "mAP" and known.any():
            values[key] = metrics.average_precision_at_k(rows, queries.relevant, int(k))
        elif name == "P" and known.any():
            precise = metrics.precision_at_k(rows, queries.relevant, int(k))
            values[key] = np.where(known, precise, np.nan)
        elif name == "R_subset" and subset_rows is not None:
            inside = protocols.without_reference(queries, subset_rows)
            inside = metrics.pad_lists(inside, max(protocols.SUBSET_KS))
            values[key] = metrics.recall_at_k(inside, queries.target, int(k))
        elif name == "top1_is_reference" and not protocol.mean_of:  # no mean of means
            values[key] = ((rows[:, 0] >= 0) & (rows[:, 0] == queries.reference)).astype(float)
    for parts in (("R@10", "R@50"), ("R@5", "R_subset@1")):
        fits = (parts[0] == "R@10") == bool(protocol.mean_of)
        if "mean" in protocol.headline and fits and set(parts) <= values.keys():
            values["mean"] = (values[parts[0]] + values[parts[1]]) / 2
    return {key: values[key] for key in protocol.headline if key in values}


def strata_names(protocol: Protocol, queries: Queries) -> list[str]:
    """For each query the name of what it is averaged in; "" for all where there is one mean."""
    if protocol.mean_of == "pools":
        return list(queries.pools)
    if protocol.mean_of == "kinds":
        return ["".join(kinds[:1]) for kinds in queries.kinds]
    return [""] * len(queries)


def strata_of(protocol: Protocol, queries: Queries) -> np.ndarray:
    """int `[Q]`: queries with the same number are drawn together, and these means averaged."""
    return np.unique(strata_names(protocol, queries), return_inverse=True)[1]


def intervals(
    values: Mapping[str, np.ndarray],
    reference: np.ndarray,
    strata: np.ndarray,
    *,
    seed: int = 0,
    draws: int = DRAWS,
) -> dict[str, Interval]:
    """Means with confidence intervals; see the module.

    Args:
      values: float `[Q]` of each metric, NaN where a query does not count.
      reference: int `[Q]`, the reference image of each query.
      strata: int `[Q]`, as `strata_of` gives it.
      seed: of the draws: the same for two runs draws the same references.
      draws: how many.

    Returns:
      For each metric that any query counts in.
    """
    keys = [key for key in values if not np.isnan(values[key]).all()]
    if not keys:
        return {}
    table = np.stack([values[key] for key in keys], axis=1)
    rng = np.random.default_rng(seed)
    whole, drawn = [], []
    for stratum in np.unique(strata):
        members = strata == stratum
        totals, counts = _by_reference(table[members], reference[members])
        whole.append(_ratio(totals.sum(0), counts.sum(0)))
        drawn.append(_draw(totals, counts, rng, draws))
    found, spread = (_mean_of_known(np.stack(x)) for x in (whole, drawn))
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.nanpercentile(spread, [tail, 100 - tail], axis=0)
    return {
        key: Interval(float(found[i]), float(low[i]), float(high[i])) for i, key in enumerate(keys)
    }


def over_seeds(
    values: np.ndarray,
    reference: np.ndarray,
    strata: np.ndarray,
    *,
    seed: int = 0,
    draws: int = DRAWS,
) -> Interval:
    """The mean over seeds and queries, with its interval; see the module.

    Args:
      values: float `[S, Q]` of one metric, of `S` seeds; of two variants with the same seeds their
        difference. NaN where a query does not count.
      reference: int `[Q]`, the reference image of each query.
      strata: int `[Q]`, as `strata_of` gives it.
      seed: of the draws.
      draws: how many.
    """
    rng, number = np.random.default_rng(seed), len(values)
    seeds = rng.multinomial(number, np.full(number, 1 / number), draws).astype(float)
    whole, drawn = [], []
    for stratum in np.unique(strata):
        members = strata == stratum
        # `[U, S]`: a column for each seed.
        totals, counts = _by_reference(values[:, members].T, reference[members])
        size = len(totals)
        times = rng.multinomial(size, np.full(size, 1 / size), draws).astype(float)
        of_seeds = ((seeds @ x.T) * times for x in (totals, counts))
        drawn.append(_ratio(*(x.sum(1) for x in of_seeds)))
        whole.append(_ratio(totals.sum(keepdims=True)[0], counts.sum(keepdims=True)[0]))
    found, spread = (_mean_of_known(np.stack(x)) for x in (whole, drawn))
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.nanpercentile(spread, [tail, 100 - tail])
    return Interval(float(found[0]), float(low), float(high))


def _by_reference(table: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sums of the values of each reference's queries and how many count, `[U, keys]` each."""
    _, place = np.unique(reference, return_inverse=True)
    known = ~np.isnan(table)
    totals = np.zeros((place.max() + 1, table.shape[1]))
    counts = np.zeros_like(totals)
    np.add.at(totals, place, np.where(known, table, 0.0))
    np.add.at(counts, place, known)
    return totals, counts


def _draw(
    totals: np.ndarray, counts: np.ndarray, rng: np.random.Generator, draws: int
) -> np.ndarray:
    """Means of draws of references with replacement, `[draws, keys]`."""
    number = len(totals)
    each = max(1, _AT_A_TIME // number)
    means = []
    for start in range(0, draws, each):
        size = min(each, draws - start)
        times = rng.multinomial(number, np.full(number, 1 / number), size).astype(float)
        means.append(_ratio(times @ totals, times @ counts))
    return np.concatenate(means)


def _mean_of_known(values: np.ndarray) -> np.ndarray:
    """Means over the first axis, NaN left out."""
    known = ~np.isnan(values)
    return _ratio(np.where(known, values, 0.0).sum(0), known.sum(0))


def _ratio(totals: np.ndarray, counts: np.ndarray) -> np.ndarray:
    return np.divide(totals, counts, out=np.full(totals.shape, np.nan), where=counts > 0)
