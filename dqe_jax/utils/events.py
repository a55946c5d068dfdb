"""Numbers by step for TensorBoard, in a file of events.

They are written by the caller's thread: the writer that tensorboardX would start has a thread of
its own, which ends at a full disk, tells so with a traceback, and lets the next ones wait for ever.
"""

from __future__ import annotations

import contextlib
import re
import sys
import time
from collections.abc import Iterator, Mapping

from etils import epath

FLUSH_S = 120  # a flush waits for the disk, or writes the whole file of a bucket


class EventFile:
    """A file of events in a directory."""

    def __init__(self, directory: epath.Path, purged: int | None = None):
        """Makes the file.

        Args:
          directory: made if it is not there.
          purged: step from which on TensorBoard drops what earlier files hold; None for no step.
        """
        with _without_torch():
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto import event_pb2, summary_pb2
        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        directory.mkdir(parents=True, exist_ok=True)
        self._writer, self._flushed = EventsWriter(str(directory / "events")), 0.0
        if purged is not None:
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._write(purged, session_log=start)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds numbers of a step; what a name must not hold becomes `_`."""
        made = [
            self._summary.Value(tag=re.sub(r"[^-/\w.]", "_", name), simple_value=float(value))
            for name, value in values.items()
        ]
        self._write(step, summary=self._summary(value=made))

    def close(self) -> None:
        """Writes what is left."""
        self._writer.close()

    def _write(self, step: int, **content: object) -> None:
        self._writer.write_event(self._event(wall_time=time.time(), step=step, **content))
        if time.time() - self._flushed > FLUSH_S:
            self._writer.flush()
            self._flushed = time.time()


@contextlib.contextmanager
def _without_torch() -> Iterator[None]:
    """Inside, `import torch` fails as where there is no PyTorch, unless it was imported before.

    tensorboardX imports it to name a type in its hints, no more: 2 s and 180 MiB at each start.
    """
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # type: ignore[assignment]  # Python's own way to stop an import
    try:
        yield
    finally:
        del sys.modules["torch"]
