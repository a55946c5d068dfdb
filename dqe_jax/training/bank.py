"""The bank: embeddings of the whole training gallery, sharded by rows over the devices.

It is filled anew every `refresh_every` steps with the parameters of that moment (the method's
interval-based update). Until the first refresh there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from absl import logging

from dqe_jax.config import RunConfig
from dqe_jax.data.splits import Split, known_positives, photo_ids
from dqe_jax.distributed import mesh
from dqe_jax.embedding.encoders import encoders
from dqe_jax.embedding.rows import RowEmbedder
from dqe_jax.method.batch import Batch, MinedNegatives
from dqe_jax.method.mining import Bank, Mined, MiningRule
from dqe_jax.method.settings import NegativesConfig
from dqe_jax.models.dqe import DQE
from dqe_jax.training import bank_programs as programs
from dqe_jax.training.state import splitter


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
        text: np.ndarray,
        known_positives: np.ndarray,
        encode_query: Callable[..., Any],
        encode_gallery: Callable[..., jax.Array],
        trained: Callable[[Any], Any],
        negatives: NegativesConfig,
        seed: int,
        batch_size: int,
        devices: Sequence[jax.Device],
    ):
        """Compiles nothing yet.

        Args:
          split: the training split, see `data/pipeline.py`.
          text: int32 `[n, L]`, ids of the queries' texts.
          known_positives: int32 `[n, P]`, image ids that are never mined, padded with -1.
          encode_query: `(params, image, text) -> QueryOutput`.
          encode_gallery: `(params, image) -> [B, M, d]`, L2-normalised.
          trained: the parameters that train, of all.
          negatives: `config.negatives`.
          seed: of the draws.
          batch_size: images embedded at a time, over all devices.
          devices: to run on.
        """
        self.bank: Bank | None = None
        self.refreshed_at: int | None = None
        self.snapshot: Any = None
        self.mined: tuple[np.ndarray, np.ndarray] | None = None
        self._split, self._text, self._known = split, text, known_positives
        self._negatives, self._seed, self._devices = negatives, seed, list(devices)
        self._trained = trained
        self._size = programs.rows_of_device(len(split.gallery), len(devices))
        self._rows_per_call = programs.rows_per_call(batch_size, len(devices))
        self._dtype = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}[negatives.bank_dtype]
        self._shape = lambda params, images: jax.eval_shape(encode_gallery, params, images)

        def embed(params, images, text):
            return encode_query(params, images, text).embedding

        self._fill = programs.make_fill(encode_gallery, self._dtype, devices)
        self._embed = RowEmbedder(
            embed, columns=1, batch_size=len(devices) * self._rows_per_call, devices=devices
        )
        self._mine = programs.make_mine(MiningRule.of(negatives), devices)
        # Places arrays on the devices, row by row.
        self._place = mesh.pmap(lambda x: x, in_axes=(0,), out_axes=0, devices=devices)

    def scheduled(self, step: int) -> bool:
        """Whether a refresh is planned after `step` steps."""
        first, every = self._negatives.first_refresh, self._negatives.refresh_every
        return step >= first and (step - first) % every == 0

    def due(self, step: int) -> bool:
        """Whether the bank is to be filled after `step` steps: on time, or for want of one."""
        return self.scheduled(step) or (self.bank is None and step >= self._negatives.first_refresh)

    def refresh(self, params: Any, step: int) -> None:
        """Embeds the whole gallery, and mines all queries if the config says so.

        Args:
          params: replicated over the devices.
          step: how many were taken.
        """
        gallery, total = self._split.gallery, len(self._devices)
        tokens = self._embed_gallery(params, step)
        image_id = np.full(total * self._size, -1, np.int32)
        image_id[: len(gallery)] = gallery.photo
        own = mesh.own_devices(self._devices)
        self.bank = Bank(tokens, self._place(image_id.reshape(total, self._size)[own]))
        if self._negatives.mining == "refresh":
            mined = self.mine_all(params, jax.random.fold_in(jax.random.key(self._seed), step))
            self.mined = mined.rows, mined.drawn
        # Copies: on CPU NumPy would look at memory that the next step overwrites.
        self.refreshed_at = step
        self.snapshot = jax.tree.map(np.array, self._trained(params))
        logging.debug("Bank of %d images filled after step %d.", len(gallery), step)

    def _embed_gallery(self, params: Any, step: int) -> jax.Array:
        """Tokens `[devices, S, M, d]` of the whole gallery; each process reads its own rows."""
        gallery, size, count = self._split.gallery, self._size, self._rows_per_call
        own = mesh.own_devices(self._devices)
        first = np.arange(len(self._devices))[own, None] * size
        starts = range(0, size, count)
        # Read in the order of use: for each call the rows of all devices of this process.
        rows = [first + start + np.arange(count) for start in starts]
        read = np.minimum(np.concatenate([r.ravel() for r in rows]), len(gallery) - 1)
        tokens = self.bank.tokens if self.bank is not None else None
        bar = tqdm.tqdm(
            zip(starts, gallery.batches(read, len(first) * count)),
            total=len(starts),
            desc=f"bank, step {step}",
            leave=False,
            disable=jax.process_index() > 0,
        )
        for start, images in bar:
            images = mesh.shard(images, len(first))
            if tokens is None:
                one = jax.eval_shape(lambda x: x[0], images)
                shape = self._shape(params, one).shape[1:]
                tokens = self._place(np.zeros((len(first), size, *shape), self._dtype))
            tokens = self._fill(params, images, np.int32(start), tokens)
        return tokens

    def add_mined(self, batch: Batch) -> Batch:
        """A training batch with what was mined for its queries at the refresh, if anything was."""
        if self.mined is None:
            return batch
        rows, drawn = (x[batch.query] for x in self.mined)
        return batch.replace(mined=MinedNegatives(rows, drawn))

    def embed_queries(self, params: Any, rows: np.ndarray) -> np.ndarray:
        """Embeddings of the queries at these positions of the split: float32 `[B, d]`."""
        split = self._split
        return self._embed(params, split.gallery, split.queries.reference[rows], self._text[rows])

    def mine_all(
        self, params: Any, key: jax.Array, rows: np.ndarray | None = None, batch: int = 1024
    ) -> Mined:
        """Mines the bank for the queries at these positions (default: all), as NumPy arrays.

        Args:
          params: replicated over the devices.
          key: of the draws; a query's draw depends on it and on its position alone.
          rows: int `[B]`, positions of queries of the split.
          batch: queries mined by one call.
        """
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
            padded = [mesh.pad_rows(x, min(batch, len(rows))) for x in columns]
            out = jax.tree.map(np.asarray, self._mine(key, *padded, self.bank))
            parts.append(jax.tree.map(lambda x, kept=here: x[: len(kept)], out))
        return jax.tree.map(lambda *xs: np.concatenate(xs), *parts)


def make_bank_keeper(
    config: RunConfig, model: DQE, split: Split, text: np.ndarray, devices: list[jax.Device]
) -> BankKeeper:
    """The keeper of the bank of a split; `text` int32 `[n, L]` are its queries' texts."""
    encode_query, encode_gallery = encoders(model)
    never = known_positives(split)
    if config.negatives.oracle != "none":
        never = np.concatenate([never, photo_ids(split, split.queries.valid)], axis=1)
    return BankKeeper(
        split=split,
        text=text,
        known_positives=never,
        encode_query=encode_query,
        encode_gallery=encode_gallery,
        trained=lambda params: splitter(config.model)(params)[0],
        negatives=config.negatives,
        seed=config.seed,
        batch_size=config.eval.batch_size,
        devices=devices,
    )
