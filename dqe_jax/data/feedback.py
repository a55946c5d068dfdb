r"""The log of what users pick and reject: a line of JSON for each click.

    {"format": 1, "time": "2026-05-01T10:00:00Z", "kind": "reject", "conversation": "c1", "turn": 0,
     "folder": "/photos", "references": ["a.jpg"], "text": "in red", "image": "b.jpg",
     "shown": ["b.jpg", "d.jpg"], "model": "f00d"}

`kind` is `pick`, `reject` or `withdraw`, which takes back what was said of an image in a turn. Ids
are paths from `folder`. A reference that the user gave is `upload:KEY`; its file lies in the
directory beside the log that has its name with `.images`. Lines that cannot be read are counted by
what is wrong with them, and skipped.
"""

from __future__ import annotations

import collections
import dataclasses
import datetime
import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import logging

from dqe_jax.utils.errors import UserError
from dqe_jax.utils.files import is_regular

FORMAT = 1
KINDS = ("pick", "reject", "withdraw")
UPLOAD = "upload:"
LINE_BYTES = 2_000_000  # of a line: longer ones are damaged
SHOWN = 3  # numbers of lines in the log of a run


@dataclasses.dataclass(frozen=True)
class Click:
    """A line of the log.

    Attributes:
      kind: of `KINDS`.
      conversation: in which it was said.
      turn: of the conversation, from 0.
      folder: of the images.
      references: ids of the query's reference images, or `upload:KEY`.
      text: of the query.
      image: id of the image that was clicked.
      shown: ids that the user saw.
      model: fingerprint of the model that found them.
      time: in UTC, ISO 8601.
    """

    kind: str
    conversation: str
    turn: int
    folder: str
    references: tuple[str, ...]
    text: str
    image: str
    shown: tuple[str, ...] = ()
    model: str = ""
    time: str = ""


@dataclasses.dataclass(frozen=True)
class Judged:
    """What users said of the images that a query found.

    Attributes:
      folder: of the images.
      references: ids of its reference images, or `upload:KEY`.
      text: of the query.
      picked: ids that are what was meant.
      rejected: ids that are not, and were picked by nobody.
    """

    folder: str
    references: tuple[str, ...]
    text: str
    picked: tuple[str, ...]
    rejected: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Log:
    """A log that was read.

    Attributes:
      clicks: the lines that could be read.
      problems: what is wrong with the others, with the numbers of their lines from 1.
    """

    clicks: tuple[Click, ...]
    problems: Mapping[str, Sequence[int]]

    @property
    def skipped(self) -> int:
        """How many lines could not be read."""
        return sum(map(len, self.problems.values()))


def append(path: str | os.PathLike[str], click: Click, uploads: Mapping[str, bytes]) -> None:
    """Adds a line to a log; several processes may do so.

    Args:
      path: of the log, which is made if it is not there.
      click: the line.
      uploads: files of the references that the user gave, by KEY.

    Raises:
      UserError: it cannot be written.
    """
    held = {"format": FORMAT, **dataclasses.asdict(click)}
    held["time"] = click.time or datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    line = (json.dumps(held, ensure_ascii=False) + "\n").encode("utf-8", "replace")
    try:
        for key, data in uploads.items():
            file = upload_file(path, key)
            if not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
                partial.write_bytes(data)
                partial.replace(file)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+b") as log:
            fcntl.flock(log, fcntl.LOCK_EX)
            end = log.seek(0, os.SEEK_END)
            if end:  # a line that was cut short must not spoil this one
                log.seek(end - 1)
                line = line if log.read(1) == b"\n" else b"\n" + line
            log.write(line)
            log.flush()
            os.fsync(log.fileno())
    except OSError as error:
        raise UserError(
            f"the log {path} cannot be written ({error.strerror or error}): make room, or name "
            "another file by --log."
        ) from error


def upload_file(path: str | os.PathLike[str], key: str) -> Path:
    """Where the file of a reference that a user gave lies, beside a log."""
    return Path(f"{os.fspath(path)}.images", key)


