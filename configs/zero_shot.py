"""Evaluates a model on a benchmark that has no training split: GeneCIS, unless a variant names one.

    python -m dqe_jax.evaluate --config=configs/zero_shot.py --checkpoint=runs/cirr

The model is that of `configs/cirr.py`. The benchmarks are in `docs/how-to/more-benchmarks.md`.

Variant `:smoke`: the smoke model of that config.
"""

from configs import cirr, common

BENCHMARKS = ()


def get_config(arg: str = ""):
    """`arg`: `smoke`, or nothing."""
    variants = common.parse_variants(arg, (*BENCHMARKS, "smoke"))
    config = cirr.get_config("smoke" if "smoke" in variants else "")
    config.data.dataset = next(iter(variants & set(BENCHMARKS)), "genecis")
    config.eval.split = "test"
    return config
