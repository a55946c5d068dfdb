"""A trained model for use in programs: embeds queries and images, and indexes folders."""

from __future__ import annotations

import dataclasses
import functools
import operator
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from dqe_jax.checkpoints.opened import Opened
from dqe_jax.distributed import mesh
from dqe_jax.embedding.encoders import encoders
from dqe_jax.embedding.references import ReferenceEncoders, reference_encoders
from dqe_jax.embedding.rows import RowEmbedder
from dqe_jax.evaluation.probability import Probability
from dqe_jax.feature_store.shards import RowSpec
from dqe_jax.method.arrays import Tree
from dqe_jax.search import images as photos
from dqe_jax.search.images import AnyImage, Encoded, Preprocessing
from dqe_jax.search.inputs import Inputs
from dqe_jax.search.texts import encode_texts
from dqe_jax.utils.ahead import read_ahead
from dqe_jax.utils.errors import UserError

if TYPE_CHECKING:
    from dqe_jax.search.index import Index

# Rows of a device at a time: a batch is padded to the next of these, and each compiles once.
SIZES = (1, 8, 64, 512)
# Images at a time over all devices, unless the caller or the run says less.
GALLERY_BATCH = 64


@dataclasses.dataclass(frozen=True)
class Query:
    """A query before it is embedded.

    Attributes:
      images: the reference images, at least one.
      text: what should change.
    """

    images: tuple[AnyImage | Encoded, ...]
    text: str


@dataclasses.dataclass(frozen=True)
class QueryEmbeddings:
    """Embeddings of n queries.

    Attributes:
      embedding: float32 `[n, d]`, at length 1.
      attribute_weights: float32 `[n, K]`, as they were used.
      attribute_names: the K names.
      warnings: of each query, sentences about what the model does not understand.
    """

    embedding: np.ndarray
    attribute_weights: np.ndarray
    attribute_names: tuple[str, ...]
    warnings: tuple[tuple[str, ...], ...]

    def weights(self, query: int = 0) -> dict[str, float]:
        """Attribute weights of a query by name."""
        return dict(zip(self.attribute_names, map(float, self.attribute_weights[query])))

    def __len__(self) -> int:
        return len(self.embedding)

    def __repr__(self) -> str:
        lines = [f"{len(self)} query embeddings of {self.embedding.shape[1]} numbers"]
        for i in range(min(len(self), 3)):
            named = ", ".join(f"{name} {x:.2f}" for name, x in self.weights(i).items())
            lines.append(f"  {i}: {named or 'no attribute weights'}")
            lines += [f"     warning: {said}" for said in self.warnings[i]]
        return "\n".join(lines)


