"""Benchmarks with several valid targets: what each query gets, and the published means of it.

`query_values` of a benchmark gives float `[Q]` by the metric's name, NaN for a query that does not
count in it; `measure` gives the means that are published. Arguments are those of
`protocols.Protocol`: `rows` int `[Q, K]` with `K >= 50`, or `places` int `[Q, R]` of
`ranking.make_place_fn` where the whole ranking counts. `n` is the number of relevant rows of a
query; rows that are never ranked, as their photo is missing, count in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from dqe_jax.data.examples import Queries
from dqe_jax.evaluation import metrics

Values = dict[str, np.ndarray]
PINPOINT_KS = (1, 5, 10, 50)
PIC2WORD_KS = (1, 5, 10, 50)
FREEDOM_KS = (5, 10, 50, 100)
FASHION200K_KS = (1, 10, 50)
CIRCLED_KS = (1, 5, 10, 50)
SMALL = 1e-5  # in the denominators of Pic2Word's, FREEDOM's and i-CIR's evaluation code
TO = " to "  # between source and target domain in the name of a pair


def mean_of(
    values: Mapping[str, np.ndarray], members: np.ndarray | None = None
) -> dict[str, float]:
    """Means over queries, over those of `members` (bool `[Q]`); none where no query counts."""
    chosen = {k: v if members is None else v[members] for k, v in values.items()}
    return {k: float(np.nanmean(v)) for k, v in chosen.items() if not np.isnan(v).all()}


def _by_kind(queries: Queries, values: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Means of each kind of query under `<metric>/<kind>`, and the numbers of queries."""
    found: dict[str, float] = {}
    for kind, members in metrics.group_members(queries.kinds).items():
        found |= {f"{key}/{kind}": value for key, value in mean_of(values, members).items()}
        found[f"queries/{kind}"] = int(members.sum())
    return found


def counts_of(queries: Queries) -> np.ndarray:
    """`n` of every query: distinct relevant rows."""
    return np.array([len(np.unique(relevant)) for relevant in queries.relevant], np.int64)


# --- PinPoint -------------------------------------------------------------------------------------


def pinpoint_values(queries: Queries, rows: np.ndarray, places: np.ndarray | None = None) -> Values:
    """What each query of PinPoint gets, k of 1, 5, 10, 50.

    | key | |
    | --- | --- |
    | `mAP@k` | AP@k over all positives, divided by min(length of their list, k) |
    | `P@k`, `R@k` | positives among the first k, as a share of k and of the length of their list |
    | `negatives@k` | explicit negatives among the first k / min(length of their list, k) |
    | `mAP@k_without_negatives` | AP@k after the negatives are struck from the ranking |
    | `nDCG@10` | over distinct positives; not among the published metrics |

    Lists count as published: an image that one names twice counts twice in its length.
    """
    del places
    longest = max(PINPOINT_KS)
    hits, _ = metrics.hits_at_k(rows, queries.relevant, longest)
    negatives = queries.negatives if len(queries.negatives) else [np.zeros(0, int)] * len(queries)
    wrong, _ = metrics.hits_at_k(rows, negatives, longest)
    count, against = (np.array(list(map(len, x))) for x in (queries.relevant, negatives))
    # What is left, in its order; places that fall free at the end hold no image.
    order = np.argsort(wrong, axis=1, kind="stable")
    left = np.take_along_axis(hits & ~wrong, order, axis=1)
    found: Values = {}
    for k in PINPOINT_KS:
        found[f"P@{k}"] = hits[:, :k].sum(1) / k
        found[f"R@{k}"] = _share(hits[:, :k].sum(1), count)
        found[f"mAP@{k}"] = metrics.average_precision_of(hits[:, :k], count)
        found[f"mAP@{k}_without_negatives"] = metrics.average_precision_of(left[:, :k], count)
        found[f"negatives@{k}"] = _share(wrong[:, :k].sum(1), np.minimum(against, k))
    found["nDCG@10"] = metrics.ndcg_at_k(rows, queries.relevant, 10)
    return found


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.full(len(part), np.nan), where=whole > 0)


