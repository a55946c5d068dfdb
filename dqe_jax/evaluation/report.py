"""What an evaluation writes: metrics, ranked lists, submissions, a picture, and a table.

| file | |
| --- | --- |
| `<split>-<step>.json` | metrics and baselines; the protocol, the data, how much was at hand |
| `<split>-<step>.ranked.json` | ids of the (at most 50) best images of each query |
| `<split>-<step>.queries.json` | what each query got, see `query_results.py` |
| `<split>-<step>.png` | some queries and what they found |
| `<split>-zero_shot.json` | rows without training, where there is no run |
| `<split>-<name>.json` and so on | the same of a file of embeddings, `<name>.npz` |
| `<split>-<step>.<file>` | what the benchmark's server takes, for a split without labels |
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from absl import logging
from etils import epath

from dqe_jax.data.datasets import DATASETS
from dqe_jax.evaluation import contact_sheet, protocols, submissions
from dqe_jax.evaluation.gain import gain_line
from dqe_jax.evaluation.intervals import query_values
from dqe_jax.evaluation.query_results import SUFFIX, QueryResults, make_results, write_results
from dqe_jax.utils.files import write_json
from dqe_jax.utils.text_table import text_table

if TYPE_CHECKING:  # scoring a file of predictions needs no JAX
    from dqe_jax.data.splits import Split
    from dqe_jax.evaluation.evaluator import EmbeddingEvaluator, Result, RetrievalEvaluator

RANKED = 50


def write_report(
    evaluator: EmbeddingEvaluator,
    result: Result,
    directory: epath.Path,
    name: str,
    *,
    run: str,
    dataset: str,
    step: int | None,
    averaged: bool = False,
) -> None:
    """Writes the files of the module's table, but for the picture, and logs what they say.

    Args:
      evaluator: that gave the result.
      result: with baselines.
      directory: made if it is not there.
      name: `<split>-<step>`.
      run: what was evaluated: the name of a run, or of a file of embeddings.
      dataset: name of the data set.
      step: of the checkpoint; None for a file of embeddings.
      averaged: whether the parameters are a moving average of those that trained.

    Raises:
      UserError: the directory is not writable, or the benchmark's server would refuse the
        submission; the other files are written before.
    """
    split, protocol = evaluator.split, evaluator.protocol
    coverage = split.coverage
    results = results_of(evaluator, result, run=run, dataset=dataset, step=step)
    facts = {
        "dataset": dataset,
        "split": split.name,
        "step": step,
        "averaged": averaged,
        "protocol": protocol.name,
        "data": split.digest,
        "queries": {"used": coverage.queries, "official": coverage.official_queries},
        "gallery": {"used": coverage.gallery, "official": coverage.official_gallery},
        "ranked_images": result.embedded,
        "metrics": result.metrics,
        "intervals": None if results is None else results.intervals(),
        "baselines": result.baselines,
        "composition_gain": result.composition_gain,
    }
    queries, ids = split.queries, split.gallery.ids
    # Before anything is written: a full disk must not cost the figures.
    ranked = "" if result.embedded == coverage.gallery else f"; {result.embedded:,} images ranked"
    logging.info(
        "%s, %s%s: %s%s.\n%s",
        *(split.name, run if step is None else f"step {step}"),
        *(", moving average of the parameters" if averaged else "", coverage, ranked),
        table(result, protocol),
    )
    if step is not None and (behind := behind_reference(result, protocol)):
        logging.info("%s", behind)
    if result.composition_gain:
        logging.info("%s", gain_line(result.composition_gain))
    write_json(directory / f"{name}.json", facts)
    lists = submissions.rankings(queries, ids, result.rows, RANKED)
    write_json(directory / f"{name}.ranked.json", lists, indent=None)
    if results is not None:
        write_results(results, directory / f"{name}{SUFFIX}")
    if not len(evaluator.labelled):
        _write_submissions(evaluator, result, directory, name, dataset)
    logging.info("Files: %s*", directory / name)


def results_of(
    evaluator: EmbeddingEvaluator, result: Result, *, run: str, dataset: str, step: int | None
) -> QueryResults | None:
    """What each query with labels got; None if there are none. Arguments as of `write_report`."""
    split, known = evaluator.split, evaluator.labelled
    if not len(known):
        return None
    protocol, subsets, places = evaluator.protocol, result.subset_rows, result.places
    values = query_values(
        protocol,
        split.queries.take(known),
        result.rows[known],
        None if subsets is None else subsets[known],
        None if places is None else places[known],
    )
    columns = protocol.columns(result.metrics)
    return make_results(
        split,
        protocol,
        {key: values[key] for key in columns if key in values},
        known,
        name=run if step is None else f"{run}, step {step}",
        dataset=dataset,
        pools=evaluator.pools,
    )


def write_rows(
    rows: Mapping[str, Mapping[str, float]],
    gain: Mapping[str, str | float] | None,
    directory: epath.Path,
    split: Split,
    protocol: protocols.Protocol,
    *,
    dataset: str,
    weights: str,
) -> None:
    """Writes `<split>-zero_shot.json` and logs a table.

    Args:
      rows: metrics of rows without training, by name.
      gain: as `gain.composition_gain` gives it.
      directory: where the file goes.
      split: that was measured on.
      protocol: of the data set.
      dataset: its name.
      weights: `config.model.weights`.

    Raises:
      UserError: the directory is not writable.
    """
    coverage = split.coverage
    logging.info("%s, without training: %s.\n%s", split.name, coverage, rows_table(rows, protocol))
    if gain:
        logging.info("%s", gain_line(gain))
    facts = {
        "dataset": dataset,
        "split": split.name,
        "weights": weights,
        "protocol": protocol.name,
        "data": split.digest,
        "queries": {"used": coverage.queries, "official": coverage.official_queries},
        "gallery": {"used": coverage.gallery, "official": coverage.official_gallery},
        "rows": rows,
        "composition_gain": gain,
    }
    path = directory / f"{split.name}-zero_shot.json"
    write_json(path, facts)
    logging.info("File: %s", path)


def _write_submissions(
    evaluator: EmbeddingEvaluator, result: Result, directory: epath.Path, name: str, dataset: str
) -> None:
    """Writes what the benchmark's server takes, after checking it against the server's rules."""
    split = evaluator.split
    made = submissions.make_submissions(
        dataset, split.queries, split.gallery.ids, result.rows, result.subset_rows
    )
    for file, content in made.items():
        submissions.check_submission(
            dataset,
            content,
            split.queries,
            split.gallery.ids,
            num_queries=split.coverage.official_queries,
        )
        path = directory / f"{name}.{file}"
        write_json(path, content, indent=None)
        logging.info("For %s: %s", DATASETS[dataset].server, path)


def table(result: Result, protocol: protocols.Protocol) -> str:
    """The metrics as text: a line each for the model, its parts and its baselines."""
    if not result.metrics:
        return "This split has no labels: no metrics, see the ranked lists."
    found = result.metrics
    keys = protocol.columns(found)
    parts = [key.partition("/") for key in found]
    groups = sorted({group for key, _, group in parts if group and key in keys})
    # A line for an attribute would repeat the line for the kind of edit that changes it.
    groups = [g for g in groups if g.removeprefix("attribute:") == g or g[10:] not in groups]
    lines = [(protocol.name, *keys, "queries")]

    def line(name: str, values: dict[str, float], suffix: str = "") -> None:
        cells = [f"{values[k + suffix]:.4f}" if k + suffix in values else "-" for k in keys]
        lines.append((name, *cells, str(values.get("queries" + suffix, "-"))))

    line("all", found)
    for group in groups:
        line(group, found, f"/{group}")
    for name, values in (result.baselines or {}).items():
        line(name, values)
    if "P@10" in keys and "P@10_ceiling" in found:
        line("ceiling", {"P@10": found["P@10_ceiling"]})
    return "\n".join(filter(None, [text_table(lines), protocol.note]))


def rows_table(rows: Mapping[str, Mapping[str, float]], protocol: protocols.Protocol) -> str:
    """Metrics of rows without a model as text."""
    keys = protocol.columns(next(iter(rows.values()), {}))
    if not keys:
        return "This split has no labels: no metrics."
    lines = [(protocol.name, *keys)]
    for name, values in rows.items():
        lines.append((name, *(f"{values[key]:.4f}" for key in keys)))
    return "\n".join(filter(None, [text_table(lines), protocol.note]))


def behind_reference(result: Result, protocol: protocols.Protocol) -> str:
    """What to think of a model that finds less than the reference alone does; "" of any other."""
    alone = (result.baselines or {}).get("reference_only", {})
    key = next(iter(protocol.columns(result.metrics)), "")
    if result.metrics.get(key, 0.0) >= alone.get(key, 0.0):
        return ""
    return (
        f"{key} is below that of the reference alone: this model has not learnt to read the text. "
        "Such a run (as every smoke run) only shows that everything works."
    )


def draw(
    evaluator: RetrievalEvaluator,
    result: Result,
    path: os.PathLike[str] | str,
    count: int,
    names: Sequence[str],
) -> list[str]:
    """Writes a contact sheet of `count` queries spread over the split.

    Args:
      evaluator: that gave the result.
      result: of its `run`.
      path: a .png.
      count: queries to draw.
      names: of the attributes.

    Returns:
      One line a drawn query: text, attribute weights, rank of the target.
    """
    queries, images = evaluator.split.queries, evaluator.split.gallery
    sheet, lines = [], []
    for i in np.unique(np.linspace(0, len(queries) - 1, count).astype(int)):
        weights = dict(zip(names, map(float, result.attribute_weights[i])))
        row = contact_sheet.sheet_row(
            images.__getitem__,
            result.rows[i],
            reference=int(queries.reference[i]),
            target=int(queries.target[i]),
            text=queries.texts[i],
            relevant=queries.relevant[i],
            weights=weights,
        )
        sheet.append(row)
        listed = ", ".join(f"{name} {value:.2f}" for name, value in weights.items())
        rank = row.target_rank or f"> {result.rows.shape[1]}"
        found = f"target at {rank}" if queries.target[i] >= 0 else "target not published"
        if evaluator.protocol.by_relevance:
            valid = np.flatnonzero(np.isin(result.rows[i], queries.relevant[i]))
            first = valid[0] + 1 if len(valid) else f"> {result.rows.shape[1]}"
            found = f"first of {len(queries.relevant[i])} valid targets at {first}"
        lines.append(f"{queries.texts[i]!r}: {listed or 'no attributes'}; {found}")
    picture = contact_sheet.draw_contact_sheet(sheet)
    with epath.Path(path).open("wb") as file:
        picture.save(file, "PNG")
    return lines
