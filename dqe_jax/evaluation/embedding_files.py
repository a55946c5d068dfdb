"""Embeddings of queries and gallery images in a file, of any model.

| array | holds |
| --- | --- |
| `query`, `gallery` | floats `[Q, d]`; `[N, d]`, or `[N, M, d]` with M tokens for each image |
| `query_id`, `gallery_id` | ids of these rows: strings, or integers |
| `judgement`, `judgement_id` | for HP-FashionIQ alone: `[J, d]`, see `preferences.py` |

`.npz` holds these arrays. `.safetensors` holds the arrays of floats; the ids are JSON lists in the
metadata fields `query_id` and so on. `.parquet` holds a line for each row in the columns `kind`
(`query`, `gallery` or `judgement`), `id` and `embedding`, a list; with several tokens, a list of
lists, which is then of one token for a query.

The score of an image is `max_m <q, T_m>`, the inner product with its best token. All lines are of
unit length, so that this is the cosine; else a user says which of the two is meant
(`SIMILARITIES`).
"""

from __future__ import annotations

import collections
import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dqe_jax.utils.errors import UserError, reason_of
from dqe_jax.utils.files import cannot_write
from dqe_jax.utils.paths import on_disk

if TYPE_CHECKING:
    import pyarrow

KINDS = ("query", "gallery", "judgement")
FORMATS = (".npz", ".safetensors", ".parquet")
SIMILARITIES = ("unit", "cosine", "dot")
# How far from 1 the length of a line in half precision may be.
NEAR = 1e-2
_AT_A_TIME = 4096  # lines that are checked together
_Columns = dict[str, tuple[list[str], np.ndarray]]  # ids and array by kind


@dataclasses.dataclass(frozen=True)
class Rows:
    """Embeddings float32 `[n, d]` or `[n, M, d]`, with their ids."""

    ids: list[str]
    array: np.ndarray

    def at(self, ids: Sequence[str]) -> np.ndarray:
        """The embeddings of these ids, which must be there."""
        place = {one: row for row, one in enumerate(self.ids)}
        rows = np.array([place[one] for one in ids], np.int64)
        # A copy would double the memory of a gallery that is in order already.
        if np.array_equal(rows, np.arange(len(self.ids))):
            return self.array
        return self.array[rows]


@dataclasses.dataclass(frozen=True)
class EmbeddingFile:
    """A file that was read and checked.

    Attributes:
      path: of the file.
      query: `[Q, d]`.
      gallery: `[N, M, d]`.
      judgement: `[J, d]`, or None.
    """

    path: Path
    query: Rows
    gallery: Rows
    judgement: Rows | None


def read_embeddings(path: str | os.PathLike[str], similarity: str = "unit") -> EmbeddingFile:
    """Reads a file of embeddings.

    Args:
      path: of the file, see the module.
      similarity: "unit" demands lines of unit length; "cosine" makes them so; "dot" takes them as
        they are.

    Raises:
      UserError: it is in a bucket, or not as the module says; an id is there twice or empty; a
        line is not finite, zero, or not of unit length; the widths differ.
    """
    path = on_disk(path, "--embeddings")
    if similarity not in SIMILARITIES:
        raise UserError(f"--similarity={similarity}: it must be one of {', '.join(SIMILARITIES)}.")
    readers = {".npz": _read_npz, ".safetensors": _read_safetensors, ".parquet": _read_parquet}
    if path.suffix not in readers:
        raise UserError(f"{path}: embeddings are read from {', '.join(FORMATS)}.")
    if not path.is_file():
        raise UserError(f"{path}: there is no such file.")
    try:
        columns = readers[path.suffix](path)
    except UserError:
        raise
    except MemoryError as error:  # a damaged header can promise any size
        raise UserError(
            f"{path} does not fit into memory ({reason_of(error)}): write the file again, or use a "
            "machine with more."
        ) from error
    except Exception as error:  # of three libraries
        raise UserError(
            f"{path} cannot be read ({reason_of(error)}): write the file again."
        ) from error
    for kind in ("query", "gallery"):
        if kind not in columns:
            raise UserError(
                f"{path} has no {kind!r}; it has {', '.join(columns) or 'nothing'}: it must hold "
                "the embeddings of queries and of gallery images."
            )
    rows = {kind: _checked(path, kind, *column, similarity) for kind, column in columns.items()}
    width = rows["gallery"].array.shape[-1]
    for kind, own in rows.items():
        if own.array.shape[-1] != width:
            raise UserError(
                f"{path}: {kind!r} has embeddings of {own.array.shape[-1]} numbers, and 'gallery' "
                f"of {width}: both must be of one model."
            )
    return EmbeddingFile(path, rows["query"], rows["gallery"], rows.get("judgement"))


