"""HP-FashionIQ: does a model prefer the set of images that people preferred?"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from absl import logging
from etils import epath
from tokenizers import Tokenizer

from dqe_jax.data import tokenizer as text_tokens
from dqe_jax.data.annotations import hp_fashioniq
from dqe_jax.data.annotations.hp_fashioniq import Judgement
from dqe_jax.data.splits import Split
from dqe_jax.evaluation import protocols, report
from dqe_jax.evaluation.evaluator import RetrievalEvaluator
from dqe_jax.utils.errors import UserError


def open_preferences(config: Any, split: Split, path: str) -> tuple[list[Judgement], int]:
    """The judgements of HP-FashionIQ whose images are all at hand, and how many there are in all.

    Raises:
      UserError: the file cannot be read, or the split is not FashionIQ's validation split.
    """
    if (config.data.dataset, split.name) != ("fashioniq", "validation"):
        raise UserError(
            f"--hp_fashioniq judges images of FashionIQ's val split, not {split.name} of "
            f"{config.data.dataset}: take --config=configs/fiq.py --split=val."
        )
    judgements = hp_fashioniq.read(epath.Path(path))
    known = set(split.gallery.ids)
    usable = [j for j in judgements if known >= {j.reference, *j.first, *j.second}]
    if not usable:
        raise UserError(f"{path}: none of the images it names is at hand.")
    return usable, len(judgements)


def measure_preferences(
    evaluator: RetrievalEvaluator,
    tokenizer: Tokenizer,
    params: Any,
    judged: tuple[list[Judgement], int],
    path: epath.Path,
) -> dict[str, float]:
    """The metrics of HP-FashionIQ, written to `path` and logged.

    Args:
      evaluator: of FashionIQ's validation split.
      tokenizer: of the model.
      params: replicated over the devices.
      judged: of `open_preferences`.
      path: a .json.
    """
    judgements, official = judged
    row = {image: i for i, image in enumerate(evaluator.split.gallery.ids)}
    ids, _ = text_tokens.encode(tokenizer, [j.text for j in judgements])
    candidates = np.array([[row[image] for image in (*j.first, *j.second)] for j in judgements])
    reference = np.array([row[j.reference] for j in judgements])
    scores = evaluator.score_rows(params, reference, ids, candidates)
    first, second = np.split(scores, 2, axis=1)
    preferred = np.array([j.preferred for j in judgements])
    found = protocols.preference_metrics(first, second, preferred) | {"official": official}
    report.write_json(path, found)
    logging.info(
        "HP-FashionIQ, %d of %d judgements:\n%s", len(judgements), official, json.dumps(found)
    )
    return found
