"""DQE-CIR: a backbone, attribute weights on top of its composer, and the learned temperature.

Two entry points serve training, evaluation and demos alike: `encode_query(image, text)` and
`encode_gallery(image)`. What a backbone is: `models/features.py`. Embeddings leave this module
L2-normalised in float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Float, Int, UInt8

from dqe_jax.method.arrays import Array
from dqe_jax.method.batch import QueryOutput, TrainOutput
from dqe_jax.models import resuming
from dqe_jax.models.attributes import AttributeGates, AttributeWeights
from dqe_jax.models.features import (
    Backbone,
    ImageFeatures,
    States,
    StoredText,
    TextFeatures,
)
from dqe_jax.models.layers import normalize, of_queries
from dqe_jax.models.lora import with_adapters

# Images, what their tower makes of them, or their features; token ids, or these with what their
# tower makes.
Images: TypeAlias = UInt8[Array, "... H W 3"] | States | ImageFeatures
Texts: TypeAlias = Int[Array, "... L"] | StoredText


class DQE(nn.Module):
    """Distinctive query embeddings.

    Attributes:
      backbone: see `models/features.py`.
      attribute_names: the K attributes; none gives the plain composer.
      form: of the attribute weights: "sum" (they weigh what is added to the query) or "gate" (they
        choose between reference and text).
      parts: of the embedding, with form "gate".
      width: of the attribute features, or of the hidden layer of the gates.
      heads: attention heads of the attribute queries.
      activation: of the attribute weights, `sigmoid` or `softmax`.
      query: "composed", or a query without a composer: "text", "image", or their "sum" or
        "product"; the text then has a head of its own.
      initial_tau: the temperature at the start.
      initial_bias: the bias of the logits of the sigmoid loss at the start; 0 for none.
      lora_scale: of adapters among the parameters (`lora.py`); 0 without any.
      upper_layers: the last layers of towers, which alone have adapters; 0 where all may have.
      dtype: compute dtype of the matrix products.
    """

    backbone: Backbone
    attribute_names: Sequence[str] = ()
    form: str = "sum"
    parts: int = 8
    width: int = 128
    heads: int = 4
    activation: str = "sigmoid"
    query: str = "composed"
    initial_tau: float = 0.07
    initial_bias: float = 0.0
    lora_scale: float = 0.0
    upper_layers: int = 0
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        """Creates the attribute weights and the temperature."""
        if self._gated:
            self.gates = AttributeGates(
                self.attribute_names, self.parts, self.backbone.embed_dim, self.width, self.dtype
            )
        elif self.attribute_names:
            self.attributes = AttributeWeights(
                self.attribute_names,
                self.backbone.embed_dim,
                self.width,
                self.heads,
                self.activation,
                self.dtype,
            )
        if self.query not in ("composed", "image"):
            self.text_head_hidden = nn.Dense(self.width, dtype=self.dtype)
            self.text_head_out = nn.Dense(self.backbone.embed_dim, dtype=self.dtype)
        # An explicit dtype: a weakly typed scalar would recompile the second step.
        start = jnp.log(jnp.asarray(1 / self.initial_tau, jnp.float32))
        self.log_scale = self.param("log_scale", lambda _: start)
        if self.initial_bias:
            bias = jnp.asarray(self.initial_bias, jnp.float32)
            self.logit_bias = self.param("logit_bias", lambda _: bias)

    @property
    def _gated(self) -> bool:
        return bool(self.attribute_names) and self.form == "gate"

    def tau(self) -> Float[Array, ""]:
        """The learned temperature, at least 0.01, float32."""
        return jnp.exp(-jnp.minimum(self.log_scale, jnp.log(jnp.float32(100.0))))

    def _compose(
        self,
        image: ImageFeatures,
        text: TextFeatures,
        train: bool,
        rows: Int[Array, " B"] | None = None,
        factors: Float[Array, "B K"] | None = None,
    ) -> QueryOutput:
        if self.query != "composed":
            return self._pure(image, text, rows)
        h = self.backbone.compose(image, text, train, rows)
        if not self.attribute_names:
            none = jnp.zeros((len(h), 0), jnp.float32)
            return QueryOutput(normalize(h), none, jnp.zeros((len(h), 0, self.width), h.dtype))
        if self._gated:
            weights = self.gates.weights(text.pooled)
            if factors is not None:
                free = jnp.ones((len(factors), self.parts - factors.shape[1]), jnp.float32)
                weights = weights * jnp.concatenate([factors, free], axis=1)
            reference = normalize(image.gallery).mean(1)
            reference = of_queries(reference, rows, len(h))
            q = normalize(h + self.gates.contribute(weights, reference, text.pooled))
            named = weights[:, : len(self.attribute_names)]
            return QueryOutput(q, named, self.gates.named_parts(q))
        weights = self.attributes.weights(text.pooled)
        if factors is not None:
            weights = weights * factors
        features = self.attributes.features(image.tokens, text.pooled, rows)
        q = normalize(h + self.attributes.contribute(features, weights))
        return QueryOutput(q, weights, features)

    def _pure(
        self, image: ImageFeatures, text: TextFeatures, rows: Int[Array, " B"] | None
    ) -> QueryOutput:
        """A query without a composer, of the text, of the reference's own embedding or of both."""
        count = len(text.ids)
        reference = of_queries(normalize(image.gallery).mean(1), rows, count)
        q: Array = normalize(reference)
        if self.query != "image":
            asked = self.text_head_out(nn.relu(self.text_head_hidden(text.pooled)))
            asked = normalize(asked)
            q = {"text": asked, "sum": q + asked, "product": q * asked}[self.query]
        none = jnp.zeros((count, 0), jnp.float32)
        return QueryOutput(normalize(q), none, jnp.zeros((count, 0, self.width), q.dtype))

    def _image(self, image: Images, train: bool = False) -> ImageFeatures:
        if isinstance(image, ImageFeatures):
            return image
        if not isinstance(image, Mapping):
            states = self.backbone.image_states(image, train)
        elif resuming.ENTERING in image:
            states = self._resumed(image[resuming.ENTERING], train)
        else:
            states = image
        return self.backbone.image_features(states, train)

    def _resumed(self, tokens: Array, train: bool) -> States:
        """The states of images, of what enters the last layers of their tower."""
        size = cast(Any, self.backbone).image_size
        nothing = jnp.zeros((len(tokens), size, size, 3), jnp.uint8)  # which is never looked at
        with resuming.resumed(self.upper_layers, tokens):
            return self.backbone.image_states(nothing, train)

    def _text(self, text: Texts, train: bool = False) -> TextFeatures:
        if isinstance(text, StoredText):
            return self.backbone.text_features(text.ids, text.states, train)
        return self.backbone.text_features(text, self.backbone.text_states(text, train), train)

    @with_adapters
    def image_states(self, image: UInt8[Array, "B H W 3"]) -> States:
        """What the tower of the backbone makes of images: it can stand in their place.

        With `upper_layers` that is what enters these layers, if the tower can be cut there.
        """
        with resuming.watched(self.upper_layers) as caught:
            states = self.backbone.image_states(image)
        if self.upper_layers and len(caught) == 1:
            return {resuming.ENTERING: next(iter(caught.values()))}
        return states

    @with_adapters
    def text_states(self, ids: Int[Array, "B L"]) -> States:
        """What the tower of the backbone makes of texts."""
        return self.backbone.text_states(ids)

    @with_adapters
    def image_features(self, image: Images) -> ImageFeatures:
        """What queries and gallery embeddings are made of: it can stand in place of the images."""
        return self._image(image)

    @with_adapters
    def encode_query(
        self, image: Images, text: Texts, factors: Float[Array, "B K"] | None = None
    ) -> QueryOutput:
        """Reference images `[R, ...]` with texts `[B, ...]` to query embeddings.

        `B` is a multiple of `R`. `factors` multiply the attribute weights, float32.
        """
        return self._compose(self._image(image), self._text(text), False, factors=factors)

    @with_adapters
    def encode_gallery(self, image: Images) -> Float[Array, "B M d"]:
        """Images `[B, ...]` to gallery embeddings, float32."""
        return normalize(self._image(image).gallery)

    @with_adapters
    def encode_text(self, text: Texts) -> Float[Array, "B d"]:
        """Texts in the space of gallery embeddings, float32, where the backbone has such a space.

        See `features.has_common_space`.
        """
        return normalize(self._text(text).pooled)

    @with_adapters
    def __call__(
        self,
        reference: Images,
        text: Texts,
        target: Images,
        rows: Int[Array, " B"] | None = None,
        train: bool = True,
    ) -> TrainOutput:
        """One pass for training; every image is encoded once.

        Args:
          reference: R images, `[R, H, W, 3]` or their states.
          text: B texts, `[B, L]` or these with their states.
          target: the image that each text leads to, `[B, H, W, 3]` or their states.
          rows: each text's reference, modulo R, as `Batch.reference`; None where each reference has
            `B / R` texts, side by side.
          train: whether dropout is on (rng `dropout`).
        """
        R = len(jax.tree.leaves(reference)[0])
        if rows is not None:
            rows = rows % R
        images = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), reference, target)
        features = self._image(images, train)
        modification = self._text(text, train)
        query = self._compose(jax.tree.map(lambda x: x[:R], features), modification, train, rows)
        if self._gated:
            target = normalize(features.gallery[R:]).mean(1)
            target_features = self.gates.named_parts(target)
        elif self.attribute_names:
            target_features = self.attributes.features(features.tokens[R:], modification.pooled)
        else:
            target_features = query.attribute_features
        gallery = normalize(features.gallery)
        bias = self.logit_bias if self.initial_bias else None
        return TrainOutput(query, gallery[:R], gallery[R:], target_features, self.tau(), bias)