def pinpoint_metrics(
    queries: Queries, rows: np.ndarray, subset_rows: np.ndarray | None = None
) -> dict[str, float]:
    """Means of `pinpoint_values` over queries, by category, and the spread over wordings.

    Queries with the same reference images are a group. Over groups of two queries or more, whose
    number is `groups`, `range_P@10` is the mean of the largest less the smallest P@10, and
    `deviation_P@10` that of the standard deviation.
    """
    del subset_rows
    values = pinpoint_values(queries, rows)
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, reference in enumerate(queries.reference.tolist()):
        more = queries.references[i].tolist() if len(queries.references) else []
        groups.setdefault((reference, *more), []).append(i)
    spread = [values["P@10"][members] for members in groups.values() if len(members) > 1]
    found = mean_of(values)
    if spread:
        found["range_P@10"] = float(np.mean([np.ptp(own) for own in spread]))
        found["deviation_P@10"] = float(np.mean([own.std() for own in spread]))
    found |= {"groups": len(spread), "queries": len(queries)}
    shown = {key: values[key] for key in ("mAP@10", "P@10", "negatives@10")}
    return found | _by_kind(queries, shown)


# --- Domain conversion ----------------------------------------------------------------------------


def pic2word_values(queries: Queries, rows: np.ndarray, places: np.ndarray | None = None) -> Values:
    """`R@k`, relevant rows among the first k / (n + 1e-5), and `P@k`, k of 1, 5, 10, 50."""
    del places
    hits, count = metrics.hits_at_k(rows, queries.relevant, max(PIC2WORD_KS))
    found: Values = {}
    for k in PIC2WORD_KS:
        found[f"R@{k}"] = hits[:, :k].sum(1) / (count + SMALL)
        found[f"P@{k}"] = hits[:, :k].sum(1) / k
    return found


def pic2word_metrics(
    queries: Queries, rows: np.ndarray, subset_rows: np.ndarray | None = None
) -> dict[str, float]:
    """Means over all queries of a domain, also those without a relevant image, and over domains."""
    del subset_rows
    values = pic2word_values(queries, rows)
    by_domain = _by_kind(queries, values)
    means = _mean_of_groups(values, by_domain)
    return {**means, **by_domain, "queries": len(queries)}


def _mean_of_groups(
    values: Mapping[str, np.ndarray], by_group: Mapping[str, float]
) -> dict[str, float]:
    """The unweighted mean over groups of each metric, from `<metric>/<group>`."""
    found = {}
    for key in values:
        of_groups = [v for name, v in by_group.items() if name.startswith(f"{key}/")]
        if of_groups:
            found[key] = float(np.mean(of_groups))
    return found


def freedom_values(queries: Queries, rows: np.ndarray, places: np.ndarray | None = None) -> Values:
    """What each query of FREEDOM's protocol gets, from the whole ranking.

    | key | |
    | --- | --- |
    | `mAP` | `metrics.trapezoid_average_precision` |
    | `R@k` | relevant rows among the first k / (n + 1e-5), k of 5, 10, 50, 100 |
    | `P@k` | the same / (min(n, k) + 1e-5) |
    """
    del rows
    if places is None:
        return {}
    count = counts_of(queries)
    found: Values = {"mAP": metrics.trapezoid_average_precision(places, count)}
    for k in FREEDOM_KS:
        hits = ((places >= 0) & (places < k)).sum(1)
        found[f"R@{k}"] = hits / (count + SMALL)
        found[f"P@{k}"] = hits / (np.minimum(count, k) + SMALL)
    return found


