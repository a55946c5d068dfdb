"""DQE-CIR on FashionIQ with SigLIP 2, ViT-B/16.

    python -m dqe_jax.main --config=configs/fiq_siglip.py

Variants: `:vit_l_16` and `:so400m_14` (larger), `:products` (the same model on `fashion_products`,
with `--data_dir`), `:smoke` (a few steps). See `configs/fiq.py` for the weights.
"""

from configs import common


def get_config(arg: str = ""):
    """`arg`: comma-separated, of `vit_l_16`, `so400m_14`, `products` and `smoke`."""
    variants = common.parse_variants(arg, ("vit_l_16", "so400m_14", "products", "smoke"))
    if {"vit_l_16", "so400m_14"} <= variants:
        raise ValueError("the variants vit_l_16 and so400m_14 of the config do not go together")
    config = common.get_config()
    config.data.dataset = "fashioniq"
    config.data.image_size = 224
    # As SigLIP's own processor does.
    config.data.preprocess = "squash"
    config.data.augment = "flip"
    config.data.captions = "random"
    config.eval.split = "validation"
    # SigLIP's own length.
    config.data.max_length = 64
    config.data.cache_images = False
    config.batch.references = 64
    config.batch.queries_per_reference = 2
    config.model.backbone = "siglip"
    config.model.weights = "google/siglip2-base-patch16-224"
    config.model.dtype = "bfloat16"
    # The composer learns first of all; a run that trains the towers too sets ("logit_scale",).
    config.model.frozen = ("vision", "pooling", "text", "logit_scale")
    config.model.attributes.names = ("color", "pattern", "shape", "article")
    config.model.attributes.width = 512
    config.model.attributes.heads = 8
    config.model.initial_tau = 0.02
    config.optimizer.learning_rate = 1e-4
    config.optimizer.warmup_steps = 500
    config.total_steps = 7000
    if "vit_l_16" in variants:
        config.data.image_size = 256
        config.model.siglip.variant = "vit_l_16"
        config.model.weights = "google/siglip2-large-patch16-256"
    if "so400m_14" in variants:
        config.model.siglip.variant = "so400m_14"
        config.model.weights = "google/siglip2-so400m-patch14-224"
    if "products" in variants:
        common.use_products(config)
    if "smoke" in variants:
        common.make_smoke(config)
    return config
