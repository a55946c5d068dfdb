"""What a backbone makes of images and of texts; the interface between backbones and the model.

A backbone is a module with

    encode_image(image, train)       -> ImageFeatures
    encode_text(ids, train)          -> TextFeatures
    compose(image, text, train)      -> composed embedding h, float [B, d], not normalised

of images uint8 `[B, H, W, 3]` and token ids int `[B, L]`; `embed_dim` is its `d`. `compose` gets R
images and B = R * Q texts, the Q texts of an image next to one another, so that what depends on the
image alone is computed once. `PARTS` of its class says which parameters form a part that can be
frozen.
"""

from __future__ import annotations

import flax.struct
import jax


@flax.struct.dataclass
class ImageFeatures:
    """Of images.

    Attributes:
      tokens: `[B, P, D]`, what attribute queries and the composer attend to.
      gallery: gallery embedding `[B, M, d]`, not normalised.
    """

    tokens: jax.Array
    gallery: jax.Array


@flax.struct.dataclass
class TextFeatures:
    """Of modification texts.

    Attributes:
      ids: int `[B, L]`.
      mask: bool `[B, L]`, false for padding.
      tokens: `[B, L, D]`.
      pooled: `[B, D']`, one vector a text.
    """

    ids: jax.Array
    mask: jax.Array
    tokens: jax.Array
    pooled: jax.Array
