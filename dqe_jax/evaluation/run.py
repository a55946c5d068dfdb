"""Evaluates a model on a split and writes what was found."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from absl import logging
from etils import epath
from tokenizers import Tokenizer

from dqe_jax.checkpoints.trained import Trained, open_trained
from dqe_jax.config import AnyConfig, RunConfig, flatten
from dqe_jax.data import datasets, splits
from dqe_jax.data.digest import SHOWN
from dqe_jax.data.examples import WHOLE
from dqe_jax.data.splits import Split
from dqe_jax.data.text import encode_wordings
from dqe_jax.distributed import mesh, processes
from dqe_jax.embedding.encoders import encoders
from dqe_jax.embedding.sources import PlainImages, PlainTexts
from dqe_jax.evaluation import protocols, report
from dqe_jax.evaluation.embedding_files import Rows, check_target, write_embeddings
from dqe_jax.evaluation.evaluator import Embedded, EmbeddingEvaluator, Result, RetrievalEvaluator
from dqe_jax.evaluation.gain import composition_gain
from dqe_jax.evaluation.judgements import judgement_ids
from dqe_jax.evaluation.page import read_compared, write_page
from dqe_jax.evaluation.preferences import (
    embed_judgements,
    measure_preferences,
    open_preferences,
    texts_of,
)
from dqe_jax.evaluation.zero_shot import Corpora, measure_rows, read_rows
from dqe_jax.feature_store.features import Features
from dqe_jax.method.arrays import Params
from dqe_jax.models.dqe import DQE
from dqe_jax.utils.errors import UserError
from dqe_jax.utils.files import make_directory, read_json
from dqe_jax.utils.paths import whole_path


def evaluate_checkpoint(
    config: AnyConfig,
    directory: str | os.PathLike[str],
    *,
    step: int | None = None,
    split: str | None = None,
    output: str | os.PathLike[str] | None = None,
    hp_fashioniq: str | os.PathLike[str] | None = None,
    page: bool = False,
    against: str | os.PathLike[str] | None = None,
    zero_shot: Sequence[str] = (),
    corpora: Corpora | None = None,
    save_embeddings: str | os.PathLike[str] | None = None,
) -> Result:
    """Evaluates a checkpoint on a split and writes the files of `report.py`.

    Args:
      config: must agree with that of the checkpoint in what the model depends on.
      directory: a workdir, or its `checkpoints` directory.
      step: of the checkpoint; None for the newest.
      split: any name of it, such as `val`; None for `config.eval.split`.
      output: directory of the files; None for that of `output_of`.
      hp_fashioniq: file of judgements, to measure the preference ratio too (FashionIQ, val).
      page: whether to write `report.html` too, see `page.py`.
      against: another run, or the directory of its results, to stand beside this one in the page.
      zero_shot: rows without training to show beside the model, of `zero_shot.ROWS`: those of
        `config.model.weights`.
      corpora: for the rows of BASIC.
      save_embeddings: file for the embeddings of queries and gallery, see `embedding_files.py`.

    Raises:
      UserError: the config, the data, the checkpoint or a file cannot be used.
    """
    config = RunConfig.of(config)
    split = datasets.split_of(config.data.dataset, split or config.eval.split)
    datasets.find_dataset(config.data, split)
    saved = None if save_embeddings is None else check_target(save_embeddings)
    trained = open_trained(config, directory, step)
    words, step = trained.tokenizer, trained.step
    opened = splits.open_split(config.data, datasets.open_dataset(config.data, split), split)
    features = Features(config, trained.model, trained.devices)
    judged, judged_texts = None, None
    if hp_fashioniq is not None:
        judged = open_preferences(config.data.dataset, opened, hp_fashioniq)
        judged_texts = features.texts(texts_of(words, judged[0]))
    evaluator = make_evaluator(config, trained.model, words, opened, trained.devices, features)
    place = whole_path(output) if output else output_of(trained, opened)
    compared = None if against is None else read_compared(against, evaluator, config.data.dataset)
    make_directory(place)
    if saved is not None:
        make_directory(whole_path(saved.parent))
    rows = _rows(config, opened, zero_shot, trained.devices, corpora)
    params = trained.place_params()
    features.fill(params)
    asking = None
    if judged is not None and judged_texts is not None:
        asking = embed_judgements(evaluator, judged_texts, params, judged[0])

    def keep(embedded: Embedded) -> None:
        if saved is not None and processes.leads():
            more = {}
            if judged is not None and asking is not None:
                more["judgement"] = Rows(judgement_ids(judged[0]), asking.query)
            write_embeddings(saved, rows_of(evaluator, embedded) | more)
            logging.info("Embeddings: %s", saved)

    result = evaluate_and_report(
        config,
        evaluator,
        params,
        step=step,
        directory=place,
        averaged=trained.averaged,
        rows=rows,
        run=trained.directory.parent.name,
        keep=keep,
    )
    if (page or compared is not None) and processes.leads():
        write_page(
            evaluator,
            result,
            place,
            run=trained.directory.parent.name,
            dataset=config.data.dataset,
            step=step,
            attributes=shown_attributes(config),
            against=compared,
        )
    if judged is not None and asking is not None:
        measure_preferences(evaluator, asking, judged, place / f"hp_fashioniq-{step}.json")
    return result


def rows_of(evaluator: EmbeddingEvaluator, embedded: Embedded) -> dict[str, Rows]:
    """The embeddings of a split with their ids, as `write_embeddings` takes them."""
    asked, held = evaluator.split, embedded.gallery
    rows = np.flatnonzero(held.place >= 0)
    ids = [asked.gallery.ids[row] for row in rows]
    tokens = held.tokens[held.place[rows]]
    gallery = Rows(ids, tokens[:, 0] if tokens.shape[1] == 1 else tokens)
    return {"query": Rows(list(asked.queries.ids), embedded.query), "gallery": gallery}


def evaluate_rows(
    config: AnyConfig,
    zero_shot: Sequence[str],
    output: str | os.PathLike[str],
    *,
    split: str | None = None,
    corpora: Corpora | None = None,
) -> dict[str, dict[str, float]]:
    """Measures rows without training on a split, without a run, and writes and logs them.

    Args:
      config: says data and pretrained weights.
      zero_shot: rows, of `zero_shot.ROWS`.
      output: directory of `<split>-zero_shot.json`.
      split: any name of it, such as `val`; None for `config.eval.split`.
      corpora: for the rows of BASIC.

    Returns:
      Metrics by row.

    Raises:
      UserError: the config, the data, the weights or a file cannot be used.
    """
    config, names = RunConfig.of(config), read_rows(zero_shot)
    split = datasets.split_of(config.data.dataset, split or config.eval.split)
    datasets.find_dataset(config.data, split)
    opened = splits.open_split(config.data, datasets.open_dataset(config.data, split), split)
    place = whole_path(output)
    make_directory(place)
    rows = _rows(config, opened, names, mesh.devices_of(config.num_devices), corpora)
    protocol = protocols.protocol_of(config.data.dataset, config.eval.protocol)
    gain = composition_gain(rows, protocol.columns(next(iter(rows.values()))))
    if processes.leads():
        report.write_rows(
            rows,
            gain,
            place,
            opened,
            protocol,
            dataset=config.data.dataset,
            weights=config.model.weights,
        )
    return rows


def _rows(
    config: RunConfig,
    split: Split,
    names: Sequence[str],
    devices: list[jax.Device],
    corpora: Corpora | None,
) -> dict[str, dict[str, float]]:
    """Metrics of rows without training; none if none are named."""
    if not names:
        return {}
    protocol = protocols.protocol_of(config.data.dataset, config.eval.protocol)
    return measure_rows(config, split, protocol, read_rows(names), devices, corpora)


def make_evaluator(
    config: RunConfig,
    model: DQE,
    tokenizer: Tokenizer,
    split: Split,
    devices: list[jax.Device],
    features: Features | None = None,
) -> RetrievalEvaluator:
    """The evaluator of a split, which takes parameters.

    Args:
      config: of the run.
      model: of the config.
      tokenizer: of the model.
      split: to evaluate on.
      devices: to run on.
      features: fill them with the parameters before the evaluator runs; None stores nothing.
    """
    texts = encode_wordings(tokenizer, split, "forward")
    encode_query, encode_gallery = encoders(model)
    return RetrievalEvaluator(
        split=split,
        images=features.images(split.gallery) if features else PlainImages(split.gallery),
        texts=features.texts(texts) if features else PlainTexts(texts.ids),
        encode_query=encode_query,
        encode_gallery=encode_gallery,
        batch_size=config.eval.batch_size,
        top_k=config.eval.top_k,
        devices=devices,
        protocol=protocols.protocol_of(config.data.dataset, config.eval.protocol),
    )


def evaluate_and_report(
    config: RunConfig,
    evaluator: RetrievalEvaluator,
    params: Params,
    *,
    step: int,
    directory: epath.Path,
    averaged: bool = False,
    rows: Mapping[str, dict[str, float]] | None = None,
    run: str = "",
    keep: Callable[[Embedded], None] | None = None,
) -> Result:
    """Evaluates, writes the files of `report.py`, and logs the table and the queries drawn.

    Args:
      config: of the run.
      evaluator: of the split.
      params: of the model.
      step: of the checkpoint.
      directory: where the files go.
      averaged: whether the parameters are a moving average of those that trained.
      rows: metrics of rows without training, to stand beside the model; None for none.
      run: what the run is called; default: the directory above that of the files.
      keep: is given the embeddings before they are ranked.

    Raises:
      UserError: the directory is not writable, or a submission would be refused.
    """
    result = evaluator.run(params, baselines=True, keep=keep)
    if rows and result.baselines is not None:
        shown = {f"zero-shot {name}": values for name, values in rows.items()}
        columns = evaluator.protocol.columns(result.metrics)
        gain = composition_gain({"model": result.metrics, **rows}, columns)
        result = dataclasses.replace(
            result, baselines=result.baselines | shown, composition_gain=gain
        )
    if not processes.leads():
        return result
    name = f"{evaluator.split.name}-{step}"
    report.write_report(
        evaluator,
        result,
        directory,
        name,
        run=run or whole_path(directory).parent.name,
        dataset=config.data.dataset,
        step=step,
        averaged=averaged,
    )
    drawn = report.draw(
        evaluator,
        result,
        directory / f"{name}.png",
        config.eval.sheet_queries,
        shown_attributes(config),
    )
    logging.info("Queries on the contact sheet:\n  %s", "\n  ".join(drawn))
    return result


def shown_attributes(config: RunConfig) -> tuple[str, ...]:
    """Names of the attributes that a config's model weighs; none if it does not."""
    return config.model.attributes.names if config.model.attributes.enabled else ()


