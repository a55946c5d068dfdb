"""Evaluation: embeds a split's gallery and queries on all devices, ranks on device, measures.

Used alike during training and by the separate evaluation binary. The gallery is never truncated:
short batches are padded, and the padding is cut off again. Embeddings of other models, read from a
file, are ranked and measured in the same way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import numpy as np

from dqe_jax.data.examples import all_references
from dqe_jax.data.splits import Split
from dqe_jax.embedding.encoders import EncodeGallery, EncodeQuery, query_fields
from dqe_jax.embedding.rows import RowEmbedder
from dqe_jax.embedding.several import directions_of, means_of
from dqe_jax.embedding.sources import Images, Rows
from dqe_jax.evaluation import metrics, protocols, ranking
from dqe_jax.evaluation.asked import Asked
from dqe_jax.evaluation.protocols import Protocol
from dqe_jax.method.arrays import Params


@dataclasses.dataclass(frozen=True)
class Result:
    """What an evaluation gives.

    Attributes:
      metrics: of the protocol (`evaluation/protocols.py`); empty for a split without labels.
      baselines: `random` (expected; plain protocol) and `reference_only` (the reference's own
        gallery embedding as query, with the reference left out of the ranking; not where a file
        lacks that of a reference), the same metrics; None if not asked for.
      rows: int32 `[Q, K]`, ranked gallery rows, -1 where a list ends.
      scores: float32 `[Q, K]`.
      subset_rows: int32 `[Q, S]`, the queries' subsets without the reference, best first, padded
        with -1; None where there are none.
      places: int32 `[Q, R]`, as `ranking.make_place_fn` gives them for the relevant rows; None
        where the protocol does without.
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
    places: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class _Embedded:
    """Gallery embeddings `[E, M, d]`, and where a row's is: int `[N]`, -1 for none."""

    tokens: np.ndarray
    place: np.ndarray


@dataclasses.dataclass(frozen=True)
class Embedded:
    """The embeddings of a split, or of queries of one's own.

    Attributes:
      query: float32 `[Q, d]`.
      gallery: of the images that are ranked.
      attribute_weights: float32 `[Q, number of attributes]`; no attributes for a model without.
    """

    query: np.ndarray
    gallery: _Embedded
    attribute_weights: np.ndarray


@dataclasses.dataclass(frozen=True)
class _Ranked:
    """What a protocol measures; as the fields of `Result`."""

    rows: np.ndarray
    scores: np.ndarray
    subset_rows: np.ndarray | None = None
    places: np.ndarray | None = None


