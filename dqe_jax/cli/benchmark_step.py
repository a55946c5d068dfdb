"""Times the training step of a config on random data, beside simpler baselines in the same process.

python -m dqe_jax.benchmark --config=configs/shapes.py [--rounds=10] [--steps=3] [--variants=...]

`dqe_jax/performance/step_benchmark.py` says what is timed and what the table means.
"""

from __future__ import annotations

from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config of the run.", lock_config=True)
_ROUNDS = flags.DEFINE_integer("rounds", 10, "Rounds over the variants.", 1)
_STEPS = flags.DEFINE_integer("steps", 3, "Steps of a variant in a round.", 1)
_VARIANTS = flags.DEFINE_list(
    "variants",
    [],
    "Of: config, no mined negatives, no attribute weights, InfoNCE, towers in each "
    "step; all by default. Each takes the memory of a run.",
)
REQUIRED = ("config",)


def main(argv: Sequence[str]) -> None:
    """Times and prints a table."""
    del argv
    from dqe_jax.performance.step_benchmark import benchmark_step  # importing JAX takes seconds

    benchmark_step(_CONFIG.value, rounds=_ROUNDS.value, steps=_STEPS.value, names=_VARIANTS.value)