def output_of(trained: Trained, split: Split) -> epath.Path:
    """Where results go: `eval/`, or a place of its own for what the run was not trained on.

    Data that differ from those of the run name the place by their digest. Where the run does not
    know those of a split, the first that it was evaluated on count as its own; those of all rows of
    a directory are never its own.

    Args:
      trained: the checkpoint.
      split: that it is evaluated on.
    """
    parent = trained.directory.parent
    names = ("data.dataset", "data.variant", "eval.protocol")
    own, run = (flatten(c) for c in (trained.config.to_dict(), trained.trained_by))
    # A field that did not exist when the run was made does not count as a difference.
    other = [str(own[name]) for name in names if own[name] != run.get(name, own[name])]
    if trained.data is None:
        logging.warning(
            "The checkpoint in %s does not say on which data it was trained: it is of an older "
            "version.",
            trained.directory,
        )
    known = None if other or trained.data is None else trained.data.get(split.name)
    held = (
        _digests_in(parent / "-".join(["eval", *other]), split.name) if known is None else {known}
    )
    if held - {split.digest} or split.name == WHOLE:
        other.append(f"data-{split.digest[:SHOWN]}")
        logging.info("These are not the data of the run: their digest names the results.")
    return parent / "-".join(["eval", *other])


def _digests_in(directory: epath.Path, split: str) -> set[str]:
    """Digests of the data that reports of a split say they are of; older ones say nothing."""
    found = set()
    for path in directory.glob(f"{split}-*.json") if directory.is_dir() else ():
        if re.fullmatch(rf"{split}-\d+\.json", path.name):
            with contextlib.suppress(UserError):
                found.add(read_json(path, dict).get("data"))
    return {digest for digest in found if isinstance(digest, str)}
