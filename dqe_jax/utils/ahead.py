"""Reads pieces of work in threads, ahead of who takes them."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

_Piece = TypeVar("_Piece")
_Read = TypeVar("_Read")

AHEAD = 2


def read_ahead(
    read: Callable[[_Piece], _Read], pieces: Sequence[_Piece], threads: int
) -> Iterator[_Read]:
    """What `read` makes of each piece, in order; at most `AHEAD + 1` results are held."""
    with ThreadPoolExecutor(threads) as pool:
        waiting = collections.deque(pool.submit(read, piece) for piece in pieces[:AHEAD])
        for i in range(len(pieces)):
            if i + AHEAD < len(pieces):
                waiting.append(pool.submit(read, pieces[i + AHEAD]))
            yield waiting.popleft().result()
