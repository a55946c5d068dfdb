"""Evaluates a model on a benchmark that has no training split: GeneCIS, unless a variant names one.

    python -m dqe_jax.evaluate --config=configs/zero_shot.py --checkpoint=runs/cirr

The model is that of `configs/cirr.py`. The benchmarks are in `docs/how-to/more-benchmarks.md`.

Variants: `:pinpoint`, `:pic2word`, `:imagenet_r`, `:nico`, `:minidn`, `:ltll`, `:fashion200k`,
`:icir`, `:edir` or `:circled` in place of GeneCIS; `:smoke`, the smoke model of `configs/cirr.py`.
"""

from configs import cirr, common

BENCHMARKS = (
    *("pinpoint", "pic2word", "imagenet_r", "nico", "minidn", "ltll"),
    *("fashion200k", "icir", "edir", "circled"),
)


def get_config(arg: str = ""):
    """The config of a benchmark.

    `arg`: `smoke`, and one of `pinpoint`, `pic2word`, `imagenet_r`, `nico`, `minidn`, `ltll`,
    `fashion200k`, `icir`, `edir` or `circled`; or nothing.
    """
    variants = common.parse_variants(arg, (*BENCHMARKS, "smoke"))
    config = cirr.whole()
    if "smoke" in variants:
        common.make_smoke(config)
    chosen = [name for name in BENCHMARKS if name in variants]
    if len(chosen) > 1:
        raise ValueError(f"the variants {' and '.join(chosen)} of the config do not go together")
    config.data.dataset = chosen[0] if chosen else "genecis"
    config.eval.split = "test"
    return config
