"""Times how fast the features of frozen towers are computed, copied to the host and written.

dqe-jax benchmark features fiq_clip:vit_b_32 [--rounds=5] [--json=FILE]

Configs are named before the flags, or one as --config=configs/fiq_clip.py. Neither data nor weights
are needed. `dqe_jax/performance/features_benchmark.py` says what is timed.
"""

from __future__ import annotations

from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

from dqe_jax.cli import command_line

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config of the run.", lock_config=True)
_MORE = flags.DEFINE_multi_string("and_config", [], "One more config; may be given several times.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Batches that are timed.", 1)
_LAYERS = flags.DEFINE_integer(
    "tower_layers",
    0,
    "Layers of a pretrained vision tower, to measure a part of one that is too large; 0 for all.",
    0,
)
_JSON = flags.DEFINE_string("json", None, "File that gets the figures as JSON.")
REQUIRED = ("config",)
CONFIGS = True


def main(argv: Sequence[str]) -> None:
    """Measures and prints tables."""
    del argv
    configs = command_line.all_configs(_CONFIG.value, _MORE.value)
    from dqe_jax.distributed import compiled, mesh  # importing JAX takes seconds
    from dqe_jax.performance import records
    from dqe_jax.performance.features_benchmark import benchmark_features

    compiled.keep_programs()
    records.claim(_JSON.value)
    results = {
        name: benchmark_features(
            config, rounds=_ROUNDS.value, tower_layers=_LAYERS.value, label=name
        ).as_json()
        for name, config in configs.items()
    }
    records.write(
        _JSON.value,
        "features",
        results,
        devices=mesh.all_devices(),
        settings={"rounds": _ROUNDS.value},
    )
