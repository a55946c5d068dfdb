"""DQE-CIR on real product photos: the public "Fashion Product Images", queries made of attributes.

    python -m dqe_jax.main --config=configs/fashion_products.py --data_dir=DIR

`DIR` holds `styles.csv` and `images/` or `images.tar`. The reference and the target agree on all
but one or two of colour, article, gender, usage and season. Variant `:smoke`: a few steps.
"""

from configs import common


def get_config(arg: str = ""):
    """`arg`: `smoke`, or nothing."""
    variants = common.parse_variants(arg, ("smoke",))
    config = common.get_config()
    config.data.dataset = "fashion_products"
    config.data.augment = "flip_shift"
    config.data.max_length = 24
    # The photos have a white background.
    config.model.tiny.pixel_mean = 255.0
    config.model.attributes.names = ("color", "article", "gender", "usage", "season")
    config.total_steps = 1250
    if "smoke" in variants:
        common.make_smoke(config)
    return config
