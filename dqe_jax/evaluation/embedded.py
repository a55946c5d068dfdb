"""Ranks embeddings by the protocol of a benchmark, on all devices, and measures the ranking.

Whoever made them: `evaluator.py` has a model embed a split, `embeddings.py` reads a file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from dqe_jax.evaluation import metrics, protocols, ranking
from dqe_jax.evaluation.asked import Asked
from dqe_jax.evaluation.protocols import Protocol


@dataclasses.dataclass(frozen=True)
class Result:
    """What an evaluation gives.

    Attributes:
      metrics: of the protocol (`evaluation/protocols.py`); empty for a split without labels.
      baselines: `random` (expected; plain protocol) and `reference_only` (the reference's own
        gallery embedding as query, with the reference left out of the ranking), the same metrics;
        None if not asked for.
      rows: int32 `[Q, K]`, ranked gallery rows, -1 where a list ends.
      scores: float32 `[Q, K]`.
      subset_rows: int32 `[Q, S]`, the queries' subsets without the reference, best first, padded
        with -1; None where there are none.
      attribute_weights: float32 `[Q, number of attributes]`.
      embedded: how many gallery images were ranked.
      composition_gain: of the best composed row over the best single modality, as
        `gain.composition_gain` says; None where rows without training were not asked for.
    """

    metrics: dict[str, float]
    baselines: dict[str, dict[str, float]] | None
    rows: np.ndarray
    scores: np.ndarray
    subset_rows: np.ndarray | None
    attribute_weights: np.ndarray
    embedded: int
    composition_gain: dict[str, str | float] | None = None


@dataclasses.dataclass(frozen=True)
class Embedded:
    """The embeddings of a split.

    Attributes:
      query: float32 `[Q, d]`.
      tokens: float32 `[E, M, d]`, of the gallery images that are ranked.
      place: int `[N]`, where those of a gallery row are in `tokens`; -1 for none.
      attribute_weights: float32 `[Q, number of attributes]`; none for a model without.
    """

    query: np.ndarray
    tokens: np.ndarray
    place: np.ndarray
    attribute_weights: np.ndarray


class EmbeddingEvaluator:
    """Ranks the gallery of a split for each of its queries, by the protocol of a benchmark."""

    def __init__(
        self, *, split: Asked, top_k: int, devices: Sequence[jax.Device], protocol: Protocol
    ):
        """Compiles nothing yet.

        Args:
          split: queries and gallery.
          top_k: length of the ranked lists; lists of a smaller gallery end in -1.
          devices: to run on.
          protocol: what is ranked and measured.

        Raises:
          UserError: the protocol needs targets that the split does not have.
        """
        self.split, self.protocol = split, protocol
        self._top_k = top_k
        # The gallery rows that queries of each pool rank.
        pools = split.pools or {"": np.arange(len(split.gallery))}
        self.pools = protocols.pool_rows(protocol, split.queries, pools)
        self._rank = ranking.make_rank_fn(top_k, devices=devices)
        self._score = ranking.make_score_fn(devices=devices)

    @property
    def labelled(self) -> np.ndarray:
        """Positions of the queries whose target is published, int `[n]`."""
        return np.flatnonzero(self.split.queries.target >= 0)

    @property
    def ranked(self) -> np.ndarray:
        """The gallery rows that any query ranks, ascending, int `[E]`."""
        return np.unique(np.concatenate([*self.pools.values()]))

    def placed(self, rows: np.ndarray) -> np.ndarray:
        """Where each gallery row is among `rows`, int `[N]`; -1 for none."""
        place = np.full(len(self.split.gallery), -1, np.int64)
        place[rows] = np.arange(len(rows))
        return place

    def metric_names(self) -> list[str]:
        """Names of the metrics that `run` measures; none for a split without labels."""
        rows = np.full((len(self.split.queries), self._top_k), -1, np.int32)
        subsets = rows if max(map(len, self.split.queries.subset)) else None
        return sorted(self._measure(rows, subsets))

    def describe(self, measured: dict[str, float]) -> str:
        """Headline metrics as a line, with the protocol and how much of the split was at hand."""
        shown = [f"{key} {measured[key]:.4f}" for key in self.protocol.columns(measured)]
        figures = ", ".join(shown) or "no labels"
        return f"{self.split.name} ({self.protocol.name}; {self.split.coverage}): {figures}"

    def measure(self, embedded: Embedded, *, baselines: bool = False) -> Result:
        """Ranks and measures embeddings.

        Args:
          embedded: of the split.
          baselines: whether to measure those of `Result` too.
        """
        rows, scores = self._rank_pools(embedded.query, embedded, self.protocol.exclude_reference)
        subset_rows = self._rank_subsets(embedded.query, embedded)
        compared = self._baselines(embedded) if baselines and len(self.labelled) else None
        return Result(
            metrics=self._measure(rows, subset_rows),
            baselines=compared,
            rows=rows,
            scores=scores,
            subset_rows=subset_rows,
            attribute_weights=embedded.attribute_weights,
            embedded=len(embedded.tokens),
        )

    def score_listed(self, query: np.ndarray, embedded: Embedded, rows: np.ndarray) -> np.ndarray:
        """Scores of given gallery rows for queries of one's own.

        Args:
          query: float32 `[J, d]`.
          embedded: of a gallery that holds these rows.
          rows: int `[J, S]`, gallery rows to score.

        Returns:
          float32 `[J, S]`.
        """
        return self._score(query, embedded.tokens, embedded.place[rows])

    def _rank_pools(
        self, query: np.ndarray, gallery: Embedded, exclude_reference: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ranks for each query the part of the gallery that is its own."""
        queries = self.split.queries
        pools = np.asarray(queries.pools, dtype=object)
        parts, members = [], []
        for name, pool in self.pools.items():
            mine = np.flatnonzero(pools == name)
            place = np.full(len(self.split.gallery), -1, np.int64)
            place[pool] = np.arange(len(pool))
            excluded = place[queries.reference[mine]][:, None] if exclude_reference else None
            tokens = gallery.tokens[gallery.place[pool]]
            rows, scores = self._rank(query[mine], tokens, excluded=excluded)
            parts.append((np.where(rows < 0, -1, pool[rows]).astype(np.int32), scores))
            members.append(mine)
        order = np.argsort(np.concatenate(members), kind="stable")
        rows, scores = (np.concatenate(columns)[order] for columns in zip(*parts))
        return rows, scores

    def _rank_subsets(self, query: np.ndarray, gallery: Embedded) -> np.ndarray | None:
        """The queries' subsets without the reference, best first: int32 `[Q, S]`."""
        queries = self.split.queries
        longest = max(map(len, queries.subset))
        if not longest:
            return None
        rows = np.full((len(queries), longest), -1, np.int32)
        for i, members in enumerate(queries.subset):
            members = members[members != queries.reference[i]]
            rows[i, : len(members)] = members
        scores = self._score(query, gallery.tokens, np.where(rows < 0, -1, gallery.place[rows]))
        return ranking.order_subset(rows, scores)

    def _measure(self, rows: np.ndarray, subset_rows: np.ndarray | None) -> dict[str, float]:
        """Metrics of the queries with labels; none if there are none."""
        known = self.labelled
        if not len(known):
            return {}
        subsets = None if subset_rows is None else subset_rows[known]
        return self.protocol.measure(self.split.queries.take(known), rows[known], subsets)

    def _baselines(self, gallery: Embedded) -> dict[str, dict[str, float]]:
        queries = self.split.queries
        # Where an embedding has several tokens, the first one is taken.
        alone = gallery.tokens[gallery.place[queries.reference], 0]
        rows, _ = self._rank_pools(alone, gallery, exclude_reference=True)
        compared = {"reference_only": self._measure(rows, self._rank_subsets(alone, gallery))}
        if self.protocol.name == "plain":
            size = len(gallery.tokens)
            counts = [min(len(queries.relevant[i]), size) for i in self.labelled]
            compared = {"random": metrics.random_baseline(size, counts), **compared}
        return compared
