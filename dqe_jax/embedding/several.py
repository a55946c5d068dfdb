"""Questions of several images: what becomes of an embedding of each."""

from __future__ import annotations

import numpy as np


def means_of(rows: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """Means of the rows of each owner: `[n, ...]`.

    Args:
      rows: float `[P, ...]`.
      owner: int `[P]`, from 0 to n - 1, each at least once.
    """
    count = np.bincount(owner)
    total = np.zeros((len(count), *rows.shape[1:]), rows.dtype)
    np.add.at(total, owner, rows)
    found: np.ndarray = total / count.reshape(-1, *[1] * (rows.ndim - 1)).astype(rows.dtype)
    return found


def directions_of(rows: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """`means_of` rows `[P, d]`, at length 1; a mean of zero stays."""
    mean = means_of(rows, owner)
    length = np.linalg.norm(mean, axis=1, keepdims=True)
    found: np.ndarray = mean / np.where(length > 0, length, 1)
    return found
