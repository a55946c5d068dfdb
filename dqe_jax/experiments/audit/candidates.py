"""Which queries can be audited, and what every candidate is to a query in truth.

Images are compared by photo: copies of one photo share an id. To a query a candidate is

| class | |
| --- | --- |
| relevant | truly relevant (the data set says so), and no known positive |
| near miss | not relevant, but its reference, or the target of another query of that reference |
| unrelated | all others |

The near misses are those of the data, not of the model: what another text makes of the same
reference differs from it in a few attributes, as the target does. Known positives (the target, all
annotated targets) and copies of their photos are in no class: they are never negatives.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict

import numpy as np

from dqe_jax.data.splits import Split, image_ids_of, known_positive_ids
from dqe_jax.utils.errors import UserError

CLASSES = ("relevant", "near_miss", "unrelated")


@dataclasses.dataclass(frozen=True)
class Truth:
    """Image ids by what they are to `B` queries, padded with -1.

    Attributes:
      known: int32 `[B, P]`, known positives.
      relevant: int32 `[B, V]`, truly relevant ones, known positives among them.
      near: int32 `[B, W]`, the reference and the targets of the queries of that reference.
    """

    known: np.ndarray
    relevant: np.ndarray
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
    known = [i for i, rows in enumerate(queries.relevant) if len(rows) and queries.target[i] >= 0]
    if not known:
        raise UserError(
            f"no query of {split.name} says which images are truly relevant: audit a data set that "
            "does, such as shapes, fashion_products, or triplets with several targets."
        )
    rng = np.random.default_rng(seed)
    return np.sort(rng.choice(known, min(num, len(known)), replace=False))


def truth_of(split: Split, rows: np.ndarray) -> Truth:
    """The truth of the queries at these positions, int `[B]`."""
    queries, image_ids = split.queries, split.gallery.image_ids
    related: dict[int, set[int]] = defaultdict(set)  # by the photo of the reference
    for reference, target, targets in zip(
        queries.reference, queries.target, queries.known_positives
    ):
        same = related[image_ids[reference]]
        same.add(reference)
        same.update(row for row in (target, *targets) if row >= 0)
    near = [np.array(sorted(related[image_ids[i]]), np.int32) for i in queries.reference[rows]]
    return Truth(
        known=known_positive_ids(split)[rows],
        relevant=image_ids_of(split, [queries.relevant[i] for i in rows]),
        near=image_ids_of(split, near),
    )


def classify(truth: Truth, image_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What each candidate is to each query.

    Args:
      truth: of `B` queries.
      image_ids: int `[N]`, image ids of the candidates, -1 for padding.

    Returns:
      classes int8 `[B, N]`, positions in `CLASSES`, and forbidden bool `[B, N]`: known positives
      and padding, whose class means nothing.
    """
    near, relevant = has_image(truth.near, image_ids), has_image(truth.relevant, image_ids)
    classes = np.where(relevant, 0, np.where(near, 1, 2)).astype(np.int8)
    return classes, has_image(truth.known, image_ids) | (image_ids < 0)


def has_image(ids: np.ndarray, image_ids: np.ndarray) -> np.ndarray:
    """Whether a candidate's photo is among a query's: `[B, P], [N] -> bool [B, N]`."""
    # Looked up in a table over all photos, which avoids an array [B, P, N].
    held = np.zeros((len(ids), max(ids.max(initial=-1), image_ids.max(initial=-1)) + 2), bool)
    np.put_along_axis(held, ids.astype(np.int64) + 1, True, axis=1)
    held[:, 0] = False  # what the padding of `ids` set
    return held[:, image_ids + 1]