def check_ids(path: Path, kind: str, ids: Sequence[str], wanted: Sequence[str]) -> None:
    """Checks that a file has an embedding for each id, and no other.

    Args:
      path: of the file.
      kind: of `KINDS`.
      ids: of the file.
      wanted: of the split.

    Raises:
      UserError: one is missing or not known; it names the first and says how many there are.
    """
    held, known = frozenset(ids), frozenset(wanted)
    missing = [one for one in wanted if one not in held]
    if missing:
        raise UserError(
            f"{path}: {kind}_id lacks {len(missing):,} of the {len(wanted):,} ids of the split "
            f"(first: {missing[0]!r}); add their embeddings."
        )
    unknown = [one for one in ids if one not in known]
    if unknown:
        raise UserError(
            f"{path}: {kind}_id holds {len(unknown):,} ids that the split does not have (first: "
            f"{unknown[0]!r}); remove them."
        )


def check_target(path: str | os.PathLike[str]) -> Path:
    """The path of a file that is going to be written.

    Raises:
      UserError: it is in a bucket, or of no known format.
    """
    path = on_disk(path, "--save_embeddings")
    if path.suffix not in FORMATS:
        raise UserError(f"--save_embeddings={path}: name a file that ends in {', '.join(FORMATS)}.")
    if path.is_dir():
        raise UserError(f"--save_embeddings={path} is a directory: name a file.")
    return path