def freedom_metrics(
    queries: Queries,
    rows: np.ndarray,
    subset_rows: np.ndarray | None = None,
    places: np.ndarray | None = None,
) -> dict[str, float]:
    """FREEDOM's table: `mAP/<source> to <target>`, `mAP/from <source>`, and `mAP`.

    A pair's figure is the mean over its queries, a source's the mean over its pairs, and the total
    the mean over sources, all unweighted. The published code rounds a pair's figure to two decimals
    of a percent before it goes on; here nothing is rounded.
    """
    del subset_rows
    values = freedom_values(queries, rows, places)
    by_pair = _by_kind(queries, values)
    sources = sorted({kind.split(TO)[0] for kinds in queries.kinds for kind in kinds})
    by_source = {
        f"{key}/from {source}": float(
            np.mean([v for name, v in by_pair.items() if name.startswith(f"{key}/{source}{TO}")])
        )
        for key in values
        for source in sources
    }
    means = {
        key: float(np.mean([by_source[f"{key}/from {source}"] for source in sources]))
        for key in values
    }
    return {**means, **by_source, **by_pair, "queries": len(queries)}


# --- i-CIR ----------------------------------------------------------------------------------------


def icir_values(queries: Queries, rows: np.ndarray, places: np.ndarray | None = None) -> Values:
    """`mAP`: `metrics.trapezoid_average_precision` of each query."""
    del rows
    if places is None:
        return {}
    return {"mAP": metrics.trapezoid_average_precision(places, counts_of(queries))}


def icir_metrics(
    queries: Queries,
    rows: np.ndarray,
    subset_rows: np.ndarray | None = None,
    places: np.ndarray | None = None,
) -> dict[str, float]:
    """`mAP` over queries; `mAP_instances` and `worst_instances`: means over instances.

    The latter two are of each instance's mean and of its minimum.
    """
    del subset_rows
    found = icir_values(queries, rows, places)["mAP"]
    by_instance = [found[m] for m in metrics.group_members([(p,) for p in queries.pools]).values()]
    return {
        "mAP": float(found.mean()),
        "mAP_instances": float(np.mean([own.mean() for own in by_instance])),
        "worst_instances": float(np.mean([own.min() for own in by_instance])),
        "instances": len(by_instance),
        "queries": len(queries),
    }


# --- Fashion200k ----------------------------------------------------------------------------------


def fashion200k_values(
    queries: Queries, rows: np.ndarray, places: np.ndarray | None = None
) -> Values:
    """`R@k`: whether an image with the target's description is among the first k, of 1, 10, 50.

    `mean` is that of the three.
    """
    del places
    found = {f"R@{k}": metrics.recall_at_k(rows, queries.relevant, k) for k in FASHION200K_KS}
    return found | {"mean": np.mean([*found.values()], axis=0)}


def fashion200k_metrics(
    queries: Queries, rows: np.ndarray, subset_rows: np.ndarray | None = None
) -> dict[str, float]:
    """Means over queries, and by category."""
    del subset_rows
    values = fashion200k_values(queries, rows)
    return mean_of(values) | _by_kind(queries, values) | {"queries": len(queries)}


# --- CIRCLED --------------------------------------------------------------------------------------


def circled_values(queries: Queries, rows: np.ndarray, places: np.ndarray | None = None) -> Values:
    """`R@k`: whether a ground truth of the session is among the first k, of 1, 5, 10, 50."""
    del places
    return {f"R@{k}": metrics.recall_at_k(rows, queries.relevant, k) for k in CIRCLED_KS}


def circled_metrics(
    queries: Queries, rows: np.ndarray, subset_rows: np.ndarray | None = None
) -> dict[str, float]:
    """Means over turns, by subset, and by number of the turn."""
    del subset_rows
    values = circled_values(queries, rows)
    return mean_of(values) | _by_kind(queries, values) | {"queries": len(queries)}


def listed_places(lists: Sequence[Sequence[int]], relevant: Sequence[np.ndarray]) -> np.ndarray:
    """`places` of ranked lists: int `[Q, R]`; a relevant row that a list lacks is never found."""
    found = [np.flatnonzero(np.isin(own, wanted)) for own, wanted in zip(lists, relevant)]
    places = np.full((len(lists), max(map(len, found), default=0)), -1, np.int32)
    for line, own in zip(places, found):
        line[: len(own)] = own
    return places
