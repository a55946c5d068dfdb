"""The two entry points of a model as functions of parameters and arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from dqe_jax.models.dqe import DQE


def encoders(model: DQE) -> tuple[Callable[..., Any], Callable[..., jax.Array]]:
    """The two entry points as functions of parameters."""

    def encode_query(params, image, text):
        return model.apply({"params": params}, image, text, method="encode_query")

    def encode_gallery(params, image):
        return model.apply({"params": params}, image, method="encode_gallery")

    return encode_query, encode_gallery
