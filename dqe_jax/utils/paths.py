"""Paths that may lie in a bucket (`gs://`)."""

from __future__ import annotations

import os

import fsspec
from etils import epath


def whole_path(path: str | os.PathLike[str]) -> epath.Path:
    """A path that holds wherever the process goes: absolute, `~` expanded; a bucket's as it is."""
    found = epath.Path(path).expanduser()
    # `absolute` would make a local directory `gs:` of the scheme.
    return found if is_remote(found) else epath.Path(os.path.abspath(found))


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is in a bucket: without locks, and with files that are written as a whole."""
    return "://" in os.fspath(path)


def look_anew() -> None:
    """Makes listings of buckets show what other processes have written since.

    gcsfs keeps them for ever otherwise: a run that is watched would seem to stand still.
    """
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
