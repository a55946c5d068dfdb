"""The backbone `features`: trained heads on what frozen encoders of any kind make of images.

Features of images come from outside the model, as tokens of a grid or as one vector, from one
encoder or from several. Each is standardized and projected to one width. A text is what an encoder
makes of it, what an encoder of words trained from scratch makes of it, or both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import DTypeLike
from jaxtyping import Float, Int, Shaped, UInt8

from dqe_jax.method.arrays import Array, Params
from dqe_jax.models.features import ImageFeatures, States, TextFeatures
from dqe_jax.models.layers import Block, masked_mean, normalize, of_queries
from dqe_jax.models.tiny import TokenHead


@dataclasses.dataclass(frozen=True)
class GivenArray:
    """An array of features of one image or text.

    Attributes:
      name: that its file or its encoder gives it.
      shape: `(P, D)` for tokens, `(D,)` for one vector.
      dtype: in which it is stored.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclasses.dataclass(frozen=True)
class GivenSource:
    """Where features come from.

    Attributes:
      name: as the config gives it.
      origin: the encoder and its version, "" if they are not known.
      arrays: what it gives of one image or text.
    """

    name: str
    origin: str
    arrays: tuple[GivenArray, ...]


@dataclasses.dataclass(frozen=True)
class GivenSizes:
    """What features the model takes.

    Attributes:
      images: where those of images come from, at least one.
      texts: where those of texts come from; none leaves the text to the encoder of words.
    """

    images: tuple[GivenSource, ...]
    texts: tuple[GivenSource, ...] = ()

    def of(self, kind: str) -> tuple[GivenSource, ...]:
        """Those of an "image" or a "text"."""
        return self.images if kind == "image" else self.texts


def state_name(source: str, array: str) -> str:
    """The name of an array among the states of an image or a text."""
    return f"{source}/{array}"


class Standardize(nn.Module):
    """Features with a mean of 0 and a deviation of 1 in each of their dimensions.

    Both start as what `with_moments` gives, and train.
    """

    @nn.compact
    def __call__(self, x: Shaped[Array, "*axes D"]) -> Float[Array, "*axes D"]:
        """Returns float32."""
        shift = self.param("shift", nn.initializers.zeros, x.shape[-1:])
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        return (x.astype(jnp.float32) - shift) * scale


