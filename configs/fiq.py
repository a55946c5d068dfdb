"""DQE-CIR on FashionIQ with BLIP-2 (EVA ViT-g/14, frozen vision tower).

    python -m dqe_jax.main --config=configs/fiq.py

`config.model.weights` is an id on the Hugging Face hub; without a network name a directory with the
same files, or one written by `python -m dqe_jax.convert`. Variants: `:vit_l` (CLIP ViT-L/14 tower,
as QuRe; its weights must be named), `:products` (the same model on `fashion_products`, with
`--data_dir`), `:smoke` (a few steps).
"""

from configs import common


def get_config(arg: str = ""):
    """`arg`: comma-separated variants, of `vit_l`, `products` and `smoke`."""
    variants = common.parse_variants(arg, ("vit_l", "products", "smoke"))
    config = common.get_config()
    common.use_blip2(config)
    config.data.dataset = "fashioniq"
    config.model.attributes.names = ("color", "pattern", "shape", "article")
    config.total_steps = 7000
    if "vit_l" in variants:
        config.model.blip2.variant = "vit_l_14"
        config.model.weights = ""
    if "products" in variants:
        common.use_products(config)
    if "smoke" in variants:
        common.make_smoke(config)
    return config
