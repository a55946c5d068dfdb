"""Times the way of images to the devices: decoding in each format, the loader, and the last copy.

dqe-jax benchmark data shapes [--data_dir=DIR] [--json=FILE]

Configs are named before the flags, or one as --config=configs/shapes.py. Images are
those of the config's prepared training split if there is one, else made ones.
`dqe_jax/performance/data_benchmark.py` says what is timed and what the table means.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

from dqe_jax.cli import command_line

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config of the run.", lock_config=True)
_MORE = flags.DEFINE_multi_string("and_config", [], "One more config; may be given several times.")
_DATA_DIR = flags.DEFINE_string(
    "data_dir", None, "Directory of the raw data; short for --config.data.data_dir."
)
_IMAGES = flags.DEFINE_integer("images", 256, "Images decoded in a round.", 1)
_BATCHES = flags.DEFINE_integer("batches", 20, "Batches of the loader that are timed.", 1)
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Rounds over the formats.", 1)
_JSON = flags.DEFINE_string("json", None, "File that gets the figures as JSON.")
REQUIRED = ("config",)
CONFIGS = True


def main(argv: Sequence[str]) -> None:
    """Measures and prints tables."""
    del argv
    configs = command_line.all_configs(_CONFIG.value, _MORE.value)
    from dqe_jax.distributed import mesh  # importing JAX takes seconds
    from dqe_jax.performance import records
    from dqe_jax.performance.data_benchmark import benchmark_data

    records.claim(_JSON.value)
    rounds = {"images": _IMAGES.value, "batches": _BATCHES.value, "rounds": _ROUNDS.value}
    results = {}
    for name, config in configs.items():
        command_line.use_data_dir(config, _DATA_DIR.value)
        results[name] = dataclasses.asdict(benchmark_data(config, **rounds))
    records.write(_JSON.value, "data", results, devices=mesh.all_devices(), settings=rounds)
