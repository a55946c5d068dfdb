"""The programs that fill and mine the bank, mapped over the devices; planning compiles them too."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from dqe_jax.distributed import mesh
from dqe_jax.distributed.mesh import Program
from dqe_jax.embedding.encoders import EncodeGallery
from dqe_jax.method import mining
from dqe_jax.method.arrays import Array, Params
from dqe_jax.method.mining import Bank, Mined, MiningRule


def rows_of_device(num_rows: int, num_devices: int, chunk_rows: int = mining.CHUNK_ROWS) -> int:
    """`S`: rows that each device holds, a multiple of `chunk_rows`; the last ones are padding."""
    return -(-num_rows // (num_devices * chunk_rows)) * chunk_rows


def rows_per_call(batch_size: int, num_devices: int) -> int:
    """Images that a device embeds at a time: a divisor of a chunk, so that calls fill the bank."""
    return int(np.gcd(mining.CHUNK_ROWS, 1 << max(batch_size // num_devices, 1).bit_length() - 1))


def make_fill(
    encode_gallery: EncodeGallery, dtype: DTypeLike, devices: Sequence[jax.Device]
) -> Program[[Params, Array, Array | np.int32, Array], Array]:
    """`(params, images [D, b, H, W, 3], start, tokens [D, S, M, d]) -> tokens`, in place.

    Embeds the images into rows `start` to `start + b` of each of the `D` devices.
    """
    return _make_fill(encode_gallery, np.dtype(dtype), tuple(devices))


@functools.lru_cache(mesh.REMEMBERED)
def _make_fill(
    encode_gallery: EncodeGallery, dtype: np.dtype, devices: tuple[jax.Device, ...]
) -> Program[[Params, Array, Array | np.int32, Array], Array]:
    def fill(params: Params, images: Array, start: Array | np.int32, tokens: Array) -> Array:
        new = encode_gallery(params, images).astype(dtype)
        return lax.dynamic_update_slice(tokens, new, (start, 0, 0))

    in_axes = (None, 0, None, 0)
    return mesh.pmap(fill, in_axes=in_axes, out_axes=0, donate_argnums=(3,), devices=devices)


def make_mine(
    rule: MiningRule, devices: Sequence[jax.Device]
) -> Program[[Array, Array, Array, Array, Array, Bank], Mined]:
    """`(key, query [B, d], target_row [B], known [B, P], row_ids [B], bank) -> Mined`."""
    return _make_mine(rule, tuple(devices))


@functools.lru_cache(mesh.REMEMBERED)
def _make_mine(
    rule: MiningRule, devices: tuple[jax.Device, ...]
) -> Program[[Array, Array, Array, Array, Array, Bank], Mined]:
    def mine(
        key: Array, query: Array, target_row: Array, known: Array, row_ids: Array, bank: Bank
    ) -> Mined:
        wanted = (query, target_row, known, row_ids, bank, rule)
        return mining.mine_bank(key, *wanted, axis=mesh.AXIS)

    in_axes = (None, None, None, None, None, 0)
    return mesh.pmap(mine, in_axes=in_axes, out_axes=None, devices=devices)
