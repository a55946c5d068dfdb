"""What attribute weights know of a query, and what moving one of them by hand does to its results.

Two questions, for images whose attributes are known:

- **Calibration.** Is the weight of an attribute high where the query changes it? Of each attribute:
  the mean weight of queries that change it and of those that keep it, the probability that a query
  of the first kind has the larger weight (AUC), and the mean distance between weight and share in
  five bins (expected calibration error).
- **Sliders.** The weight of one attribute is multiplied by a factor, as the page's sliders do. Of
  the queries that change the attribute: the mean share of the first images with the requested
  value. Of those that keep it: the mean share with the reference's value. A slider does what it
  says if the first never falls as the factor rises.

Writes `sliders-<split>-<step>.json` and logs two tables.
"""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from absl import logging
from scipy import stats

from dqe_jax.config import AnyConfig, RunConfig
from dqe_jax.data import datasets, lexicon, splits
from dqe_jax.experiments.described import described, write_images
from dqe_jax.search.asks import Ask
from dqe_jax.search.index import Index
from dqe_jax.search.loading import load
from dqe_jax.search.relevance import STILL
from dqe_jax.utils.errors import UserError
from dqe_jax.utils.files import JsonObject, write_json
from dqe_jax.utils.paths import whole_path
from dqe_jax.utils.text_table import text_table

FACTORS = (0.0, 0.5, 1.0, 1.5, 2.0, 4.0)
BATCH = 64  # searches at a time
BINS = 5


def measure_sliders(
    config: AnyConfig,
    directory: str | os.PathLike[str],
    *,
    step: int | None = None,
    split: str = "test",
    queries: int = 500,
    shown: int = 10,
    factors: Sequence[float] = FACTORS,
    output: str | os.PathLike[str] | None = None,
) -> JsonObject:
    """Measures the attribute weights of a trained model.

    Args:
      config: of the data; the model is of its own config.
      directory: of the run, or of an export.
      step: of its checkpoint; None for the newest.
      split: whose images are searched, by any name of it.
      queries: how many of the split's, drawn with `config.seed`.
      shown: images that count of each ranking.
      factors: by which a weight is multiplied, ascending.
      output: directory of the result; None for `<directory>/eval`.

    Returns:
      What the JSON holds.

    Raises:
      UserError: the data do not describe images by attributes, the model has no attribute weights,
        or none of its attributes is one of the data.
    """
    config = RunConfig.of(config)
    if sorted(set(factors)) != list(factors) or not factors or factors[0] < 0:
        raise UserError("--factors: give ascending numbers of at least 0, such as 0,1,2.")
    split = datasets.split_of(config.data.dataset, split)
    builder = datasets.open_dataset(config.data)
    opened = splits.open_split(config.data, builder, split)
    columns, values = described(splits.gallery_attributes(builder, split), config.data.dataset)
    with tempfile.TemporaryDirectory(prefix="dqe-sliders-") as place:
        ids = write_images(opened, Path(place))
        model = load(directory, step=step)
        if not model.attribute_names:
            raise UserError(f"{directory} holds a model without attribute weights: name another.")
        words = lexicon.load_lexicon(config.data.lexicon)
        of = columns_of(model.attribute_names, columns, values, words)
        if not of:
            raise UserError(
                f"no attribute of the model ({', '.join(model.attribute_names)}) has a column "
                f"among {', '.join(columns)}: its values must be words of the lexicon."
            )
        own = opened.queries
        if not len(own) or (own.target < 0).any():
            raise UserError(
                f"{split} of {config.data.dataset} does not say the target of each query: take "
                "--split=validation."
            )
        chosen = np.random.default_rng(config.seed).permutation(len(own))[:queries]
        asks = [(ids[own.reference[i]], own.texts[i]) for i in chosen]
        ends = [(values[own.reference[i]], values[own.target[i]]) for i in chosen]
        index = model.index(place)
        row_of = {id_: row for row, id_ in enumerate(ids)}
        weights, _ = _answers(index, asks, shown, {})
        found: JsonObject = {}
        for name, column in of.items():
            before = np.array([reference[column] for reference, _ in ends])
            wanted = np.array([target[column] for _, target in ends])
            shares = {}
            for factor in factors:
                _, results = _answers(index, asks, shown, {name: factor})
                shown_values = [[values[row_of[id_]][column] for id_ in one] for one in results]
                shares[factor] = np.array(
                    [np.mean([x == y for x in one]) for one, y in zip(shown_values, wanted)]
                )
            changed = before != wanted
            found[name] = {
                "column": columns[column],
                "calibration": calibration(weights[name], changed),
                "sliders": slider(shares, changed),
            }
            logging.info("%s: %d of %d queries change it.", name, changed.sum(), len(changed))
    facts: JsonObject = {
        "dataset": config.data.dataset,
        "variant": config.data.variant,
        "split": split,
        "step": model.step,
        "model": str(directory),
        "seed": config.seed,
        "queries": len(chosen),
        "shown": shown,
        "factors": list(factors),
        "attributes": found,
    }
    target = whole_path(output) if output is not None else whole_path(directory) / "eval"
    path = target / f"sliders-{split}-{model.step}.json"
    write_json(path, facts)
    logging.info("%s", told(facts))
    logging.info("Written to %s.", path)
    return facts