class Given(nn.Module):
    """Backbone interface: see `models/features.py`. Word id 0 is padding.

    Attributes:
      sizes: of the features.
      vocab_size: size of the text vocabulary.
      max_length: longest text, in tokens.
      words: whether the encoder of words reads texts that have features.
      width: `D`.
      heads: attention heads.
      text_depth: blocks of the encoder of words.
      composer: "attention" (blocks in which image tokens attend to the text) or "mlp" (of the
        reference's embedding and the pooled text).
      composer_depth: blocks, or hidden layers, of the composer.
      composer_width: width of the hidden layers of an MLP.
      composer_norm: whether an MLP reads both of its inputs with a mean of 0 and a deviation of 1,
        and its last layer starts at random. A query that starts as its reference has this nearest
        of all negatives in the batch, and small batches then collapse all embeddings into one.
      token_dim: width of a token inside the embedding heads.
      embed_dim: `d`.
      dropout: rate in all places, in training only.
      dtype: compute dtype of the matrix products; parameters are float32.
    """

    sizes: GivenSizes
    vocab_size: int
    max_length: int
    words: bool = True
    width: int = 128
    heads: int = 4
    text_depth: int = 0
    composer: str = "mlp"
    composer_depth: int = 2
    composer_width: int = 384
    composer_norm: bool = False
    token_dim: int = 64
    embed_dim: int = 256
    dropout: float = 0.1
    dtype: DTypeLike = jnp.float32

    PARTS: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "inputs": ("image_*",),
        "text": ("words_table/*", "text_*"),
        "composer": ("composer_*", "residual_head/*"),
        "projections": ("gallery_*",),
    }
    TOWERS: ClassVar[Mapping[str, tuple[str, ...]]] = {"image": (), "text": ("text",)}

    def setup(self) -> None:
        """Creates the submodules."""
        self.image_norms, self.image_inputs = self._inputs("image")
        grids = sorted({_tokens_of(array) for array in self._grids})
        vectors = len(_arrays_of(self.sizes.images)) - len(self._grids)
        self.image_positions = nn.Embed(sum(grids) or vectors, self.width, dtype=self.dtype)
        self.text_norms, self.text_inputs = self._inputs("text")
        if self._reads_words:
            self.words_table = nn.Embed(self.vocab_size, self.width, dtype=self.dtype)
            self.text_positions = nn.Embed(self.max_length, self.width, dtype=self.dtype)
            self.text_blocks = self._blocks(self.text_depth)
            self.text_norm = nn.LayerNorm()
        self.gallery_head = TokenHead(self.token_dim, self.embed_dim, self.dtype)
        self.gallery_vectors = [self._dense(self.embed_dim) for _ in range(vectors)]
        if self.composer == "attention":
            self.composer_blocks = self._blocks(self.composer_depth)
            self.residual_head = TokenHead(
                self.token_dim, self.embed_dim, self.dtype, zero_init=True
            )
        else:
            self.composer_hidden = [
                self._dense(self.composer_width) for _ in range(self.composer_depth)
            ]
            start = nn.linear.default_kernel_init if self.composer_norm else nn.initializers.zeros
            self.composer_out = self._dense(self.embed_dim, start)
            if self.composer_norm:
                self.composer_image_norm = nn.LayerNorm()
                self.composer_text_norm = nn.LayerNorm()
        self.drop = nn.Dropout(self.dropout)

    @property
    def _reads_words(self) -> bool:
        return self.words or not self.sizes.texts

    @property
    def _grids(self) -> list[GivenArray]:
        """The arrays of images that have several tokens."""
        return [array for _, array in _arrays_of(self.sizes.images) if _tokens_of(array) > 1]

    def _blocks(self, depth: int) -> list[Block]:
        return [Block(self.heads, dtype=self.dtype) for _ in range(depth)]

    def _dense(
        self, width: int, init: nn.initializers.Initializer = nn.linear.default_kernel_init
    ) -> nn.Dense:
        return nn.Dense(width, kernel_init=init, dtype=self.dtype)

    def _inputs(self, kind: str) -> tuple[list[Standardize], list[nn.Dense]]:
        """A norm and a projection for each array of a kind."""
        arrays = _arrays_of(self.sizes.of(kind))
        return [Standardize() for _ in arrays], [self._dense(self.width) for _ in arrays]

    def given_states(self, kind: str) -> Mapping[str, jax.ShapeDtypeStruct]:
        """As the sizes say."""
        return {
            name: jax.ShapeDtypeStruct(array.shape, jnp.dtype(array.dtype))
            for name, array in _arrays_of(self.sizes.of(kind))
        }

    def random_towers(self) -> frozenset[str]:
        """The encoder of words."""
        return frozenset({"text"} if self.dropout else ())

    def image_states(self, image: UInt8[Array, "B H W 3"], train: bool = False) -> States:
        """Not here: they come from outside.

        Raises:
          TypeError: always.
        """
        raise TypeError("the backbone 'features' takes what encoders made of images, not images")

    def image_features(self, states: States, train: bool = False) -> ImageFeatures:
        """Tokens `[B, P, D]`, one for each place of each grid, and an embedding `[B, M=1, d]`.

        What several arrays say of the same place is added; so is, to every token, what vectors say.
        """
        grids: dict[int, list[jax.Array]] = {}
        alone: list[jax.Array] = []
        own: list[jax.Array] = []
        made = iter(self.gallery_vectors)
        tokens: Array
        arrays = self._standardized("image", states)
        for x, project in zip(arrays, self.image_inputs):
            token = project(x)
            if x.shape[1] > 1:
                grids.setdefault(x.shape[1], []).append(token)
            else:
                alone.append(token)
                own.append(next(made)(self._dropped(x[:, 0], train)))
        if grids:
            tokens = jnp.concatenate([sum(grids[count]) for count in sorted(grids)], axis=1)
            tokens = tokens + sum(alone)
        else:
            tokens = jnp.concatenate(alone, axis=1)
        positions = self.image_positions(jnp.arange(tokens.shape[1]))
        tokens = self._dropped(tokens + positions, train)
        gallery = self.gallery_head(self._dropped(tokens, train)) + sum(own)
        return ImageFeatures(tokens, gallery[:, None])

    def text_states(self, ids: Int[Array, "B L"], train: bool = False) -> States:
        """Tokens `[B, L, D]` of words, where no features of texts are given.

        Raises:
          TypeError: they are given.
        """
        if self.sizes.texts:
            raise TypeError("this model takes what encoders made of texts beside their ids")
        return {"words": self._words(ids, train)}

    def text_features(
        self, ids: Int[Array, "B L"], states: States, train: bool = False
    ) -> TextFeatures:
        """Tokens `[B, P + L, D]`, given ones before words, and the means of each side by side."""
        given = self._standardized("text", states)
        tokens = [project(self._dropped(x, train)) for x, project in zip(given, self.text_inputs)]
        mask = [jnp.ones(x.shape[:2], bool) for x in tokens]
        if self._reads_words:
            words = states["words"] if "words" in states else self._words(ids, train)
            tokens.append(words[:, : ids.shape[1]])  # a store has all of them
            mask.append(jnp.asarray(ids > 0))
        pooled = [masked_mean(x, own) for x, own in zip(tokens, mask)]
        return TextFeatures(
            ids,
            jnp.concatenate(mask, axis=1),
            jnp.concatenate(tokens, axis=1),
            jnp.concatenate(pooled, axis=1),
        )

    def compose(
        self,
        image: ImageFeatures,
        text: TextFeatures,
        train: bool = False,
        rows: Int[Array, " B"] | None = None,
    ) -> Float[Array, "B d"]:
        """Composed embedding `h`, float32: the reference's own at length 1, and a residual."""
        count = len(text.ids)
        gallery = of_queries(image.gallery[:, 0], rows, count)
        if self.composer == "attention":
            x: Array = of_queries(image.tokens, rows, count)
            for block in self.composer_blocks:
                x = block(x, context=text.tokens, context_mask=text.mask)
            return normalize(gallery) + self.residual_head(self._dropped(x, train))
        inputs = gallery, text.pooled.astype(gallery.dtype)
        if self.composer_norm:
            inputs = self.composer_image_norm(inputs[0]), self.composer_text_norm(inputs[1])
        y: Array = jnp.concatenate(inputs, axis=1)
        for layer in self.composer_hidden:
            y = self._dropped(jax.nn.relu(layer(y)), train)
        return normalize(gallery) + self.composer_out(y)

    def _words(self, ids: Int[Array, "B L"], train: bool) -> Float[Array, "B L D"]:
        mask = ids > 0
        x = self.words_table(ids) + self.text_positions(jnp.arange(ids.shape[1]))
        x = self._dropped(x, train)
        for block in self.text_blocks:
            x = block(x, mask)
        return self.text_norm(x)

    def _standardized(self, kind: str, states: States) -> list[Array]:
        """Each array of a kind as tokens `[B, P, *]`, standardized."""
        norms = self.image_norms if kind == "image" else self.text_norms
        found = []
        for (name, array), norm in zip(_arrays_of(self.sizes.of(kind)), norms):
            x = jnp.asarray(states[name]).reshape(-1, _tokens_of(array), array.shape[-1])
            found.append(norm(x))
        return found

    def _dropped(self, x: Array, train: bool) -> Array:
        return self.drop(x, deterministic=not train)


