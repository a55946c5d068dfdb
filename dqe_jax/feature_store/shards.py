"""A store on disk: rows of arrays, each under a key, in shards that are written once.

A shard is a directory with `keys.npy`, one `.npy` file for each array, and `shard.json` with their
sizes. It is written under another name and renamed when it is whole: a process that is killed loses
the shard that it was writing and nothing else. bfloat16, which NumPy does not know, is stored as
the same bits in uint16; `store.json` says the true dtype.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
from absl import logging

from dqe_jax.data.digest import CONTENT_BYTES
from dqe_jax.utils.errors import UserError
from dqe_jax.utils.files import is_regular

# Bytes of a key: a digest of the content, and one byte that says which view of it.
KEY_BYTES = CONTENT_BYTES + 1
# Arrays are files beside that of the keys.
ARRAY_NAME = re.compile(r"(?!keys$)[A-Za-z0-9_][A-Za-z0-9_.-]*")
_KEYS, _FACTS, _PARTIAL = "keys", "shard.json", ".partial"
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@dataclasses.dataclass(frozen=True)
class RowSpec:
    """Shape and dtype of one row of an array."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @classmethod
    def of(cls, shape: Sequence[int], dtype: str) -> RowSpec:
        """Made of the name of a dtype; NumPy does not know bfloat16."""
        return cls(tuple(shape), _BFLOAT16 if dtype == "bfloat16" else np.dtype(dtype))

    @property
    def nbytes(self) -> int:
        """Bytes of a row."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Shard:
    """A whole shard.

    Attributes:
      directory: of its files.
      keys: uint8 `[n, KEY_BYTES]`.
    """

    directory: Path
    keys: np.ndarray

    def array(self, name: str, spec: RowSpec) -> np.ndarray:
        """An array `[n, ...]`, mapped into memory: rows are read when they are looked at."""
        held = np.load(self.directory / f"{name}.npy", mmap_mode="r")
        return held.view(_BFLOAT16) if spec.dtype == _BFLOAT16 else held


def open_shards(directory: Path, specs: Mapping[str, RowSpec]) -> tuple[list[Shard], list[Path]]:
    """The whole shards of a store in the order of their numbers, and what is there beside them.

    Args:
      directory: of the store; need not exist.
      specs: of its arrays.

    Returns:
      The shards, and the directories that are damaged or half-written.
    """
    whole, rest = [], []
    for place in sorted(directory.glob("shard-*")):
        keys = None if place.name.endswith(_PARTIAL) else _keys_of(place, specs)
        if keys is None:
            rest.append(place)
        else:
            whole.append(Shard(place, keys))
    return whole, rest


def _keys_of(place: Path, specs: Mapping[str, RowSpec]) -> np.ndarray | None:
    """The keys of a shard; None if a file is missing, cut off or of other arrays."""
    try:
        if not is_regular(place / _FACTS):  # a pipe would be read for ever
            return None
        sizes = json.loads((place / _FACTS).read_text())
        for name, size in sizes.items():
            if (place / name).stat().st_size != size:
                return None
        if not {f"{name}.npy" for name in (_KEYS, *specs)} <= sizes.keys():
            return None
        keys = np.load(place / f"{_KEYS}.npy")
        for name, spec in specs.items():
            if np.load(place / f"{name}.npy", mmap_mode="r").shape != (len(keys), *spec.shape):
                return None
    except MemoryError:  # the shard may be whole
        raise
    except Exception:  # NumPy raises many types for a header that is damaged
        return None
    return keys if keys.shape[1:] == (KEY_BYTES,) and keys.dtype == np.uint8 else None


def write_shard(
    directory: Path, number: int, keys: np.ndarray, arrays: Mapping[str, np.ndarray]
) -> None:
    """Writes a shard, all of it or nothing.

    Args:
      directory: of the store.
      number: of the shard.
      keys: uint8 `[n, KEY_BYTES]`.
      arrays: `[n, ...]` by name.

    Raises:
      OSError: it cannot be written.
    """
    place = directory / f"shard-{number:06d}"
    partial = directory / f"{place.name}.{os.getpid()}{_PARTIAL}"
    try:
        partial.mkdir(parents=True)
        sizes = {}
        for name, array in {_KEYS: keys, **arrays}.items():
            bits = array.view(np.uint16) if array.dtype == _BFLOAT16 else array
            path = partial / f"{name}.npy"
            with path.open("wb") as file:
                np.save(file, bits)
                file.flush()
                os.fsync(file.fileno())
            sizes[path.name] = path.stat().st_size
        (partial / _FACTS).write_text(json.dumps(sizes))
        partial.rename(place)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def remove_damaged(places: Sequence[Path]) -> None:
    """Removes what `open_shards` found beside whole shards: it is computed again."""
    for place in places:
        if not place.name.endswith(_PARTIAL):
            logging.warning("%s is damaged: its rows are computed again.", place)
        shutil.rmtree(place, ignore_errors=True)


def next_number(shards: Sequence[Shard]) -> int:
    """The number of the next shard."""
    return max((int(shard.directory.name.split("-")[1]) for shard in shards), default=-1) + 1


def find_rows(shards: Sequence[Shard], keys: np.ndarray) -> np.ndarray:
    """Where rows lie, counted through all shards: int64 `[n]`, -1 for keys that are not there.

    Args:
      shards: of a store.
      keys: uint8 `[n, KEY_BYTES]`.
    """
    held = np.concatenate([np.zeros((0, KEY_BYTES), np.uint8), *(s.keys for s in shards)])
    at = {key.tobytes(): row for row, key in enumerate(held)}
    return np.array([at.get(key.tobytes(), -1) for key in keys], np.int64)


def read_rows(
    shards: Sequence[Shard], name: str, spec: RowSpec, rows: np.ndarray, out: np.ndarray
) -> None:
    """Copies rows of an array into `out` `[n, ...]`.

    Args:
      shards: of the store.
      name: of the array.
      spec: of it.
      rows: int64 `[n]`, as `find_rows` counts them.
      out: is written.
    """
    first = 0
    for shard in shards:
        here = np.flatnonzero((rows >= first) & (rows < first + len(shard.keys)))
        if len(here):
            out[here] = shard.array(name, spec)[rows[here] - first]
        first += len(shard.keys)


def first_not_finite(array: np.ndarray) -> int | None:
    """The first row of an array `[n, ...]` whose numbers are not all finite, if there is one."""
    bad = ~np.isfinite(array.astype(np.float32).reshape(len(array), -1)).all(1)
    return int(bad.argmax()) if bad.any() else None


def check_finite(arrays: Mapping[str, np.ndarray], names: Sequence[str]) -> None:
    """Raises a `UserError` that names the first row whose numbers are not all finite."""
    for array in arrays.values():
        row = first_not_finite(array)
        if row is not None:
            raise UserError(
                f"the frozen tower makes numbers of {names[row]} that are not "
                "finite: check config.model.weights, or take config.model.dtype='float32'."
            )
