"""HP-FashionIQ by embeddings: does a model prefer the set of images that people preferred?

`judgements.py` has the metrics.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence

import numpy as np
from absl import logging
from etils import epath
from tokenizers import Tokenizer

from dqe_jax.data import tokenizer as text_tokens
from dqe_jax.data.annotations import hp_fashioniq
from dqe_jax.data.annotations.hp_fashioniq import Judgement
from dqe_jax.data.text import Wordings
from dqe_jax.embedding.sources import Rows
from dqe_jax.evaluation.asked import Asked
from dqe_jax.evaluation.evaluator import Embedded, EmbeddingEvaluator, RetrievalEvaluator
from dqe_jax.evaluation.judgements import preference_metrics
from dqe_jax.method.arrays import Params
from dqe_jax.utils.errors import UserError
from dqe_jax.utils.files import write_json


def open_preferences(
    dataset: str, split: Asked, path: str | os.PathLike[str]
) -> tuple[list[Judgement], int]:
    """The judgements of HP-FashionIQ whose images are all at hand, and how many there are in all.

    Raises:
      UserError: the file cannot be read, or the split is not FashionIQ's validation split.
    """
    if (dataset, split.name) != ("fashioniq", "validation"):
        raise UserError(
            f"--hp_fashioniq judges images of FashionIQ's val split, not {split.name} of "
            f"{dataset}: take --config=configs/fiq.py --split=val."
        )
    judgements = hp_fashioniq.read(epath.Path(path))
    known = set(split.gallery.ids)
    usable = [j for j in judgements if known >= {j.reference, *j.first, *j.second}]
    if not usable:
        raise UserError(f"{path}: none of the images it names is at hand.")
    return usable, len(judgements)


def texts_of(tokenizer: Tokenizer, judgements: Sequence[Judgement]) -> Wordings:
    """The texts of judgements."""
    texts = [judgement.text for judgement in judgements]
    return Wordings(text_tokens.encode(tokenizer, texts)[0][:, None], [texts])


def embed_judgements(
    evaluator: RetrievalEvaluator,
    texts: Rows,
    params: Params,
    judgements: Sequence[Judgement],
) -> Embedded:
    """Embeddings of judgements as queries, and of the images that they judge.

    Args:
      evaluator: of FashionIQ's validation split.
      texts: of the judgements.
      params: replicated over the devices.
      judgements: of `open_preferences`.
    """
    row = {image: i for i, image in enumerate(evaluator.split.gallery.ids)}
    reference = np.array([row[j.reference] for j in judgements])
    return evaluator.embed(params, reference, texts, _candidates(evaluator, judgements))


def _candidates(evaluator: EmbeddingEvaluator, judgements: Sequence[Judgement]) -> np.ndarray:
    """Gallery rows of the two sets of each judgement, int `[J, 10]`."""
    row = {image: i for i, image in enumerate(evaluator.split.gallery.ids)}
    return np.array([[row[image] for image in (*j.first, *j.second)] for j in judgements])


def measure_preferences(
    evaluator: EmbeddingEvaluator,
    embedded: Embedded,
    judged: tuple[list[Judgement], int],
    path: epath.Path | None,
) -> dict[str, float]:
    """The metrics of HP-FashionIQ, written to `path` and logged.

    Args:
      evaluator: of FashionIQ's validation split.
      embedded: the judgements as queries, and a gallery with the images that they judge.
      judged: of `open_preferences`.
      path: a .json; None writes nothing.
    """
    judgements, official = judged
    candidates = _candidates(evaluator, judgements)
    scores = evaluator.score_rows(embedded, candidates)
    first, second = np.split(scores, 2, axis=1)
    preferred = np.array([j.preferred for j in judgements])
    found = preference_metrics(first, second, preferred) | {"official": official}
    if path is not None:
        write_json(path, found)
    logging.info(
        "HP-FashionIQ, %d of %d judgements:\n%s", len(judgements), official, json.dumps(found)
    )
    return found
