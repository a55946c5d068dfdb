"""The bank: embeddings of the whole training gallery, sharded by rows over the devices.

It is filled anew every `refresh_every` steps with the parameters of that moment (the method's
interval-based update). Until the first refresh there is none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np
import tqdm
from absl import logging

from dqe_jax.config import RunConfig
from dqe_jax.data.splits import Split, image_ids_of, known_positive_ids
from dqe_jax.data.text import Wordings
from dqe_jax.distributed import mesh
from dqe_jax.embedding.encoders import EncodeGallery, EncodeQuery, encoders, query_fields
from dqe_jax.embedding.rows import RowEmbedder
from dqe_jax.embedding.sources import Images, Rows
from dqe_jax.feature_store.features import Features
from dqe_jax.method.arrays import Array, Params
from dqe_jax.method.batch import Batch, MinedNegatives
from dqe_jax.method.mining import Bank, Mined, MiningRule
from dqe_jax.method.settings import NegativesConfig
from dqe_jax.models.build import DTYPES
from dqe_jax.models.dqe import DQE
from dqe_jax.training import bank_programs as programs
from dqe_jax.training.state import splitter
from dqe_jax.utils import progress


class BankKeeper:
    """Keeps the bank of a training split.

    Attributes:
      bank: sharded, leaves `[devices, S, ...]`; None before the first refresh.
      refreshed_at: the step of its refresh.
      snapshot: the trained parameters that it is of, as NumPy arrays.
      mined: `(rows int32 [n, k], drawn bool [n, k])` of all training queries, if they are mined at
        a refresh.
    """

    def __init__(
        self,
        *,
        split: Split,
        images: Images,
        texts: Rows,
        known_positives: np.ndarray,
        encode_query: EncodeQuery,
        encode_gallery: EncodeGallery,
        trained: Callable[[Params], Params],
        negatives: NegativesConfig,
        seed: int,
        batch_size: int,
        devices: Sequence[jax.Device],
    ):
        """Compiles nothing yet.

        Args:
          split: the training split, see `data/pipeline.py`.
          images: of its gallery.
          texts: of its queries.
          known_positives: int32 `[n, P]`, image ids that are never mined, padded with -1.
          encode_query: of the model.
          encode_gallery: of the model.
          trained: the parameters that train, of all.
          negatives: `config.negatives`.
          seed: of the draws.
          batch_size: images embedded at a time, over all devices.
          devices: to run on.
        """
        self.bank: Bank | None = None
        self.refreshed_at: int | None = None
        self.snapshot: Params | None = None
        self.mined: tuple[Array, Array] | None = None
        self._split, self._known = split, known_positives
        self._images, self._texts = images, texts
        self._negatives, self._seed, self._devices = negatives, seed, list(devices)
        self._trained = trained
        self._size = programs.rows_of_device(len(split.gallery), len(devices))
        self._rows_per_call = programs.rows_per_call(batch_size, len(devices))
        self._dtype = DTYPES[negatives.bank_dtype]
        self._encode_gallery = encode_gallery

        self._fill = programs.make_fill(encode_gallery, self._dtype, devices)
        self._embed = RowEmbedder[tuple[np.ndarray]](
            query_fields(encode_query, "embedding"),
            columns=2,
            batch_size=len(devices) * self._rows_per_call,
            devices=devices,
        )
        rule = MiningRule.of(negatives)
        self._mine = None if rule is None else programs.make_mine(rule, devices)
        self._place = mesh.placer(devices)

    def scheduled(self, step: int) -> bool:
        """Whether a refresh is planned after `step` steps."""
        first, every = self._negatives.first_refresh, self._negatives.refresh_every
        return step >= first and (step - first) % every == 0

    def due(self, step: int) -> bool:
        """Whether the bank is to be filled after `step` steps: on time, or for want of one."""
        return self.scheduled(step) or (self.bank is None and step >= self._negatives.first_refresh)

    def refresh_if_due(self, params: Params, step: int) -> bool:
        """Fills the bank if that is due after `step` steps; whether it was."""
        due = self.due(step)
        if due:
            self.refresh(params, step)
        return due

    def refresh(self, params: Params, step: int) -> Bank:
        """Embeds the whole gallery, and mines all queries if the config says so.

        Args:
          params: replicated over the devices.
          step: how many were taken.

        Returns:
          The bank, which is also kept.
        """
        gallery, total = self._split.gallery, len(self._devices)
        tokens = self._embed_gallery(params, step)
        image_id = np.full(total * self._size, -1, np.int32)
        image_id[: len(gallery)] = gallery.image_ids
        own = mesh.own_devices(self._devices)
        self.bank = bank = Bank(tokens, self._place(image_id.reshape(total, self._size)[own]))
        if self._negatives.mining == "refresh":
            mined = self.mine_all(params, jax.random.fold_in(jax.random.key(self._seed), step))
            self.mined = mined.rows, mined.drawn
        # Copies: on CPU NumPy would look at memory that the next step overwrites.
        self.refreshed_at = step
        self.snapshot = jax.tree.map(np.array, self._trained(params))
        logging.debug("Bank of %d images filled after step %d.", len(gallery), step)
        return bank

    def _embed_gallery(self, params: Params, step: int) -> Array:
        """Tokens `[devices, S, M, d]` of the whole gallery; each process reads its own rows."""
        gallery, size, count = self._split.gallery, self._size, self._rows_per_call
        own = mesh.own_devices(self._devices)
        first = np.arange(len(self._devices))[own, None] * size
        starts = range(0, size, count)
        # Rows are read in the order in which the calls need them, for all devices of this process.
        rows = [first + start + np.arange(count) for start in starts]
        read = np.minimum(np.concatenate([r.ravel() for r in rows]), len(gallery) - 1)
        tokens = self.bank.tokens if self.bank is not None else self._empty(params, len(first))
        bar = tqdm.tqdm(
            zip(starts, self._images.batches(read, len(first) * count, len(first))),
            total=len(starts),
            desc=f"bank, step {step}",
            leave=False,
            disable=jax.process_index() > 0 or not progress.on_terminal(),
        )
        for start, images in bar:
            tokens = self._fill(params, images, np.int32(start), tokens)
        return tokens

    def _empty(self, params: Params, num_devices: int) -> Array:
        """Zeros in place of the tokens `[devices, S, M, d]`, for the devices of this process."""
        images = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((self._rows_per_call, *x.shape), x.dtype),
            self._images.spec(),
        )
        one = jax.eval_shape(self._encode_gallery, params, images).shape[1:]
        return self._place(np.zeros((num_devices, self._size, *one), self._dtype))

    def add_mined(self, batch: Batch) -> Batch:
        """A training batch with what was mined for its queries at the refresh, if anything was."""
        if self.mined is None:
            return batch
        query = np.asarray(batch.query)
        rows, drawn = (x[query] for x in self.mined)
        return dataclasses.replace(batch, mined=MinedNegatives(rows, drawn))

    def embed_queries(self, params: Params, rows: np.ndarray) -> np.ndarray:
        """Embeddings of the queries at these positions of the split: float32 `[B, d]`."""
        references = self._split.queries.reference[rows]
        return self._embed(params, (self._images, references), (self._texts, rows))[0]

    def mine_all(
        self, params: Params, key: jax.Array, rows: np.ndarray | None = None, batch: int = 1024
    ) -> Mined:
        """Mines the bank for the queries at these positions (default: all), as NumPy arrays.

        Args:
          params: replicated over the devices.
          key: of the draws; a query's draw depends on it and on its position alone.
          rows: int `[B]`, positions of queries of the split.
          batch: queries mined by one call.

        Raises:
          ValueError: the bank is empty, or the rule of the config mines nothing.
        """
        if self.bank is None or self._mine is None:
            raise ValueError("there is nothing to mine, or no rule to mine by")
        queries = self._split.queries
        rows = np.arange(len(queries)) if rows is None else rows
        query = self.embed_queries(params, rows)
        parts = []
        for start in range(0, len(rows), batch):
            here = rows[start : start + batch]
            columns = (
                query[start : start + batch],
                queries.target[here],
                self._known[here],
                here.astype(np.int32),
            )
            own, target, known, ids = (mesh.pad_rows(x, min(batch, len(rows))) for x in columns)
            mined = self._mine(key, own, target, known, ids, self.bank)
            out = jax.tree.map(np.asarray, mined)
            parts.append(jax.tree.map(lambda x, kept=here: x[: len(kept)], out))
        return jax.tree.map(lambda *xs: np.concatenate(xs), *parts)


def make_bank_keeper(
    config: RunConfig,
    model: DQE,
    split: Split,
    text: Wordings,
    devices: list[jax.Device],
    features: Features,
) -> BankKeeper:
    """The keeper of the bank of a split.

    Args:
      config: of the run.
      model: of the config.
      split: the training split.
      text: its queries' texts; the first wording counts.
      devices: to run on.
      features: filled before the bank is.
    """
    encode_query, encode_gallery = encoders(model)
    never = known_positive_ids(split)
    if config.negatives.oracle != "none":
        never = np.concatenate([never, image_ids_of(split, split.queries.relevant)], axis=1)
    return BankKeeper(
        split=split,
        images=features.images(split.gallery),
        texts=features.texts(text.first()),
        known_positives=never,
        encode_query=encode_query,
        encode_gallery=encode_gallery,
        trained=lambda params: splitter(config.model)(params)[0],
        negatives=config.negatives,
        seed=config.seed,
        batch_size=config.eval.batch_size,
        devices=devices,
    )
