"""A model of a few thousand parameters over each backbone: the code that ships, at small sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Int, UInt8

from dqe_jax.cli.config_files import load_config
from dqe_jax.config import RunConfig
from dqe_jax.method.arrays import Array
from dqe_jax.models.blip2 import Blip2Sizes
from dqe_jax.models.build import build_model
from dqe_jax.models.clip import ClipSizes
from dqe_jax.models.dino import V2_REGISTERS, DinoSizes
from dqe_jax.models.dqe import DQE
from dqe_jax.models.encoder import VisionSizes
from dqe_jax.models.features import States
from dqe_jax.models.given import Given, GivenArray, GivenSizes, GivenSource
from dqe_jax.models.siglip import SiglipSizes
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


CLIP_SIZES = ClipSizes(
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
)
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
        sizes=CLIP_SIZES,
    ),
    "siglip": Small(
        tokens=1,
        fields={"composer_width": 16, "composer_depth": 1, "composer_heads": 2},
        sizes=SiglipSizes(
            vision=dataclasses.replace(
                VISION,
                width=EMBED_DIM,
                activation="gelu_pytorch_tanh",
                pre_norm=False,
                patch_bias=True,
                class_token=False,
            ),
            text_width=16,
            text_depth=2,
            text_heads=2,
            text_mlp_dim=32,
            text_activation="gelu_pytorch_tanh",
            text_epsilon=1e-6,
            vocab_size=VOCAB,
            max_length=LENGTH + 2,
            embed_dim=EMBED_DIM,
        ),
    ),
    "dino": Small(
        tokens=1,
        fields={"composer_width": 16, "composer_depth": 1, "composer_heads": 2},
        sizes=DinoSizes(
            vision=dataclasses.replace(
                VISION,
                activation="gelu",
                pre_norm=False,
                patch_bias=True,
                registers=2,
                layer_scale=True,
                antialias=True,
            ),
            family=V2_REGISTERS,
            text=CLIP_SIZES,
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
    "features": Small(
        tokens=1,
        fields={
            "width": 16,
            "heads": 2,
            "text_depth": 1,
            "composer_width": 16,
            "token_dim": 4,
            "embed_dim": EMBED_DIM,
        },
        sizes=GivenSizes(
            images=(
                GivenSource("one", "", (GivenArray("tokens", (3, 10), "float32"),)),
                GivenSource(
                    "two",
                    "lab.encoders:images 1",
                    (
                        GivenArray("early", (2, 6), "float16"),
                        GivenArray("vector", (12,), "float32"),
                    ),
                ),
            ),
            texts=(GivenSource("three", "", (GivenArray("features", (9,), "float32"),)),),
        ),
    ),
}


class GivenFromPixels(Given):
    """The backbone `features` with encoders in it: fixed sums of pixels and of words.

    It takes images and texts as the other backbones do.
    """

    def given_states(self, kind: str) -> Mapping[str, jax.ShapeDtypeStruct]:
        """None."""
        return {}

    def image_states(self, image: UInt8[Array, "B H W 3"], train: bool = False) -> States:
        """What the model takes of images."""
        cells = image.reshape(len(image), 4, SIZE // 4, 4, SIZE // 4, 3).mean((2, 4)) / 255
        return self._states("image", jnp.asarray(cells.reshape(len(image), -1)))

    def text_states(self, ids: Int[Array, "B L"], train: bool = False) -> States:
        """What the model takes of texts."""
        return self._states("text", (jax.nn.one_hot(ids, VOCAB) * (ids > 0)[..., None]).sum(1))

    def _states(self, kind: str, x: Array) -> States:
        found = {}
        for i, (name, spec) in enumerate(super().given_states(kind).items()):
            table = jax.random.normal(jax.random.key(i), (x.shape[-1], *spec.shape))
            found[name] = jnp.tensordot(x, table, 1).astype(spec.dtype)
        return found


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
    model = build_model(
        config.model,
        vocab_size=VOCAB,
        max_length=LENGTH,
        image_size=config.data.image_size,
        sizes=BACKBONES[config.model.backbone].sizes,
    )
    if not isinstance(model.backbone, Given):
        return model
    own = {f.name: getattr(model.backbone, f.name) for f in dataclasses.fields(model.backbone)}
    fields = {name: own[name] for name in own if name not in ("parent", "name")}
    return model.clone(backbone=GivenFromPixels(**fields))
