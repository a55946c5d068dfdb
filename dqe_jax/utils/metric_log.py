"""Where a run's metrics go: `metrics.jsonl`, one JSON object a line, and TensorBoard events."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from etils import epath
from tensorboardX import SummaryWriter


class MetricLog:
    """Writes metrics by step.

    When a run resumes at step `s`, lines of later steps are dropped first: the steps after the
    checkpoint are taken again, and each step is logged once.
    """

    def __init__(self, workdir: epath.Path, resume_step: int = 0):
        """Opens the log of a workdir."""
        self._path = workdir / "metrics.jsonl"
        kept = "".join(line + "\n" for line in _lines_until(self._path, resume_step))
        self._path.write_text(kept)
        # TensorBoard drops what an earlier attempt wrote at or after this step.
        self._events = SummaryWriter(str(workdir / "events"), purge_step=resume_step + 1)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Appends a line `{"step": step, ...}` and the same numbers to TensorBoard."""
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            if isinstance(value, (int, float)):
                # TensorBoard allows no @ in a name.
                self._events.add_scalar(name.replace("@", "_at_"), value, step)

    def close(self) -> None:
        """Flushes."""
        self._events.close()


def _lines_until(path: epath.Path, step: int) -> list[str]:
    """The lines of steps up to `step`; a half-written last line is dropped.

    So is the line of the test split: every run that reaches its end writes it anew.
    """
    kept = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            values = json.loads(line)
            if values["step"] <= step and not any(name.startswith("test/") for name in values):
                kept.append(line)
        except (json.JSONDecodeError, KeyError):
            continue
    return kept
