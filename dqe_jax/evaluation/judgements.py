"""HP-FashionIQ: the metrics, and files of what any model prefers. It needs no JAX.

A file of predictions is a JSON object. For each judgement it gives the scores of the images of both
sets, in the order in which `hpfiq.json` lists them; higher is better.

    {"user_1/question_set_1/0": [[0.31, 0.29, 0.28, 0.25, 0.2], [0.33, 0.3, 0.21, 0.2, 0.1]]}

A judgement is named by its user, its question set and its position in it. All of `hpfiq.json` must
be there, and no other.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence

import numpy as np
from absl import logging
from etils import epath

from dqe_jax.data.annotations import hp_fashioniq
from dqe_jax.data.annotations.hp_fashioniq import SET_SIZE, Judgement
from dqe_jax.utils.errors import UserError
from dqe_jax.utils.files import make_directory, read_json, write_json
from dqe_jax.utils.paths import whole_path

PathLike = str | os.PathLike[str]


def score_preferences(
    path: PathLike, hpfiq: PathLike, *, output: PathLike | None = None
) -> dict[str, float]:
    """Metrics of a file of predictions; they are logged and written.

    Args:
      path: of the file, see the module.
      hpfiq: the published `hpfiq.json`.
      output: directory for `hp_fashioniq-<name of the file>.json`; None writes nothing.

    Returns:
      Those of `preference_metrics`, and `official`, the number of published judgements.

    Raises:
      UserError: a file cannot be read or is not as it should be, or the directory is not writable.
    """
    file, place = epath.Path(path).expanduser(), None
    if output is not None:
        place = whole_path(output)
        make_directory(place)
    judgements = hp_fashioniq.read(epath.Path(hpfiq).expanduser())
    first, second = _read_scores(file, judgement_ids(judgements))
    preferred = [judgement.preferred for judgement in judgements]
    found = preference_metrics(first, second, preferred) | {"official": len(judgements)}
    logging.info("HP-FashionIQ, %d judgements:\n%s", len(judgements), json.dumps(found, indent=2))
    if place is not None:
        write_json(place / f"hp_fashioniq-{file.name.partition('.')[0]}.json", found)
    return found


def _read_scores(path: epath.Path, ids: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Scores of both sets, float64 `[J, 5]` each."""
    content = read_json(path, dict)
    known = frozenset(ids)
    for wrong, fault, remedy in (
        ([x for x in ids if x not in content], "judgements that are not in the file", "add them"),
        ([x for x in content if x not in known], "no judgements of hpfiq.json", "remove them"),
        (
            [x for x in ids if x in content and not _are_scores(content[x])],
            f"judgements without two lists of {SET_SIZE} finite numbers",
            "correct them",
        ),
    ):
        if wrong:
            raise UserError(f"{path}: {fault}: {len(wrong):,} (first: {wrong[0]!r}); {remedy}.")
    scores = np.array([content[x] for x in ids], np.float64)
    return scores[:, 0], scores[:, 1]


def _are_scores(sets: object) -> bool:
    def is_number(value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        return abs(value) < 1e300  # false for NaN; beyond it a whole number may be no float

    return (
        isinstance(sets, list)
        and len(sets) == 2
        and all(isinstance(x, list) and len(x) == SET_SIZE for x in sets)
        and all(is_number(value) for own in sets for value in own)
    )


def judgement_ids(judgements: Sequence[Judgement]) -> list[str]:
    """Ids of judgements, as files of embeddings name them: `user_1/question_set_1/0`."""
    return [f"{j.user}/{j.question_set}/{j.index}" for j in judgements]


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
