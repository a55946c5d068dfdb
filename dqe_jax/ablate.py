"""The ablation binary: trains the variants of a config over seeds, and compares them.

python -m dqe_jax.ablate --config=configs/shapes.py [--seeds=3] [--equal=both] [--workdir=DIR]

The same command goes on with what was interrupted. See `dqe_jax/ablation.py` for the variants, for
what equal time means and for what is written.
"""

from __future__ import annotations

from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

from dqe_jax.utils import command_line

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config that the variants change; its seed is the first.", lock_config=True
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Directory of the ablation; default: runs/<name of the config>-ablation."
)
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Short for --config.data.data_dir.")
_SEEDS = flags.DEFINE_integer("seeds", 3, "Runs of each variant, with seeds that follow.", 1)
_VARIANTS = flags.DEFINE_list("variants", [], "Variants to compare, beside infonce; default: all.")
_EQUAL = flags.DEFINE_enum(
    "equal", "both", ("steps", "time", "both"), "What the runs have in common."
)


def main(argv: Sequence[str]) -> None:
    """Trains what is missing and writes the tables."""
    del argv
    from dqe_jax import ablation  # after the flags: importing JAX takes seconds

    config = _CONFIG.value
    if _DATA_DIR.value is not None:
        config.data.data_dir = _DATA_DIR.value
    ablation.run_ablation(
        config,
        _WORKDIR.value or command_line.default_workdir("ablation"),
        variants=ablation.choose_variants(_VARIANTS.value),
        seeds=_SEEDS.value,
        equal=ablation.EQUAL if _EQUAL.value == "both" else (_EQUAL.value,),
    )


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    command_line.run(main)
