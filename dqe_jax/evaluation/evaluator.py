"""Evaluation: embeds a split's gallery and queries on all devices, ranks on device, measures.

Used alike during training and by the separate evaluation binary. The gallery is never truncated:
short batches are padded, and the padding is cut off again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import numpy as np

from dqe_jax.data.splits import Split
from dqe_jax.embedding.encoders import EncodeGallery, EncodeQuery, query_fields
from dqe_jax.embedding.rows import RowEmbedder
from dqe_jax.embedding.sources import Images, Rows
from dqe_jax.evaluation.embedded import Embedded, EmbeddingEvaluator, Result
from dqe_jax.evaluation.protocols import Protocol
from dqe_jax.method.arrays import Params


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
        embedded = self.embed(params)
        if keep is not None:
            keep(embedded)
        return self.measure(embedded, baselines=baselines)

    def embed(self, params: Params) -> Embedded:
        """Embeds the queries, and the gallery images that any of them ranks."""
        tokens, place = self._embed_gallery(params, self.ranked)
        queries = self.split.queries
        query, weights = self._embed_queries(
            params,
            (self._images, queries.reference),
            (self._texts, np.arange(len(queries))),
        )
        return Embedded(query, tokens, place, weights)

    def embed_asked(
        self, params: Params, reference: np.ndarray, texts: Rows, rows: np.ndarray
    ) -> Embedded:
        """Embeds queries of one's own, and some of the gallery.

        Args:
          params: replicated over the devices.
          reference: int `[J]`, rows of the reference images.
          texts: J of them.
          rows: int, the gallery rows; each may be there several times.
        """
        tokens, place = self._embed_gallery(params, np.unique(rows))
        every = (texts, np.arange(len(reference)))
        query, weights = self._embed_queries(params, (self._images, reference), every)
        return Embedded(query, tokens, place, weights)

    def _embed_gallery(self, params: Params, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Embeddings of gallery rows `[E, M, d]`, and where a row's is, int `[N]`."""
        return self._embed_rows(params, (self._images, rows)), self.placed(rows)