def write_embeddings(path: Path, rows: Mapping[str, Rows]) -> None:
    """Writes embeddings; the file is whole or not there.

    Args:
      path: that `check_target` gave.
      rows: by kind.

    Raises:
      UserError: it cannot be written.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    writers = {".npz": _write_npz, ".safetensors": _write_safetensors, ".parquet": _write_parquet}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        writers[path.suffix](partial, rows)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        from etils import epath

        raise cannot_write(epath.Path(path.parent), error) from error


# --- Checks ---------------------------------------------------------------------------------------


def _checked(path: Path, kind: str, ids: list[str], array: np.ndarray, similarity: str) -> Rows:
    """The rows as float32, gallery images with tokens and queries without."""
    if not ids:
        raise UserError(f"{path}: {kind!r} is empty.")
    if "" in ids:
        raise UserError(f"{path}: {kind}_id of row {ids.index('')} is empty.")
    if len(set(ids)) < len(ids):
        twice = collections.Counter(ids).most_common(1)[0][0]
        raise UserError(f"{path}: {kind}_id holds {twice!r} twice; keep one of its embeddings.")
    if array.dtype.kind != "f" and str(array.dtype) != "bfloat16":
        raise UserError(f"{path}: {kind!r} has dtype {array.dtype}: embeddings are floats.")
    if kind != "gallery" and array.ndim == 3 and array.shape[1] == 1:
        array = array[:, 0]
    if kind == "gallery" and array.ndim == 2:
        array = array[:, None]
    sizes = "[N, d] or [N, M, d]" if kind == "gallery" else "[N, d]"
    if array.ndim != (3 if kind == "gallery" else 2) or 0 in array.shape:
        raise UserError(f"{path}: {kind!r} has shape {list(array.shape)}; it must be {sizes}.")
    if len(array) != len(ids):
        raise UserError(f"{path}: {kind!r} has {len(array):,} rows for {len(ids):,} ids.")
    with np.errstate(over="ignore"):  # it is named below
        made = array.astype(np.float32)
    for start in range(0, len(made), _AT_A_TIME):
        part = made[start : start + _AT_A_TIME]
        lengths = np.sqrt(np.square(part.astype(np.float64)).sum(axis=-1))
        lengths = lengths.reshape(len(part), -1)
        _check_lengths(path, kind, ids[start : start + _AT_A_TIME], lengths, similarity)
        if similarity == "cosine":
            part /= lengths.reshape(*part.shape[:-1], 1).astype(np.float32)
    return Rows(ids, made)


def _check_lengths(
    path: Path, kind: str, ids: Sequence[str], lengths: np.ndarray, similarity: str
) -> None:
    """Raises an error for a line that is not finite, zero, or of another length than it must be."""
    for wrong, what in (
        (~np.isfinite(lengths), "is not finite in float32: mend it"),
        (lengths == 0, "is zero: leave out what could not be embedded, or mend it"),
    ):
        if wrong.any():
            raise UserError(f"{path}: {kind!r} of {ids[int(np.argmax(wrong.any(1)))]!r} {what}.")
    away = np.abs(lengths - 1) > NEAR
    if similarity == "unit" and away.any():
        row = int(np.argmax(away.any(axis=1)))
        raise UserError(
            f"{path}: {kind!r} of {ids[row]!r} has length {lengths[row][away[row]][0]:.3g} and not "
            "1: say --similarity=cosine or --similarity=dot, whichever your model ranks by."
        )


# --- Formats --------------------------------------------------------------------------------------


def _read_npz(path: Path) -> _Columns:
    columns: _Columns = {}
    with np.load(path, allow_pickle=False) as held:
        _check_names(path, held.files, [*KINDS, *(f"{kind}_id" for kind in KINDS)])
        for kind in KINDS:
            if kind not in held.files:
                continue
            if f"{kind}_id" not in held.files:
                raise UserError(f"{path} has no {kind + '_id'!r}: add the ids of {kind!r}.")
            ids = held[f"{kind}_id"]
            if ids.dtype.kind not in "USiu" or ids.ndim != 1:
                raise UserError(
                    f"{path}: {kind + '_id'!r} has dtype {ids.dtype} and shape {list(ids.shape)}; "
                    "it must hold one string for each row, np.array([...], dtype=str)."
                )
            words = np.char.decode(ids, "utf-8") if ids.dtype.kind == "S" else ids
            columns[kind] = ([str(word) for word in words], held[kind])
    return columns


def _check_names(path: Path, names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            raise UserError(f"{path} holds {name!r}; it may hold {', '.join(known)}.")


def _write_npz(path: Path, rows: Mapping[str, Rows]) -> None:
    columns: dict[str, np.ndarray] = {}
    for kind, own in rows.items():
        columns |= {f"{kind}_id": np.array(own.ids, dtype=str), kind: own.array}
    with path.open("wb") as file:  # numpy would add a suffix to a path
        np.savez(file, **columns)  # type: ignore[arg-type]  # of `allow_pickle`


def _read_safetensors(path: Path) -> _Columns:
    from safetensors import safe_open
    from safetensors.numpy import load_file

    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata() or {}
    arrays = load_file(path)
    _check_names(path, list(arrays), KINDS)
    columns: _Columns = {}
    for kind, array in arrays.items():
        if f"{kind}_id" not in metadata:
            raise UserError(
                f"{path} has no metadata field {kind + '_id'!r}: add the ids of {kind!r} as a JSON "
                "list."
            )
        try:
            ids = json.loads(metadata[f"{kind}_id"])
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path}: the metadata field {kind + '_id'!r} is not JSON ({error.msg})."
            ) from error
        columns[kind] = (_names(path, kind, ids), array)
    return columns


def _names(path: Path, kind: str, ids: object) -> list[str]:
    if not isinstance(ids, list):
        raise UserError(f"{path}: {kind}_id must be a list of strings.")
    for row, one in enumerate(ids):
        if not isinstance(one, str | int) or isinstance(one, bool):
            raise UserError(f"{path}: {kind}_id of row {row} is {one!r}: it must be a string.")
    return [str(one) for one in ids]


def _write_safetensors(path: Path, rows: Mapping[str, Rows]) -> None:
    from safetensors.numpy import save_file

    metadata = {f"{kind}_id": json.dumps(own.ids) for kind, own in rows.items()}
    arrays = {kind: np.ascontiguousarray(own.array) for kind, own in rows.items()}
    save_file(arrays, path, metadata=metadata)


def _read_parquet(path: Path) -> _Columns:
    import pyarrow.compute  # takes a while
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(path)
    for name in ("kind", "id", "embedding"):
        if name not in table.column_names:
            held = ", ".join(table.column_names) or "none"
            raise UserError(f"{path} has no column {name!r}; it has {held}.")
    kinds = pyarrow.compute.unique(table["kind"]).to_pylist()
    _check_names(path, [str(kind) for kind in kinds], KINDS)
    columns: _Columns = {}
    for kind in kinds:
        part = table.filter(pyarrow.compute.equal(table["kind"], kind))
        ids = _names(path, kind, part["id"].to_pylist())
        arrays, start = [], 0
        for chunk in part["embedding"].chunks:
            arrays.append(_stacked(path, kind, ids[start : start + len(chunk)], chunk))
            start += len(chunk)
        if len({array.shape[1:] for array in arrays}) > 1:
            raise _uneven(path, kind, "its rows")
        columns[kind] = (ids, np.concatenate(arrays))
    return columns


def _stacked(path: Path, kind: str, ids: Sequence[str], column: pyarrow.Array) -> np.ndarray:
    """A column of lists, or of lists of lists, as an array."""
    import pyarrow.compute

    shape = [len(column)]
    while _is_list(column.type):
        lengths = pyarrow.compute.list_value_length(column)
        each = lengths.to_numpy(zero_copy_only=False)
        if column.null_count or len(np.unique(each)) > 1:
            row = int(np.argmax(np.nan_to_num(each, nan=-1) != np.nan_to_num(each[0], nan=-2)))
            raise _uneven(path, kind, repr(ids[row // max(1, int(np.prod(shape[1:])))]))
        shape.append(int(each[0]) if len(each) else 0)
        column = pyarrow.compute.list_flatten(column)
    if column.null_count:
        raise UserError(f"{path}: 'embedding' of a {kind} holds a missing number; mend it.")
    return np.asarray(column.to_numpy(zero_copy_only=False)).reshape(shape)


def _is_list(kind: pyarrow.DataType) -> bool:
    import pyarrow

    tests = (pyarrow.types.is_list, pyarrow.types.is_large_list, pyarrow.types.is_fixed_size_list)
    return any(test(kind) for test in tests)


def _uneven(path: Path, kind: str, which: str) -> UserError:
    return UserError(
        f"{path}: 'embedding' of the {kind} {which} is not a list as long as that of the others: "
        f"all rows of {kind!r} must have one shape."
    )


def _write_parquet(path: Path, rows: Mapping[str, Rows]) -> None:
    import pyarrow
    import pyarrow.parquet

    tokens = any(own.array.ndim == 3 and own.array.shape[1] > 1 for own in rows.values())
    parts = []
    for kind, own in rows.items():
        array = own.array.reshape(len(own.ids), -1, own.array.shape[-1])
        flat = pyarrow.array(array.reshape(-1))
        lists = pyarrow.FixedSizeListArray.from_arrays(flat, array.shape[-1])
        lists = lists.cast(pyarrow.list_(flat.type))
        if tokens:
            starts = np.arange(len(own.ids) + 1, dtype=np.int32) * array.shape[1]
            lists = pyarrow.ListArray.from_arrays(pyarrow.array(starts), lists)
        names = pyarrow.array(own.ids, pyarrow.string())
        kinds = pyarrow.array([kind] * len(own.ids), pyarrow.string())
        parts.append(pyarrow.table({"kind": kinds, "id": names, "embedding": lists}))
    pyarrow.parquet.write_table(pyarrow.concat_tables(parts), path)
