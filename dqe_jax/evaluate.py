"""The evaluation binary: metrics and a contact sheet from a checkpoint's parameters alone.

python -m dqe_jax.evaluate --config=configs/shapes.py --workdir=runs/shapes [--split=test]
"""

from __future__ import annotations

from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

from dqe_jax.utils import command_line
from dqe_jax.utils.errors import UserError

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config of the run.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.")
_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Directory of checkpoints, or --workdir.")
_STEP = flags.DEFINE_integer("step", None, "Step of the checkpoint; default: the newest.")
_SPLIT = flags.DEFINE_enum("split", "test", ["train", "validation", "test"], "Split.")
_OUTPUT = flags.DEFINE_string("output", None, "Where results go; default: <run>/eval.")
_DATA_DIR = flags.DEFINE_string(
    "data_dir", None, "Directory of the raw data; short for --config.data.data_dir."
)


def main(argv: Sequence[str]) -> None:
    """Evaluates one checkpoint."""
    del argv
    from etils import epath

    from dqe_jax import checkpoint, parallel, run_setup
    from dqe_jax.config import MODEL_FIELDS, START_FIELDS, check_config, differences
    from dqe_jax.data import datasets, pipeline, tokenizer
    from dqe_jax.weights import sizes as size_files

    config = _CONFIG.value
    if _DATA_DIR.value is not None:
        config.data.data_dir = _DATA_DIR.value
    check_config(config)
    directory = _CHECKPOINT.value or _WORKDIR.value
    if directory is None:
        raise UserError("name what to evaluate: --workdir=DIR or --checkpoint=DIR.")
    manager = checkpoint.open_for_reading(directory)
    step = checkpoint.choose_step(manager, _STEP.value)
    meta = checkpoint.read_meta(manager, step)
    changed = differences(config.to_dict(), meta["config"], MODEL_FIELDS, START_FIELDS)
    if changed:
        raise UserError(
            f"the checkpoint in {manager.directory} is of another model; --config differs in "
            f"{'; '.join(changed)}."
        )
    devices = run_setup.devices_of(config.num_devices)
    words = tokenizer.tokenizer_from_json(meta["tokenizer"])
    sizes = meta["sizes"] and size_files.from_json(config.model.backbone, meta["sizes"])
    model = run_setup.model_of(config, words, sizes)
    builder = datasets.open_dataset(config.data)
    split = pipeline.load_split(
        builder, _SPLIT.value, config.data.image_size, config.data.cache_images
    )
    evaluator = run_setup.make_evaluator(config, model, words, split, devices)
    shapes = run_setup.param_shapes(model, config)
    params = checkpoint.restore(manager, step, params=shapes)["params"]
    output = epath.Path(_OUTPUT.value) if _OUTPUT.value else manager.directory.parent / "eval"
    run_setup.evaluate_and_report(
        config, evaluator, parallel.replicate(params, devices), step=step, directory=output
    )


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    command_line.run(main)
