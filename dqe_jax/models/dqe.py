"""DQE-CIR: a backbone, attribute weights on top of its composer, and the learned temperature.

Two entry points serve training, evaluation and demos alike: `encode_query(image, text)` and
`encode_gallery(image)`. What a backbone is: `models/features.py`. Embeddings leave this module
L2-normalised in float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Float, Int, UInt8

from dqe_jax.method.arrays import Array
from dqe_jax.method.batch import QueryOutput, TrainOutput
from dqe_jax.models.attributes import AttributeWeights
from dqe_jax.models.features import Backbone, ImageFeatures, TextFeatures
from dqe_jax.models.layers import normalize


class DQE(nn.Module):
    """Distinctive query embeddings.

    Attributes:
      backbone: see `models/features.py`.
      attribute_names: the K attributes; none gives the plain composer.
      width: of the attribute features.
      heads: attention heads of the attribute queries.
      activation: of the attribute weights, `sigmoid` or `softmax`.
      initial_tau: the temperature at the start.
      dtype: compute dtype of the matrix products.
    """

    backbone: Backbone
    attribute_names: Sequence[str] = ()
    width: int = 128
    heads: int = 4
    activation: str = "sigmoid"
    initial_tau: float = 0.07
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        """Creates the attribute weights and the temperature."""
        if self.attribute_names:
            self.attributes = AttributeWeights(
                self.attribute_names,
                self.backbone.embed_dim,
                self.width,
                self.heads,
                self.activation,
                self.dtype,
            )
        # An explicit dtype: a weakly typed scalar would recompile the second step.
        start = jnp.log(jnp.asarray(1 / self.initial_tau, jnp.float32))
        self.log_scale = self.param("log_scale", lambda _: start)

    def tau(self) -> Float[Array, ""]:
        """The learned temperature, at least 0.01, float32."""
        return jnp.exp(-jnp.minimum(self.log_scale, jnp.log(jnp.float32(100.0))))

    def _compose(self, image: ImageFeatures, text: TextFeatures, train: bool) -> QueryOutput:
        h = self.backbone.compose(image, text, train)
        if not self.attribute_names:
            none = jnp.zeros((len(h), 0), jnp.float32)
            return QueryOutput(normalize(h), none, jnp.zeros((len(h), 0, self.width), h.dtype))
        weights = self.attributes.weights(text.pooled)
        features = self.attributes.features(image.tokens, text.pooled)
        q = normalize(h + self.attributes.contribute(features, weights))
        return QueryOutput(q, weights, features)

    def encode_query(self, image: UInt8[Array, "R H W 3"], text: Int[Array, "B L"]) -> QueryOutput:
        """Reference images with token ids to query embeddings; `B` is a multiple of `R`."""
        reference = self.backbone.encode_image(image)
        return self._compose(reference, self.backbone.encode_text(text), False)

    def encode_gallery(self, image: UInt8[Array, "B H W 3"]) -> Float[Array, "B M d"]:
        """Images to gallery embeddings, float32."""
        return normalize(self.backbone.encode_image(image).gallery)

    def __call__(
        self,
        reference: UInt8[Array, "R H W 3"],
        text: Int[Array, "R Q L"],
        target: UInt8[Array, "R Q H W 3"],
        train: bool = True,
    ) -> TrainOutput:
        """One pass for training; every image is encoded once.

        Args:
          reference: R images.
          text: ids of Q texts for each reference.
          target: the image that each text leads to.
          train: whether dropout is on (rng `dropout`).
        """
        R, Q, L = text.shape
        images = jnp.concatenate([reference, target.reshape(-1, *target.shape[2:])])
        features = self.backbone.encode_image(images, train)
        modification = self.backbone.encode_text(text.reshape(R * Q, L), train)
        query = self._compose(jax.tree.map(lambda x: x[:R], features), modification, train)
        if self.attribute_names:
            target_features = self.attributes.features(features.tokens[R:], modification.pooled)
        else:
            target_features = query.attribute_features
        gallery = normalize(features.gallery)
        return TrainOutput(query, gallery[:R], gallery[R:], target_features, self.tau())
