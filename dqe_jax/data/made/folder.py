"""The folder of a user's photos."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from typing import Protocol

from absl import logging
from etils import epath

from dqe_jax.data.photos import MAX_BYTES
from dqe_jax.data.raw_files import RawFiles
from dqe_jax.utils.errors import UserError
from dqe_jax.utils.files import is_regular
from dqe_jax.utils.paths import whole_path

_SHOWN = 5


class Digest(Protocol):
    """A digest of `hashlib`."""

    def update(self, data: bytes, /) -> None:
        """Adds bytes."""

    def hexdigest(self) -> str:
        """The digest of all."""


class Folder:
    """Photos by their paths below a folder, as `photos.PhotoSource`."""

    def __init__(self, root: epath.Path):
        self._root = root

    def read(self, photo_id: str, /) -> bytes:
        """Bytes of a photo; a ValueError or an OSError says why there are none."""
        file = self._root / photo_id
        if not is_regular(file):  # a pipe or a device would be read for ever
            raise ValueError("is no regular file")
        if (size := file.stat().length) > MAX_BYTES:
            raise ValueError(f"has {size} bytes")
        return file.read_bytes()

    def close(self) -> None:
        """Nothing is open."""


def folder_of(images: str | os.PathLike[str]) -> epath.Path:
    """A folder that `--images` names.

    Raises:
      UserError: it is not there.
    """
    folder = whole_path(images)
    if not os.fspath(images) or not folder.is_dir():
        raise UserError(f"--images: there is no folder {os.fspath(images)!r}; name the photos'.")
    return folder


def listing_digest(digest: Digest, files: RawFiles) -> str:
    """A digest that has taken in the paths and sizes of all photos."""
    for path in files.image_paths:
        size: object = "none"  # of a link to nothing, which is told when it is read
        with contextlib.suppress(OSError):
            size = (files.root / path).stat().length
        digest.update(f"\n{path}:{size}".encode(errors="surrogateescape"))
    return digest.hexdigest()


def warn(where: object, what: str, names: Sequence[str]) -> None:
    """Says in the log how many of something there are, and names a few; nothing if none."""
    if names:
        shown = "; ".join(names[:_SHOWN]) + ("; ..." if len(names) > _SHOWN else "")
        logging.warning("%s: %d %s: %s", where, len(names), what, shown)
