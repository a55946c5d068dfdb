"""Keys: of a store, by all that its rows depend on, and of a row, by the content it is made of."""

from __future__ import annotations

import hashlib
import json

import numpy as np
from flax.traverse_util import flatten_dict

from dqe_jax.method.arrays import Params
from dqe_jax.utils.files import JsonObject

FORMAT = 1  # of stores; another one is never read


def store_key(facts: JsonObject, tower: Params) -> str:
    """The name of a store: 16 hexadecimal digits.

    Args:
      facts: all that decides what the tower makes, beside its parameters.
      tower: its parameters.
    """
    digest = hashlib.sha256(json.dumps({"format": FORMAT, **facts}, sort_keys=True).encode())
    for path, value in sorted(flatten_dict(tower, sep="/").items()):
        array = np.ascontiguousarray(value)
        digest.update(f"{path} {array.dtype} {array.shape}".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()[:16]


def row_keys(contents: np.ndarray, view: int = 0) -> np.ndarray:
    """Keys of rows: uint8 `[n, KEY_BYTES]`.

    Args:
      contents: uint8 `[n, KEY_BYTES - 1]`, digests of what the rows are made of.
      view: of the content: 0 as it is, 1 mirrored left to right.
    """
    return np.concatenate([contents, np.full((len(contents), 1), view, np.uint8)], axis=1)