def columns_of(
    names: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[str]],
    words: Mapping[str, frozenset[str]],
) -> dict[str, int]:
    """Of each attribute of a model the position of its column in the data.

    It is the column of the same name, or else the one most of whose values the attribute's section
    of the lexicon holds. An attribute without such a column is left out.

    Args:
      names: of the model's attributes.
      columns: names of the data's attributes.
      values: theirs, by image.
      words: the lexicon.
    """
    found: dict[str, int] = {}
    for name in names:
        if name in columns:
            found[name] = columns.index(name)
        elif name in words:
            shares = [
                float(lexicon.mentions(sorted({own[i] for own in values}), [name], words).mean())
                for i in range(len(columns))
            ]
            if max(shares) > 0.5:
                found[name] = int(np.argmax(shares))
    return found


def _answers(
    index: Index, asks: Sequence[tuple[str, str]], shown: int, factors: Mapping[str, float]
) -> tuple[dict[str, np.ndarray], list[list[str]]]:
    """The weights by attribute, float `[n]`, and the ids that were found, of searches."""
    every = []
    for start in range(0, len(asks), BATCH):
        part = [
            Ask((image,), text, shown, weights=factors)
            for image, text in asks[start : start + BATCH]
        ]
        every += index.answer(part, STILL)
    weights = {
        name: np.array([one.attribute_weights[name] for one in every])
        for name in every[0].attribute_weights
    }
    return weights, [[result.id for result in one] for one in every]


def calibration(weights: np.ndarray, changed: np.ndarray) -> JsonObject:
    """How well weights tell queries that change an attribute from those that keep it.

    Args:
      weights: float `[n]`, 0 to 1.
      changed: bool `[n]`.

    Returns:
      `changed` and `kept`, mean weights; `auc`; `bins`, each `[queries, mean weight, share that
      changes]`; `error`, the mean distance of the last two over queries. None where there is
      nothing to tell apart.
    """
    own, other = weights[changed], weights[~changed]
    auc = None
    if len(own) and len(other):
        auc = float(stats.mannwhitneyu(own, other).statistic / (len(own) * len(other)))
    place = np.minimum((weights * BINS).astype(int), BINS - 1)
    bins = [
        [
            int((place == i).sum()),
            float(weights[place == i].mean()),
            float(changed[place == i].mean()),
        ]
        for i in range(BINS)
        if (place == i).any()
    ]
    return {
        "changed": float(own.mean()) if len(own) else None,
        "kept": float(other.mean()) if len(other) else None,
        "auc": auc,
        "error": sum(n * abs(mean - share) for n, mean, share in bins) / len(weights),
        "bins": bins,
    }


def slider(shares: Mapping[float, np.ndarray], changed: np.ndarray) -> JsonObject:
    """What the factors of a weight do.

    Args:
      shares: by ascending factor, of each query the share of its first images with the value of
        its target, `[n]`.
      changed: bool `[n]`, whether the query changes the attribute.

    Returns:
      `changed` and `kept`: mean shares by factor. `errors`: standard errors, over queries, of the
      differences between neighbouring factors where the attribute is changed. `falls`: the
      largest fall between two of these factors, 0 for none.
    """
    own = [share[changed] for share in shares.values()]
    other = [share[~changed] for share in shares.values()]
    steps = [after - before for before, after in itertools.pairwise(own)]
    means = [float(one.mean()) for one in steps if len(one)]
    return {
        "changed": [float(one.mean()) if len(one) else None for one in own],
        "kept": [float(one.mean()) if len(one) else None for one in other],
        "errors": [float(stats.sem(one)) if len(one) > 1 else None for one in steps],
        "falls": max([0.0, *(-mean for mean in means)]),
    }


def told(facts: JsonObject) -> str:
    """Both tables."""

    def shown(x: float | None) -> str:
        return "" if x is None else f"{x:.3f}"

    known = [["attribute", "weight where changed", "where kept", "AUC", "calibration error"]]
    moved = [["attribute", "queries that", *(f"x {x:g}" for x in facts["factors"])]]
    for name, found in facts["attributes"].items():
        own, sliders = found["calibration"], found["sliders"]
        known.append([name, *(shown(own[key]) for key in ("changed", "kept", "auc", "error"))])
        moved.append([name, "change it", *map(shown, sliders["changed"])])
        moved.append([name, "keep it", *map(shown, sliders["kept"])])
    return (
        f"Weights:\n{text_table(known)}\n\nShare of the first {facts['shown']} images with the "
        f"target's value, by the factor of the weight:\n{text_table(moved)}"
    )
