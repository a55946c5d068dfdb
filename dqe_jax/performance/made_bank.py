"""A bank of made embeddings, in place of one that a run fills: to time steps that mine from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from dqe_jax.config import RunConfig
from dqe_jax.data.datasets import DATASETS
from dqe_jax.distributed import mesh
from dqe_jax.embedding.encoders import encoders
from dqe_jax.method.arrays import Params
from dqe_jax.method.batch import Batch, MinedNegatives
from dqe_jax.method.mining import Bank
from dqe_jax.models.build import DTYPES
from dqe_jax.models.dqe import DQE
from dqe_jax.performance.planning.programs import OTHER_GALLERY
from dqe_jax.training.bank_programs import rows_of_device
from dqe_jax.utils.errors import UserError

FAR = 16  # of how many targets one is far from its query


def images_of(config: RunConfig, images: int, queries: int) -> int:
    """How many images the bank has: those asked for, or of the published training gallery.

    Args:
      config: of a run.
      images: asked for; 0 for the published number, 20,000 where none is known.
      queries: of a batch, whose targets are all in the bank.

    Raises:
      UserError: there is no room for the targets of a batch.
    """
    published = DATASETS[config.data.dataset].sizes.get("train")
    count = images or (published.images if published else OTHER_GALLERY)
    if count < queries:
        raise UserError(
            f"--bank_images={count}: a batch has {queries} targets; give at least as many."
        )
    return count


def make_bank(
    config: RunConfig,
    model: DQE,
    params: Params,
    batch: Batch,
    images: int,
    devices: Sequence[jax.Device],
) -> tuple[Bank, Batch]:
    """A bank of random unit vectors, and a batch that mines from it.

    The row of a query's target holds the embedding of its reference, of which a query is made: the
    target is then close, as it is to a model that has learned. That of one query in `FAR` is not,
    so that its mid-zone is mostly empty, which costs time.

    Args:
      config: of a run.
      model: of the config.
      params: of it.
      batch: as `step_benchmark.random_batch` makes it, NumPy arrays.
      images: of the bank, at least as many as the batch has queries.
      devices: to spread it over.

    Returns:
      The bank `[devices, S, ...]`; the batch, with negatives drawn at random where the config mines
      at a refresh.
    """
    rng, count, total = np.random.default_rng(1), len(batch.query), len(devices)
    near = np.asarray(jax.jit(encoders(model)[1])(params, batch.reference_image))  # [R, M, d]
    each = count // len(near)
    slot = np.arange(count) // each if batch.reference is None else np.asarray(batch.reference)
    size = rows_of_device(images, total)
    tokens = rng.standard_normal((total * size, *near.shape[1:]), np.float32)
    tokens /= np.linalg.norm(tokens, axis=-1, keepdims=True)
    close = np.arange(count)[np.arange(count) % FAR > 0]
    tokens[close] = near[slot[close]]
    image_id = np.full(total * size, -1, np.int32)
    image_id[:images] = np.arange(images) + int(np.min(batch.target_id))
    # Cast as a bank is filled; NumPy has no bfloat16 of its own.
    cast = np.asarray(jax.numpy.asarray(tokens, DTYPES[config.negatives.bank_dtype]))
    rows = cast.reshape(total, size, *near.shape[1:]), image_id.reshape(total, size)
    own = mesh.own_devices(devices)
    bank = Bank(*(mesh.placer(devices)(x[own]) for x in rows))
    if config.negatives.mining == "refresh":
        drawn = (count, config.negatives.per_query)
        mined = rng.integers(count, max(images, count + 1), drawn) % images
        batch = dataclasses.replace(
            batch, mined=MinedNegatives(mined.astype(np.int32), np.ones(drawn, bool))
        )
    return bank, batch
