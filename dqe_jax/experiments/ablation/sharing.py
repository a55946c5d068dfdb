"""Runs that several processes share: each takes those that no other process trains."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from absl import logging

from dqe_jax.training.lease import BusyError

POLL_SECONDS = 5.0
Item = TypeVar("Item")
Result = TypeVar("Result")


def in_turn(
    items: Iterable[Item],
    complete: Callable[[Item], Result],
    *,
    pause: Callable[[float], None] = time.sleep,
) -> Iterator[tuple[Item, Result]]:
    """Completes every item, and yields it with its result as soon as it has one.

    An item that another process is busy with comes after the others. When only such items are left
    it waits until they are complete, or until their process has ended and they can be taken over.

    Args:
      items: in the order in which they are tried.
      complete: gives the result of an item, and raises a `BusyError` if another process is at it.
      pause: waits for some seconds.
    """
    missing, told = list(items), False
    while missing:
        busy = []
        for item in missing:
            try:
                result = complete(item)
            except BusyError as error:
                logging.log_if(logging.INFO, "%s", not told, error)
                busy.append(item)
                continue
            yield item, result
        if len(busy) == len(missing):
            if not told:
                logging.info("Other processes train the %d runs that are left: waiting.", len(busy))
            told = True
            pause(POLL_SECONDS)
        missing = busy
