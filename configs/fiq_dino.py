"""DQE-CIR on FashionIQ with image tokens of DINOv2, ViT-B/14, and the text tower of CLIP ViT-L/14.

    python -m dqe_jax.main --config=configs/fiq_dino.py

Variants: `:v3` (DINOv3, ViT-B/16), `:products` (the same model on `fashion_products`, with
`--data_dir`), `:smoke` (a few steps). See `configs/fiq.py` for the weights.
"""

from configs import common


def get_config(arg: str = ""):
    """`arg`: comma-separated variants, of `v3`, `products` and `smoke`."""
    variants = common.parse_variants(arg, ("v3", "products", "smoke"))
    config = common.get_config()
    config.data.dataset = "fashioniq"
    config.data.image_size = 224
    config.data.preprocess = "target_pad"
    config.data.augment = "flip"
    config.data.captions = "random"
    config.eval.split = "validation"
    # The length of CLIP's texts.
    config.data.max_length = 77
    config.data.cache_images = False
    config.batch.references = 64
    config.batch.queries_per_reference = 2
    config.model.backbone = "dino"
    config.model.weights = "facebook/dinov2-base"
    config.model.dino.text_weights = "openai/clip-vit-large-patch14"
    config.model.dtype = "bfloat16"
    # The projection of the images, which starts at random, trains with the composer.
    config.model.frozen = ("vision", "text")
    config.model.attributes.names = ("color", "pattern", "shape", "article")
    config.model.attributes.width = 512
    config.model.attributes.heads = 8
    config.model.initial_tau = 0.02
    config.optimizer.learning_rate = 1e-4
    config.optimizer.warmup_steps = 500
    config.total_steps = 7000
    if "v3" in variants:
        config.model.dino.variant = "dinov3_vit_b_16"
        config.model.weights = "facebook/dinov3-vitb16-pretrain-lvd1689m"
    if "products" in variants:
        common.use_products(config)
    if "smoke" in variants:
        common.make_smoke(config)
    return config
