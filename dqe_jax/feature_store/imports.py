"""Imports features that any encoder made: from `.npz`, `.safetensors` and Parquet files.

| file | holds |
| --- | --- |
| `.npz` | `id`, strings `[N]`; every other array, `[N, D]` or `[N, P, D]`, is features |
| `.safetensors` | one tensor `[D]` or `[P, D]` for each id, under the id; or stacked tensors \
`[N, ...]`, with the ids as a JSON list in the metadata field `ids` |
| `.parquet` | a column `id`; every other column, of lists or of lists of lists, is features |

The id of an image is that of the data set, the id of a text is the text itself. All files are read
and checked before anything is written.

Features are written to `NAME.PID.partial` beside the stores, which is renamed when it is whole.
Imports to one place write in turns. So whatever `.partial` directory an import finds there belongs
to one that was killed, and it removes it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from absl import logging

from dqe_jax.feature_store import writing
from dqe_jax.feature_store.encoders import ONE, names_encoder, open_encoder
from dqe_jax.feature_store.given import IMPORTED, check_space, id_keys
from dqe_jax.feature_store.shards import ARRAY_NAME, RowSpec, first_not_finite
from dqe_jax.feature_store.store import SHARD_BYTES
from dqe_jax.models.weights.sizes import GIVEN_DTYPES
from dqe_jax.utils.errors import UserError, reason_of
from dqe_jax.utils.files import JsonObject

ID = "id"
# float64 is kept as float32.
READ = (*GIVEN_DTYPES, "float64")
PARTIAL = ".partial"
_LEFTOVER = re.compile(r".+\.\d+\.partial")


@dataclasses.dataclass(frozen=True)
class Features:
    """What a file holds.

    Attributes:
      path: of the file.
      ids: of the rows.
      arrays: `[N, D]` or `[N, P, D]` by name.
    """

    path: Path
    ids: list[str]
    arrays: dict[str, np.ndarray]


def import_features(
    root: Path,
    name: str,
    kind: str,
    paths: Sequence[str | os.PathLike[str]],
    *,
    encoder: str = "",
    dtype: str = "auto",
) -> Path:
    """Makes a store of the features in some files.

    Args:
      root: directory of all stores.
      name: of the store; configs name it.
      kind: "image" or "text".
      paths: of the files; they have the same arrays and no id twice.
      encoder: that made them, as `package.module:function`, to compute what they lack; or "".
      dtype: in which they are stored; "auto" for that of the files.

    Returns:
      The store.

    Raises:
      UserError: a file is not what it should be, the store exists, or it cannot be written.
    """
    taken = re.fullmatch(r"[0-9a-f]{16}", name) or name.endswith(PARTIAL)
    if taken or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise UserError(
            f"--name={name}: take letters, digits, '.', '-' and '_', such as --name=dinov3."
        )
    _check_free(root, name)
    if encoder:
        if not names_encoder(encoder):
            raise UserError(f"--encoder={encoder}: name it as package.module:function.")
        open_encoder(encoder)
    read = [_checked(_read(Path(path))) for path in paths]
    if not read:
        raise UserError("no file is named: import at least one.")
    specs = _specs(read, dtype)
    _check_ids(read)
    with writing.locked(root, writing.LOCK_OF_IMPORTS) as has_locks:
        if has_locks:  # otherwise another import may be writing
            remove_leftovers(root)
        _check_free(root, name)
        _write(root, name, {"kind": kind, "backbone": IMPORTED, "encoder": encoder}, read, specs)
    logging.info(
        "%s holds features of %s %ss: %s.",
        *(root / name, f"{sum(len(one.ids) for one in read):,}", kind),
        ", ".join(f"{n} {list(s.shape)} {s.dtype}" for n, s in specs.items()),
    )
    return root / name


def remove_leftovers(root: Path) -> None:
    """Removes what killed imports have left; the caller holds the lock of `root`.

    Args:
      root: directory of all stores.
    """
    for place in sorted(root.glob(f"*{PARTIAL}")):
        if _LEFTOVER.fullmatch(place.name):
            logging.info("%s is what a killed import has left: it is removed.", place)
            shutil.rmtree(place, ignore_errors=True)


def _check_free(root: Path, name: str) -> None:
    """Raises a `UserError` if there is a store of this name."""
    if (root / name).exists():
        raise UserError(
            f"--name={name}: {root / name} exists; take another name, or remove it with "
            f"--delete={name}."
        )


def _write(
    root: Path,
    name: str,
    facts: JsonObject,
    read: Sequence[Features],
    specs: dict[str, RowSpec],
) -> None:
    """Writes a store, all of it or nothing."""
    partial = root / f"{name}.{os.getpid()}{PARTIAL}"
    try:
        try:
            partial.mkdir()
        except OSError as error:
            raise writing.cannot_write(root, error) from error
        count = sum(len(one.ids) for one in read)
        check_space(partial, count, sum(spec.nbytes for spec in specs.values()))
        for number, (ids, arrays) in enumerate(_pieces(read, specs)):
            writing.write(partial, number, id_keys(ids), arrays)
        writing.write_facts(partial, facts, specs)  # last: without them it is no store
        partial.rename(root / name)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _pieces(
    read: Sequence[Features], specs: dict[str, RowSpec]
) -> Iterator[tuple[list[str], dict[str, np.ndarray]]]:
    """The rows of one shard after another, in the dtypes of the store."""
    rows = max(1, SHARD_BYTES // sum(spec.nbytes for spec in specs.values()))
    for one in read:
        for start in range(0, len(one.ids), rows):
            here = slice(start, start + rows)
            with np.errstate(over="ignore"):  # it is named below
                arrays = {n: one.arrays[n][here].astype(spec.dtype) for n, spec in specs.items()}
            for name, array in arrays.items():
                _check_finite(one.path, one.ids[here], name, array)
            yield one.ids[here], arrays


def _read(path: Path) -> Features:
    """A file of any format."""
    readers = {".npz": _read_npz, ".safetensors": _read_safetensors, ".parquet": _read_parquet}
    if path.suffix not in readers:
        raise UserError(f"{path}: features are read from {', '.join(readers)}.")
    if not path.is_file():
        raise UserError(f"{path}: there is no such file.")
    try:
        ids, arrays = readers[path.suffix](path)
    except UserError:
        raise
    except Exception as error:  # of three libraries
        raise UserError(
            f"{path} cannot be read ({reason_of(error)}): write the file again."
        ) from error
    return Features(path, ids, arrays)


def _read_npz(path: Path) -> tuple[list[str], dict[str, np.ndarray]]:
    try:
        with np.load(path, allow_pickle=False) as held:
            arrays = {name: held[name] for name in held.files}
    except zipfile.BadZipFile as error:
        raise UserError(f"{path} is no whole .npz file: write it again.") from error
    ids = _taken(path, arrays)
    if ids.dtype.kind not in "USiu" or ids.ndim != 1:
        raise UserError(
            f"{path}: {ID!r} has dtype {ids.dtype} and shape {list(ids.shape)}; it must hold one "
            "string for each row, np.array([...], dtype=str)."
        )
    words = np.char.decode(ids, "utf-8") if ids.dtype.kind == "S" else ids
    return [str(word) for word in words], arrays


def _read_safetensors(path: Path) -> tuple[list[str], dict[str, np.ndarray]]:
    from safetensors import safe_open
    from safetensors.numpy import load_file

    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata() or {}
    arrays = load_file(path)
    if "ids" in metadata:
        ids = json.loads(metadata["ids"])
        if not isinstance(ids, list) or not all(isinstance(one, str) for one in ids):
            raise UserError(f"{path}: the metadata field 'ids' must be a JSON list of strings.")
        return ids, arrays
    ids = sorted(arrays)
    if not ids:
        raise UserError(f"{path} holds no tensor.")
    for one in ids:
        if (arrays[one].shape, arrays[one].dtype) != (arrays[ids[0]].shape, arrays[ids[0]].dtype):
            raise UserError(
                f"{path}: the features of {one!r} have shape {list(arrays[one].shape)} and dtype "
                f"{arrays[one].dtype}, those of {ids[0]!r} {list(arrays[ids[0]].shape)} and "
                f"{arrays[ids[0]].dtype}; all must be alike."
            )
    return ids, {ONE: np.stack([arrays[one] for one in ids])}


def _read_parquet(path: Path) -> tuple[list[str], dict[str, np.ndarray]]:
    import pyarrow.parquet  # takes a while

    table = pyarrow.parquet.read_table(path)
    columns = {name: table.column(name).to_pylist() for name in table.column_names}
    if ID not in columns:
        raise UserError(f"{path} has no column {ID!r}; it has {', '.join(columns) or 'none'}.")
    ids = columns.pop(ID)
    for row, one in enumerate(ids):
        if not isinstance(one, str | int):
            raise UserError(f"{path}: the {ID!r} of row {row} is {one!r}: it must be a string.")
    names = [str(one) for one in ids]
    return names, {name: _stacked(path, names, name, rows) for name, rows in columns.items()}


def _stacked(path: Path, ids: Sequence[str], name: str, rows: Sequence[object]) -> np.ndarray:
    """A column of lists as an array."""
    made: list[np.ndarray] = []
    for one, row in zip(ids, rows):
        try:
            array = np.asarray(row)
        except ValueError:
            array = np.asarray(None)
        if array.dtype == object or (made and array.shape != made[0].shape):
            raise UserError(
                f"{path}: {name!r} of {one!r} is not a list of numbers as long as that of "
                f"{ids[0]!r}: all rows must have one shape."
            )
        made.append(array)
    return np.stack(made) if made else np.zeros((0, 0), np.float32)


def _taken(path: Path, arrays: dict[str, np.ndarray]) -> np.ndarray:
    """The ids, which are then no longer among the arrays."""
    if ID not in arrays:
        raise UserError(
            f"{path} has no array {ID!r} with the ids of its rows; it has "
            f"{', '.join(arrays) or 'none'}."
        )
    return arrays.pop(ID)


def _checked(one: Features) -> Features:
    """A file whose arrays have a row for each id; raises a `UserError` otherwise."""
    if not one.ids or not one.arrays:
        raise UserError(f"{one.path} holds no features.")
    if "" in one.ids:
        raise UserError(f"{one.path}: the id of row {one.ids.index('')} is empty.")
    for name, array in one.arrays.items():
        if not ARRAY_NAME.fullmatch(name):
            raise UserError(
                f"{one.path}: {name!r} names features: take letters, digits and '_', and not "
                "'keys'."
            )
        if str(array.dtype) not in READ:
            raise UserError(
                f"{one.path}: {name!r} of {one.ids[0]!r} has dtype {array.dtype}: features are "
                f"{', '.join(GIVEN_DTYPES)}."
            )
        if array.ndim not in (2, 3) or 0 in array.shape or len(array) != len(one.ids):
            raise UserError(
                f"{one.path}: {name!r} has shape {list(array.shape)} for {len(one.ids):,} ids: it "
                f"must be [{len(one.ids)}, D] or [{len(one.ids)}, P, D]."
            )
        _check_finite(one.path, one.ids, name, array)
    return one


def _check_finite(path: Path, ids: Sequence[str], name: str, array: np.ndarray) -> None:
    row = first_not_finite(array)
    if row is not None:
        raise UserError(
            f"{path}: {name!r} of {ids[row]!r} is not finite in {array.dtype}: mend "
            "the file, or import with --dtype=float32."
        )


def _specs(read: Sequence[Features], dtype: str) -> dict[str, RowSpec]:
    """What the store holds; raises a `UserError` if files do not agree."""
    if dtype not in ("auto", *GIVEN_DTYPES):
        raise UserError(f"--dtype={dtype}: it must be one of auto, {', '.join(GIVEN_DTYPES)}.")
    first = read[0]
    for one in read:
        for name in sorted({*one.arrays, *first.arrays}):
            a, b = one.arrays.get(name), first.arrays.get(name)
            if a is None or b is None or a.shape[1:] != b.shape[1:]:
                shapes = [None if x is None else list(x.shape[1:]) for x in (a, b)]
                raise UserError(
                    f"{one.path}: {name!r} of {one.ids[0]!r} has shape {shapes[0]}, in "
                    f"{first.path} it has {shapes[1]}: import files of one encoder."
                )

    def stored(array: np.ndarray) -> str:
        own = "float32" if array.dtype == np.float64 else str(array.dtype)
        return own if dtype == "auto" else dtype

    # In one order, whatever that of the file: the model's parameters follow it.
    named = sorted(first.arrays.items())
    return {name: RowSpec.of(array.shape[1:], stored(array)) for name, array in named}


def _check_ids(read: Sequence[Features]) -> None:
    """Raises a `UserError` for an id that comes twice."""
    seen: dict[str, Path] = {}
    for one in read:
        for own in one.ids:
            if own in seen:
                where = "twice" if seen[own] == one.path else f"in {seen[own]} too"
                raise UserError(f"{one.path}: the id {own!r} is there {where}; keep one of them.")
            seen[own] = one.path
