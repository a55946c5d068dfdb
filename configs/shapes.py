"""DQE-CIR on `shapes`: generated scenes, no download.

    python -m dqe_jax.main --config=configs/shapes.py

Variants: `configs/shapes.py:hard` (compound and open edits), `:coarse` (places and sizes do not
matter: about 17 scenes are valid for a query), `:smoke` (a few steps in seconds); `smoke` goes with
either.
"""

from configs import common


def get_config(arg: str = ""):
    """`arg`: comma-separated variants, of `hard` or `coarse`, and `smoke`."""
    variants = common.parse_variants(arg, ("hard", "coarse", "smoke"))
    if {"hard", "coarse"} <= variants:
        raise ValueError("the variants hard and coarse of the config do not go together")
    config = common.get_config()
    config.data.dataset = "shapes"
    # One token a cell of the 3x3 grid: fewer tokens than 16-pixel patches, and a clearer picture.
    config.data.image_size = 72
    config.model.tiny.patch_size = 24
    config.model.attributes.names = ("color", "shape", "size", "position")
    # Shallow: in the minutes of this run more steps are worth more than more depth.
    config.model.tiny.image_depth = 1
    config.model.tiny.text_depth = 1
    # A batch has hardly any false negatives, so that mining has little to add to its own term.
    config.loss.preference = 0.1
    config.loss.margin = 0.02
    # It made no difference here, and costs the attribute features of the targets.
    config.loss.alignment = 0.0
    config.total_steps = 1500
    if "hard" in variants:
        config.data.variant = "hard"
        config.data.max_length = 40
        config.model.attributes.names = ("color", "shape", "size", "position", "fill")
    if "coarse" in variants:
        config.data.variant = "coarse"
        config.model.attributes.names = ("color", "shape")
    if "smoke" in variants:
        plain = config.data.variant == "plain"
        config.data.variant = "smoke" if plain else f"{config.data.variant}_smoke"
        common.make_smoke(config)
    return config
