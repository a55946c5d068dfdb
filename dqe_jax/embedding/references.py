"""Queries in two steps: features of their reference images, which can be kept, and the rest.

Only those fields of `ImageFeatures` are made that queries or gallery embeddings of the model read:
a composer that does not look at the tokens of the reference needs its embedding alone.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import cast

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr

from dqe_jax.distributed.mesh import REMEMBERED
from dqe_jax.method.arrays import Array, Params, Tree
from dqe_jax.method.batch import QueryOutput
from dqe_jax.models.dqe import DQE
from dqe_jax.models.features import ImageFeatures

# Features of images `[R, ...]`, by the name of the field of `ImageFeatures`.
Fields = Mapping[str, Array]
# Shape, without the axis of images, and dtype of a field.
_Spec = tuple[str, tuple[int, ...], str]


@dataclasses.dataclass(frozen=True)
class ReferenceEncoders:
    """The steps of a model, as functions of its parameters.

    Attributes:
      specs: of the fields of one image.
      features: of parameters and images or their states, to fields `[R, ...]`.
      query: of parameters, fields `[B, ...]`, texts and factors `[B, K]` of the attribute weights,
        to embeddings `[B, d]` and the weights `[B, K]` that they were composed with.
      gallery: of parameters and fields `[R, ...]` to embeddings `[R, M, d]`.
    """

    specs: Mapping[str, jax.ShapeDtypeStruct]
    features: Callable[[Params, Tree], Fields]
    query: Callable[[Params, Fields, Tree, Array], tuple[Array, Array]]
    gallery: Callable[[Params, Fields], Array]


def reference_encoders(
    model: DQE, params: Params, images: Tree, texts: Tree, num_factors: int
) -> ReferenceEncoders:
    """The steps of a model.

    Args:
      model: any.
      params: of it, or their shapes.
      images: one image or its states, or their shapes: `[1, ...]`.
      texts: likewise, of one text.
      num_factors: `K`.
    """
    whole = jax.eval_shape(_features_of(model), params, images)
    factors = jax.ShapeDtypeStruct((1, num_factors), jnp.float32)
    read = _fields_read(model, params, whole, texts, factors)
    fields = tuple((n, x.shape[1:], x.dtype.name) for n, x in sorted(vars(whole).items()))
    names = tuple(name for name, _, _ in fields if name in read)
    return ReferenceEncoders(
        specs={n: jax.ShapeDtypeStruct(shape, dtype) for n, shape, dtype in fields if n in read},
        features=_fields_of(model, names),
        query=_query_of(model, fields),
        gallery=_gallery_of(model, fields),
    )


def _fields_read(
    model: DQE, params: Params, whole: ImageFeatures, texts: Tree, factors: jax.ShapeDtypeStruct
) -> frozenset[str]:
    """The fields that decide a query or a gallery embedding."""

    def both(fields: Fields, params: Params, texts: Tree, factors: Array) -> Tree:
        features = ImageFeatures(**fields)
        query = _weighted(model, params, features, texts, factors)
        return query, _gallery(model, params, features)

    traced = jax.make_jaxpr(both)(dict(vars(whole)), params, texts, factors).jaxpr
    # A tree of a dict has its values in the order of its keys, and arguments come in order.
    names = sorted(vars(whole))
    needed = _needed(traced)
    return frozenset(n for n, x in zip(names, traced.invars) if id(x) in needed)


def _needed(jaxpr: Jaxpr) -> set[int]:
    """By `id`, the variables of a program that decide its results."""
    needed = {id(x) for x in jaxpr.outvars}
    for equation in reversed(jaxpr.eqns):
        if any(id(x) in needed for x in equation.outvars):
            needed.update(map(id, equation.invars))
    return needed


# Mapped programs are remembered by the functions that they map: an equal model has the same ones.


@functools.lru_cache(REMEMBERED)
def _features_of(model: DQE) -> Callable[[Params, Tree], ImageFeatures]:
    def features(params: Params, image: Tree) -> ImageFeatures:
        return cast(ImageFeatures, model.apply({"params": params}, image, method="image_features"))

    return features


@functools.lru_cache(REMEMBERED)
def _fields_of(model: DQE, names: tuple[str, ...]) -> Callable[[Params, Tree], Fields]:
    def fields(params: Params, image: Tree) -> Fields:
        made = _features_of(model)(params, image)
        return {name: getattr(made, name) for name in names}

    return fields


@functools.lru_cache(REMEMBERED)
def _query_of(
    model: DQE, specs: tuple[_Spec, ...]
) -> Callable[[Params, Fields, Tree, Array], tuple[Array, Array]]:
    def query(params: Params, fields: Fields, texts: Tree, factors: Array) -> tuple[Array, Array]:
        return _weighted(model, params, _filled(fields, specs), texts, factors)

    return query


@functools.lru_cache(REMEMBERED)
def _gallery_of(model: DQE, specs: tuple[_Spec, ...]) -> Callable[[Params, Fields], Array]:
    def gallery(params: Params, fields: Fields) -> Array:
        return _gallery(model, params, _filled(fields, specs))

    return gallery


def _filled(fields: Fields, specs: tuple[_Spec, ...]) -> ImageFeatures:
    """Features in which zeros stand for what nothing reads."""
    count = len(next(iter(fields.values())))
    nothing = {name: jnp.zeros((count, *shape), dtype) for name, shape, dtype in specs}
    return ImageFeatures(**{**nothing, **fields})


def _weighted(
    model: DQE, params: Params, image: ImageFeatures, texts: Tree, factors: Array
) -> tuple[Array, Array]:
    given = (image, texts, factors) if factors.shape[1] else (image, texts)
    out = cast(QueryOutput, model.apply({"params": params}, *given, method="encode_query"))
    return out.embedding, out.attribute_weights


def _gallery(model: DQE, params: Params, image: ImageFeatures) -> Array:
    return cast(Array, model.apply({"params": params}, image, method="encode_gallery"))
