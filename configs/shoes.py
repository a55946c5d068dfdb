"""DQE-CIR on Shoes with BLIP-2 (EVA ViT-g/14, frozen vision tower).

    python -m dqe_jax.main --config=configs/shoes.py

See `configs/fiq.py` for the weights. Variant `:smoke`: a few steps.
"""

from configs import common


def get_config(arg: str = ""):
    """`arg`: `smoke`, or nothing."""
    variants = common.parse_variants(arg, ("smoke",))
    config = common.get_config()
    common.use_blip2(config)
    config.data.dataset = "shoes"
    config.model.attributes.names = ("color", "pattern", "shape", "article")
    config.total_steps = 6000
    if "smoke" in variants:
        common.make_smoke(config)
    return config
