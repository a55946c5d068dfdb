"""A fingerprint of a trained model: what makes embeddings that can be compared with one another."""

from __future__ import annotations

import hashlib
import json

import numpy as np
from flax.traverse_util import flatten_dict

from dqe_jax.config import RunConfig
from dqe_jax.method.arrays import Params
from dqe_jax.models.weights import sizes as size_files
from dqe_jax.models.weights.sizes import Sizes
from dqe_jax.models.weights.stacking import unstack_layers

DIGITS = 32


def fingerprint_of(config: RunConfig, sizes: Sizes | None, params: Params) -> str:
    """A digest of the parameters and of all else that decides the embedding of a photo.

    A checkpoint and its export have the same one; layers that are scanned make no difference.

    Args:
      config: of the run.
      sizes: of the model, where the config does not say them.
      params: of the whole model, as NumPy arrays.

    Returns:
      `DIGITS` hexadecimal digits.
    """
    facts = {
        "backbone": config.model.backbone,
        "dtype": config.model.dtype,
        "image_size": config.data.image_size,
        "preprocess": config.data.preprocess,
        "sizes": sizes and size_files.to_json(sizes),
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for path, value in sorted(flatten_dict(unstack_layers(params), sep="/").items()):
        array = np.ascontiguousarray(value)
        digest.update(f"{path} {array.dtype} {array.shape}".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()[:DIGITS]
