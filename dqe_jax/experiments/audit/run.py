"""Audits the negatives of a checkpoint: what share of what each rule mines is truly relevant.

Writes `audit-<split>-<step>.json` and a picture, `.png`, and logs two tables: the rules, and the
rule `trns` against its lower bound. The figures are those of `statistics.py`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from absl import logging
from etils import epath

from dqe_jax.checkpoints.trained import Trained, open_trained
from dqe_jax.config import AnyConfig, RunConfig
from dqe_jax.data import datasets, splits
from dqe_jax.data.splits import Split
from dqe_jax.data.text import encode_wordings
from dqe_jax.evaluation.run import output_of
from dqe_jax.experiments.audit import candidates, draws, figure, statistics
from dqe_jax.feature_store.features import Features
from dqe_jax.method.settings import NegativesConfig
from dqe_jax.training.bank import make_bank_keeper
from dqe_jax.utils.errors import UserError
from dqe_jax.utils.files import JsonObject, make_directory, write_json
from dqe_jax.utils.paths import whole_path


def audit_checkpoint(
    config: AnyConfig,
    directory: str | os.PathLike[str],
    *,
    step: int | None = None,
    split: str = "train",
    queries: int = 2000,
    rules: Sequence[str] = draws.RULES,
    lowers: Sequence[float] | None = None,
    output: str | os.PathLike[str] | None = None,
) -> JsonObject:
    """Audits a checkpoint and writes the files of the module.

    Args:
      config: must agree with that of the checkpoint in what the model depends on; its seed decides
        the sample and the draws.
      directory: a workdir, or its `checkpoints` directory.
      step: of the checkpoint; None for the newest.
      split: whose gallery is mined for its queries, by any name of it.
      queries: of the sample, at least 1.
      rules: to mine by, of `draws.RULES`.
      lowers: lower quantiles of the sweep, empty for no sweep; None for those of `draws.LOWERS`
        that are below the upper one.
      output: directory of the files; None for where evaluation writes.

    Returns:
      What the JSON holds.

    Raises:
      UserError: the config, the data, the checkpoint or a file cannot be used, or the data do not
        say which images are truly relevant.
    """
    config = RunConfig.of(config)
    for rule in rules:
        draws.rule_of(config.negatives, rule)
    lowers = _checked_lowers(config.negatives, lowers)
    split = datasets.split_of(config.data.dataset, split)
    datasets.find_dataset(config.data, split)
    trained = open_trained(config, directory, step)
    opened = splits.open_split(config.data, datasets.open_dataset(config.data, split), split)
    rows = candidates.sample_queries(opened, queries, config.seed)
    place = whole_path(output) if output else output_of(trained, opened)
    make_directory(place)
    facts = {
        "dataset": config.data.dataset,
        "split": opened.name,
        "step": trained.step,
        "averaged": trained.averaged,
        "queries": len(rows),
        "seed": config.seed,
        "negatives": config.to_dict()["negatives"],
        **_measure(trained, opened, rows, rules, lowers),
    }
    path = place / f"audit-{opened.name}-{trained.step}.json"
    write_json(path, facts)
    path.with_suffix(".png").write_bytes(figure.draw(facts))
    _log(facts, len(opened.queries), path)
    return facts


def _measure(
    trained: Trained,
    split: Split,
    rows: np.ndarray,
    rules: Sequence[str],
    lowers: Sequence[float],
) -> JsonObject:
    """What `draws.audit` finds for the queries at these positions, int `[B]`."""
    # Filling the bank mines nothing yet.
    banked = {"negatives.pool": "bank", "negatives.mining": "step"}
    config = trained.config.with_changes(banked)
    text = encode_wordings(trained.tokenizer, split, "forward")
    features = Features(config, trained.model, trained.devices)
    keeper = make_bank_keeper(config, trained.model, split, text, trained.devices, features)
    params = trained.place_params()
    features.fill(params)
    return draws.audit(
        keeper,
        params,
        trained.step,
        split=split,
        rows=rows,
        negatives=trained.config.negatives,
        rules=rules,
        lowers=lowers,
        seed=config.seed,
        devices=trained.devices,
    )


def _checked_lowers(negatives: NegativesConfig, lowers: Sequence[float] | None) -> list[float]:
    """The lower quantiles of the sweep, ascending.

    Raises:
      UserError: one is not below the upper quantile.
    """
    upper = draws.upper_of(negatives)
    if lowers is None:
        return statistics.lower_quantiles(draws.LOWERS, upper)
    found = statistics.lower_quantiles(lowers, upper)
    if not set(lowers) <= set(found):
        raise UserError(
            f"--sweep={','.join(f'{q:g}' for q in lowers)}: lower quantiles must be at least 0 and "
            f"below the upper one, {upper:g}."
        )
    return found


def _log(facts: JsonObject, of: int, path: epath.Path) -> None:
    """Logs the tables, and a warning if no rule can draw a false negative."""
    logging.info(
        "%s, step %d: %d of %d queries, %.0f candidates each; oracle: all of them.\n%s",
        *(facts["split"], facts["step"], facts["queries"], of, facts["candidates"]),
        statistics.rules_table(facts),
    )
    if facts["sweep"]:
        logging.info("trns by its lower bound:\n%s", statistics.sweep_table(facts))
    if not facts["oracle"]["false"]:
        logging.warning(
            "No candidate is truly relevant beside the known positives of %s: no rule can draw a "
            "false negative here.",
            facts["split"],
        )
    logging.info("Files: %s and .png", path)
