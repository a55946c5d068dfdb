"""What is known of a gallery without reading its images: made once, after it is prepared.

Reads every record back, without decoding its image, and keeps the answer beside the records.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from etils import epath

from dqe_jax.data.examples import Record
from dqe_jax.data.records import read_records
from dqe_jax.utils.errors import UserError
from dqe_jax.utils.files import is_regular

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

_FIELDS = ("id", "photo", "texts", "pools")


@dataclasses.dataclass(frozen=True)
class GalleryIndex:
    """A gallery of `N` records.

    Attributes:
      ids: of the images.
      image_ids: int32 `[N]`, the row of the first image with the same content.
      missing: why there is no image, by row; rows with an image are not named.
      pools: rows of each named part of the gallery, ascending; empty if it has no parts.
    """

    ids: list[str]
    image_ids: np.ndarray
    missing: dict[int, str]
    pools: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.ids)

    def to_json(self) -> str:
        """As it is stored."""
        pools = {name: rows.tolist() for name, rows in self.pools.items()}
        content = {"ids": self.ids, "photo": self.image_ids.tolist(), "pools": pools}
        return json.dumps({**content, "missing": {str(k): v for k, v in self.missing.items()}})


def from_json(text: str) -> GalleryIndex:
    """The index that `to_json` gave.

    Raises:
      Exception: it did not give it; of many types.
    """
    content = json.loads(text)
    found = GalleryIndex(
        ids=content["ids"],
        image_ids=np.array(content["photo"], np.int32),
        missing={int(row): reason for row, reason in content["missing"].items()},
        pools={name: np.array(rows, np.int32) for name, rows in content["pools"].items()},
    )
    rows = [found.image_ids, np.array([*found.missing], np.int32), *found.pools.values()]
    if not all(x.ndim == 1 and ((x >= 0) & (x < len(found))).all() for x in rows):
        raise ValueError("rows that the gallery does not have")
    if len(found.image_ids) != len(found) or not isinstance(found.ids, list):
        raise ValueError("not a row of an image for each id")
    if not all(isinstance(text, str) for text in (*found.ids, *found.missing.values())):
        raise TypeError("ids and reasons are texts")
    return found


def make_index(records: Sequence[Record]) -> GalleryIndex:
    """The index of a gallery's records, in order; of these only `_FIELDS` are read."""
    numbers = np.array([record["photo"] for record in records], np.int64)
    _, first, inverse = np.unique(numbers, return_index=True, return_inverse=True)
    pools: dict[str, list[int]] = {}
    for row, record in enumerate(records):
        for pool in record["pools"]:
            pools.setdefault(pool.decode(), []).append(row)
    return GalleryIndex(
        ids=[record["id"].decode() for record in records],
        image_ids=first[inverse].astype(np.int32),
        missing={
            r: record["texts"][0].decode() for r, record in enumerate(records) if record["texts"]
        },
        pools={name: np.array(rows, np.int32) for name, rows in pools.items()},
    )


def path_of(builder: tfds.core.DatasetBuilder, split: str) -> epath.Path:
    """Where the index of a gallery split lies."""
    return epath.Path(builder.data_path) / "index" / f"{split}.json"


def write_index(builder: tfds.core.DatasetBuilder, split: str) -> GalleryIndex:
    """Reads the records of a prepared gallery and writes its index; images are not decoded."""
    # Without their images, which may not fit the memory together.
    records = [{k: record[k] for k in _FIELDS} for record in read_records(builder, split)]
    index = make_index(records)
    path = path_of(builder, split)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.parent / f"{path.name}.{os.getpid()}.partial"
    partial.write_text(index.to_json())
    partial.replace(path)  # a half-written index is never read
    return index


def read_index(builder: tfds.core.DatasetBuilder, split: str) -> GalleryIndex:
    """The index of a gallery split of a prepared builder.

    Raises:
      UserError: it is not there or damaged.
    """
    path = path_of(builder, split)
    try:
        if not is_regular(path):  # a pipe would be read for ever
            raise OSError(f"{path} is no regular file")
        return from_json(path.read_text(encoding="utf-8"))
    except Exception as error:  # a damaged file can be wrong in any way
        raise UserError(
            f"{path} is missing or damaged ({type(error).__name__}); remove {builder.data_dir} and "
            "prepare the data set again."
        ) from error
