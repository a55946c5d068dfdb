"""The model and its backbones: a dict from the name in a config to a module."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from dqe_jax.models.dqe import DQE, QueryOutput, TrainOutput
from dqe_jax.models.tiny import Tiny

BACKBONES = {"tiny": Tiny}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}

__all__ = ["BACKBONES", "DQE", "DTYPES", "QueryOutput", "TrainOutput", "build_model"]


def build_model(config: Any, *, vocab_size: int, max_length: int, image_size: int) -> DQE:
    """The model of a config.

    Args:
      config: `config.model`, see `configs/common.py`.
      vocab_size: size of the text vocabulary.
      max_length: longest text, in tokens.
      image_size: pixels a side of the square images.
    """
    dtype = DTYPES[config.dtype]
    sizes = dict(config[config.backbone])
    backbone = BACKBONES[config.backbone](
        vocab_size=vocab_size,
        max_length=max_length,
        image_size=image_size,
        dtype=dtype,
        **sizes,
    )
    attributes = config.attributes
    return DQE(
        backbone=backbone,
        attribute_names=tuple(attributes.names) if attributes.enabled else (),
        embed_dim=sizes["embed_dim"],
        heads=sizes["heads"],
        activation=attributes.activation,
        initial_tau=config.initial_tau,
        dtype=dtype,
    )