def read_log(path: str | os.PathLike[str]) -> Log:
    """Reads a log. Lines that cannot be read are skipped, counted and named in the log of the run.

    Raises:
      UserError: there is no such file, it cannot be read, or no line of it can.
    """
    clicks: list[Click] = []
    problems: dict[str, list[int]] = collections.defaultdict(list)
    try:
        if not is_regular(path):  # a pipe or a device would be read for ever
            raise UserError(f"the log {path} cannot be read: it is no regular file.")
        with open(path, "rb") as file:
            number = 0
            while data := file.readline(LINE_BYTES + 1):
                number += 1
                reason = ""
                if len(data) > LINE_BYTES:
                    while data and not data.endswith(b"\n"):
                        data = file.readline(LINE_BYTES)
                    reason = "is too long"
                elif data.strip():
                    found = _click_of(data)
                    if isinstance(found, Click):
                        clicks.append(found)
                    else:
                        reason = found
                if reason:
                    problems[reason].append(number)
    except FileNotFoundError as error:
        raise UserError(f"there is no log {path}: name one that dqe-jax serve wrote.") from error
    except OSError as error:
        raise UserError(f"the log {path} cannot be read ({error.strerror or error}).") from error
    log = Log(tuple(clicks), dict(problems))
    for reason, lines in problems.items():
        shown = ", ".join(map(str, lines[:SHOWN])) + (", ..." if len(lines) > SHOWN else "")
        logging.warning("%s: %d lines skipped; each %s: %s", path, len(lines), reason, shown)
    if not clicks:
        why = f"none of its {log.skipped} lines can be read" if log.skipped else "it is empty"
        raise UserError(f"the log {path} holds no clicks: {why}.")
    return log


def _click_of(data: bytes) -> Click | str:
    """The click of a line, or what is wrong with it."""
    try:
        held = json.loads(data.decode("utf-8"))
    except UnicodeDecodeError:
        return "is not UTF-8"
    except (ValueError, RecursionError):
        return "is not JSON"
    if not isinstance(held, dict):
        return "is no JSON object"
    if held.get("format") != FORMAT:
        return f"is not of format {FORMAT}"
    if held.get("kind") not in KINDS:
        return "has no kind that is known"
    for name in ("conversation", "folder", "text", "image", "model", "time"):
        if not isinstance(held.get(name), str) or "\0" in held[name]:
            return f"has no {name}"
    for name in ("references", "shown"):
        own = held.get(name)
        if not isinstance(own, list) or not all(isinstance(x, str) and "\0" not in x for x in own):
            return f"has no {name}"
    if not held["references"] or not held["image"]:
        return "names no image"
    if not isinstance(held.get("turn"), int) or isinstance(held["turn"], bool):
        return "has no turn"
    named = {field.name: held[field.name] for field in dataclasses.fields(Click)}
    given: dict[str, Any] = {k: tuple(x) if isinstance(x, list) else x for k, x in named.items()}
    return Click(**given)


def judged(clicks: Sequence[Click]) -> list[Judged]:
    """What users said of each query, in the order in which queries came first.

    In a turn of a conversation the last click on an image counts. An image that some users picked
    for a query and others rejected counts as picked. Queries of which nothing is left are left out.
    """
    last: dict[tuple[str, int, tuple[str, tuple[str, ...], str], str], str] = {}
    for click in clicks:
        query = (click.folder, click.references, click.text)
        last[click.conversation, click.turn, query, click.image] = click.kind
    said: dict[tuple[str, tuple[str, ...], str], dict[str, set[str]]] = {}
    for (_, _, query, image), kind in last.items():
        said.setdefault(query, {kind: set() for kind in KINDS})[kind].add(image)
    found = []
    for query, kinds in said.items():
        picked = kinds["pick"]
        rejected = kinds["reject"] - picked
        if picked or rejected:
            found.append(Judged(*query, tuple(sorted(picked)), tuple(sorted(rejected))))
    return found
