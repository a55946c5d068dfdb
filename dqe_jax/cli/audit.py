"""Audits negatives: what share of what each rule mines is in truth valid (false negatives).

python -m dqe_jax.audit --config=configs/fashion_products.py --data_dir=DIR --workdir=DIR

For data that say which images are in truth valid. Writes `audit-<split>-<step>.json` and a picture,
`.png`, and logs two tables: the rules, and the rule `trns` against its lower bound. The figures are
those of `experiments/audit/statistics.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from absl import flags, logging
from ml_collections import config_flags

from dqe_jax.utils.errors import UserError

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config of the run.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.")
_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Directory of checkpoints, or --workdir.")
_STEP = flags.DEFINE_integer("step", None, "Step of the checkpoint; default: the newest.")
_SPLIT = flags.DEFINE_string("split", "train", "Split whose gallery is mined for its queries.")
_QUERIES = flags.DEFINE_integer(
    "queries", 2000, "Queries of the sample, which config.seed decides.", lower_bound=1
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
    from dqe_jax.config import check_config
    from dqe_jax.data import datasets
    from dqe_jax.experiments.audit import draws

    config = _CONFIG.value
    if _DATA_DIR.value is not None:
        config.data.data_dir = _DATA_DIR.value
    check_config(config)
    for rule in _RULES.value:
        draws.rule_of(config.negatives, rule)
    lowers = _lowers(config.negatives)
    split = datasets.split_of(config.data.dataset, _SPLIT.value)
    directory = _CHECKPOINT.value or _WORKDIR.value
    if directory is None:
        raise UserError("name what to audit: --workdir=DIR or --checkpoint=DIR.")
    datasets.find_dataset(config.data)
    _audit(config, split, directory, lowers)


def _lowers(negatives: Any) -> list[float]:
    """The lower quantiles of the sweep.

    Raises:
      UserError: one is no number, or not below the upper quantile.
    """
    from dqe_jax.experiments.audit import draws, statistics

    upper = draws.upper_of(negatives)
    if _SWEEP.value is None:
        return statistics.lower_quantiles(draws.LOWERS, upper)
    try:
        wanted = [float(value) for value in _SWEEP.value if value]
    except ValueError as error:
        raise UserError(
            f"--sweep={','.join(_SWEEP.value)}: name numbers, such as 0,0.01,0.1."
        ) from error
    found = statistics.lower_quantiles(wanted, upper)
    if not set(wanted) <= set(found):
        raise UserError(
            f"--sweep={','.join(_SWEEP.value)}: lower quantiles must be at least 0 and below the "
            f"upper one, {upper:g}."
        )
    return found


def _audit(config: Any, split: str, directory: str, lowers: Sequence[float]) -> None:
    from dqe_jax.checkpoints.trained import open_trained
    from dqe_jax.data import datasets, splits
    from dqe_jax.data.text import encode_texts
    from dqe_jax.evaluation import report
    from dqe_jax.evaluation.run import output_of
    from dqe_jax.experiments.audit import candidates, draws, figure
    from dqe_jax.training.bank import make_bank_keeper
    from dqe_jax.utils.paths import whole_path

    trained = open_trained(config, directory, _STEP.value)
    model, words, devices, step = trained.model, trained.tokenizer, trained.devices, trained.step
    opened = splits.open_split(config, datasets.open_dataset(config.data), split)
    rows = candidates.sample_queries(opened, _QUERIES.value, config.seed)
    output = whole_path(_OUTPUT.value) if _OUTPUT.value else output_of(trained)
    _make_directory(output)
    params = trained.read_params()
    banked = config.copy_and_resolve_references()
    banked.negatives.update(pool="bank", mining="step")  # filling the bank mines nothing yet
    text = encode_texts(words, opened)
    found = draws.audit(
        make_bank_keeper(banked, model, opened, text, devices),
        params,
        step,
        split=opened,
        rows=rows,
        negatives=config.negatives,
        rules=_RULES.value,
        lowers=lowers,
        seed=config.seed,
        devices=devices,
    )
    facts = {
        "dataset": config.data.dataset,
        "split": opened.name,
        "step": step,
        "queries": len(rows),
        "seed": config.seed,
        "negatives": config.negatives.to_dict(),
        **found,
    }
    path = output / f"audit-{opened.name}-{step}.json"
    report.write_json(path, facts)
    path.with_suffix(".png").write_bytes(figure.draw(facts))
    _log(facts, len(opened.queries), path)


def _make_directory(path: Any) -> None:
    """Makes the directory of the results now: minutes later would be late to learn it cannot be.

    Raises:
      UserError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write to {path} ({error.strerror}): name a writable directory."
        ) from error


def _log(facts: dict[str, Any], of: int, path: Any) -> None:
    from dqe_jax.experiments.audit import statistics

    logging.info(
        "%s, step %d: %d of %d queries, %.0f candidates each; oracle: all of them.\n%s",
        *(facts["split"], facts["step"], facts["queries"], of, facts["candidates"]),
        statistics.rules_table(facts),
    )
    if facts["sweep"]:
        logging.info("trns by its lower bound:\n%s", statistics.sweep_table(facts))
    if not facts["oracle"]["false"]:
        logging.warning(
            "No candidate is in truth valid beside the known positives of %s: no rule can draw a "
            "false negative here.",
            facts["split"],
        )
    logging.info("Files: %s and .png", path)
