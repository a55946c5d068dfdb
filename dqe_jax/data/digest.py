"""A digest of a prepared split, so that a run and its results know on which data they were made.

It is of what is stored: all fields of the queries and of the gallery's images, these as they are
encoded. It does not depend on where the data lie. It is computed once and kept beside the records.
"""

from __future__ import annotations

import hashlib
import os
import re
from typing import TYPE_CHECKING

import numpy as np
from absl import logging
from etils import epath

from dqe_jax.data.examples import gallery_split

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

_CHUNK = 256
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


def _read(path: epath.Path) -> str:
    """The digest that a file holds; "" if it is not there, or damaged."""
    try:
        held = path.read_bytes().strip()
    except OSError:
        return ""
    return held.decode() if re.fullmatch(rb"[0-9a-f]{64}", held) else ""


def write_digest(builder: tfds.core.DatasetBuilder, stored: str) -> str:
    """Computes the digest of a stored split, and keeps it where that can be written.

    Args:
      builder: prepared.
      stored: name of a split of the builder, of queries or of a gallery.
    """
    found = _of_records(builder, stored)
    path = path_of(builder, stored)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.parent / f"{path.name}.{os.getpid()}.partial"
        partial.write_text(found + "\n")
        partial.replace(path)  # a half-written one is never read
    except OSError as error:
        logging.warning(
            "%s cannot be written (%s): the digest of the data is computed again by each run.",
            *(path, error.strerror or error),
        )
    return found


def _of_records(builder: tfds.core.DatasetBuilder, stored: str) -> str:
    """Hashes every field of every record; images stay encoded."""
    import tensorflow_datasets as tfds  # slow to import

    features = {name: builder.info.features[name] for name in sorted(builder.info.features)}
    features["image"] = tfds.features.Sequence(tfds.features.Text())
    fields = tfds.features.FeaturesDict(features)
    source = builder.as_data_source(
        split=stored, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
    )
    digest = hashlib.sha256(f"{builder.name} {stored} {len(source)}".encode())
    for start in range(0, len(source), _CHUNK):
        rows = list(range(start, min(start + _CHUNK, len(source))))
        for record in map(fields.deserialize_example_np, source.__getitems__(rows)):
            for name in features:
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
