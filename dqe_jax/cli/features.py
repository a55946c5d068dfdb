"""Computes what a config's frozen towers make of images and texts, or lists and deletes it.

python -m dqe_jax.features --config=configs/fiq.py --data_dir=DIR

A run computes what it lacks by itself: this command does it ahead, on a machine of its own if you
like, and may be interrupted at any time. `--list` shows what is stored, `--delete=NAME` or
`--delete=all` removes it.
"""

from __future__ import annotations

from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

from dqe_jax.utils.errors import UserError

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config of the run.", lock_config=True)
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Short for --config.data.data_dir.")
_SPLITS = flags.DEFINE_list(
    "splits", [], "Splits, such as train,val; default: those that the run needs."
)
_LIST = flags.DEFINE_bool("list", False, "Show the stored features, and compute nothing.")
_DELETE = flags.DEFINE_list("delete", [], "Stored features to delete, by name; all for all.")
REQUIRED = ("config",)


def main(argv: Sequence[str]) -> None:
    """Computes, lists or deletes."""
    del argv
    from dqe_jax.feature_store import manage  # importing JAX takes seconds

    if _DATA_DIR.value is not None:
        _CONFIG.value.data.data_dir = _DATA_DIR.value
    if _LIST.value and _DELETE.value:
        raise UserError("--list and --delete contradict each other: drop one.")
    if _DELETE.value:
        manage.delete_stores(_CONFIG.value, _DELETE.value)
    elif _LIST.value:
        manage.show_stores(_CONFIG.value)
    else:
        manage.compute(_CONFIG.value, _SPLITS.value)
