"""DQE-CIR on FashionIQ with CLIP ViT-L/14.

    python -m dqe_jax.main --config=configs/fiq_clip.py

Variants: `:vit_b_32` (smaller), `:products` (the same model on `fashion_products`, with
`--data_dir`), `:smoke` (a few steps). See `configs/fiq.py` for the weights.
"""

from configs import common


def get_config(arg: str = ""):
    """`arg`: comma-separated variants, of `vit_b_32`, `products` and `smoke`."""
    variants = common.parse_variants(arg, ("vit_b_32", "products", "smoke"))
    config = common.get_config()
    config.data.dataset = "fashioniq"
    config.data.image_size = 224
    config.data.preprocess = "target_pad"
    config.data.augment = "flip"
    config.data.captions = "random"
    config.eval.split = "validation"
    # CLIP's own length.
    config.data.max_length = 77
    config.data.cache_images = False
    config.batch.references = 64
    config.batch.queries_per_reference = 2
    config.model.backbone = "clip"
    config.model.weights = "openai/clip-vit-large-patch14"
    config.model.dtype = "bfloat16"
    # The composer learns first of all; a run that trains the towers too sets ("logit_scale",).
    config.model.frozen = ("vision", "text", "logit_scale")
    config.model.attributes.names = ("color", "pattern", "shape", "article")
    config.model.attributes.width = 512
    config.model.attributes.heads = 8
    config.model.initial_tau = 0.02
    config.optimizer.learning_rate = 1e-4
    config.optimizer.warmup_steps = 500
    config.total_steps = 7000
    if "vit_b_32" in variants:
        config.model.clip.variant = "vit_b_32"
        config.model.weights = "openai/clip-vit-base-patch32"
    if "products" in variants:
        common.use_products(config)
    if "smoke" in variants:
        common.make_smoke(config)
    return config
