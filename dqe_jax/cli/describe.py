"""Describes the model of a config: parameters by part, and the cost of a forward pass.

python -m dqe_jax.describe --config=configs/fiq.py

Needs no data, and weights only where the config takes the model's sizes from them. GFLOP come from
XLA's cost analysis of the program before it is optimised; a multiply-add counts as two.
"""

from __future__ import annotations

from collections.abc import Sequence

from absl import logging
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config of the run.", lock_config=True)
REQUIRED = ("config",)


def main(argv: Sequence[str]) -> None:
    """Prints the table."""
    del argv
    from dqe_jax.performance.describe import describe_model  # importing JAX takes seconds

    logging.info("%s", describe_model(_CONFIG.value))
