"""Where a run's metrics go: JSON lines, TensorBoard events, and services that are asked for.

`metrics.jsonl` holds what the run computes: repeated, killed or resumed it is the same to the byte.
`timing.jsonl` holds what the machine made of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from absl import logging
from etils import epath

from dqe_jax.utils.errors import reason_of
from dqe_jax.utils.events import EventFile
from dqe_jax.utils.files import JsonObject, finite, read_bytes, write_at_once
from dqe_jax.utils.paths import is_remote
from dqe_jax.utils.sinks import Sinks


class MetricLog:
    """Writes metrics by step.

    When a run resumes at step `s`, lines of later steps are dropped first: the steps after the
    checkpoint are taken again, and each step is logged once.
    """

    def __init__(
        self,
        directory: epath.Path,
        resume_step: int | None = 0,
        again: str = "test/",
        sinks: Sinks | None = None,
    ):
        """Opens the logs of a directory, which is made if it is not there.

        Args:
          directory: for the files of the module's description, and `events/`.
          resume_step: the last step whose lines stay; None for all.
          again: lines with a name that starts so are dropped too: the run writes them anew; ""
            for none.
          sinks: get the same numbers, and are closed with the log; None for none.

        Raises:
          UserError: something that cannot be read stands in the place of a file.
        """
        self._sinks = sinks
        directory.mkdir(parents=True, exist_ok=True)
        self._paths = {name: directory / f"{name}.jsonl" for name in ("metrics", "timing")}
        # In a bucket files can only be written as a whole, so their content is kept here.
        self._held: dict[str, str] | None = {} if is_remote(directory) else None
        self._late: set[str] = set()  # of these, what the bucket has not got yet
        for name, path in self._paths.items():
            text = "".join(line + "\n" for line in _lines_until(path, resume_step, again))
            if self._held is not None:
                self._held[name] = text
            # Written at once, so that a run that is killed here does not lose the lines.
            write_at_once(path, text)
        # TensorBoard drops what an earlier attempt wrote at or after this step.
        purged = None if resume_step is None else resume_step + 1
        self._events = EventFile(directory / "events", purged)

    def write(self, step: int, values: Mapping[str, object]) -> None:
        """Appends a line `{"step": step, ...}` and the same numbers to TensorBoard."""
        self._append("metrics", step, values)

    def write_timing(self, step: int, values: Mapping[str, float]) -> None:
        """The same for times and rates."""
        self._append("timing", step, values)

    def steps(self) -> list[int]:
        """Steps of the lines of `metrics.jsonl`."""
        lines = map(read_line, self._paths["metrics"].read_bytes().split(b"\n"))
        return [values["step"] for values in lines if values is not None]

    def close(self) -> None:
        """Flushes."""
        for name in sorted(self._late):
            self._write_held(name)
        self._events.close()
        if self._sinks is not None:
            self._sinks.close()

    def _append(self, name: str, step: int, values: Mapping[str, object]) -> None:
        # Numbers that are not finite are no JSON.
        line = json.dumps(finite({"step": step, **values}), allow_nan=False) + "\n"
        if self._held is None:
            with self._paths[name].open("a") as file:
                file.write(line)
        else:
            self._held[name] += line
            self._write_held(name)
        numbers = {key: x for key, x in values.items() if isinstance(x, (int, float))}
        if self._sinks is not None:
            self._sinks.log(step, numbers)
        # TensorBoard allows no @ in a name.
        self._events.write(step, {key.replace("@", "_at_"): x for key, x in numbers.items()})

    def _write_held(self, name: str) -> None:
        """Writes the file of a bucket anew; what cannot be written now is in the next one."""
        if self._held is None:
            return
        try:
            self._paths[name].write_text(self._held[name])
            self._late.discard(name)
        except Exception as error:  # of the bucket, in many types
            if name not in self._late:
                logging.warning(
                    "%s cannot be written now (%s); it is tried again with its next line.",
                    *(self._paths[name], reason_of(error)),
                )
            self._late.add(name)


class NoLog:
    """The log of processes that do not lead: it writes nothing."""

    def write(self, step: int, values: Mapping[str, object]) -> None:
        """Nothing."""

    def write_timing(self, step: int, values: Mapping[str, float]) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def _lines_until(path: epath.Path, step: int | None, again: str) -> list[str]:
    """The lines that stay, see `MetricLog`; a half-written or damaged line does not."""
    kept, damaged = [], 0
    for line in read_bytes(path).split(b"\n") if path.exists() else ():
        values = read_line(line)
        if values is None:
            damaged += bool(line.strip())
            continue
        written_anew = again and any(name.startswith(again) for name in values)
        if (step is None or values["step"] <= step) and not written_anew:
            kept.append(line.decode())
    if damaged > 1:  # a run that was killed leaves one
        logging.warning("%s: %d lines are damaged; they are dropped.", path, damaged)
    return kept


def read_line(line: bytes) -> JsonObject | None:
    """The content of a line, with an integer `step`; None if it is no line of a log."""
    try:
        values = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    sound = isinstance(values, dict) and type(values.get("step")) is int
    return values if sound else None
