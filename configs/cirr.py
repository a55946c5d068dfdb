"""DQE-CIR on CIRR with BLIP-2 (EVA ViT-g/14, frozen vision tower).

    python -m dqe_jax.main --config=configs/cirr.py

See `configs/fiq.py` for the weights. Variant `:smoke`: a few steps.
"""

from configs import common


def whole():
    """The config of a whole run."""
    config = common.get_config()
    common.use_blip2(config)
    config.data.dataset = "cirr"
    # Open-domain photos: whole scenes count, so nothing is cut off.
    config.data.preprocess = "squash"
    config.model.attributes.names = ("color", "shape", "size", "position")
    config.total_steps = 12000
    return config


def get_config(arg: str = ""):
    """`arg`: `smoke`, or nothing."""
    variants = common.parse_variants(arg, ("smoke",))
    config = whole()
    if "smoke" in variants:
        common.make_smoke(config)
    return config
