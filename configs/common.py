"""The fields that every run has, with their defaults. A run's file changes what it needs.

`dqe_jax/config.py` and the `settings.py` of `dqe_jax/data/`, `dqe_jax/models/` and
`dqe_jax/method/` say what each field means; so does `--helpfull` of every command that takes a
config.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from dqe_jax.config import RunConfig


def get_config() -> ConfigDict:
    """The defaults of all fields."""
    return RunConfig().to_config_dict()


def parse_variants(arg: str, known: tuple[str, ...]) -> set[str]:
    """The variants in the string after the config's file name, `configs/shapes.py:hard,smoke`."""
    variants = {name.strip() for name in arg.split(",") if name.strip()}
    if not variants <= set(known):
        unknown = ", ".join(sorted(variants - set(known)))
        raise ValueError(f"unknown variant {unknown} of the config; it has {', '.join(known)}")
    return variants


def use_blip2(config: ConfigDict) -> None:
    """BLIP-2 with EVA ViT-g/14: Q-Former, projections and attributes train, the tower does not."""
    config.data.image_size = 224
    config.data.preprocess = "target_pad"
    config.data.augment = "flip"
    config.data.captions = "random"
    config.eval.split = "validation"
    # As the CIR papers on BLIP-2 do.
    config.data.max_length = 32
    config.data.cache_images = False
    config.batch.references = 64
    config.batch.queries_per_reference = 2
    config.model.backbone = "blip2"
    config.model.weights = "Salesforce/blip2-itm-vit-g"
    config.model.dtype = "bfloat16"
    config.model.frozen = ("vision", "itm_head")
    config.model.frozen_dtype = "bfloat16"
    config.model.scan_layers = True
    config.model.attributes.width = 256
    config.optimizer.learning_rate = 1e-5
    config.optimizer.warmup_steps = 500


def use_products(config: ConfigDict) -> None:
    """The same model on `fashion_products`: real photos too, and FashionIQ is not needed."""
    config.data.dataset = "fashion_products"
    config.eval.split = "test"
    config.model.attributes.names = ("color", "article", "gender", "usage", "season")


def use_example_encoders(config: ConfigDict) -> None:
    """A small composer on what frozen example encoders make of photos and texts."""
    config.data.image_size = 224
    config.data.cache_images = False  # only the encoders look at them
    config.model.backbone = "features"
    config.model.features.images = (
        "dqe_jax.encoders.efficientnet:images",
        "dqe_jax.encoders.colors:images",
    )
    config.model.features.texts = ("dqe_jax.encoders.minilm:texts",)
    config.model.features.composer_norm = True
    config.model.attributes.form = "gate"
    config.model.attributes.parts = 16
    config.batch.references = 64
    config.total_steps = 1500


def use_narrow_bank(config: ConfigDict) -> None:
    """Many negatives from a narrow, hard zone of the whole gallery, for small batches."""
    negatives = config.negatives
    negatives.pool = "bank"
    negatives.first_refresh, negatives.refresh_every = 300, 100
    negatives.lower, negatives.upper = 0.002, 0.1
    negatives.per_query = 64
    negatives.sample_temperature = 0.05
    config.loss.preference, config.loss.margin = 1.0, 0.2


def align(config: ConfigDict) -> None:
    """Trains heads of images and texts alone on photos and their captions: a start for others.

    `config.init.run` of another run then names the run of this config.
    """
    config.data.queries = "captions"
    config.model.query = "text"
    config.model.attributes.enabled = False
    config.negatives.rule = "in_batch"
    config.batch.references = 128
    config.batch.queries_per_reference = 1
    config.total_steps = 1000


def make_smoke(config: ConfigDict) -> None:
    """Shrinks a run to a few steps, and `tiny` to a small model: to see that everything works."""
    config.total_steps = 8
    config.log_every = 2
    config.negatives.first_refresh = config.negatives.refresh_every = 4
    config.eval_every = 4
    config.checkpoint_every = 4
    config.batch.references = 8
    config.model.tiny.width = 32
    config.model.tiny.image_depth = 1
    config.model.tiny.text_depth = 1
    config.model.tiny.composer_depth = 1
    config.model.tiny.token_dim = 8
    config.model.tiny.embed_dim = 32
    config.eval.sheet_queries = 4
