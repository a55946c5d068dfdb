"""Which queries can be audited, and what every candidate is to a query in truth.

Images are compared by photo: copies of one photo share an id. To a query a candidate is

| class | |
| --- | --- |
| valid | in truth valid (the data set says so), and no known positive |
| near miss | not valid, but its reference, or the target of another query of that reference |
| unrelated | all others |

The near misses are those of the data, not of the model: what another text makes of the same
reference differs from it in a few attributes, as the target does. Known positives (the target, all
annotated targets) and copies of their photos are in no class: they are never negatives.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict

import numpy as np

from dqe_jax.data.splits import Split, known_positives, photo_ids
from dqe_jax.utils.errors import UserError

CLASSES = ("valid", "near_miss", "unrelated")


@dataclasses.dataclass(frozen=True)
class Truth:
    """Image ids by what they are to `B` queries, padded with -1.

    Attributes:
      known: int32 `[B, P]`, known positives.
      valid: int32 `[B, V]`, in truth valid ones, known positives among them.
      near: int32 `[B, W]`, the reference and the targets of the queries of that reference.
    """

    known: np.ndarray
    valid: np.ndarray
    near: np.ndarray


def sample_queries(split: Split, num: int, seed: int) -> np.ndarray:
    """Ascending positions of `num` queries (all, if there are fewer) whose truth is known.

    Args:
      split: of the data set.
      num: at least 1.
      seed: of the sample: the same seed gives the same queries.

    Raises:
      UserError: there is none.
    """
    queries = split.queries
    known = [i for i, rows in enumerate(queries.valid) if len(rows) and queries.target[i] >= 0]
    if not known:
        raise UserError(
            f"no query of {split.name} says which images are in truth valid: audit a data set that "
            "does, such as shapes, fashion_products, or triplets with several targets."
        )
    rng = np.random.default_rng(seed)
    return np.sort(rng.choice(known, min(num, len(known)), replace=False))


def truth_of(split: Split, rows: np.ndarray) -> Truth:
    """The truth of the queries at these positions, int `[B]`."""
    queries, photo = split.queries, split.gallery.photo
    related: dict[int, set[int]] = defaultdict(set)  # by the photo of the reference
    for reference, target, targets in zip(queries.reference, queries.target, queries.targets):
        same = related[photo[reference]]
        same.add(reference)
        same.update(row for row in (target, *targets) if row >= 0)
    near = [np.array(sorted(related[photo[i]]), np.int32) for i in queries.reference[rows]]
    return Truth(
        known=known_positives(split)[rows],
        valid=photo_ids(split, [queries.valid[i] for i in rows]),
        near=photo_ids(split, near),
    )


def classify(truth: Truth, photo: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What each candidate is to each query.

    Args:
      truth: of `B` queries.
      photo: int `[N]`, image ids of the candidates, -1 for padding.

    Returns:
      classes int8 `[B, N]`, positions in `CLASSES`, and forbidden bool `[B, N]`: known positives
      and padding, whose class means nothing.
    """
    near, valid = has_photo(truth.near, photo), has_photo(truth.valid, photo)
    classes = np.where(valid, 0, np.where(near, 1, 2)).astype(np.int8)
    return classes, has_photo(truth.known, photo) | (photo < 0)


def has_photo(ids: np.ndarray, photo: np.ndarray) -> np.ndarray:
    """Whether a candidate's photo is among a query's: `[B, P], [N] -> bool [B, N]`."""
    # By a table over all photos: no [B, P, N] array.
    held = np.zeros((len(ids), max(ids.max(initial=-1), photo.max(initial=-1)) + 2), bool)
    np.put_along_axis(held, ids.astype(np.int64) + 1, True, axis=1)
    held[:, 0] = False  # what the padding of `ids` set
    return held[:, photo + 1]
