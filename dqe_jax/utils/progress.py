"""Progress of long work: a bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import tqdm
from absl import logging

_T = TypeVar("_T")

# Without a terminal a line is written after so many seconds or this share of the work.
SECONDS, SHARE = 60.0, 0.1
MANY = 1000  # of fewer pieces nothing is said: they take seconds


def on_terminal() -> bool:
    """Whether a bar would be seen as one."""
    return sys.stderr.isatty()


class Pace:
    """Says when a plain line is due."""

    def __init__(self, total: int, done: int = 0):
        """Starts after `done` of `total` pieces."""
        self._total, self._told, self._told_at = total, done, time.time()

    def due(self, done: int) -> bool:
        """Whether a line is due after so many pieces: then it counts as written."""
        now = time.time()
        late = now - self._told_at >= SECONDS
        if not late and done < self._total and done - self._told < SHARE * self._total:
            return False
        self._told, self._told_at = done, now
        return True


def progress(
    items: Iterable[_T], total: int, what: str, each: int = 1, least: int = MANY
) -> Iterator[_T]:
    """Passes the items on, and shows how many of `total` are done if there are at least `least`.

    Args:
      items: any.
      total: how many there are.
      what: begins each line, such as "Decoding photos".
      each: pieces that an item is of.
      least: of fewer pieces nothing is said.
    """
    if total < least:
        yield from items
        return
    if on_terminal():
        with tqdm.tqdm(total=total, desc=what, dynamic_ncols=True, leave=False) as bar:
            for item in items:
                yield item
                bar.update(min(each, total - bar.n))
        return
    pace = Pace(total)
    for number, item in enumerate(items, 1):
        count = min(number * each, total)
        if pace.due(count):  # before the item: who takes them may stop at the last one
            logging.info("%s: %d of %d", what, count, total)
        yield item
