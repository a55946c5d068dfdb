"""What a source needs of a store: rows, each made of some content."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence

import numpy as np

from dqe_jax.data.digest import CONTENT_BYTES
from dqe_jax.feature_store import keys as row_names
from dqe_jax.feature_store.shards import KEY_BYTES


@dataclasses.dataclass
class Need:
    """Rows that a source needs.

    Attributes:
      digests: gives uint8 `[n, 16]`, digests of their contents.
      read: gives the input of a row.
      names: of the rows: ids of images, or texts.
      view: of the contents, see `keys.row_keys`.
      rows: int64 `[n]`, their numbers in the table; set when it is filled.
    """

    digests: Callable[[], np.ndarray]
    read: Callable[[int], np.ndarray]
    names: Sequence[str]
    view: int = 0
    rows: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))

    @functools.cached_property
    def keys(self) -> np.ndarray:
        """uint8 `[n, KEY_BYTES]`."""
        return row_names.row_keys(self.digests(), self.view)


def text_digests(texts: Sequence[str]) -> np.ndarray:
    """Digests of texts, uint8 `[n, CONTENT_BYTES]`."""
    digests = [hashlib.sha256(text.encode()).digest()[:CONTENT_BYTES] for text in texts]
    return np.frombuffer(b"".join(digests), np.uint8).reshape(len(texts), CONTENT_BYTES)


def distinct(needs: Sequence[Need]) -> tuple[np.ndarray, np.ndarray]:
    """The distinct rows of several needs.

    Returns:
      Their keys, uint8 `[n, KEY_BYTES]`, and the first need and row that has each, int64 `[n, 2]`.
    """
    seen: dict[bytes, tuple[int, int]] = {}
    for number, need in enumerate(needs):
        for row, key in enumerate(need.keys):
            seen.setdefault(key.tobytes(), (number, row))
    keys = np.frombuffer(b"".join(seen), np.uint8).reshape(-1, KEY_BYTES)
    return keys, np.array(list(seen.values()), np.int64).reshape(-1, 2)
