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
from jax import lax

from dqe_jax.data.splits import Split, known_positives, photo_ids
from dqe_jax.distributed import mesh
from dqe_jax.embedding.encoders import encoders
from dqe_jax.method import mining
from dqe_jax.method.mining import Bank, Mined
from dqe_jax.models import DQE
from dqe_jax.training.state import splitter


def rows_of_device(num_rows: int, num_devices: int, chunk_rows: int = mining.CHUNK_ROWS) -> int:
    """`S`: rows that each device holds, a multiple of `chunk_rows`; the last ones are padding."""
    return -(-num_rows // (num_devices * chunk_rows)) * chunk_rows


def make_fill(encode_gallery: Callable[..., jax.Array], dtype: Any, devices: Any) -> Any:
    """`(params, images [D, b, H, W, 3], start, tokens [D, S, M, d]) -> tokens`, in place.

    Embeds the images into rows `start` to `start + b` of each of the `D` devices.
    """

    def fill(params, images, start, tokens):
        new = encode_gallery(params, images).astype(dtype)
        return lax.dynamic_update_slice(tokens, new, (start, 0, 0))

    in_axes = (None, 0, None, 0)
    return mesh.pmap(fill, in_axes=in_axes, out_axes=0, donate_argnums=(3,), devices=devices)


def make_mine(negatives: Any, devices: Any) -> Any:
    """`(key, query [B, d], target_row [B], known [B, P], row_ids [B], bank) -> Mined`."""

    def mine(key, query, target_row, known, row_ids, bank):
        wanted = (query, target_row, known, row_ids, bank, negatives)
        return mining.mine_bank(key, *wanted, axis_name=mesh.AXIS)

    in_axes = (None, None, None, None, None, 0)
    return mesh.pmap(mine, in_axes=in_axes, out_axes=None, devices=devices)


def step_rows(batch_size: int, num_devices: int) -> int:
    """Images that a device embeds at a time: a divisor of a chunk, so that steps fill the bank."""
    return int(np.gcd(mining.CHUNK_ROWS, 1 << max(batch_size // num_devices, 1).bit_length() - 1))


class BankKeeper:
    """Keeps the bank of a training split.

    Attributes:
      bank: sharded, leaves `[devices, S, ...]`; None before the first refresh.
      step: of its refresh.
      snapshot: the trained parameters that it is of, as NumPy arrays.
      mined: `(rows int32 [n, k], drawn bool [n, k])` of all training queries, if they are mined at
        a refresh.
    """

    def __init__(
        self,
        *,
        split: Any,
        text: np.ndarray,
        known_positives: np.ndarray,
        encode_query: Callable[..., Any],
        encode_gallery: Callable[..., jax.Array],
        trained: Callable[[Any], Any],
        negatives: Any,
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
        self.step: int | None = None
        self.snapshot: Any = None
        self.mined: tuple[np.ndarray, np.ndarray] | None = None
        self._split, self._text, self._known = split, text, known_positives
        self._negatives, self._seed, self._devices = negatives, seed, list(devices)
        self._trained = trained
        self._size = rows_of_device(len(split.gallery), len(devices))
        self._step = step_rows(batch_size, len(devices))
        self._dtype = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}[negatives.bank_dtype]
        self._shape = lambda params, images: jax.eval_shape(encode_gallery, params, images)

        def embed(params, images, text):
            return encode_query(params, images, text).embedding

        self._fill = make_fill(encode_gallery, self._dtype, devices)
        self._embed = mesh.map_rows(embed, columns=2, devices=devices)
        self._mine = make_mine(negatives, devices)
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
        gallery, size, total = self._split.gallery, self._size, len(self._devices)
        own = mesh.own_devices(self._devices)
        first = np.arange(total)[own, None] * size
        starts = range(0, size, self._step)
        # Read in the order of use: for each step the rows of all devices of this process.
        rows = [first + start + np.arange(self._step) for start in starts]
        read = np.minimum(np.concatenate([r.ravel() for r in rows]), len(gallery) - 1)
        batches = gallery.batches(read, len(first) * self._step)
        tokens = self.bank.tokens if self.bank is not None else None
        bar = tqdm.tqdm(
            zip(starts, batches),
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
        photo = np.full(total * size, -1, np.int32)
        photo[: len(gallery)] = gallery.photo
        self.bank = Bank(tokens, self._place(photo.reshape(total, size)[own]))
        if self._negatives.mining == "refresh":
            mined = self.mine_all(params, jax.random.fold_in(jax.random.key(self._seed), step))
            self.mined = mined.rows, mined.drawn
        # Copies: on CPU NumPy would look at memory that the next step overwrites.
        self.step, self.snapshot = step, jax.tree.map(np.array, self._trained(params))
        logging.debug("Bank of %d images filled after step %d.", len(gallery), step)

    def add_mined(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """A training batch with what was mined for its queries at the refresh, if anything was."""
        if self.mined is None:
            return batch
        rows, drawn = (x[batch["query"]] for x in self.mined)
        return {**batch, "mined_rows": rows, "mined_drawn": drawn}

    def embed_queries(self, params: Any, rows: np.ndarray) -> np.ndarray:
        """Embeddings of the queries at these positions of the split: float32 `[B, d]`."""
        queries, batch = self._split.queries, len(self._devices) * self._step
        mine = mesh.own_rows(mesh.pad_rows(rows, batch), batch, self._devices)
        size = self._step * mesh.count_own(self._devices)
        images_of = self._split.gallery.batches(queries.reference[mine], size)
        parts = [
            self._embed(params, images, self._text[mine[i * size : (i + 1) * size]])
            for i, images in enumerate(images_of)
        ]
        return np.concatenate(parts)[: len(rows)]

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
    config: Any, model: DQE, split: Split, text: np.ndarray, devices: list[jax.Device]
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
