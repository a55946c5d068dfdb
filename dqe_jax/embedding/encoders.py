"""The two entry points of a model as functions of parameters and arrays."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import cast

from dqe_jax.distributed.mesh import REMEMBERED
from dqe_jax.method.arrays import Array, Params, Tree
from dqe_jax.method.batch import QueryOutput
from dqe_jax.models.dqe import DQE

# A function of parameters, reference images `[R, H, W, 3]` and token ids `[B, L]`, or their states.
EncodeQuery = Callable[[Params, Tree, Tree], QueryOutput]
# A function of parameters and images `[B, H, W, 3]`, or their states, to embeddings `[B, M, d]`.
EncodeGallery = Callable[[Params, Tree], Array]


@functools.lru_cache(REMEMBERED)
def encoders(model: DQE) -> tuple[EncodeQuery, EncodeGallery]:
    """The two entry points as functions of parameters; the same ones for an equal model."""

    def encode_query(params: Params, image: Tree, text: Tree) -> QueryOutput:
        out = model.apply({"params": params}, image, text, method="encode_query")
        return cast(QueryOutput, out)

    def encode_gallery(params: Params, image: Tree) -> Array:
        out = model.apply({"params": params}, image, method="encode_gallery")
        return cast(Array, out)

    return encode_query, encode_gallery


@functools.lru_cache(REMEMBERED)
def query_fields(
    encode_query: EncodeQuery, *names: str
) -> Callable[[Params, Tree, Tree], tuple[Array, ...]]:
    """`encode_query` that gives the fields of `QueryOutput` with these names alone."""

    def fields(params: Params, image: Tree, text: Tree) -> tuple[Array, ...]:
        out = encode_query(params, image, text)
        return tuple(getattr(out, name) for name in names)

    return fields
