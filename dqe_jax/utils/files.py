"""Reads and writes files: what is wrong with one ends in a sentence that names it."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import stat
import tempfile
from typing import Any, TypeVar

import fsspec
from etils import epath

from dqe_jax.utils.errors import UserError, reason_of
from dqe_jax.utils.paths import is_remote

# What a JSON file holds, by the names in it.
JsonObject = dict[str, Any]

CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
# What libraries say of a full disk, in errors of their own; NumPy's has no number of an error.
FULL = re.compile(r"No space left on device|Disk quota exceeded|\d+ requested and \d+ written")
_Kind = TypeVar("_Kind", list[Any], JsonObject)


def is_regular(path: str | os.PathLike[str]) -> bool:
    """Whether a file ends: no pipe, no device, no directory, nor a link to one.

    Raises:
      OSError: there is no such file.
    """
    return is_remote(path) or stat.S_ISREG(os.stat(path).st_mode)


def read_bytes(path: epath.Path) -> bytes:
    """The content of a file.

    Raises:
      UserError: it cannot be read.
    """
    try:
        if not is_regular(path):
            raise UserError(f"{path} cannot be read: it is no regular file.")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}).") from error


def read_text(path: epath.Path) -> str:
    """The text of a file.

    Raises:
      UserError: it cannot be read, or is not UTF-8; the sentence names the byte.
    """
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 (byte {error.start}); get the file again or save it as UTF-8."
        ) from error


def read_json(path: epath.Path, kind: type[_Kind], advice: str = "get the file again") -> _Kind:
    """The content of a JSON file, a `list` or a `dict` as `kind` says.

    Args:
      path: of the file.
      kind: what it must hold.
      advice: the end of the sentence of an error: what to do.

    Raises:
      UserError: it cannot be read, is not JSON, or holds something else.
    """
    text = read_text(path)
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path} is not JSON (line {error.lineno}, column {error.colno}: {error.msg}); "
            f"{advice}."
        ) from error
    except (ValueError, RecursionError) as error:  # numbers too long, nested too deeply
        raise UserError(f"{path} is not JSON ({reason_of(error)}); {advice}.") from error
    if not isinstance(content, kind):
        words = "a list of records" if kind is list else "an object"
        raise UserError(f"{path} must hold {words}; {advice}.")
    return content


def finite(content: object) -> object:
    """What JSON can hold: numbers that are not finite become None, tuples lists."""
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, dict):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [finite(value) for value in content]
    return content


def write_json(path: epath.Path, content: object, indent: int | None = 2) -> None:
    """Writes a JSON file and makes its directory; see `finite`.

    Raises:
      UserError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(to_json(content, indent))
    except OSError as error:
        raise cannot_write(path.parent, error) from error


def to_json(content: object, indent: int | None = 2) -> str:
    """The text of a JSON file; see `finite`."""
    return json.dumps(finite(content), indent=indent, allow_nan=False) + "\n"


def write_at_once(path: epath.Path, content: str | bytes) -> None:
    """Writes a file so that it is never seen half-written, and an earlier one stays until then.

    In a bucket files are written as a whole anyway, and a move whose answer is lost cannot be told
    from one that failed.

    Raises:
      OSError: it cannot be written.
    """
    data = content.encode() if isinstance(content, str) else content
    if is_remote(path):
        path.write_bytes(data)
        return
    new = path.with_name(path.name + ".new")
    new.write_bytes(data)
    new.replace(path)


def move_directory(source: epath.Path, target: epath.Path) -> None:
    """Renames a directory; what is in the way of it must not be there.

    A bucket moves object by object. A move whose answer was lost is asked again, and then its
    object is no longer there; so each counts as moved when it lies at its new place.

    Raises:
      OSError: it cannot be moved; in a bucket a part may have been, and the same call moves the
        rest.
    """
    if not is_remote(source):
        source.rename(target)
        return
    bucket, start = fsspec.url_to_fs(os.fspath(source))
    _, end = fsspec.url_to_fs(os.fspath(target))
    for place in bucket.find(start):
        to = end + place.removeprefix(start)
        try:
            bucket.mv(place, to)
        except FileNotFoundError:
            if not bucket.exists(to):
                raise


def make_directory(path: epath.Path) -> None:
    """Makes a directory for results, and sees that files can be written there.

    Now: minutes later would be late to learn that they cannot be.

    Raises:
      UserError: it cannot be made, or nothing can be written there.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not is_remote(path):
            with tempfile.TemporaryFile(dir=path) as file:
                file.write(b"x")
    except OSError as error:
        raise cannot_write(path, error) from error


def is_of_disk(error: BaseException) -> bool:
    """Whether an error says that something cannot be written: for want of space, or of rights."""
    return getattr(error, "errno", None) in CANNOT_WRITE or bool(FULL.search(str(error)))


def cannot_write(path: epath.Path, error: OSError) -> UserError:
    """The error for a directory that cannot be written to."""
    return UserError(
        f"cannot write to {path} ({error.strerror or error}): name a writable directory."
    )
