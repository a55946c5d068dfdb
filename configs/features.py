"""Bring your own encoder: DQE-CIR on features that any encoders have made of images and texts.

    python -m dqe_jax.main --config=configs/features.py --data_dir=DIR \\
        --config.model.features.images=mine --config.model.features.texts=mine_texts

Import them first, or name functions that compute them: see docs/how-to/own-encoder.md. This config
trains on the photos of `fashion_products`; for other data change `config.data`. Without features
of texts, an encoder of words that trains from scratch reads them. Variant: `:smoke` (a few steps).
"""

from configs import common


def get_config(arg: str = ""):
    """`arg`: comma-separated variants, of `smoke`."""
    variants = common.parse_variants(arg, ("smoke",))
    config = common.get_config()
    config.data.dataset = "fashion_products"
    config.data.max_length = 18
    config.model.backbone = "features"
    config.model.features.composer_norm = True
    config.model.attributes.names = ("color", "article", "gender", "usage", "season")
    config.total_steps = 6000
    config.batch.references = 64
    config.batch.queries_per_reference = 1
    if "smoke" in variants:
        common.make_smoke(config)
    return config
