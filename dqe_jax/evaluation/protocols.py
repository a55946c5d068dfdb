"""The protocols of the benchmarks, measured on ranked lists.

A protocol says what is ranked for a query and how the ranked lists are measured. All figures are
fractions (published tables show percentages), means over queries unless it says otherwise:

| protocol | data sets | gallery of a query | reference | metrics |
| --- | --- | --- | --- | --- |
| plain | shapes, fashion_products, triplets | all | stays | `metrics.summarize` |
| fashioniq-original | fashioniq | its category's image split file | stays | R@k by category |
| fashioniq-val | fashioniq | references and targets of its category's queries | stays | the same |
| cirr | cirr | all | left out | R@k; R_subset@k among the query's subset |
| circo | circo | all | stays | mAP@k over all ground truths; R@k of the single target |
| genecis | genecis | its own 10 or 15 candidates | stays | R@k by task |
| pinpoint | pinpoint | all | stays | mAP@k, rate of explicit negatives, spread over wordings |
| shoes | shoes | all | left out | R@k, mean of R@1, R@10 and R@50 |
| pic2word | pic2word | all | stays | share of the relevant images in the first k, by domain |
| freedom | imagenet_r, nico, minidn, ltll | all; nico, minidn: their database | stays | mAP |
| lasco | lasco | all | stays | R@k |
| fashion200k | fashion200k | all | left out | R@k of any image with the target's description |
| icir | icir | its instance's database | stays | mAP |
| edir | edir | all of the corpus | stays | R@k, by subcategory |
| circled | circled | its subset's | stays | R@k of any ground truth, by subset and turn |

`several_targets.py` measures those with several valid targets. The mAP of freedom and icir is of
the whole ranking and the trapezoid rule, so that a measure takes `places` too.

The two of FashionIQ are **not comparable**: `original` is that of CLIP4Cir, SPRC and QuRe; `val`
(VAL-split), with about half the images, that of VAL and DQU-CIR.

Where `rows` are passed they are int `[Q, K]`, ranked rows of the split's gallery, as in
`metrics`: best first, padded with -1 to at least `TOP_K` columns.

HP-FashionIQ has no ranking: see `preferences.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from dqe_jax.data.datasets import DATASETS
from dqe_jax.data.examples import Queries
from dqe_jax.evaluation import metrics, several_targets
from dqe_jax.utils.errors import UserError

TOP_K = 50  # the largest cut-off of all protocols, and the length of submitted lists
RECALL_KS = (1, 5, 10, 50)
SUBSET_KS = (1, 2, 3)
CIRCO_KS = (5, 10, 25, 50)
GENECIS_KS = (1, 2, 3)
SHOES_KS = (1, 10, 50)

Measure = Callable[..., dict[str, float]]
# Of queries, rows and places: float `[Q]` by the metric's name.
QueryValues = Callable[[Queries, np.ndarray, np.ndarray | None], Mapping[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How a data set is ranked and measured.

    Attributes:
      name: as in the module's table; every table of results names it.
      measure: `(queries, rows, subset_rows=None) -> metrics`, for labelled queries only: a split
        without labels has no metrics. `subset_rows` int `[Q, S]` are the images of each query's
        subset, best first, padded with -1; only CIRR has them. If `whole_ranking` it takes
        `places` too, int `[Q, R]` as `ranking.make_place_fn` gives them.
      headline: keys for a log line and the columns of a table.
      note: one line on what the figures mean, to be printed with them.
      exclude_reference: whether the reference is left out of the ranking.
      gallery_of_queries: whether only images that the queries name are ranked: see `pool_rows`.
      own_gallery: whether a query ranks its subset alone, the reference too if it is there; of
        equal scores the target's comes last.
      whole_ranking: whether metrics need the places of all relevant rows.
      by_relevance: whether all that counts are the relevant rows, so that a query counts that has
        none, and has no single target.
      mean_of: what metrics are unweighted means over: "pools" or "kinds" of the queries, or "" for
        the queries themselves.
      query_values: what each query gets; None where `intervals.query_values` knows it by the names
        of the metrics.
    """

    name: str
    measure: Measure
    headline: tuple[str, ...]
    note: str
    exclude_reference: bool = False
    gallery_of_queries: bool = False
    own_gallery: bool = False
    whole_ranking: bool = False
    by_relevance: bool = False
    mean_of: str = ""
    query_values: QueryValues | None = None

    def labelled(self, queries: Queries) -> np.ndarray:
        """Positions of the queries that are measured, int `[n]`; none without published labels."""
        if self.by_relevance and any(len(relevant) for relevant in queries.relevant):
            return np.arange(len(queries))
        return np.flatnonzero(queries.target >= 0)

    def metrics(
        self,
        queries: Queries,
        rows: np.ndarray,
        subset_rows: np.ndarray | None = None,
        places: np.ndarray | None = None,
    ) -> dict[str, float]:
        """Metrics of the labelled queries among all; {} if there are none.

        Args:
          queries: of a split.
          rows: of all of them.
          subset_rows: the same.
          places: the same; needed if `whole_ranking`.
        """
        known = self.labelled(queries)
        if not len(known):
            return {}
        more: dict[str, Any] = {}
        if self.whole_ranking:
            if places is None:
                raise ValueError(f"the protocol {self.name} needs places")
            more = {"places": places[known]}
        inside = None if subset_rows is None else subset_rows[known]
        return self.measure(queries.take(known), rows[known], inside, **more)

    def columns(self, found: Mapping[str, float]) -> tuple[str, ...]:
        """The headline metrics that say something: P@10 does not where a query has one target.

        Args:
          found: the metrics of a split.
        """
        single = found.get("P@10_ceiling", 1.0) < 0.1 + 1e-6  # a mean: it is rounded
        return tuple(
            key for key in self.headline if key in found and not (single and key == "P@10")
        )


