"""The evaluation binary: metrics, ranked lists, submissions, from a checkpoint's parameters.

python -m dqe_jax.evaluate --config=configs/shapes.py --workdir=runs/shapes [--split=test]

or of every checkpoint of a run that trains elsewhere, as it appears:

python -m dqe_jax.evaluate --config=configs/shapes.py --workdir=runs/shapes --watch

or of a file of predictions, without a model and without images:

python -m dqe_jax.evaluate --config=configs/circo.py --split=val --predictions=FILE --raw_dir=DIR
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from absl import flags, logging
from ml_collections import config_flags

from dqe_jax.utils.errors import UserError

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config of the run.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.")
_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Directory of checkpoints, or --workdir.")
_STEP = flags.DEFINE_integer("step", None, "Step of the checkpoint; default: the newest.")
_SPLIT = flags.DEFINE_string(
    "split",
    None,
    "train, validation (val) or test (test1); default: config.eval.split; of --watch: validation.",
)
_OUTPUT = flags.DEFINE_string(
    "output", None, "Where results go; default: <run>/eval, or a place named by another data set."
)
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Short for --config.data.data_dir.")
_PREDICTIONS = flags.DEFINE_string(
    "predictions", None, "Score this file of ranked image ids; needs --raw_dir."
)
_RAW_DIR = flags.DEFINE_string("raw_dir", None, "Directory of the raw annotation files.")
_HP_FASHIONIQ = flags.DEFINE_string(
    "hp_fashioniq", None, "Also measure the preference ratio on this hpfiq.json (FashionIQ, val)."
)
_WATCH = flags.DEFINE_bool(
    "watch", False, "Follow the --workdir: evaluate each new checkpoint, until training is done."
)
_POLL_S = flags.DEFINE_float("poll_s", 30.0, "Seconds between looks of --watch.", 0.0)
_PATIENCE_S = flags.DEFINE_float(
    "patience_s", 0.0, "Seconds without a new checkpoint after which --watch fails; 0: never.", 0.0
)
REQUIRED = ("config",)


def main(argv: Sequence[str]) -> None:
    """Evaluates one checkpoint, or one file of predictions."""
    del argv
    from dqe_jax.config import check_config
    from dqe_jax.data import datasets

    config = _CONFIG.value
    if _DATA_DIR.value is not None:
        config.data.data_dir = _DATA_DIR.value
    check_config(config)
    # A run that still trains is watched on the validation split.
    default = "validation" if _WATCH.value else config.eval.split
    split = datasets.split_of(config.data.dataset, _SPLIT.value or default)
    if _PREDICTIONS.value is not None:
        _score(config, split)
    elif _WATCH.value:
        _watch(config, split)
    else:
        _evaluate(config, split)


def _evaluate(config, split: str) -> None:
    from dqe_jax.checkpoints.trained import open_trained
    from dqe_jax.data import datasets, splits
    from dqe_jax.evaluation.preferences import measure_preferences, open_preferences
    from dqe_jax.evaluation.run import evaluate_and_report, make_evaluator, output_of
    from dqe_jax.utils.paths import whole_path

    directory = _CHECKPOINT.value or _WORKDIR.value
    if directory is None:
        raise UserError("name what to evaluate: --workdir=DIR or --checkpoint=DIR.")
    datasets.find_dataset(config.data)
    trained = open_trained(config, directory, _STEP.value)
    model, words, step = trained.model, trained.tokenizer, trained.step
    opened = splits.open_split(config, datasets.open_dataset(config.data), split)
    judged = None
    if _HP_FASHIONIQ.value is not None:
        judged = open_preferences(config, opened, _HP_FASHIONIQ.value)
    evaluator = make_evaluator(config, model, words, opened, trained.devices)
    params = trained.read_params()
    output = whole_path(_OUTPUT.value) if _OUTPUT.value else output_of(trained)
    evaluate_and_report(config, evaluator, params, step=step, directory=output)
    if judged is not None:
        path = output / f"hp_fashioniq-{step}.json"
        measure_preferences(evaluator, words, params, judged, path)


def _watch(config, split: str) -> None:
    from dqe_jax.evaluation.watch import watch
    from dqe_jax.utils.paths import whole_path

    if _WORKDIR.value is None or _CHECKPOINT.value or _STEP.value is not None:
        raise UserError("--watch follows --workdir=DIR, without --checkpoint and --step.")
    workdir = whole_path(_WORKDIR.value)
    output = whole_path(_OUTPUT.value) if _OUTPUT.value else workdir / "eval"
    watch(
        config,
        workdir,
        split,
        output=output,
        poll_s=_POLL_S.value,
        patience_s=_PATIENCE_S.value,
    )


def _score(config, split: str) -> None:
    from etils import epath

    from dqe_jax.evaluation import predictions, protocols, report

    if _RAW_DIR.value is None:
        raise UserError("--predictions needs --raw_dir=DIR, the directory of the annotation files.")
    dataset, variant = config.data.dataset, config.eval.protocol
    found = predictions.score(dataset, split, _PREDICTIONS.value, _RAW_DIR.value, variant)
    protocol = protocols.protocol_of(dataset, variant)
    facts = {"dataset": dataset, "split": split, "protocol": protocol.name, "metrics": found}
    logging.info("%s\n%s", json.dumps(facts, indent=2), protocol.note)
    if _OUTPUT.value is not None:
        report.write_json(epath.Path(_OUTPUT.value) / f"predictions-{split}.json", facts)
