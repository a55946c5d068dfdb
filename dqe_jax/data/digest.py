"""A digest of a prepared split, so that a run and its results know on which data they were made.

It is of what is stored: all fields of the queries and of the gallery's images, these as they are
encoded. It does not depend on where the data lie. It is computed once and kept beside the records.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
from absl import logging
from etils import epath

from dqe_jax.data.examples import gallery_split
from dqe_jax.data.records import read_records
from dqe_jax.utils.errors import UserError
from dqe_jax.utils.files import read_bytes

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

CONTENT_BYTES = 16
SHOWN = 8  # digits of a digest that name a directory


def path_of(builder: tfds.core.DatasetBuilder, split: str) -> epath.Path:
    """Where the digest of a stored split lies."""
    return epath.Path(builder.data_path) / "index" / f"{split}.digest"


def digest_of(builder: tfds.core.DatasetBuilder, split: str) -> str:
    """The digest of a prepared split and its gallery, 32 hexadecimal digits.

    Args:
      builder: prepared.
      split: of `examples.SPLITS`.
    """
    both = hashlib.sha256()
    for stored in (split, gallery_split(split, builder.info.splits)):
        both.update((_read(path_of(builder, stored)) or write_digest(builder, stored)).encode())
    return both.hexdigest()[:32]


def digests_of_rows(rows: Iterable[np.ndarray]) -> np.ndarray:
    """Digests of arrays: uint8 `[n, CONTENT_BYTES]`."""
    made = [hashlib.sha256(np.ascontiguousarray(row).data).digest()[:CONTENT_BYTES] for row in rows]
    return np.frombuffer(b"".join(made), np.uint8).reshape(len(made), CONTENT_BYTES)


def contents_of(builder: tfds.core.DatasetBuilder, stored: str) -> np.ndarray:
    """Digests of the images of a stored gallery, as they are encoded: uint8 `[N, CONTENT_BYTES]`.

    Kept beside the records where that can be written; zeros stand for an image that is not there.

    Args:
      builder: prepared.
      stored: name of a split of the builder.
    """
    path = epath.Path(builder.data_path) / "index" / f"{stored}.contents"
    count = builder.info.splits[stored].num_examples
    held = np.frombuffer(_held(path), np.uint8)
    if held.size == count * CONTENT_BYTES:
        return held.reshape(count, CONTENT_BYTES)
    found = np.zeros((count, CONTENT_BYTES), np.uint8)
    for row, record in enumerate(read_records(builder, stored)):
        for image in record["image"][:1]:
            digest = hashlib.sha256(image).digest()[:CONTENT_BYTES]
            found[row] = np.frombuffer(digest, np.uint8)
    _keep(path, found.tobytes(), "the contents of images are")
    return found


def _read(path: epath.Path) -> str:
    """The digest that a file holds; "" if it is not there, or damaged."""
    held = _held(path).strip()
    return held.decode() if re.fullmatch(rb"[0-9a-f]{64}", held) else ""


def _held(path: epath.Path) -> bytes:
    """What a file holds; b"" if it cannot be read: it can be computed again."""
    try:
        return read_bytes(path)
    except UserError:
        return b""


def write_digest(builder: tfds.core.DatasetBuilder, stored: str) -> str:
    """Computes the digest of a stored split, and keeps it where that can be written.

    Args:
      builder: prepared.
      stored: name of a split of the builder, of queries or of a gallery.
    """
    found = _of_records(builder, stored)
    _keep(path_of(builder, stored), f"{found}\n".encode(), "the digest of the data is")
    return found


def _keep(path: epath.Path, content: bytes, what: str) -> None:
    """Writes a file at once, or warns that each run computes it again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.parent / f"{path.name}.{os.getpid()}.partial"
        partial.write_bytes(content)
        partial.replace(path)  # a half-written one is never read
    except OSError as error:
        logging.warning(
            "%s cannot be written (%s): %s computed again by each run.",
            *(path, error.strerror or error, what),
        )


def _of_records(builder: tfds.core.DatasetBuilder, stored: str) -> str:
    """Hashes every field of every record; images stay encoded."""
    names = ["image", *(name for name in builder.info.features if name != "image")]
    count = builder.info.splits[stored].num_examples
    digest = hashlib.sha256(f"{builder.name} {stored} {count}".encode())
    for record in read_records(builder, stored):
        for name in sorted(names):
            _add(digest, record[name])
    return digest.hexdigest()


def _add(digest: hashlib._Hash, value: object) -> None:
    """Adds a field; lengths come first, so that no two records give the same bytes."""
    if isinstance(value, bytes):
        digest.update(f"b{len(value)}:".encode() + value)
    elif isinstance(value, np.ndarray) and value.dtype != object:
        digest.update(f"{value.dtype}{value.shape}:".encode() + value.tobytes())
    elif isinstance(value, (list, tuple, np.ndarray)):
        digest.update(f"l{len(value)}:".encode())
        for item in value:
            _add(digest, item)
    else:
        digest.update(f"{value}:".encode())
