"""Times the way of images to the devices: decoding in each format, the loader, and the last copy.

dqe-jax benchmark data --config=configs/shapes.py [--data_dir=DIR] [--json=FILE]

Images are those of the config's prepared training split if there is one, else made ones.
`dqe_jax/performance/data_benchmark.py` says what is timed and what the table means.
"""

from __future__ import annotations

from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

from dqe_jax.cli.command_line import use_data_dir

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config of the run.", lock_config=True)
_DATA_DIR = flags.DEFINE_string(
    "data_dir", None, "Directory of the raw data; short for --config.data.data_dir."
)
_IMAGES = flags.DEFINE_integer("images", 256, "Images decoded in a round.", 1)
_BATCHES = flags.DEFINE_integer("batches", 20, "Batches of the loader that are timed.", 1)
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Rounds over the formats.", 1)
_JSON = flags.DEFINE_string("json", None, "File that gets the figures as JSON.")
REQUIRED = ("config",)


def main(argv: Sequence[str]) -> None:
    """Measures and prints tables."""
    del argv
    from dqe_jax.performance.data_benchmark import benchmark_data  # importing JAX takes seconds

    config = _CONFIG.value
    use_data_dir(config, _DATA_DIR.value)
    benchmark_data(
        config,
        images=_IMAGES.value,
        batches=_BATCHES.value,
        rounds=_ROUNDS.value,
        json_file=_JSON.value,
    )
