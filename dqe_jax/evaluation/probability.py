"""The probability that a found image is valid, fitted to a score on validation data.

A logistic curve `p = 1 / (1 + exp(-(slope * score + offset)))` with the smoothed labels of Platt
("Probabilistic outputs for support vector machines", 1999), which keep the curve finite where the
scores separate valid images from others. It is fitted to the ranked lists of the validation
queries, so it holds for images that a search shows, and for galleries like that of the validation
split. It never falls: a model whose scores say nothing gives all images the share of valid ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from dqe_jax.data.examples import Queries
from dqe_jax.utils.files import JsonObject


@dataclasses.dataclass(frozen=True)
class Probability:
    """The curve.

    Attributes:
      slope: of the score, at least 0 where it was fitted.
      offset: added to it.
    """

    slope: float
    offset: float

    def of(self, scores: np.ndarray) -> np.ndarray:
        """Probabilities float64 of scores, in the same shape."""
        return _logistic(self.slope * np.asarray(scores, np.float64) + self.offset)

    def to_json(self) -> JsonObject:
        """What JSON can hold."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, held: object) -> Probability | None:
        """The curve of a checkpoint or an exported model; None where none was fitted.

        Raises:
          ValueError: it is not what `to_json` gives.
        """
        if held is None:
            return None
        if not isinstance(held, dict) or held.keys() != {"slope", "offset"}:
            raise ValueError("probability has no slope and offset")
        found = cls(float(held["slope"]), float(held["offset"]))
        if not np.isfinite([found.slope, found.offset]).all():
            raise ValueError("probability is not finite")
        return found


def fit(rows: np.ndarray, scores: np.ndarray, queries: Queries) -> Probability | None:
    """Fits the curve to ranked lists.

    Valid are all relevant images where a data set knows them, else the annotated targets.

    Args:
      rows: int `[Q, K]`, gallery rows, -1 where a list ends.
      scores: float `[Q, K]`.
      queries: of the split.

    Returns:
      None where the lists hold no valid image, or nothing else.
    """
    from scipy.optimize import minimize  # slow to import

    labelled = np.flatnonzero(queries.target >= 0)
    found = [np.isin(rows[i], valid_rows(queries, i)) for i in labelled.tolist()]
    listed = rows[labelled] >= 0
    valid = np.reshape(found, listed.shape)[listed]
    given = scores[labelled][listed].astype(np.float64)
    positive, negative = int(valid.sum()), int((~valid).sum())
    if not positive or not negative:
        return None
    label = np.where(valid, (positive + 1) / (positive + 2), 1 / (negative + 2))
    mean, width = given.mean(), max(given.std(), 1e-6)
    x = (given - mean) / width

    def loss(curve: np.ndarray) -> tuple[float, np.ndarray]:
        z = curve[0] * x + curve[1]
        error = _logistic(z) - label
        return float((np.logaddexp(0, z) - label * z).mean()), np.array(
            [(error * x).mean(), error.mean()]
        )

    start = np.array([0.0, np.log((positive + 1) / (negative + 1))])
    bounds = [(0, None), (None, None)]  # a higher score never makes an image less likely
    slope, offset = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds).x
    return Probability(float(slope / width), float(offset - slope * mean / width))


def _logistic(z: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(z / 2))  # exp would overflow


def valid_rows(queries: Queries, at: int) -> Sequence[int] | np.ndarray:
    """Gallery rows that are valid for a query: its relevant ones if they are known."""
    relevant = queries.relevant[at]
    return relevant if len(relevant) else queries.target[at : at + 1]
