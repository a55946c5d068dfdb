"""The backbone `features`: trained heads on what frozen encoders of any kind make of images.

Features of images come from outside the model, as tokens or as one vector, from one encoder or from
several. Each is normalised and projected to tokens of one width. A text is what an encoder makes of
it, what an encoder of words trained from scratch makes of it, or both. Composer and embedding heads
are those of `tiny`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Float, Int, UInt8

from dqe_jax.method.arrays import Array
from dqe_jax.models.features import ImageFeatures, States, TextFeatures
from dqe_jax.models.layers import Block, normalize
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
      composer_depth: blocks of the composer.
      token_dim: width of a token inside the embedding heads.
      embed_dim: `d`.
      dropout: rate on the tokens of images and on words, in training only.
      dtype: compute dtype of the matrix products; parameters are float32.
    """

    sizes: GivenSizes
    vocab_size: int
    max_length: int
    words: bool = True
    width: int = 256
    heads: int = 4
    text_depth: int = 1
    composer_depth: int = 2
    token_dim: int = 64
    embed_dim: int = 256
    dropout: float = 0.1
    dtype: DTypeLike = jnp.float32

    PARTS: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "inputs": ("image_*",),
        "text": ("words_table/*", "text_*"),
        "composer": ("composer_*", "residual_head/*"),
        "projections": ("gallery_head/*",),
    }
    TOWERS: ClassVar[Mapping[str, tuple[str, ...]]] = {"image": (), "text": ("text",)}

    def setup(self) -> None:
        """Creates the submodules."""
        self.image_norms, self.image_inputs = self._inputs(self.sizes.images)
        self.image_positions = nn.Embed(
            sum(_tokens_of(array) for _, array in _arrays_of(self.sizes.images)),
            self.width,
            dtype=self.dtype,
        )
        self.text_norms, self.text_inputs = self._inputs(self.sizes.texts)
        if self._reads_words:
            self.words_table = nn.Embed(self.vocab_size, self.width, dtype=self.dtype)
            self.text_positions = nn.Embed(self.max_length, self.width, dtype=self.dtype)
            self.text_blocks = self._blocks(self.text_depth)
            self.text_norm = nn.LayerNorm()
        self.composer_blocks = self._blocks(self.composer_depth)
        self.gallery_head = TokenHead(self.token_dim, self.embed_dim, self.dtype)
        self.residual_head = TokenHead(self.token_dim, self.embed_dim, self.dtype, zero_init=True)
        self.drop = nn.Dropout(self.dropout)

    @property
    def _reads_words(self) -> bool:
        return self.words or not self.sizes.texts

    def _blocks(self, depth: int) -> list[Block]:
        return [Block(self.heads, dtype=self.dtype) for _ in range(depth)]

    def _inputs(self, sources: Sequence[GivenSource]) -> tuple[list[nn.LayerNorm], list[nn.Dense]]:
        """A norm and a projection for each array of some sources."""
        arrays = list(_arrays_of(sources))
        return (
            [nn.LayerNorm() for _ in arrays],
            [nn.Dense(self.width, dtype=self.dtype) for _ in arrays],
        )

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
        """Tokens `[B, P, D]` of all arrays in turn, and gallery embedding `[B, M=1, d]`."""
        tokens = self._tokens(self.sizes.images, states, self.image_norms, self.image_inputs)
        x = jnp.concatenate(tokens, axis=1)
        x = self.drop(x + self.image_positions(jnp.arange(x.shape[1])), deterministic=not train)
        return ImageFeatures(x, self.gallery_head(x)[:, None])

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
        """Tokens `[B, P + L, D]`, given ones before words, and their mean `[B, D]`."""
        tokens = self._tokens(self.sizes.texts, states, self.text_norms, self.text_inputs)
        mask = [jnp.ones(x.shape[:2], bool) for x in tokens]
        if self._reads_words:
            tokens.append(states["words"] if "words" in states else self._words(ids, train))
            mask.append(jnp.asarray(ids > 0))
        pooled = [
            (x * m[..., None]).sum(1) / jnp.maximum(m.sum(1, keepdims=True), 1)
            for x, m in zip(tokens, mask)
        ]
        x, whole = jnp.concatenate(tokens, axis=1), jnp.concatenate(mask, axis=1)
        return TextFeatures(ids, whole, x, jnp.stack(pooled).mean(0))

    def compose(
        self, image: ImageFeatures, text: TextFeatures, train: bool = False
    ) -> Float[Array, "B d"]:
        """Composed embedding `h`, float32: the reference's own and a residual, as in `tiny`."""
        del train
        each = len(text.ids) // len(image.tokens)
        x: Array = jnp.repeat(image.tokens, each, axis=0)
        for block in self.composer_blocks:
            x = block(x, context=text.tokens, context_mask=text.mask)
        reference = jnp.repeat(normalize(image.gallery[:, 0]), each, axis=0)
        return reference + self.residual_head(x)

    def _words(self, ids: Int[Array, "B L"], train: bool) -> Float[Array, "B L D"]:
        mask = ids > 0
        x = self.words_table(ids) + self.text_positions(jnp.arange(ids.shape[1]))
        x = self.drop(x, deterministic=not train)
        for block in self.text_blocks:
            x = block(x, mask)
        return self.text_norm(x)

    def _tokens(
        self,
        sources: Sequence[GivenSource],
        states: States,
        norms: Sequence[nn.LayerNorm],
        inputs: Sequence[nn.Dense],
    ) -> list[Array]:
        """The tokens `[B, P, D]` of each array."""
        found = []
        for (name, array), norm, project in zip(_arrays_of(sources), norms, inputs):
            x = jnp.asarray(states[name]).reshape(-1, _tokens_of(array), array.shape[-1])
            found.append(project(norm(x.astype(jnp.float32))))
        return found


def _arrays_of(sources: Sequence[GivenSource]) -> Iterator[tuple[str, GivenArray]]:
    """The arrays of some sources, by their names among the states."""
    for source in sources:
        for array in source.arrays:
            yield state_name(source.name, array.name), array


def _tokens_of(array: GivenArray) -> int:
    return array.shape[0] if len(array.shape) == 2 else 1
