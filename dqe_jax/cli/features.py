"""Features of images and texts: computes what a config needs, imports, lists and deletes them.

python -m dqe_jax.features --config=configs/fiq.py --data_dir=DIR

A run computes what it lacks by itself: this command does it ahead, on a machine of its own if you
like, and may be interrupted at any time. Several processes can compute together: see --distributed.
`--import_images=FILE --name=NAME` and `--import_texts` make features that any encoder has made
known under a name; `--write_inputs=DIR` writes which images and texts a config needs. `--list`
shows what is stored, `--delete=NAME` or `--delete=all` removes it.
"""

from __future__ import annotations

from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

from dqe_jax.cli.command_line import use_data_dir
from dqe_jax.config import RunConfig
from dqe_jax.utils.errors import UserError

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config of the run.", lock_config=True)
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Short for --config.data.data_dir.")
_SPLITS = flags.DEFINE_list(
    "splits", [], "Splits, such as train,val; default: those that the run needs."
)
_IMAGES = flags.DEFINE_list(
    "import_images", [], "Files with features of images: .npz, .safetensors or .parquet."
)
_TEXTS = flags.DEFINE_list(
    "import_texts", [], "Files with features of texts: .npz, .safetensors or .parquet."
)
_NAME = flags.DEFINE_string("name", None, "Name of the imported features, for configs.")
_ENCODER = flags.DEFINE_string(
    "encoder",
    "",
    "Encoder that made the imported features, as package.module:function. It then computes what "
    "they lack.",
)
_DTYPE = flags.DEFINE_string(
    "dtype", "auto", "Dtype of imported features: float32, float16, bfloat16; auto: the file's."
)
_INPUTS = flags.DEFINE_string(
    "write_inputs",
    None,
    "Directory for images.csv and texts.csv: what the config needs features of.",
)
_LIST = flags.DEFINE_bool("list", False, "Show the stored features, and compute nothing.")
_DELETE = flags.DEFINE_list("delete", [], "Stored features to delete, by name; all for all.")
_DISTRIBUTED = flags.DEFINE_enum(
    "distributed",
    "auto",
    ["auto", "on", "off"],
    "Join other processes to compute: on lets JAX find them; auto does so under Slurm.",
)
_COORDINATOR = flags.DEFINE_string("coordinator", None, "host:port of process 0.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Processes that compute.", 1)
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.", 0)
REQUIRED = ("config",)


def main(argv: Sequence[str]) -> None:
    """Computes, imports, lists or deletes."""
    del argv
    asked = {
        "--import_images": bool(_IMAGES.value),
        "--import_texts": bool(_TEXTS.value),
        "--write_inputs": _INPUTS.value is not None,
        "--list": _LIST.value,
        "--delete": bool(_DELETE.value),
    }
    chosen = [name for name, is_asked in asked.items() if is_asked]
    if len(chosen) > 1:
        raise UserError(f"{' and '.join(chosen)} contradict each other: take one at a time.")
    if chosen and (_DISTRIBUTED.value == "on" or _COORDINATOR.value is not None):
        raise UserError(f"{chosen[0]} is for one process: start it once, without the others.")
    importing = bool(_IMAGES.value or _TEXTS.value)
    if importing and _NAME.value is None:
        raise UserError(f"{chosen[0]} needs --name=NAME: configs call the features by it.")
    for name, is_given in (
        ("--name", _NAME.value is not None),
        ("--encoder", bool(_ENCODER.value)),
        ("--dtype", _DTYPE.value != "auto"),
    ):
        if is_given and not importing:
            raise UserError(f"{name} goes with --import_images or --import_texts: name files.")
    from dqe_jax.feature_store import manage  # importing JAX takes seconds

    use_data_dir(_CONFIG.value, _DATA_DIR.value)
    if importing:
        from dqe_jax.feature_store.features import directory_of
        from dqe_jax.feature_store.imports import import_features

        import_features(
            directory_of(RunConfig.of(_CONFIG.value)),
            _NAME.value or "",
            "image" if _IMAGES.value else "text",
            _IMAGES.value or _TEXTS.value,
            encoder=_ENCODER.value,
            dtype=_DTYPE.value,
        )
    elif _INPUTS.value is not None:
        manage.write_inputs(_CONFIG.value, _SPLITS.value, _INPUTS.value)
    elif _DELETE.value:
        manage.delete_stores(_CONFIG.value, _DELETE.value)
    elif _LIST.value:
        manage.show_stores(_CONFIG.value)
    else:
        _compute()


def _compute() -> None:
    from dqe_jax.distributed import processes
    from dqe_jax.feature_store import manage

    processes.join(
        _DISTRIBUTED.value,
        coordinator=_COORDINATOR.value,
        num_processes=_NUM_PROCESSES.value,
        process_id=_PROCESS_ID.value,
    )
    with processes.ending_together():
        manage.compute(_CONFIG.value, _SPLITS.value)
