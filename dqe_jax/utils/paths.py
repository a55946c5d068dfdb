"""Paths that may lie in a bucket (`gs://`)."""

from __future__ import annotations

import os
from pathlib import Path

import fsspec
from etils import epath

from dqe_jax.utils.errors import UserError


def whole_path(path: str | os.PathLike[str]) -> epath.Path:
    """A path that holds wherever the process goes: absolute, `~` expanded; a bucket's as it is."""
    found = epath.Path(path).expanduser()
    # `absolute` would make a local directory `gs:` of the scheme.
    return found if is_remote(found) else epath.Path(os.path.abspath(found))


def on_disk(path: str | os.PathLike[str], name: str) -> Path:
    """A path of this machine: absolute, `~` expanded.

    Args:
      path: of a file or a directory that other libraries read or write, which know disks alone.
      name: of the flag or the argument, for the sentence.

    Raises:
      UserError: it is in a bucket.
    """
    if is_remote(path):
        raise UserError(f"{name}={os.fspath(path)}: name a path on a disk of this machine.")
    return Path(os.path.abspath(Path(path).expanduser()))


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is in a bucket: without locks, and with files that are written as a whole."""
    return "://" in os.fspath(path)


def look_anew() -> None:
    """Makes listings of buckets show what other processes have written since.

    gcsfs keeps them for ever otherwise: a run that is watched would seem to stand still.
    """
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