def with_moments(
    params: Params, sizes: GivenSizes, moments: Mapping[str, tuple[np.ndarray, np.ndarray]]
) -> Params:
    """Parameters of a model that start by standardizing its features.

    Args:
      params: of the whole model.
      sizes: of its features.
      moments: mean and standard deviation `[D]` of the arrays, by their names among the states.
    """
    flat = flatten_dict(params, sep="/")
    for kind in ("image", "text"):
        for i, (name, _) in enumerate(_arrays_of(sizes.of(kind))):
            mean, deviation = moments[name]
            place = f"backbone/{kind}_norms_{i}"
            flat[f"{place}/shift"] = mean.astype(np.float32)
            # A dimension that hardly moves is not blown up.
            least = 1e-3 * float(deviation.mean()) + 1e-6
            flat[f"{place}/scale"] = (1 / (deviation + least)).astype(np.float32)
    return unflatten_dict(flat, sep="/")


def _arrays_of(sources: Sequence[GivenSource]) -> list[tuple[str, GivenArray]]:
    """The arrays of some sources, by their names among the states."""
    return [
        (state_name(source.name, array.name), array)
        for source in sources
        for array in source.arrays
    ]


def _tokens_of(array: GivenArray) -> int:
    return array.shape[0] if len(array.shape) == 2 else 1
