"""The training binary.

python -m dqe_jax.main --config=configs/shapes.py [--workdir=DIR] [--config.field=value]
"""

from __future__ import annotations

from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

from dqe_jax.utils import command_line

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config of the run.", lock_config=True)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Directory of the run; default: runs/<name of the config>."
)
_DATA_DIR = flags.DEFINE_string(
    "data_dir", None, "Directory of the raw data; short for --config.data.data_dir."
)
_STOP_AT = flags.DEFINE_integer(
    "stop_at", None, "End after this step, as if interrupted; the same command goes on.", 1
)


def main(argv: Sequence[str]) -> None:
    """Trains and evaluates."""
    del argv
    from dqe_jax.train import train_and_evaluate  # after the flags: importing JAX takes seconds

    config = _CONFIG.value
    if _DATA_DIR.value is not None:
        config.data.data_dir = _DATA_DIR.value
    train_and_evaluate(
        config, _WORKDIR.value or command_line.default_workdir(), stop_at=_STOP_AT.value
    )


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    command_line.run(main)
