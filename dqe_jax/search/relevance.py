"""Relevance feedback: earlier turns and rejections of a conversation move its query.

After Rocchio (1971), in the space of embeddings. The moved query is

    q' = unit(q + EARLIER * sum_i DECAY^i q_i - REJECTED * mean_r t_r)

`q_i` are the queries of the turns before, the latest first (i = 0). `t_r` is of each rejected image
the token that is most similar to `q`: the one by which it was found. The constants were set by
hand; `dqe-jax simulate` measures them and others (`--earlier`, `--decay`, `--rejected`).
"""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Moves:
    """How far a query moves; 0 leaves it where it is.

    Attributes:
      earlier: towards the query of the turn before.
      decay: by which each turn before that counts less.
      rejected: away from the mean of the rejected images.
    """

    earlier: float = 0.3
    decay: float = 0.5
    rejected: float = 0.3


MOVES = Moves()
STILL = Moves(earlier=0.0, rejected=0.0)


def moved(
    query: np.ndarray, earlier: np.ndarray, rejected: np.ndarray, moves: Moves = MOVES
) -> np.ndarray:
    """A query moved by its conversation.

    Args:
      query: float32 `[d]`, at length 1.
      earlier: float32 `[E, d]`, queries of the turns before, the oldest first.
      rejected: float32 `[R, M, d]`, embeddings of rejected images.
      moves: how far.

    Returns:
      float32 `[d]`, at length 1.
    """
    if not len(earlier) and not len(rejected):
        return query
    out = query.astype(np.float64)
    for age, other in enumerate(earlier[::-1]):
        out += moves.earlier * moves.decay**age * other
    if len(rejected):
        best = np.argmax(rejected @ query, axis=1)
        out -= moves.rejected * rejected[np.arange(len(rejected)), best].mean(0)
    length = float(np.linalg.norm(out))
    return (out / length).astype(np.float32) if length > 1e-6 else query
