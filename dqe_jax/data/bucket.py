"""Prepared data in a bucket: read and written by way of a copy on this machine.

ArrayRecord files are read at random places, by a library that knows disks alone. So what a bucket
holds of a data set is copied to the user's cache once, and what is prepared here goes to the bucket
when it is complete. `dataset_info.json`, by which data count as prepared, is copied last, either
way.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from absl import logging
from etils import epath

from dqe_jax.utils.errors import UserError, reason_of
from dqe_jax.utils.paths import is_remote

CACHE = "~/.cache/dqe_jax/buckets"
LAST = "dataset_info.json"


def local_of(directory: str | os.PathLike[str]) -> epath.Path:
    """Where the copy of a bucket's directory lies; a directory on a disk as it is."""
    path = epath.Path(directory).expanduser()
    if not is_remote(path):
        return path
    return epath.Path(CACHE).expanduser() / os.fspath(path).replace("://", "/")


def fetch(directory: str | os.PathLike[str], dataset: str) -> None:
    """Copies what a bucket's directory holds of a data set; nothing for a directory on a disk.

    Raises:
      UserError: the bucket cannot be read, or this machine's disk not be written.
    """
    if is_remote(directory):
        _copy(epath.Path(directory) / dataset, local_of(directory) / dataset)


def send(directory: str | os.PathLike[str], dataset: str) -> None:
    """Copies what was prepared here of a data set to a bucket's directory; raises as `fetch`."""
    if is_remote(directory):
        _copy(local_of(directory) / dataset, epath.Path(directory) / dataset)


def _copy(source: epath.Path, target: epath.Path) -> None:
    """Copies the files that the target lacks, or has of another size, or of other data."""
    try:
        if not source.is_dir():
            return
        count = 0
        for folder in _folders(source):
            files = [path for path in folder.iterdir() if not path.is_dir()]
            to = target / os.path.relpath(folder, source)
            if _is_complete(folder, to):
                continue
            to.mkdir(parents=True, exist_ok=True)
            for file in sorted(files, key=lambda path: path.name == LAST):
                if file.name.endswith(".partial"):
                    continue
                # A bucket shows no half of a file.
                mine = f"{file.name}.{os.getpid()}.partial"  # others may copy the same
                new = to / (file.name if is_remote(to) else mine)
                file.copy(new, overwrite=True)
                if new.name != file.name:
                    new.replace(to / file.name)
                count += 1
        if count:
            logging.info("Copied %d files of %s to %s.", count, source, target)
    except Exception as error:  # of the bucket, in many types
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{source} cannot be copied to {target} ({reason_of(error)}): see that the bucket can "
            "be reached, and that there is room."
        ) from error


def _folders(root: epath.Path) -> Iterator[epath.Path]:
    """Directories below one, and itself, that hold files; those that are being prepared not."""
    waiting = [root]
    while waiting:
        folder = waiting.pop()
        inside = list(folder.iterdir())
        if any(not path.is_dir() for path in inside):
            yield folder
        waiting += [p for p in inside if p.is_dir() and not p.name.startswith("incomplete.")]


def _is_complete(source: epath.Path, target: epath.Path) -> bool:
    """Whether the target has the same files, of the same sizes, and the same data."""
    for file in source.iterdir():
        if file.is_dir() or file.name.endswith(".partial"):
            continue
        held = target / file.name
        if not held.exists() or held.stat().length != file.stat().length:
            return False
    mark = source / LAST
    return not mark.exists() or mark.read_bytes() == (target / LAST).read_bytes()
