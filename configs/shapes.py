"""DQE-CIR on `shapes`: generated scenes, no download.

    python -m dqe_jax.main --config=configs/shapes.py

Variants: `configs/shapes.py:hard` (compound and open edits), `:smoke` (a few steps in seconds),
`:hard,smoke`.
"""

from configs import common


def get_config(arg: str = ""):
    """`arg`: comma-separated variants, of `hard` and `smoke`."""
    variants = common.parse_variants(arg, ("hard", "smoke"))
    config = common.get_config()
    config.data.dataset = "shapes"
    # One token a cell of the 3x3 grid: fewer tokens than 16-pixel patches, and a clearer picture.
    config.data.image_size = 72
    config.model.tiny.patch_size = 24
    config.model.attributes.names = ("color", "shape", "size", "position")
    # Shallow: in the minutes of this run more steps are worth more than more depth.
    config.model.tiny.image_depth = 1
    config.model.tiny.text_depth = 1
    # Scenes have no false negatives, so that mining has little to add to the in-batch term.
    config.loss.preference = 0.1
    config.loss.margin = 0.02
    config.total_steps = 1500
    if "hard" in variants:
        config.data.variant = "hard"
        config.data.max_length = 40
        config.model.attributes.names = ("color", "shape", "size", "position", "fill")
    if "smoke" in variants:
        config.data.variant = "hard_smoke" if "hard" in variants else "smoke"
        common.make_smoke(config)
    return config
