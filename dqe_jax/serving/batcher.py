"""Answers searches together: those that wait while the devices work are the next batch."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable, Sequence

from absl import logging

from dqe_jax.search.asks import Ask
from dqe_jax.search.results import Results
from dqe_jax.utils.errors import UserError


class BusyError(Exception):
    """Too many searches wait."""


class ClosedError(Exception):
    """The server ends."""


class _Waiting:
    """A search and who waits for it; `result` is called from the batcher's thread."""

    def __init__(self, ask: Ask, loop: asyncio.AbstractEventLoop):
        self.ask, self._loop = ask, loop
        self.future: asyncio.Future[Results] = loop.create_future()

    def given_up(self) -> bool:
        return self.future.cancelled()

    def result(self, value: Results | BaseException) -> None:
        def tell() -> None:
            if self.future.done():
                return
            if isinstance(value, BaseException):
                self.future.set_exception(value)
            else:
                self.future.set_result(value)

        self._loop.call_soon_threadsafe(tell)


class Batcher:
    """A thread that answers searches, as many at a time as wait, up to a limit.

    No search waits for others to come: a batch is what came while the one before was answered.
    """

    def __init__(
        self,
        answer: Callable[[Sequence[Ask]], list[Results]],
        *,
        most: int,
        waiting: int,
        counted: Callable[[int], object] = lambda size: None,
    ):
        """Starts the thread.

        Args:
          answer: of a batch, such as `Index.answer`; it is called by one thread alone.
          most: searches of a batch.
          waiting: searches that may wait.
          counted: gets the size of each batch.
        """
        self._answer, self._most, self._counted = answer, most, counted
        self._queue: queue.Queue[_Waiting | None] = queue.Queue(waiting)
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="batcher", daemon=True)
        self._thread.start()

    async def ask(self, ask: Ask) -> Results:
        """What a search finds.

        Raises:
          BusyError: too many wait.
          ClosedError: the batcher was closed.
          UserError: the search cannot be answered.
        """
        if self._closed:
            raise ClosedError
        waiting = _Waiting(ask, asyncio.get_running_loop())
        try:
            self._queue.put_nowait(waiting)
        except queue.Full:
            raise BusyError from None
        return await waiting.future

    def close(self) -> None:
        """Answers what waits, and ends the thread."""
        if not self._closed:
            self._closed = True
            self._queue.put(None)
            self._thread.join()

    def _run(self) -> None:
        ending = False
        while not ending:
            batch: list[_Waiting] = []
            one: _Waiting | None = self._queue.get()
            while True:
                if one is None:
                    ending = True
                elif not one.given_up():
                    batch.append(one)
                if ending or len(batch) >= self._most:
                    break
                try:
                    one = self._queue.get_nowait()
                except queue.Empty:
                    break
            if batch:
                self._counted(len(batch))
                self._answer_all(batch)

    def _answer_all(self, batch: Sequence[_Waiting]) -> None:
        """Answers a batch; if it fails, each search alone, so that one does not fail others."""
        try:
            for waiting, results in zip(batch, self._answer([one.ask for one in batch])):
                waiting.result(results)
        except Exception as error:
            if len(batch) > 1:
                for one in batch:
                    self._answer_all([one])
                return
            if not isinstance(error, UserError):
                logging.exception("A search failed.")
            batch[0].result(error)