class Model:
    """A trained model, as `dqe_jax.load` opens it.

    Attributes:
      origin: the path that it was loaded from.
      step: of its checkpoint.
      fingerprint: tells models apart: an index takes queries of the model that made it alone.
      attribute_names: the K attributes that queries weigh; none for a plain composer.
      preprocessing: how photos become what the model sees.
      probability: gives the probability that an image is valid from its score, as fitted on
        validation data; None where none was fitted.
    """

    def __init__(
        self,
        opened: Opened,
        *,
        encoder_names: Mapping[str, str] | None = None,
        batch_size: int | None = None,
    ):
        """Compiles nothing yet.

        Args:
          opened: the model.
          encoder_names: see `inputs.Inputs`.
          batch_size: images at a time over all devices; None for that of the run's evaluation, at
            most `GALLERY_BATCH`.

        Raises:
          UserError: an encoder that it needs is not there, or the model is damaged.
        """
        config = opened.config
        self.origin, self.step, self.fingerprint = opened.origin, opened.step, opened.fingerprint
        self.config, self.tokenizer, self.devices = config, opened.tokenizer, opened.devices
        self.attribute_names = tuple(opened.model.attribute_names)
        try:
            self.probability = Probability.from_json(opened.probability)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"the model in {opened.origin} is damaged ({error}): copy it again."
            ) from error
        self.preprocessing = Preprocessing.of(config)
        self._inputs = Inputs(opened.model, encoder_names or {})
        self._params = mesh.replicate(opened.params, opened.devices)
        self._encode_gallery = encoders(opened.model)[1]
        self._model = opened.model
        asked = batch_size or min(config.eval.batch_size, GALLERY_BATCH)
        self.batch_size = -(-asked // len(self.devices)) * len(self.devices)

    def __repr__(self) -> str:
        names = ", ".join(self.attribute_names) or "none"
        how = self.preprocessing
        return (
            f"Model({self.origin!r}, step {self.step}, backbone {self.config.model.backbone}, "
            f"images of {how.size} pixels ({how.method}), attributes: {names})"
        )

    def token_shape(self) -> tuple[int, int]:
        """`(M, d)`: tokens of an image's embedding, and their width."""
        size = self.preprocessing.size
        blank = self._inputs.images(np.full((1, size, size, 3), 255, np.uint8))
        _, tokens, width = jax.eval_shape(self._encode_gallery, self._params, blank).shape
        return tokens, width

    def encode_gallery(self, images: AnyImage | Sequence[AnyImage]) -> np.ndarray:
        """Embeds images of a gallery on all devices, a batch at a time.

        Args:
          images: one image or several: paths, images of PIL, or arrays uint8 `[H, W, 3]`; an array
            `[n, H, W, 3]` is n images.

        Returns:
          float32 `[n, M, d]`: M tokens of each image, at length 1.

        Raises:
          UserError: some cannot be used; it names them.
        """
        every = _listed(images)
        chunks = [every[i : i + self.batch_size] for i in range(0, len(every), self.batch_size)]
        if not chunks:
            raise UserError("encode_gallery: there is no image; give at least one.")
        parts = read_ahead(lambda some: photos.read_images(some, self.preprocessing), chunks, 1)
        return np.concatenate([self.embed_pixels(pixels) for pixels in parts])

    def embed_pixels(self, pixels: np.ndarray) -> np.ndarray:
        """As `encode_gallery`, of images uint8 `[n, size, size, 3]` that are preprocessed."""
        return self._mapped(self._encode_gallery, self._inputs.images(pixels))

    @property
    def reference_specs(self) -> dict[str, RowSpec]:
        """Shapes and dtypes of what queries read of one reference image, by name."""
        specs = self._references.specs
        return {name: RowSpec(spec.shape, np.dtype(spec.dtype)) for name, spec in specs.items()}

    def encode_references(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        """What queries read of reference images: arrays `[n, ...]` as `reference_specs` says.

        Args:
          pixels: uint8 `[n, size, size, 3]`, preprocessed.
        """
        made = self._mapped(self._references.features, self._inputs.images(pixels))
        return dict(made)

    def embed_features(self, features: Mapping[str, np.ndarray]) -> np.ndarray:
        """As `embed_pixels`, of what `encode_references` gave."""
        return self._mapped(self._references.gallery, dict(features))

    @functools.cached_property
    def _references(self) -> ReferenceEncoders:
        size = self.preprocessing.size
        images = self._inputs.images(np.full((1, size, size, 3), 255, np.uint8))
        ids, _ = encode_texts(self.tokenizer, [""])
        texts = self._inputs.texts([""], ids)
        num_factors = len(self.attribute_names)
        return reference_encoders(self._model, self._params, images, texts, num_factors)

    def encode_query(
        self,
        image: AnyImage | Sequence[AnyImage | Sequence[AnyImage]],
        text: str | Sequence[str],
        *,
        weights: Mapping[str, float] | None = None,
    ) -> QueryEmbeddings:
        """Embeds queries: reference images, each with a text that says what should change.

        Several references of one query are each composed with the text, and the query is the mean
        of these embeddings, brought to length 1. With an empty text nothing is composed: the query
        is the embedding of the reference as an image of a gallery, the first of its tokens, and all
        attribute weights are 0.

        Args:
          image: with one text: one image, or a list of several references. With n texts: one image
            for all of them, or a list of n, in each place an image or a list of several.
          text: one text, or a list of n.
          weights: factors by attribute, by which the predicted weights are multiplied.

        Raises:
          UserError: an image cannot be used, there is no such attribute, or lengths differ.
        """
        return self.embed_queries(queries_of(image, text), weights)

    def embed_queries(
        self,
        queries: Sequence[Query],
        weights: Mapping[str, float] | Sequence[Mapping[str, float]] | None = None,
    ) -> QueryEmbeddings:
        """As `encode_query`, of a list of queries; `weights` may be a list with those of each.

        What was made of a reference before (`Encoded`) is taken as it is.
        """
        each = [weights] * len(queries) if isinstance(weights, Mapping) else weights
        factors = np.stack([self.factors(own) for own in each or [{}] * len(queries)])
        ids, warnings = encode_texts(self.tokenizer, [query.text for query in queries])
        starts = range(0, len(queries), self.batch_size)
        some = [slice(start, start + self.batch_size) for start in starts]
        parts = [self._embed_some(queries[at], ids[at], factors[at]) for at in some]
        embedding, used = (np.concatenate(own) for own in zip(*parts))
        return QueryEmbeddings(embedding, used, self.attribute_names, tuple(warnings))

    def _embed_some(
        self, queries: Sequence[Query], ids: np.ndarray, factors: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Embeddings `[n, d]` of n queries and the attribute weights `[n, K]` that they used."""
        counts = [len(query.images) for query in queries]
        owner = np.repeat(np.arange(len(queries)), counts)
        features = self._features_of([image for query in queries for image in query.images])
        texts = self._inputs.texts([query.text for query in queries], ids)
        texts = jax.tree.map(lambda x: x[owner], texts)
        composed, used = self._mapped(self._references.query, features, texts, factors[owner])
        # No model was trained on empty texts. On photos the reference's own embedding finds more
        # images of its kind than what is composed with nothing.
        empty = np.array([not query.text.strip() for query in queries], bool)[owner]
        if empty.any():
            alone = jax.tree.map(operator.itemgetter(empty), features)
            composed[empty] = self.embed_features(alone)[:, 0]
            used[empty] = 0
        first = np.cumsum([0, *counts[:-1]])
        embedding = composed[first]
        for i in np.flatnonzero(np.array(counts) > 1):
            mean = composed[owner == i].mean(0)
            embedding[i] = mean / max(float(np.linalg.norm(mean)), 1e-12)
        return embedding, used[first]

    def _features_of(self, images: Sequence[AnyImage | Encoded]) -> dict[str, np.ndarray]:
        """As `encode_references`, of images of any kind; one that comes twice is read once."""
        distinct: dict[str | int, int] = {}
        every: list[AnyImage] = []
        place = np.full(len(images), -1, np.int64)
        for row, image in enumerate(images):
            if isinstance(image, Encoded):
                continue
            key = os.fspath(image) if isinstance(image, (str, os.PathLike)) else id(image)
            if key not in distinct:
                distinct[key] = len(every)
                every.append(image)
            place[row] = distinct[key]
        fresh: Mapping[str, np.ndarray] = {}
        if every:
            fresh = self.encode_references(photos.read_images(every, self.preprocessing))
        found = {}
        for name, spec in self.reference_specs.items():
            found[name] = np.empty((len(images), *spec.shape), spec.dtype)
            for row, image in enumerate(images):
                if isinstance(image, Encoded):
                    found[name][row] = image.features[name]
                else:
                    found[name][row] = fresh[name][place[row]]
        return found

    def index(
        self,
        photos: str | os.PathLike[str],
        *,
        output: str | os.PathLike[str] | None = None,
        table: str | os.PathLike[str] | None = None,
        store: str | None = None,
        keep_features: bool | None = None,
    ) -> Index:
        """Indexes all images of a folder and of the folders in it, for search.

        Args:
          photos: the folder.
          output: directory of the index. One that is there is brought up to date: only images that
            are new or have changed are embedded. None keeps the index for as long as this object
            lives.
          table: a CSV file with columns of metadata, see `tables.py`.
          store: for millions of images: a file such as `index.db` (Milvus Lite) or the address of a
            Milvus server, which then searches in place of the devices. Needs `output`; None keeps
            the one that the index has.
          keep_features: whether the index keeps what queries read of each image, so that a search
            whose reference is in the index does not encode it again. None leaves an index as it is;
            a new one keeps features of at most 32 KiB an image. `reference_specs` says how large
            they are.

        Raises:
          UserError: the folder or the table cannot be used, or `output` is an index of another
            model.
        """
        from dqe_jax.search.index import build_index  # it knows this module

        return build_index(
            self, photos, output=output, table=table, store=store, keep_features=keep_features
        )

    def factors(self, weights: Mapping[str, float]) -> np.ndarray:
        """Factors float32 `[K]` of the attribute weights.

        Args:
          weights: by name; 1 for those that it lacks.

        Raises:
          UserError: there is no such attribute, or a factor is negative or not finite.
        """
        for name, factor in weights.items():
            if name not in self.attribute_names:
                known = ", ".join(self.attribute_names) or "none"
                raise UserError(f"weights: the model has no attribute {name!r}; it has {known}.")
            if not (isinstance(factor, (int, float)) and 0 <= factor < np.inf):
                raise UserError(f"weights: {name} is {factor!r}: give a number of at least 0.")
        return np.array([weights.get(name, 1.0) for name in self.attribute_names], np.float32)

    def _mapped(self, encode: Callable[..., Tree], *inputs: Tree) -> Tree:
        """What an encoder makes of arrays `[n, ...]`, on all devices: NumPy arrays `[n, ...]`."""
        count, devices = len(jax.tree.leaves(inputs[0])[0]), len(self.devices)
        wanted = -(-count // devices)
        size = next((s for s in SIZES if s >= wanted), SIZES[-1]) * devices
        embed = RowEmbedder[Tree](
            encode,
            columns=len(inputs),
            batch_size=min(size, self.batch_size),
            devices=self.devices,
        )
        rows = np.arange(count)
        return embed(self._params, *((TreeRows(x), rows) for x in inputs))


class TreeRows:
    """Rows of a tree of arrays, as `embedding.sources.Rows`."""

    def __init__(self, tree: Tree):
        """Arrays `[n, ...]`."""
        self._tree = tree

    def batches(self, rows: np.ndarray, size: int, shards: int) -> Iterator[Tree]:
        """As `sources.Rows` says."""
        for start in range(0, len(rows), size):
            here = rows[start : start + size]
            yield mesh.shard(jax.tree.map(operator.itemgetter(here), self._tree), shards)


def queries_of(image: Any, text: str | Sequence[str]) -> list[Query]:
    """The queries that images and texts are, as `Model.encode_query` says.

    Raises:
      UserError: lengths differ, or there is no image.
    """
    if isinstance(text, str):
        return [Query(_references(image), text)]
    if not isinstance(text, (list, tuple, np.ndarray)) or not len(text):
        raise UserError(f"the text of a query is {text!r:.40}: give a string, or a list of some.")
    texts = list(text)
    if is_one(image):
        return [Query(_references(image), one) for one in texts]
    if len(image) != len(texts):
        raise UserError(f"there are {len(image)} images and {len(texts)} texts: give as many.")
    return [Query(_references(own), one) for own, one in zip(image, texts)]


def is_one(image: object) -> bool:
    """Whether this is one image, not several."""
    if isinstance(image, np.ndarray):
        return image.ndim < 4
    return not isinstance(image, (list, tuple))


def _listed(images: Any) -> list[AnyImage]:
    return [images] if is_one(images) else list(images)


def _references(image: Any) -> tuple[AnyImage, ...]:
    own = tuple(_listed(image))
    if not own:
        raise UserError("a query needs an image: give a path, an image of PIL or an array.")
    return own
