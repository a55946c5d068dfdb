"""Retrieval metrics on ranked lists, in NumPy.

Everywhere `rows` is int `[Q, K]`: for each query the gallery rows found, best first and without
repetition, with -1 where a list is shorter than `K` (-1 never counts as a hit): a list shorter than
a cut-off, as of a gallery smaller than it, counts what it has. Relevant rows are *ragged*: one
sequence of ints for each query, or int `[Q, P]` padded with -1, or int `[Q]` for one relevant row
each. All results are float64.

    P@k  = (relevant rows among the first k) / k
    R@k  = 1 if any relevant row is among the first k, else 0
    AP@k = (sum over ranks i <= k that are relevant of P@i) / min(number of relevant rows, k)
    nDCG@k = (sum over ranks i <= k that are relevant of 1 / log2(i + 1)) / (its best value)

`R@k` is recall for one target and the "hit rate" for several, as FashionIQ and CIRR report it; AP@k
is that of CIRCO (Baldrati et al., 2023, arXiv:2303.15247, section 5).

The keys of `summarize`:

| key | mean of |
| --- | --- |
| `R@k` | the single target being among the first k |
| `R_valid@k` | any relevant target being among the first k |
| `P@k`, `P@k_ceiling` | precision over relevant targets, and its best value |
| `mAP@k` | AP@k over relevant targets |
| `nDCG@k` | nDCG@k over relevant targets, each worth 1 |
| `top1_is_reference` | the first result being the query's own reference image |
| `queries` | (the number of queries) |
| `queries_with_valid` | (the number of queries whose relevant targets are known) |

and the same for each kind of query under keys such as `R@1/color`, and for each attribute that the
texts change under keys such as `P@10/attribute:color`, both in sorted order. A query counts once in
each of its kinds and attributes; one without any counts in the total only. Metrics over relevant
targets are means over the queries whose relevant targets are known, and are left out where there
are none. Queries without a target are left out everywhere, and their number is
`queries_without_target`, if there are any.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized

import numpy as np

from dqe_jax.utils.errors import UserError

Ragged = Sequence[Sequence[int] | np.ndarray] | np.ndarray


def pad_lists(rows: np.ndarray, k: int) -> np.ndarray:
    """Ranked lists int `[Q, max(K, k)]`: -1 is added where `K` is smaller than `k`."""
    rows = np.asarray(rows)
    missing = max(k - rows.shape[1], 0)
    return np.pad(rows, ((0, 0), (0, missing)), constant_values=-1)


def recall_at_k(rows: np.ndarray, targets: Ragged, k: int) -> np.ndarray:
    """R@k of every query, `[Q]`: whether any of its targets is among its first `k` rows.

    Raises:
        UserError: if `k` is larger than `K`.
        ValueError: if shapes do not fit together or a list repeats a row.
    """
    hits, _ = hits_at_k(rows, targets, k)
    return np.asarray(hits.any(axis=1), np.float64)


def precision_at_k(rows: np.ndarray, targets: Ragged, k: int) -> np.ndarray:
    """P@k of every query, `[Q]`. Raises as `recall_at_k`."""
    return hits_at_k(rows, targets, k)[0].sum(axis=1) / k


def precision_ceiling(num_relevant: Sequence[int] | np.ndarray, k: int) -> np.ndarray:
    """The best P@k that a query with `num_relevant[q]` relevant rows can reach, `[Q]`."""
    return np.minimum(np.asarray(num_relevant), k) / k


def average_precision_at_k(rows: np.ndarray, targets: Ragged, k: int) -> np.ndarray:
    """AP@k of every query, `[Q]`; NaN without any target. Raises as `recall_at_k`."""
    return average_precision_of(*hits_at_k(rows, targets, k))


def ndcg_at_k(rows: np.ndarray, targets: Ragged, k: int) -> np.ndarray:
    """nDCG@k of every query, `[Q]`; NaN without any target. Raises as `recall_at_k`."""
    return _ndcg(*hits_at_k(rows, targets, k))


def _ndcg(hits: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """nDCG@k of hits `[Q, k]`, with `counts[q]` relevant rows in all, each worth 1."""
    k = hits.shape[1]
    gains = 1 / np.log2(np.arange(2, k + 2))
    best = np.concatenate([[0.0], np.cumsum(gains)])[np.minimum(counts, k)]
    return np.divide(hits @ gains, best, out=np.full(len(hits), np.nan), where=best > 0)


def trapezoid_average_precision(places: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """AP of every query as the area under its curve by the trapezoid rule, `[Q]`.

    That of the Oxford buildings protocol (Philbin et al., 2007), as in the evaluation code of
    Radenovic et al. (2018). With relevant rows at places `r_0 < r_1 < ...`, counted from 0, and `n`
    of them in all,

        AP = sum_j (p_j + p'_j) / 2 / (n + 1e-5),  p_j = j / r_j (1 if r_j = 0),
                                                   p'_j = (j + 1) / (r_j + 1)

    A query without relevant rows has 0.

    Args:
        places: int `[Q, R]`, places of the relevant rows in the whole ranking, ascending, padded
            with -1 at the end.
        counts: int `[Q]`, `n`; rows that are not ranked at all count in it.
    """
    places = np.asarray(places)
    j = np.arange(places.shape[1])
    before = np.where(places <= 0, 1.0, j / np.maximum(places, 1))
    area = (before + (j + 1) / (places + 1.0 + (places < 0))) / 2
    total: np.ndarray = np.where(places >= 0, area, 0.0).sum(axis=1) / (np.asarray(counts) + 1e-5)
    return total


def average_precision_of(hits: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """AP@k of hits bool `[Q, k]`, `[Q]`, with `counts[q]` relevant rows in all; NaN without any."""
    k = hits.shape[1]
    precision = np.cumsum(hits, axis=1) / np.arange(1, k + 1)
    best = np.minimum(counts, k)
    return np.divide(
        (precision * hits).sum(axis=1), best, out=np.full(len(hits), np.nan), where=best > 0
    )


def r_precision(rows: np.ndarray, targets: Ragged) -> np.ndarray:
    """P@R with R the query's own number of targets, `[Q]`.

    NaN where it is not defined: without any target, or where the list is shorter than R and so does
    not suffice. Such queries have to be left out of a mean by the caller, who should say so.
    """
    hits, counts = hits_at_k(rows, targets, np.shape(rows)[1])
    within = np.arange(hits.shape[1]) < counts[:, None]
    known = (counts > 0) & (counts <= hits.shape[1])
    return np.divide(
        (hits & within).sum(axis=1), counts, out=np.full(len(hits), np.nan), where=known
    )


def summarize(
    rows: np.ndarray,
    *,
    target: Sequence[int] | np.ndarray,
    relevant: Ragged | None,
    reference: Sequence[int] | np.ndarray,
    kinds: Sequence[Sequence[str]],
    attributes: Sequence[Sequence[str]] | None = None,
    ks: Sequence[int] = (1, 5, 10, 50),
    precision_ks: Sequence[int] = (10,),
) -> dict[str, float]:
    """All metrics of a ranking as one flat dict, see the module: means over queries.

    Args:
        rows: int `[Q, K]`, see the module.
        target: int `[Q]`, the row that each query was made for, -1 if it has no label.
        relevant: ragged rows that are truly relevant; None or empty where truth is unknown.
        reference: int `[Q]`, the row of the reference image; -1 if it is not in the gallery.
        kinds: `Q` sequences of names.
        attributes: `Q` sequences of `name=value`; None for no metrics by attribute.
        ks: cut-offs of `R@k` and `R_valid@k`.
        precision_ks: cut-offs of `P@k`, `mAP@k` and `nDCG@k`.

    Raises:
        UserError: if a cut-off is larger than `K` (see `pad_lists`).
        ValueError: if lengths do not fit together or no query has a target: a split without labels
            has no metrics.
    """
    rows, target, reference = np.asarray(rows), np.asarray(target), np.asarray(reference)
    relevant = [()] * len(rows) if relevant is None else relevant
    attributes = [()] * len(rows) if attributes is None else attributes
    _check_lengths(len(rows), target=target, relevant=relevant, reference=reference)
    _check_lengths(len(rows), kinds=kinds, attributes=attributes)
    if any(isinstance(entry, str) for entry in (*kinds, *attributes)):
        raise ValueError("kinds and attributes hold a sequence of strings for each query")
    labelled = target >= 0
    if not labelled.any():
        raise ValueError("there are no queries with a target to summarize")
    values = {f"R@{k}": recall_at_k(rows, target, k) for k in ks}
    values["top1_is_reference"] = (rows[:, 0] >= 0) & (rows[:, 0] == reference)
    # Looking up relevant rows takes most of the time, so it is done once for all metrics.
    hits, num_relevant = hits_at_k(rows, relevant, rows.shape[1])
    over_relevant = _over_relevant(hits, num_relevant, ks, precision_ks)
    summary: dict[str, float] = {}
    for suffix, members in _groups(kinds, attributes).items():
        members = members & labelled
        means = _means(values, over_relevant, members, members & (num_relevant > 0))
        summary |= {name + suffix: mean for name, mean in means.items()}
    if not labelled.all():
        summary["queries_without_target"] = int((~labelled).sum())
    return summary


def _check_lengths(count: int, **columns: Sized) -> None:
    for name, values in columns.items():
        if len(values) != count:
            raise ValueError(f"{name} has {len(values)} entries for {count} ranked lists")


def _over_relevant(
    hits: np.ndarray, num_relevant: np.ndarray, ks: Sequence[int], precision_ks: Sequence[int]
) -> dict[str, np.ndarray]:
    """Metrics over relevant rows of every query, `[Q]`, from hits `[Q, K]`; none without any."""
    if not num_relevant.any():
        return {}
    values = {}
    for k in precision_ks:
        _check_cutoff(k, hits)
        values[f"P@{k}"] = hits[:, :k].sum(axis=1) / k
        values[f"P@{k}_ceiling"] = precision_ceiling(num_relevant, k)
        values[f"mAP@{k}"] = average_precision_of(hits[:, :k], num_relevant)
        values[f"nDCG@{k}"] = _ndcg(hits[:, :k], num_relevant)
    return values | {f"R_valid@{k}": hits[:, :k].any(axis=1) for k in ks}


def _groups(
    kinds: Sequence[Sequence[str]], attributes: Sequence[Sequence[str]]
) -> dict[str, np.ndarray]:
    """The queries of each group, bool `[Q]`, by the end of its keys; "" for all queries."""
    names = [[pair.split("=")[0] for pair in pairs] for pairs in attributes]
    return {
        "": np.ones(len(kinds), bool),
        **{f"/{kind}": members for kind, members in group_members(kinds).items()},
        **{f"/attribute:{name}": members for name, members in group_members(names).items()},
    }


def _means(
    values: Mapping[str, np.ndarray],
    over_relevant: Mapping[str, np.ndarray],
    members: np.ndarray,
    known: np.ndarray,
) -> dict[str, float]:
    """Means and numbers of a group's queries; none if it has none.

    Args:
        values: metrics of every query, `[Q]`.
        over_relevant: the same, over relevant rows.
        members: bool `[Q]`, the group's queries that have a target.
        known: bool `[Q]`, those of them whose relevant rows are known.
    """
    if not members.any():
        return {}
    means: dict[str, float] = {name: float(value[members].mean()) for name, value in values.items()}
    if known.any():
        means |= {name: float(value[known].mean()) for name, value in over_relevant.items()}
        means["queries_with_valid"] = int(known.sum())
    means["queries"] = int(members.sum())
    return means


def group_members(names: Sequence[Sequence[str]]) -> dict[str, np.ndarray]:
    """Which queries belong to each group.

    Args:
        names: for each of `Q` queries the groups that it is in.

    Returns:
        For each name, in sorted order, bool `[Q]`.
    """
    return {
        name: np.array([name in entry for entry in names], bool)
        for name in sorted(set().union(*names))
    }


def random_baseline(
    num_gallery: int,
    num_relevant: Sequence[int] | np.ndarray | None = None,
    *,
    ks: Sequence[int] = (1, 5, 10, 50),
    precision_ks: Sequence[int] = (10,),
) -> dict[str, float]:
    """What a uniformly random order of the gallery scores on average: exact expectations.

    With `N` images of which `n` are relevant, the rank of each is uniform, hence (hypergeometric)

        R@k       = min(k, N) / N
        R_valid@k = 1 - C(N - n, k) / C(N, k)
        P@k       = n / N
        AP@k      = sum_{i <= k} (1/i) (n/N) (1 + (i - 1) (n - 1) / (N - 1)) / min(n, k)
        nDCG@k    = (n/N) (sum_{i <= min(k, N)} 1 / log2(i + 1)) / (the same sum to min(n, k))

    where AP@k takes P@i, given that rank i is relevant, as that hit plus the expected ones
    before it. Keys and the mean over queries are those of `summarize`.

    Args:
        num_gallery: `N`, the images that are ranked: one fewer if the reference is left out.
        num_relevant: int `[Q]`, the number of relevant targets of each query; queries with none are
            left out. None or none at all gives `R@k` only.
        ks: cut-offs of `R@k` and `R_valid@k`.
        precision_ks: cut-offs of `P@k`, `mAP@k` and `nDCG@k`.

    Raises:
        ValueError: if the gallery is empty or holds fewer images than a query has relevant targets.
    """
    N = int(num_gallery)
    if N < 1:
        raise ValueError("the gallery is empty")
    result = {f"R@{k}": min(k, N) / N for k in ks}
    n: np.ndarray = np.asarray([] if num_relevant is None else num_relevant, np.float64).reshape(-1)
    n = n[n > 0]
    if not n.size:
        return result
    if n.max() > N:
        raise ValueError(f"{int(n.max())} relevant targets in a gallery of {N} images")

    for k in precision_ks:
        i = np.arange(1, min(k, N) + 1)[:, None]
        precision = n / N
        expected = precision / i * (1 + (i - 1) * (n - 1) / max(N - 1, 1))
        # A list that is longer than the gallery ends in empty places.
        result[f"P@{k}"] = float(precision.mean() * min(k, N) / k)
        result[f"P@{k}_ceiling"] = float(precision_ceiling(n, k).mean())
        result[f"mAP@{k}"] = float((expected.sum(axis=0) / np.minimum(n, k)).mean())
        gains = np.cumsum(1 / np.log2(np.arange(2, k + 2)))
        best = gains[np.minimum(n, k).astype(int) - 1]
        result[f"nDCG@{k}"] = float((precision * gains[min(k, N) - 1] / best).mean())
    for k in ks:
        j = np.arange(min(k, N))[:, None]
        # A factor at or below 0 means that k draws cannot miss all n.
        miss = np.prod(np.maximum(N - n - j, 0) / (N - j), axis=0)
        result[f"R_valid@{k}"] = float((1 - miss).mean())
    return result


def hits_at_k(rows: np.ndarray, targets: Ragged, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Whether each of the first `k` rows is a target, bool `[Q, k]`; how many targets, `[Q]`.

    Raises as `recall_at_k`.
    """
    rows = np.asarray(rows)
    if rows.ndim != 2 or len(targets) != len(rows):
        raise ValueError(
            "expected rows [Q, K] and targets of Q queries, "
            f"got {list(rows.shape)} and {len(targets)}"
        )
    _check_cutoff(k, rows)
    ordered = np.sort(rows, axis=1)
    if ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any():
        raise ValueError("a ranked list holds the same row twice")
    first = rows[:, :k]
    if isinstance(targets, np.ndarray) and targets.ndim == 1 and targets.dtype != object:
        known = targets >= 0
        return (first == targets[:, None]) & known[:, None], known.astype(np.int64)
    # Query by query: an array [Q, k, P] is large where a query has thousands of relevant targets.
    hits, counts = np.zeros(first.shape, bool), np.zeros(len(first), np.int64)
    for i, values in enumerate(targets):
        wanted = np.unique(np.asarray(values, np.int64))
        wanted = wanted[wanted >= 0]
        hits[i], counts[i] = np.isin(first[i], wanted), len(wanted)
    return hits, counts


def _check_cutoff(k: int, rows: np.ndarray) -> None:
    if not 1 <= k <= rows.shape[1]:
        raise UserError(
            f"k={k} does not fit ranked lists of {rows.shape[1]} rows: raise eval.top_k, or choose "
            f"1 <= k <= {rows.shape[1]}."
        )
