"""A model of a few thousand parameters over each backbone: the code that ships, at small sizes."""

from __future__ import annotations

import dataclasses

from dqe_jax.cli.config_files import load_config
from dqe_jax.config import RunConfig
from dqe_jax.models.blip2 import Blip2Sizes
from dqe_jax.models.build import build_model
from dqe_jax.models.clip import ClipSizes
from dqe_jax.models.dqe import DQE
from dqe_jax.models.encoder import VisionSizes
from dqe_jax.models.weights.sizes import Sizes

# Words of the vocabulary, of which the last ends a text; tokens of a text; pixels a side.
VOCAB, LENGTH, SIZE = 20, 8, 32
END = VOCAB - 1
ATTRIBUTES = ("color", "shape", "size")
# Width of an embedding, and of the features of an attribute.
EMBED_DIM, ATTRIBUTE_WIDTH = 8, 12

VISION = VisionSizes(
    image_size=SIZE,
    patch_size=16,
    width=16,
    depth=2,
    heads=2,
    mlp_dim=32,
    activation="quick_gelu",
    epsilon=1e-5,
    pre_norm=True,
    patch_bias=False,
)


@dataclasses.dataclass(frozen=True)
class Small:
    """What makes a backbone small.

    Attributes:
      tokens: of a gallery embedding.
      fields: of the backbone's section of the config.
      sizes: of a pretrained backbone; None for those of the config.
    """

    tokens: int
    fields: dict[str, int]
    sizes: Sizes | None = None


# One for each of `models.build.BACKBONES`.
BACKBONES = {
    "tiny": Small(
        tokens=1,
        fields={
            "patch_size": 16,
            "width": 16,
            "heads": 2,
            "image_depth": 1,
            "text_depth": 1,
            "composer_depth": 1,
            "token_dim": 4,
            "embed_dim": EMBED_DIM,
        },
    ),
    "clip": Small(
        tokens=1,
        fields={"composer_width": 16, "composer_depth": 1, "composer_heads": 2},
        sizes=ClipSizes(
            vision=VISION,
            text_width=16,
            text_depth=2,
            text_heads=2,
            text_mlp_dim=32,
            text_activation="quick_gelu",
            text_epsilon=1e-5,
            vocab_size=VOCAB,
            max_length=LENGTH,
            embed_dim=EMBED_DIM,
            end_id=END,
        ),
    ),
    "blip2": Small(
        tokens=4,
        fields={},
        sizes=Blip2Sizes(
            vision=dataclasses.replace(VISION, pre_norm=False, patch_bias=True, activation="gelu"),
            width=16,
            depth=3,
            heads=2,
            mlp_dim=32,
            num_queries=4,
            vocab_size=VOCAB,
            max_length=LENGTH,
            embed_dim=EMBED_DIM,
        ),
    ),
}


def small_model_config(backbone: str = "tiny", **changes: object) -> RunConfig:
    """The config of a small model.

    Args:
      backbone: a key of `BACKBONES`.
      **changes: by dotted name.
    """
    config = load_config("common")
    config.model.backbone = backbone
    config.model.attributes.update(names=ATTRIBUTES, width=ATTRIBUTE_WIDTH)
    config.data.image_size, config.data.max_length = SIZE, LENGTH
    for name, value in BACKBONES[backbone].fields.items():
        config.model[backbone][name] = value
    config.update_from_flattened_dict(changes)
    return RunConfig.of(config)


def build_small_model(config: RunConfig) -> DQE:
    """The model of a config of `small_model_config`."""
    return build_model(
        config.model,
        vocab_size=VOCAB,
        max_length=LENGTH,
        image_size=config.data.image_size,
        sizes=BACKBONES[config.model.backbone].sizes,
    )