def protocol_of(dataset: str, variant: str = "original") -> Protocol:
    """The protocol of a data set.

    Args:
      dataset: its name.
      variant: `original`, what is usual for the data set; or `val`, which only fashioniq has.

    Raises:
      UserError: the data set is not known, is not ranked, or has no such variant.
    """
    if dataset == "hp_fashioniq":
        raise UserError(
            "hp_fashioniq holds preferences between two sets of images, not queries that are "
            f"ranked; choose one of {', '.join(DATASETS)}."
        )
    if dataset not in DATASETS:
        raise UserError(f"There is no data set {dataset!r}; choose one of {', '.join(DATASETS)}.")
    names = DATASETS[dataset].protocols
    if variant not in names:
        variants = ", ".join(map(repr, names))
        raise UserError(f"{dataset} has no protocol {variant!r}; choose {variants}.")
    return PROTOCOLS[names[variant]]


def pool_rows(
    protocol: Protocol, queries: Queries, pools: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The gallery rows that queries of each pool rank.

    Args:
      protocol: of the data set.
      queries: all queries of the split.
      pools: the rows of each part of the gallery, by the names that `queries.pools` holds.

    Returns:
      `pools`; or, if the protocol ranks only images that the queries name, the sorted distinct rows
      of references and targets of each pool's queries (none for a pool without queries).

    Raises:
      UserError: the targets are needed and not known.
    """
    if not protocol.gallery_of_queries:
        return {name: np.asarray(rows) for name, rows in pools.items()}
    if (queries.target < 0).any():
        raise UserError(
            f"The protocol {protocol.name} needs the targets of all queries, which this split does "
            "not have; choose the protocol 'original' or a split with labels."
        )
    named = np.stack([queries.reference, queries.target])
    members = metrics.group_members([(pool,) for pool in queries.pools])
    nobody = np.zeros(len(queries), bool)
    return {name: np.unique(named[:, members.get(name, nobody)]) for name in pools}


def subsets_of(protocol: Protocol, queries: Queries) -> np.ndarray:
    """The queries' subsets that are ranked among themselves: int32 `[Q, S]`, padded with -1.

    Without the reference, but where they are a query's whole gallery.
    """
    rows = np.full((len(queries), max(map(len, queries.subset))), -1, np.int32)
    for i, members in enumerate(queries.subset):
        if not protocol.own_gallery:
            members = members[members != queries.reference[i]]
        rows[i, : len(members)] = members
    return rows


def plain_metrics(
    queries: Queries, rows: np.ndarray, subset_rows: np.ndarray | None = None
) -> dict[str, float]:
    """`metrics.summarize`, by kind and by attribute."""
    del subset_rows
    return metrics.summarize(
        rows,
        target=queries.target,
        relevant=queries.relevant,
        reference=queries.reference,
        kinds=queries.kinds,
        attributes=queries.attributes,
    )


def fashioniq_metrics(
    queries: Queries, rows: np.ndarray, subset_rows: np.ndarray | None = None
) -> dict[str, float]:
    """FashionIQ's metrics under either protocol.

    | key | |
    | --- | --- |
    | `R@k/<category>` | recall of the category's queries, k of 1, 5, 10, 50 |
    | `R@k` | the unweighted mean of the categories' |
    | `mean`, `mean/<category>` | `(R@10 + R@50) / 2` |
    | `top1_is_reference` | share of all queries whose first result is their own reference |
    | `queries`, `queries/<category>` | numbers of queries |
    | `categories` | how many categories there are: published means are over three |
    """
    del subset_rows
    recalls = _recalls(queries, rows, RECALL_KS)
    categories = metrics.group_members([(pool,) for pool in queries.pools])
    by_category = {
        f"{name}/{category}": float(values[members].mean())
        for category, members in categories.items()
        for name, values in recalls.items()
    }
    means = {
        name: float(np.mean([by_category[f"{name}/{category}"] for category in categories]))
        for name in recalls
    }
    halves = {
        f"mean/{category}": (by_category[f"R@10/{category}"] + by_category[f"R@50/{category}"]) / 2
        for category in categories
    }
    return {
        **means,
        "mean": (means["R@10"] + means["R@50"]) / 2,
        **by_category,
        **halves,
        "top1_is_reference": _top1_is_reference(queries, rows),
        "queries": len(queries),
        **{f"queries/{category}": int(members.sum()) for category, members in categories.items()},
        "categories": len(categories),
    }


def cirr_metrics(
    queries: Queries, rows: np.ndarray, subset_rows: np.ndarray | None = None
) -> dict[str, float]:
    """CIRR's metrics: those of `cirr_recall` and `cirr_subset_recall`, and `mean`.

    `mean` is `(R@5 + R_subset@1) / 2`. Without `subset_rows` there is `cirr_recall` only. The
    reference is skipped in `subset_rows`.

    Raises:
      ValueError: `rows` hold a query's own reference, or as `cirr_recall`.
    """
    rows = np.asarray(rows)
    if ((rows == queries.reference[:, None]) & (rows >= 0)).any():
        raise ValueError("CIRR's ranked lists hold a query's own reference: leave it out")
    result = cirr_recall(queries, rows)
    if subset_rows is not None:
        result |= cirr_subset_recall(queries, without_reference(queries, subset_rows))
        result["mean"] = (result["R@5"] + result["R_subset@1"]) / 2
    return result


def cirr_recall(queries: Queries, rows: np.ndarray) -> dict[str, float]:
    """`R@k` for k of 1, 5, 10, 50 and `queries`, of lists as they are.

    Raises:
      ValueError: a query has no target, or a list repeats a row.
    """
    recalls = _recalls(queries, rows, RECALL_KS)
    return {name: float(v.mean()) for name, v in recalls.items()} | {"queries": len(queries)}


def cirr_subset_recall(queries: Queries, subset_rows: np.ndarray) -> dict[str, float]:
    """`R_subset@k` for k of 1, 2, 3 and `queries`, of lists as they are.

    Raises:
      ValueError: as `cirr_recall`.
    """
    recalls = _recalls(queries, metrics.pad_lists(subset_rows, max(SUBSET_KS)), SUBSET_KS)
    return {name.replace("R@", "R_subset@"): float(v.mean()) for name, v in recalls.items()} | {
        "queries": len(queries)
    }


def circo_metrics(
    queries: Queries, rows: np.ndarray, subset_rows: np.ndarray | None = None
) -> dict[str, float]:
    """CIRCO's metrics.

    | key | |
    | --- | --- |
    | `mAP@k` | over all ground truths, k of 5, 10, 25, 50; see `metrics` |
    | `nDCG@10` | the same; not among the published metrics |
    | `R@k` | recall of the single target that the text was written for |
    | `mAP@10/<aspect>` | of the queries with this semantic aspect, one of nine |
    | `top1_is_reference` | share of queries whose first result is their own reference |
    | `queries`, `queries/<aspect>` | numbers of queries |

    Ground truths that are never ranked, as their photo is missing, count in `mAP@k` all the same.

    Raises:
      ValueError: a query has no target or no ground truth, or a list repeats a row.
    """
    del subset_rows
    if not all(np.any(np.asarray(relevant) >= 0) for relevant in queries.relevant):
        raise ValueError("a query of CIRCO has no ground truth")
    precisions = {
        f"mAP@{k}": metrics.average_precision_at_k(rows, queries.relevant, k) for k in CIRCO_KS
    }
    gains = {"nDCG@10": metrics.ndcg_at_k(rows, queries.relevant, 10)}
    aspects = metrics.group_members(queries.kinds)
    values = precisions | gains | _recalls(queries, rows, CIRCO_KS)
    return {
        **{name: float(value.mean()) for name, value in values.items()},
        **{
            f"mAP@10/{aspect}": float(precisions["mAP@10"][members].mean())
            for aspect, members in aspects.items()
        },
        "top1_is_reference": _top1_is_reference(queries, rows),
        "queries": len(queries),
        **{f"queries/{aspect}": int(members.sum()) for aspect, members in aspects.items()},
    }


def genecis_metrics(
    queries: Queries, rows: np.ndarray, subset_rows: np.ndarray | None = None
) -> dict[str, float]:
    """GeneCIS's metrics, of each query's candidates as they are ranked.

    | key | |
    | --- | --- |
    | `R@k/<task>` | recall of the task's queries, k of 1, 2, 3 |
    | `R@k` | the unweighted mean of the tasks' |
    | `queries`, `queries/<task>` | numbers of queries |
    | `tasks` | how many tasks there are: published means are over four |
    """
    del subset_rows
    recalls = _recalls(queries, rows, GENECIS_KS)
    tasks = metrics.group_members([(pool,) for pool in queries.pools])
    by_task = {
        f"{name}/{task}": float(values[members].mean())
        for task, members in tasks.items()
        for name, values in recalls.items()
    }
    return {
        **{name: float(np.mean([by_task[f"{name}/{task}"] for task in tasks])) for name in recalls},
        **by_task,
        "queries": len(queries),
        **{f"queries/{task}": int(members.sum()) for task, members in tasks.items()},
        "tasks": len(tasks),
    }


def shoes_values(
    queries: Queries, rows: np.ndarray, places: np.ndarray | None = None
) -> Mapping[str, np.ndarray]:
    """`R@k` of each query for k of 1, 10, 50, and their `mean`."""
    del places
    found = _recalls(queries, rows, SHOES_KS)
    return found | {"mean": np.mean([*found.values()], axis=0)}


def shoes_metrics(
    queries: Queries, rows: np.ndarray, subset_rows: np.ndarray | None = None
) -> dict[str, float]:
    """Means of `shoes_values` over queries, and `queries`."""
    del subset_rows
    found = {key: float(value.mean()) for key, value in shoes_values(queries, rows).items()}
    return found | {"queries": len(queries)}


def lasco_metrics(
    queries: Queries, rows: np.ndarray, subset_rows: np.ndarray | None = None
) -> dict[str, float]:
    """`R@k` for k of 1, 5, 10, 50, `top1_is_reference` and `queries`."""
    del subset_rows
    found = {k: float(v.mean()) for k, v in _recalls(queries, rows, RECALL_KS).items()}
    return {
        **found,
        "top1_is_reference": _top1_is_reference(queries, rows),
        "queries": len(queries),
    }


def edir_metrics(
    queries: Queries, rows: np.ndarray, subset_rows: np.ndarray | None = None
) -> dict[str, float]:
    """`R@k` for k of 1, 5, 10, 50, over all queries and by subcategory."""
    del subset_rows
    values = _recalls(queries, rows, RECALL_KS)
    found = {k: float(v.mean()) for k, v in values.items()} | {"queries": len(queries)}
    for kind, members in metrics.group_members(queries.kinds).items():
        found |= {f"{k}/{kind}": float(v[members].mean()) for k, v in values.items()}
        found[f"queries/{kind}"] = int(members.sum())
    return found


def _recalls(queries: Queries, rows: np.ndarray, ks: Iterable[int]) -> dict[str, np.ndarray]:
    """`R@k` of every query, `[Q]`, by key."""
    target = np.asarray(queries.target)
    if not len(target) or (target < 0).any():
        raise ValueError(f"{(target < 0).sum()} of {len(target)} queries have no target")
    return {f"R@{k}": metrics.recall_at_k(rows, target, k) for k in ks}


def _top1_is_reference(queries: Queries, rows: np.ndarray) -> float:
    first = np.asarray(rows)[:, 0]
    return float(((first >= 0) & (first == queries.reference)).mean())


def without_reference(queries: Queries, rows: np.ndarray) -> np.ndarray:
    """Lists in which the query's reference, if it is there, has become padding at the end."""
    rows = np.where(np.asarray(rows) == queries.reference[:, None], -1, rows)
    # Stable: all others keep their order.
    return np.take_along_axis(rows, np.argsort(rows < 0, axis=1, kind="stable"), axis=1)


_PLAIN = Protocol(
    name="plain",
    measure=plain_metrics,
    headline=("R@1", "R@5", "R@10", "R@50", "P@10", "mAP@10", "top1_is_reference"),
    note="plain protocol: the whole gallery is ranked, the reference included",
)
_FASHIONIQ_HEADLINE = ("R@10", "R@50", "mean", "R@1", "R@5", "top1_is_reference")
_FASHIONIQ = Protocol(
    name="fashioniq-original",
    measure=fashioniq_metrics,
    headline=_FASHIONIQ_HEADLINE,
    note=(
        "FashionIQ, original protocol: image split files as galleries, the reference included; "
        "totals are unweighted means over categories; not comparable with the val protocol"
    ),
    mean_of="pools",
)
_FASHIONIQ_VAL = Protocol(
    name="fashioniq-val",
    measure=fashioniq_metrics,
    headline=_FASHIONIQ_HEADLINE,
    note=(
        "FashionIQ, val protocol (VAL-split): references and targets of the queries as galleries, "
        "the reference included; totals are unweighted means over categories; not comparable with "
        "the original protocol"
    ),
    gallery_of_queries=True,
    mean_of="pools",
)
_CIRR = Protocol(
    name="cirr",
    measure=cirr_metrics,
    headline=(
        *("R@1", "R@5", "R@10", "R@50"),
        *("R_subset@1", "R_subset@2", "R_subset@3", "mean"),
    ),
    note="CIRR protocol: the reference is left out of rankings; mean is (R@5 + R_subset@1) / 2",
    exclude_reference=True,
)
_CIRCO = Protocol(
    name="circo",
    measure=circo_metrics,
    headline=("mAP@5", "mAP@10", "mAP@25", "mAP@50", "R@5", "R@10", "R@25", "R@50"),
    note="CIRCO protocol: mAP@k over all ground truths, R@k of the single target",
)
_GENECIS = Protocol(
    name="genecis",
    measure=genecis_metrics,
    headline=("R@1", "R@2", "R@3"),
    note=(
        "GeneCIS protocol: each query ranks its own 10 or 15 candidates, equal scores against the "
        "target; totals are unweighted means over tasks; a random order has 0.075, 0.150 and 0.225"
    ),
    own_gallery=True,
    mean_of="pools",
)
_PINPOINT = Protocol(
    name="pinpoint",
    measure=several_targets.pinpoint_metrics,
    headline=(
        *("mAP@10", "P@1", "P@10", "negatives@10", "mAP@10_without_negatives"),
        *("range_P@10", "nDCG@10"),
    ),
    note=(
        "PinPoint protocol: the whole gallery is ranked, the references included; mAP over all "
        "positives; negatives@10 is the rate of explicit negatives: lower is better"
    ),
    by_relevance=True,
    query_values=several_targets.pinpoint_values,
)
_SHOES = Protocol(
    name="shoes",
    measure=shoes_metrics,
    headline=("R@1", "R@10", "R@50", "mean"),
    note=(
        "Shoes protocol: all images of the evaluation split, the reference left out; mean is that "
        "of R@1, R@10 and R@50"
    ),
    exclude_reference=True,
    query_values=shoes_values,
)
_PIC2WORD = Protocol(
    name="pic2word",
    measure=several_targets.pic2word_metrics,
    headline=("R@10", "R@50", "R@1", "R@5", "P@10"),
    note=(
        "Pic2Word protocol: R@k is the share of a query's relevant images among the first k; "
        "queries without any count 0, so that R@10 is at most 0.539 and R@50 at most 0.679; the "
        "reference is ranked too"
    ),
    by_relevance=True,
    mean_of="kinds",
    query_values=several_targets.pic2word_values,
)
_FREEDOM = Protocol(
    name="freedom",
    measure=several_targets.freedom_metrics,
    headline=("mAP", "R@10", "R@50", "P@10", "P@50"),
    note=(
        "FREEDOM protocol: mAP of the whole ranking by the trapezoid rule, for each source and "
        "target domain, then means over targets and over sources; queries without a relevant image "
        "count 0"
    ),
    whole_ranking=True,
    by_relevance=True,
    mean_of="kinds",
    query_values=several_targets.freedom_values,
)
_LASCO = Protocol(
    name="lasco",
    measure=lasco_metrics,
    headline=("R@1", "R@5", "R@10", "R@50", "top1_is_reference"),
    note="LaSCo protocol: the whole gallery is ranked, the reference included",
)
_FASHION200K = Protocol(
    name="fashion200k",
    measure=several_targets.fashion200k_metrics,
    headline=("R@1", "R@10", "R@50", "mean"),
    note=(
        "Fashion200k protocol: all test images, the reference left out; any image with the "
        "target's description is a hit"
    ),
    exclude_reference=True,
    by_relevance=True,
    query_values=several_targets.fashion200k_values,
)
_ICIR = Protocol(
    name="icir",
    measure=several_targets.icir_metrics,
    headline=("mAP", "mAP_instances", "worst_instances"),
    note=(
        "i-CIR protocol: each query ranks its instance's database; mAP by the trapezoid rule over "
        "queries, the mean of the instances' means and that of their minima"
    ),
    whole_ranking=True,
    by_relevance=True,
    query_values=several_targets.icir_values,
)
_EDIR = Protocol(
    name="edir",
    measure=edir_metrics,
    headline=("R@1", "R@5", "R@10", "R@50"),
    note=(
        "EDIR protocol: the public corpus is ranked, the reference too where it is in it; the "
        "paper's figures are of a larger gallery"
    ),
)
_CIRCLED = Protocol(
    name="circled",
    measure=several_targets.circled_metrics,
    headline=("R@1", "R@5", "R@10", "R@50"),
    note=(
        "CIRCLED, each turn by itself: it ranks its subset's gallery, the reference included, and "
        "any ground truth is a hit; this measure is ours and knows no earlier turns"
    ),
    query_values=several_targets.circled_values,
)
# By name; `data/datasets.py` says which data set uses which.
PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        *(_PLAIN, _FASHIONIQ, _FASHIONIQ_VAL, _CIRR, _CIRCO),
        *(_GENECIS, _PINPOINT, _SHOES, _PIC2WORD, _FREEDOM, _LASCO, _FASHION200K, _ICIR, _EDIR),
        _CIRCLED,
    )
}
