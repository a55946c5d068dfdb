"""The evaluation binary: metrics, ranked lists, submissions, from a checkpoint's parameters.

python -m dqe_jax.evaluate --config=configs/shapes.py --workdir=runs/shapes [--split=test]

To evaluate on a second directory of photos with its own styles.csv, all rows as one gallery:

python -m dqe_jax.evaluate --config=configs/fashion_products.py --data_dir=DIR --split=all \
  --workdir=runs/fashion_products

To evaluate checkpoints while another machine trains:

python -m dqe_jax.evaluate --config=configs/shapes.py --workdir=runs/shapes --watch

To measure what pretrained weights find without any training, without a run:

python -m dqe_jax.evaluate --config=configs/fiq_clip.py --zero_shot=text,image,sum,product \
  --output=DIR

To score a file of predictions, without a model and without images:

python -m dqe_jax.evaluate --config=configs/circo.py --split=val --predictions=FILE --raw_dir=DIR

To score the embeddings of any model, in FILE.npz, FILE.safetensors or FILE.parquet:

python -m dqe_jax.evaluate --config=configs/cirr.py --split=val --embeddings=FILE --raw_dir=DIR \
  --output=DIR2
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from absl import flags
from ml_collections import config_flags

from dqe_jax.cli.command_line import use_data_dir
from dqe_jax.utils.errors import UserError

if TYPE_CHECKING:
    from dqe_jax.evaluation.zero_shot import Corpora

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config of the run.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.")
_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Directory of checkpoints, or --workdir.")
_STEP = flags.DEFINE_integer("step", None, "Step of the checkpoint; default: the newest.")
_SPLIT = flags.DEFINE_string(
    "split",
    None,
    "train, validation (val) or test (test1), or all: every row of a directory of fashion_products "
    "as one gallery; default: config.eval.split; of --watch: validation.",
)
_OUTPUT = flags.DEFINE_string(
    "output", None, "Where results go; default: <run>/eval, or a place named by another data set."
)
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Short for --config.data.data_dir.")
_PREDICTIONS = flags.DEFINE_string("predictions", None, "Score this file of ranked image ids.")
_EMBEDDINGS = flags.DEFINE_string(
    "embeddings", None, "Score this file of embeddings of queries and gallery; needs --output."
)
_SIMILARITY = flags.DEFINE_enum(
    "similarity",
    "unit",
    ("unit", "cosine", "dot"),
    "With --embeddings: unit demands embeddings of length 1, cosine makes them so, dot ranks by "
    "the inner product of what is there.",
)
_SAVE_EMBEDDINGS = flags.DEFINE_string(
    "save_embeddings",
    None,
    "Write the embeddings of queries and gallery to this .npz, .safetensors or .parquet file.",
)
_RAW_DIR = flags.DEFINE_string(
    "raw_dir",
    None,
    "With --predictions or --embeddings: directory of the raw annotation files, in place of "
    "prepared data.",
)
_HP_FASHIONIQ = flags.DEFINE_string(
    "hp_fashioniq",
    None,
    "Also measure the preference ratio on this hpfiq.json (FashionIQ, val). With --predictions: "
    "the file holds scores of its judgements, and nothing else is measured.",
)
_REPORT = flags.DEFINE_bool(
    "report", False, "Write report.html too: every query with what it found, in one file."
)
_REPORT_AGAINST = flags.DEFINE_string(
    "report_against",
    None,
    "A second run that was evaluated on the same split, to stand beside this one in report.html.",
)
_ZERO_SHOT = flags.DEFINE_list(
    "zero_shot",
    [],
    "Rows without training, of config.model.weights: text, image, sum, product, basic, "
    "basic_expanded. They stand beside the run's model; without --workdir they are measured alone.",
)
_BASIC_SUBJECTS = flags.DEFINE_string(
    "basic_subjects", None, "For basic: a text file with a line for each thing images may show."
)
_BASIC_STYLES = flags.DEFINE_string(
    "basic_styles", None, "For basic: a text file with a line for each way to show it."
)
_WATCH = flags.DEFINE_bool(
    "watch", False, "Evaluate each new checkpoint of --workdir until training is done."
)
_POLL_S = flags.DEFINE_float(
    "poll_s", 30.0, "With --watch: seconds between looks at the directory of the run.", 0.0, 1e6
)
_PATIENCE_S = flags.DEFINE_float(
    "patience_s",
    0.0,
    "With --watch: seconds without a new checkpoint after which to fail; 0 waits for ever.",
    0.0,
)
REQUIRED = ("config",)


def main(argv: Sequence[str]) -> None:
    """Evaluates one checkpoint, the checkpoints of a run, or a file of what another model found."""
    del argv
    use_data_dir(_CONFIG.value, _DATA_DIR.value)
    page = _REPORT.value or _REPORT_AGAINST.value
    if page and (_PREDICTIONS.value or _WATCH.value):
        raise UserError("--report goes with one checkpoint, without --watch and --predictions.")
    if _ZERO_SHOT.value and (_PREDICTIONS.value or _EMBEDDINGS.value or _WATCH.value):
        raise UserError(
            "--zero_shot goes with one checkpoint, without --watch, --predictions and --embeddings."
        )
    files = _PREDICTIONS.value, _EMBEDDINGS.value
    if all(files) or (any(files) and (_WATCH.value or _SAVE_EMBEDDINGS.value)):
        raise UserError(
            "--predictions, --embeddings, --save_embeddings and --watch: name one of them."
        )
    if _RAW_DIR.value is not None and not any(files):
        raise UserError("--raw_dir goes with --predictions or --embeddings.")
    if _SIMILARITY.value != "unit" and not _EMBEDDINGS.value:
        raise UserError("--similarity goes with --embeddings.")
    if _PREDICTIONS.value is not None:
        _score(_PREDICTIONS.value)
    elif _EMBEDDINGS.value is not None:
        _score_embeddings(_EMBEDDINGS.value)
    elif _WATCH.value:
        _watch()
    else:
        _evaluate()


def _evaluate() -> None:
    directory = _CHECKPOINT.value or _WORKDIR.value
    if directory is None and _ZERO_SHOT.value:
        _measure_rows()
        return
    if directory is None:
        raise UserError("name what to evaluate: --workdir=DIR or --checkpoint=DIR.")
    from dqe_jax.distributed import compiled  # importing JAX takes seconds
    from dqe_jax.evaluation.run import evaluate_checkpoint

    compiled.keep_programs()

    evaluate_checkpoint(
        _CONFIG.value,
        directory,
        step=_STEP.value,
        split=_SPLIT.value,
        output=_OUTPUT.value,
        hp_fashioniq=_HP_FASHIONIQ.value,
        page=_REPORT.value,
        against=_REPORT_AGAINST.value,
        zero_shot=_ZERO_SHOT.value,
        corpora=_corpora(),
        save_embeddings=_SAVE_EMBEDDINGS.value,
    )


def _measure_rows() -> None:
    """Measures rows without training, without a run."""
    if _OUTPUT.value is None:
        raise UserError("--zero_shot without --workdir needs --output=DIR, where results go.")
    if _REPORT.value or _REPORT_AGAINST.value:
        raise UserError("--report shows the queries of a run: name one by --workdir=DIR.")
    if _SAVE_EMBEDDINGS.value is not None:
        raise UserError("--save_embeddings writes those of a run: name one by --workdir=DIR.")
    from dqe_jax.distributed import compiled
    from dqe_jax.evaluation.run import evaluate_rows

    compiled.keep_programs()
    evaluate_rows(
        _CONFIG.value,
        _ZERO_SHOT.value,
        _OUTPUT.value,
        split=_SPLIT.value,
        corpora=_corpora(),
    )


def _corpora() -> Corpora | None:
    """The corpora of BASIC, where a row of it is named."""
    from dqe_jax.evaluation.zero_shot import BASIC, read_corpora

    if not set(_ZERO_SHOT.value) & set(BASIC):
        if _BASIC_SUBJECTS.value or _BASIC_STYLES.value:
            raise UserError(
                "--basic_subjects and --basic_styles are for BASIC: add --zero_shot=basic."
            )
        return None
    return read_corpora(_BASIC_SUBJECTS.value, _BASIC_STYLES.value)


def _watch() -> None:
    if _WORKDIR.value is None or _CHECKPOINT.value or _STEP.value is not None:
        raise UserError("--watch follows --workdir=DIR, without --checkpoint and --step.")
    if _SAVE_EMBEDDINGS.value is not None:
        raise UserError("--save_embeddings goes with one checkpoint, without --watch.")
    from dqe_jax.evaluation.watch import watch

    watch(
        _CONFIG.value,
        _WORKDIR.value,
        split=_SPLIT.value or "validation",
        output=_OUTPUT.value,
        poll_s=_POLL_S.value,
        patience_s=_PATIENCE_S.value,
    )


def _score(predictions: str) -> None:
    if _HP_FASHIONIQ.value is not None:
        if _CONFIG.value.data.dataset != "fashioniq":
            raise UserError(
                f"--hp_fashioniq judges images of FashionIQ, not of {_CONFIG.value.data.dataset}: "
                "take --config=configs/fiq.py."
            )
        if _RAW_DIR.value is not None:
            raise UserError(
                "--hp_fashioniq with --predictions needs hpfiq.json alone: leave out --raw_dir."
            )
        from dqe_jax.evaluation.judgements import score_preferences

        score_preferences(predictions, _HP_FASHIONIQ.value, output=_OUTPUT.value)
        return
    from dqe_jax.config import RunConfig
    from dqe_jax.evaluation.asked import read_labels, read_prepared
    from dqe_jax.evaluation.predictions import score_asked

    config = RunConfig.of(_CONFIG.value)
    dataset, split = config.data.dataset, _SPLIT.value or config.eval.split
    score_asked(
        dataset,
        read_prepared(config.data, split)
        if _RAW_DIR.value is None
        else read_labels(dataset, split, _RAW_DIR.value),
        predictions,
        config.eval.protocol,
        output=_OUTPUT.value,
    )


def _score_embeddings(file: str) -> None:
    if _OUTPUT.value is None:
        raise UserError("--embeddings needs --output=DIR, where results go.")
    from dqe_jax.distributed import compiled
    from dqe_jax.evaluation.scoring import score_embeddings

    compiled.keep_programs()
    score_embeddings(
        _CONFIG.value,
        file,
        _OUTPUT.value,
        split=_SPLIT.value,
        raw_dir=_RAW_DIR.value,
        similarity=_SIMILARITY.value,
        hp_fashioniq=_HP_FASHIONIQ.value,
        page=_REPORT.value,
        against=_REPORT_AGAINST.value,
    )
