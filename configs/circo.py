"""Evaluates a model trained on CIRR on CIRCO, which has no training split.

    python -m dqe_jax.evaluate --config=configs/circo.py --checkpoint=runs/cirr --split=val

The model is that of `configs/cirr.py`. Variant `:smoke`: the smoke model of that config.
"""

from configs import cirr


def get_config(arg: str = ""):
    """`arg`: `smoke`, or nothing."""
    config = cirr.get_config(arg)
    config.data.dataset = "circo"
    config.eval.split = "validation"
    return config
