"""SIGTERM (preemption) and SIGINT (Ctrl-C): noted, and heeded between two steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType

from absl import logging

SIGNALS = (signal.SIGTERM, signal.SIGINT)

_Handler = Callable[[int, FrameType | None], object] | int | None


class Interrupted(Exception):  # noqa: N818 (no error: the run was asked to end)
    """The run was interrupted and has saved; the process ends with status 128 + signal."""

    def __init__(self, number: int, step: int):
        """Takes a signal and the step that was saved."""
        super().__init__(f"{signal.Signals(number).name} after step {step}")
        self.status = 128 + number


class Interrupts:
    """While this context lasts a first signal is only noted; a second one acts as usual.

    Attributes:
      seen: number of the signal that came; 0 for none.
    """

    def __init__(self) -> None:
        self.seen = 0
        self._before: dict[signal.Signals, _Handler] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():  # others may not set handlers
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.seen = number
        name = signal.Signals(number).name
        logging.warning("%s: saving after the next steps; once more to end at once.", name)
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
