"""Scores the embeddings of any model: ranks them as those of a run are ranked, and reports."""

from __future__ import annotations

import dataclasses
import os

import numpy as np
from absl import logging

from dqe_jax.config import AnyConfig, RunConfig
from dqe_jax.data.annotations.hp_fashioniq import Judgement
from dqe_jax.distributed import mesh, processes
from dqe_jax.evaluation import protocols, report
from dqe_jax.evaluation.asked import Asked, Labels, read_labels, read_prepared
from dqe_jax.evaluation.embedding_files import EmbeddingFile, check_ids, read_embeddings
from dqe_jax.evaluation.evaluator import Embedded, EmbeddingEvaluator, Result
from dqe_jax.evaluation.judgements import judgement_ids
from dqe_jax.evaluation.page import read_compared, write_page
from dqe_jax.evaluation.preferences import measure_preferences, open_preferences
from dqe_jax.utils.errors import UserError
from dqe_jax.utils.files import make_directory
from dqe_jax.utils.paths import on_disk, whole_path

PathLike = str | os.PathLike[str]


def score_embeddings(
    config: AnyConfig,
    path: PathLike,
    output: PathLike,
    *,
    split: str | None = None,
    raw_dir: PathLike | None = None,
    similarity: str = "unit",
    hp_fashioniq: PathLike | None = None,
    page: bool = False,
    against: PathLike | None = None,
) -> Result:
    """Scores a file of embeddings and writes the files of `report.py`, but for the picture.

    Args:
      config: says data set, protocol and length of lists; its model is not looked at.
      path: of the file, see `embedding_files.py`.
      output: directory of what is written.
      split: any name of it, such as `val`; None for `config.eval.split`.
      raw_dir: the directory with the annotation files; None to score against prepared data.
      similarity: as for `read_embeddings`.
      hp_fashioniq: file of judgements, to measure the preference ratio too (FashionIQ, val).
      page: whether to write `report.html` too, which needs the images of prepared data.
      against: another run, or the directory of its results, to stand beside this one in the page.

    Raises:
      UserError: the data or a file cannot be used, or the file lacks an embedding or has one of no
        known query or image.
    """
    config = RunConfig.of(config)
    on_disk(path, "--embeddings")
    asked: Asked
    chosen = split or config.eval.split
    if raw_dir is not None and (page or against is not None):
        raise UserError("--report shows images: leave out --raw_dir, and prepare the data.")
    if raw_dir is None:
        asked = read_prepared(config.data, chosen)
    else:
        asked = read_labels(config.data.dataset, chosen, raw_dir, gallery=True)
    judged = None
    if hp_fashioniq is not None:
        judged = open_preferences(config.data.dataset, asked, hp_fashioniq)
    held = read_embeddings(path, similarity)
    if isinstance(asked, Labels) and not asked.listed:
        check_ids(held.path, "gallery", held.gallery.ids, [*asked.gallery.ids, *held.gallery.ids])
        asked = asked.with_images(held.gallery.ids)
        logging.warning(
            "The annotation files do not list the gallery: it is what %s holds, %d images.",
            *(held.path, len(held.gallery.ids)),
        )
    evaluator = EmbeddingEvaluator(
        split=asked,
        top_k=config.eval.top_k,
        devices=mesh.devices_of(config.num_devices),
        protocol=protocols.protocol_of(config.data.dataset, config.eval.protocol),
    )
    embedded = _embedded(evaluator, held)
    asking = None if judged is None else _judgements(held, embedded, judged[0])
    place, name = whole_path(output), held.path.stem
    make_directory(place)
    compared = None
    if against is not None:
        compared = read_compared(against, evaluator, config.data.dataset)

    result = evaluator.measure(embedded, baselines=True)
    if not processes.leads():
        return result
    report.write_report(
        evaluator,
        result,
        place,
        f"{asked.name}-{name}",
        run=name,
        dataset=config.data.dataset,
        step=None,
    )
    if page or compared is not None:
        write_page(
            evaluator,
            result,
            place,
            run=name,
            dataset=config.data.dataset,
            step=None,
            attributes=(),
            against=compared,
        )
    if judged is not None and asking is not None:
        measure_preferences(evaluator, asking, judged, place / f"hp_fashioniq-{name}.json")
    return result


def _embedded(evaluator: EmbeddingEvaluator, held: EmbeddingFile) -> Embedded:
    """The embeddings in the order of the split; raises if the file has not just those."""
    asked = evaluator.split
    check_ids(held.path, "query", held.query.ids, asked.queries.ids)
    ids = [asked.gallery.ids[row] for row in evaluator.ranked]
    # A file may hold more of the gallery than a protocol ranks.
    known = frozenset(asked.gallery.ids)
    extra = [image for image in held.gallery.ids if image in known]
    check_ids(held.path, "gallery", held.gallery.ids, list(dict.fromkeys([*ids, *extra])))
    inside = frozenset(extra)
    rows = [row for row in evaluator.compared.tolist() if asked.gallery.ids[row] in inside]
    tokens = held.gallery.at([asked.gallery.ids[row] for row in rows])
    return evaluator.embedded(held.query.at(asked.queries.ids), tokens, np.array(rows))


def _judgements(held: EmbeddingFile, embedded: Embedded, judgements: list[Judgement]) -> Embedded:
    if held.judgement is None:
        raise UserError(
            f"{held.path} has no 'judgement': --hp_fashioniq needs the embeddings of its queries."
        )
    ids = judgement_ids(judgements)
    asked = frozenset(ids)  # others are of images that are not at hand
    own = [one for one in held.judgement.ids if one in asked]
    check_ids(held.path, "judgement", own, ids)
    return dataclasses.replace(embedded, query=held.judgement.at(ids))