class EmbeddingEvaluator:
    """Ranks embeddings of a split's gallery for each of its queries, by a benchmark's protocol."""

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
        pools = split.pools or {"": np.arange(len(split.gallery))}
        self._pools = protocols.pool_rows(protocol, split.queries, pools)
        self._rank = ranking.make_rank_fn(top_k, devices=devices)
        self._score = ranking.make_score_fn(devices=devices)
        self._place = ranking.make_place_fn(devices=devices)

    @property
    def pools(self) -> Mapping[str, np.ndarray]:
        """The gallery rows that queries of each pool rank."""
        return self._pools

    @property
    def ranked(self) -> np.ndarray:
        """The gallery rows that any query ranks, ascending, int `[E]`."""
        return np.unique(np.concatenate([*self._pools.values()]))

    @property
    def compared(self) -> np.ndarray:
        """`ranked` and the queries' references, which some galleries leave out, int `[E]`."""
        return np.union1d(self.ranked, self.split.queries.reference)

    @property
    def labelled(self) -> np.ndarray:
        """Positions of the queries whose labels are published, int `[n]`."""
        return self.protocol.labelled(self.split.queries)

    def metric_names(self) -> list[str]:
        """Names of the metrics that `run` measures; none for a split without labels."""
        rows = np.full((len(self.split.queries), self._top_k), -1, np.int32)
        subsets = rows if max(map(len, self.split.queries.subset)) else None
        return sorted(self.protocol.metrics(self.split.queries, rows, subsets, rows))

    def describe(self, measured: dict[str, float]) -> str:
        """Headline metrics as a line, with the protocol and how much of the split was at hand."""
        shown = [f"{key} {measured[key]:.4f}" for key in self.protocol.columns(measured)]
        figures = ", ".join(shown) or "no labels"
        return f"{self.split.name} ({self.protocol.name}; {self.split.coverage}): {figures}"

    def embedded(
        self,
        query: np.ndarray,
        tokens: np.ndarray,
        rows: np.ndarray,
        attribute_weights: np.ndarray | None = None,
    ) -> Embedded:
        """Embeddings as `measure` takes them.

        Args:
          query: float32 `[Q, d]`.
          tokens: float32 `[E, M, d]`.
          rows: int `[E]`, the gallery rows whose tokens these are.
          attribute_weights: as in `Embedded`; None for a model without.
        """
        place = np.full(len(self.split.gallery), -1, np.int64)
        place[rows] = np.arange(len(rows))
        nothing = np.zeros((len(query), 0), np.float32)
        weights = nothing if attribute_weights is None else attribute_weights
        return Embedded(query, _Embedded(tokens, place), weights)

    def measure(self, embedded: Embedded, *, baselines: bool = False) -> Result:
        """Ranks and measures the embeddings of the split, at least of `ranked`.

        The baseline of the reference alone needs those of `compared`.
        """
        query, gallery = embedded.query, embedded.gallery
        found = self._rank_all(query, gallery, self.protocol.exclude_reference)
        return Result(
            metrics=self._measure(found),
            baselines=self._baselines(gallery) if baselines and len(self.labelled) else None,
            rows=found.rows,
            scores=found.scores,
            subset_rows=found.subset_rows,
            attribute_weights=embedded.attribute_weights,
            embedded=len(self.ranked),
            places=found.places,
        )

    def score_rows(self, embedded: Embedded, rows: np.ndarray) -> np.ndarray:
        """Scores float32 `[J, S]` of gallery rows int `[J, S]` for `J` queries of one's own."""
        gallery = embedded.gallery
        return self._score(embedded.query, gallery.tokens, gallery.place[rows])

    def _rank_all(self, query: np.ndarray, gallery: _Embedded, exclude_reference: bool) -> _Ranked:
        """What the protocol measures, of the embedded queries."""
        if self.protocol.own_gallery:
            rows, scores = self._rank_subsets(query, gallery)
            width = ((0, 0), (0, max(0, self._top_k - rows.shape[1])))
            rows = np.pad(rows, width, constant_values=-1)
            return _Ranked(rows, np.pad(scores, width, constant_values=-np.inf))
        rows, scores = self._rank_pools(query, gallery, exclude_reference)
        inside = None
        if max(map(len, self.split.queries.subset)):
            inside, _ = self._rank_subsets(query, gallery)
        places = None
        if self.protocol.whole_ranking:
            places = self._place_relevant(query, gallery, exclude_reference)
        return _Ranked(rows, scores, inside, places)

    def _place_relevant(
        self, query: np.ndarray, gallery: _Embedded, exclude_reference: bool
    ) -> np.ndarray:
        """Places of the queries' relevant rows in their whole ranking: int32 `[Q, R]`."""
        queries, size = self.split.queries, len(self.split.gallery)
        at_hand = [np.unique(rows[rows < size]) for rows in queries.relevant]
        places = np.full((len(queries), max(map(len, at_hand))), -1, np.int32)
        for name, pool, mine in self._members():
            place = np.full(size, -1, np.int64)
            place[pool] = np.arange(len(pool))
            own = [at_hand[i] for i in mine]
            rows = np.full((len(mine), places.shape[1]), -1, np.int32)
            held = np.arange(places.shape[1]) < np.array(list(map(len, own)))[:, None]
            rows[held] = place[np.concatenate(own)]
            if (rows[held] < 0).any():
                raise ValueError(f"a relevant row of a query is not in its gallery {name!r}")
            tokens = gallery.tokens[gallery.place[pool]]
            excluded = place[queries.reference[mine]] if exclude_reference else None
            places[mine] = self._place(query[mine], tokens, rows, excluded=excluded)
        return places

    def _members(self) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        """Each pool that queries rank: its name, its rows, and positions of these queries."""
        pools = np.asarray(self.split.queries.pools, dtype=object)
        for name, pool in self._pools.items():
            mine = np.flatnonzero(pools == name)
            if len(mine):
                yield name, pool, mine

    def _rank_pools(
        self, query: np.ndarray, gallery: _Embedded, exclude_reference: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ranks for each query the part of the gallery that is its own."""
        queries = self.split.queries
        parts, members = [], []
        for _, pool, mine in self._members():
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

    def _rank_subsets(self, query: np.ndarray, gallery: _Embedded) -> tuple[np.ndarray, np.ndarray]:
        """The queries' subsets, best first: int32 and float32 `[Q, S]`."""
        queries = self.split.queries
        rows = protocols.subsets_of(self.protocol, queries)
        scores = self._score(query, gallery.tokens, np.where(rows < 0, -1, gallery.place[rows]))
        last = queries.target if self.protocol.own_gallery else None
        order = ranking.order_of_subset(rows, scores, last)
        return np.take_along_axis(rows, order, axis=1), np.take_along_axis(scores, order, axis=1)

    def _measure(self, found: _Ranked) -> dict[str, float]:
        """Metrics of the queries with labels; none if there are none."""
        return self.protocol.metrics(
            self.split.queries, found.rows, found.subset_rows, found.places
        )

    def _baselines(self, gallery: _Embedded) -> dict[str, dict[str, float]]:
        queries, size = self.split.queries, len(self.ranked)
        compared = {}
        place = gallery.place[queries.reference]
        if (place >= 0).all():
            # Where an embedding has several tokens, the first one is taken.
            found = self._rank_all(gallery.tokens[place, 0], gallery, exclude_reference=True)
            compared["reference_only"] = self._measure(found)
        if self.protocol.name == "plain":
            counts = [min(len(queries.relevant[i]), size) for i in self.labelled]
            compared = {"random": metrics.random_baseline(size, counts), **compared}
        return compared


class RetrievalEvaluator(EmbeddingEvaluator):
    """Embeds a split by a model, and ranks its gallery for each of its queries."""

    split: Split

    def __init__(
        self,
        *,
        split: Split,
        images: Images,
        texts: Rows,
        encode_query: EncodeQuery,
        encode_gallery: EncodeGallery,
        batch_size: int,
        top_k: int,
        devices: Sequence[jax.Device],
        protocol: Protocol,
    ):
        """Compiles nothing yet.

        Args:
          split: queries and gallery.
          images: of the gallery.
          texts: of the queries.
          encode_query: of the model.
          encode_gallery: of the model.
          batch_size: examples at a time over all devices; rounded up to a multiple of these.
          top_k: length of the ranked lists; lists of a smaller gallery end in -1.
          devices: to run on.
          protocol: what is ranked and measured.
        """
        super().__init__(split=split, top_k=top_k, devices=devices, protocol=protocol)
        self._images, self._texts = images, texts
        batch = -(-batch_size // len(devices)) * len(devices)
        self._embed_queries = RowEmbedder[tuple[np.ndarray, np.ndarray]](
            query_fields(encode_query, "embedding", "attribute_weights"),
            columns=2,
            batch_size=batch,
            devices=devices,
        )
        self._embed_rows = RowEmbedder[np.ndarray](
            encode_gallery, columns=1, batch_size=batch, devices=devices
        )

    def run(
        self,
        params: Params,
        *,
        baselines: bool = False,
        keep: Callable[[Embedded], None] | None = None,
    ) -> Result:
        """Evaluates parameters that are replicated over the devices.

        Args:
          params: of the model.
          baselines: whether to measure those of `Result` too.
          keep: is given the embeddings before they are ranked.
        """
        rows = self.compared if baselines and len(self.labelled) else self.ranked
        tokens = self._embed_rows(params, (self._images, rows))
        query, weights = self._embed_questions(params)
        embedded = self.embedded(query, tokens, rows, weights)
        if keep is not None:
            keep(embedded)
        return self.measure(embedded, baselines=baselines)

    def _embed_questions(self, params: Params) -> tuple[np.ndarray, np.ndarray]:
        """The queries' embeddings `[Q, d]` and attribute weights.

        Where a query has several references, each is composed with its text; the embedding is the
        direction of their mean.
        """
        queries = self.split.queries
        owner, reference = all_references(queries)
        query, weights = self._embed_queries(
            params, (self._images, reference), (self._texts, owner)
        )
        if len(owner) == len(queries):
            return query, weights
        return directions_of(query, owner), means_of(weights, owner)

    def embed(
        self, params: Params, reference: np.ndarray, texts: Rows, rows: np.ndarray
    ) -> Embedded:
        """Embeds queries of one's own, and some of the gallery.

        Args:
          params: replicated over the devices.
          reference: int `[J]`, rows of the reference images.
          texts: J of them.
          rows: int, gallery rows; each may be there several times.
        """
        rows = np.unique(rows)
        tokens = self._embed_rows(params, (self._images, rows))
        every = (texts, np.arange(len(reference)))
        query, weights = self._embed_queries(params, (self._images, reference), every)
        return self.embedded(query, tokens, rows, weights)
