"""HP-FashionIQ: does a model prefer the set of images that people preferred?"""

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


def judgement_ids(judgements: Sequence[Judgement]) -> list[str]:
    """Ids of judgements, as files of embeddings name them: `user_1/question_set_1/0`."""
    return [f"{j.user}/{j.question_set}/{j.index}" for j in judgements]


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


def preference_metrics(
    first: np.ndarray, second: np.ndarray, preferred: Sequence[int] | np.ndarray
) -> dict[str, float]:
    """How well a model agrees with the judgements of HP-FashionIQ.

    The score of a set of five images is the mean of the model's scores for them.

    | key | |
    | --- | --- |
    | `preference_ratio` | of the judgements with set 1 scoring higher, the share preferring set 1 |
    | `first_higher` | the number of those judgements |
    | `agreement` | share whose higher-scoring set is the preferred one; a tie counts half |
    | `ties` | the number of judgements whose two sets score the same |
    | `always_first` | share that prefers set 1: the baseline |
    | `judgements` | their number |

    `preference_ratio` is that of the authors' script (github.com/jackwaky/QuRe,
    HP_FashionIQ/evaluate.py), which looks at one order of the two sets only, and is 0.0 if set 1
    never scores higher. `agreement`, which is ours, looks at both orders. Sets with
    the same images in another order, of which there are ten, tie; in the script rounding decides.

    Args:
      first: float `[J, 5]`, the model's scores of set 1.
      second: float `[J, 5]`, of set 2.
      preferred: int `[J]`, 1 or 2.

    Raises:
      ValueError: shapes do not fit, there is no judgement, or a value cannot be.
    """
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    preferred = np.asarray(preferred)
    if first.ndim != 2 or first.shape != second.shape or preferred.shape != first.shape[:1]:
        raise ValueError(
            f"expected scores [J, 5], [J, 5] and judgements [J], got {list(first.shape)}, "
            f"{list(second.shape)} and {list(preferred.shape)}"
        )
    if not len(first) or not np.isin(preferred, (1, 2)).all():
        raise ValueError("there are no judgements, or one is neither 1 nor 2")
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise ValueError("the scores hold values that are not finite")
    # Sorted, so that the order of the images cannot change how the mean is rounded.
    difference = np.sort(first).mean(axis=1) - np.sort(second).mean(axis=1)
    higher, ties, prefers_first = difference > 0, difference == 0, preferred == 1
    agrees = np.where(ties, 0.5, higher == prefers_first)
    return {
        "preference_ratio": float(prefers_first[higher].mean()) if higher.any() else 0.0,
        "agreement": float(agrees.mean()),
        "always_first": float(prefers_first.mean()),
        "first_higher": int(higher.sum()),
        "ties": int(ties.sum()),
        "judgements": len(preferred),
    }
