"""Measures what attribute weights know, and what moving one of them by hand does to the results.

dqe-jax sliders --config=fashion_products --data_dir=DIR --workdir=DIR2

Needs data whose images are described by attributes, and a run with attribute weights.
"""

from __future__ import annotations

from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

from dqe_jax.cli.command_line import given, use_data_dir
from dqe_jax.utils.errors import UserError

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config of the data.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run, or of an export.")
_STEP = flags.DEFINE_integer("step", None, "Step of the checkpoint; default: the newest.")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Short for --config.data.data_dir.")
_SPLIT = flags.DEFINE_string("split", "test", "Split whose images are searched.")
_QUERIES = flags.DEFINE_integer("queries", 500, "How many; config.seed draws them.", 1)
_SHOWN = flags.DEFINE_integer("shown", 10, "Images that count of each ranking.", 1, 100)
_FACTORS = flags.DEFINE_list(
    "factors", ["0", "0.5", "1", "1.5", "2", "4"], "By which a weight is multiplied, ascending."
)
_OUTPUT = flags.DEFINE_string("output", None, "Directory of the result; default: <run>/eval.")
REQUIRED = ("config", "workdir")


def main(argv: Sequence[str]) -> None:
    """Measures one checkpoint."""
    del argv
    config = _CONFIG.value
    use_data_dir(config, _DATA_DIR.value)
    try:
        factors = [float(word) for word in _FACTORS.value]
    except ValueError as error:
        raise UserError(
            f"--factors={','.join(_FACTORS.value)}: give numbers, such as 0,1,2."
        ) from error
    from dqe_jax.distributed import compiled  # importing JAX takes seconds
    from dqe_jax.experiments.sliders import measure_sliders

    compiled.keep_programs()
    measure_sliders(
        config,
        given(_WORKDIR),
        step=_STEP.value,
        split=_SPLIT.value,
        queries=_QUERIES.value,
        shown=_SHOWN.value,
        factors=factors,
        output=_OUTPUT.value,
    )
