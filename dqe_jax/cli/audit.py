"""Audits negatives: how many of those that each rule mines are truly relevant (false negatives).

python -m dqe_jax.audit --config=configs/fashion_products.py --data_dir=DIR --workdir=DIR

Needs data that say which images are truly relevant. Writes `audit-<split>-<step>.json` and a
picture (`.png`), and logs two tables: one of the rules, and one of the rule `trns` by its lower
bound. `experiments/audit/statistics.py` explains the figures.
"""

from __future__ import annotations

from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

from dqe_jax.cli.command_line import use_data_dir
from dqe_jax.utils.errors import UserError

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config of the run.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.")
_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Directory of checkpoints, or --workdir.")
_STEP = flags.DEFINE_integer("step", None, "Step of the checkpoint; default: the newest.")
_SPLIT = flags.DEFINE_string("split", "train", "Split whose gallery is mined for its queries.")
_QUERIES = flags.DEFINE_integer(
    "queries", 2000, "Size of the sample of queries; config.seed chooses them.", lower_bound=1
)
_OUTPUT = flags.DEFINE_string("output", None, "Where results go; default: <run>/eval.")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Short for --config.data.data_dir.")
_RULES = flags.DEFINE_list("rules", ["random", "hardest", "qure", "trns"], "Rules to mine by.")
_SWEEP = flags.DEFINE_list(
    "sweep",
    None,
    "Lower quantiles of trns to try, with and without floor; default: 0 to 0.1; --sweep= for none.",
)
REQUIRED = ("config",)


def main(argv: Sequence[str]) -> None:
    """Audits one checkpoint."""
    del argv
    config = _CONFIG.value
    use_data_dir(config, _DATA_DIR.value)
    directory = _CHECKPOINT.value or _WORKDIR.value
    if directory is None:
        raise UserError("name what to audit: --workdir=DIR or --checkpoint=DIR.")
    lowers = None if _SWEEP.value is None else _read_numbers(_SWEEP.value)
    from dqe_jax.distributed import compiled  # importing JAX takes seconds
    from dqe_jax.experiments.audit.run import audit_checkpoint

    compiled.keep_programs()
    audit_checkpoint(
        config,
        directory,
        step=_STEP.value,
        split=_SPLIT.value,
        queries=_QUERIES.value,
        rules=_RULES.value,
        lowers=lowers,
        output=_OUTPUT.value,
    )


def _read_numbers(words: Sequence[str]) -> list[float]:
    """The numbers of --sweep.

    Raises:
      UserError: one is none.
    """
    try:
        return [float(word) for word in words if word]
    except ValueError as error:
        raise UserError(f"--sweep={','.join(words)}: name numbers, such as 0,0.01,0.1.") from error
