"""What a bad file must lead to, from its content alone: rules that share no code with dqe_jax.

| verdict | the command |
| --- | --- |
| `refused` | ends with status 2 and one sentence |
| `same` | gives the result that the good file gives |
| `either` | does one of the two: the file is sound, and says something else |
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

REFUSED, SAME, EITHER = "refused", "same", "either"
Rule = Callable[[Path, Path], str]
ABSENT = object()  # in place of a value that is not there


def text(value: object) -> bool:
    """A string that UTF-8 can hold."""
    return isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)


def name(value: object) -> bool:
    """Such a string that is not empty."""
    return text(value) and bool(value)


def whole(value: object) -> bool:
    """An integer, which true and false are not."""
    return type(value) is int


def number(value: object) -> bool:
    """A number."""
    return type(value) in (int, float)


def record(value: object) -> bool:
    """An object."""
    return isinstance(value, dict)


def many(kind: Callable[[object], bool]) -> Callable[[object], bool]:
    """A list of these."""
    return lambda value: isinstance(value, list) and all(map(kind, value))


def any_of(value: object) -> bool:
    """Anything that is there."""
    return value is not ABSENT


def of_json(read: Mapping[str, Callable[[object], bool]]) -> Rule:
    """The rule of a JSON file of which these fields are read.

    Args:
      read: what must hold of the value at a place, `*.captions.*`, where `*` is any place of a list
        and any key of an object whose keys are data. What is not named is not read.
    """

    def rule(path: Path, good: Path) -> str:
        try:
            held = json.loads(path.read_bytes().decode("utf-8-sig"))
        except (ValueError, RecursionError):
            return REFUSED
        verdict = SAME
        for place, value in _differences(json.loads(good.read_text()), held):
            known = [p for p in read if _fits(p, place)]
            if not known and _within(read, place):
                known = [""]  # inside of something that is read
            for pattern in known:
                if pattern and not read[pattern](value):
                    return REFUSED
                verdict = EITHER
            if not place and not read.get("", any_of)(held):
                return REFUSED
            verdict = EITHER if not place else verdict
        return verdict

    return rule


def _fits(pattern: str, place: tuple[str, ...]) -> bool:
    parts = tuple(pattern.split(".")) if pattern else ()
    return len(parts) == len(place) and all(p in ("*", at) for p, at in zip(parts, place))


def _within(read: Mapping[str, object], place: tuple[str, ...]) -> bool:
    return any(_fits(p, place[:i]) for i in range(2, len(place)) for p in read if p)


def _differences(
    good: object, held: object, at: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], object]]:
    """The places at which two trees differ, and what the second has there."""
    if isinstance(good, dict) and isinstance(held, dict):
        for key in {**good, **held}:
            if key not in held:
                yield (*at, key), ABSENT
            elif key not in good:
                yield (*at, key), held[key]
            else:
                yield from _differences(good[key], held[key], (*at, key))
    elif isinstance(good, list) and isinstance(held, list) and len(good) == len(held):
        for i, (one, other) in enumerate(zip(good, held)):
            yield from _differences(one, other, (*at, str(i)))
    elif type(good) is not type(held) or good != held:
        yield at, held


def lines(path: Path, good: Path) -> str:
    """Of files of lines: marks and ends of lines say nothing; a bad line may be lost alone."""
    held = path.read_bytes().removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n")
    return SAME if held == good.read_bytes() else EITHER


def of_arrays(reader: Callable[[Path], Mapping[str, object]]) -> Rule:
    """The rule of a file of arrays: what cannot be read, or is not finite, is refused."""

    def rule(path: Path, good: Path) -> str:
        try:
            held = reader(path)
        except Exception:  # whatever a library says of a file that is not whole
            return REFUSED
        wanted = reader(good)
        floats = [x for x in held.values() if isinstance(x, np.ndarray) and x.dtype.kind == "f"]
        if not all(np.isfinite(x).all() for x in floats):
            return REFUSED
        same = held.keys() == wanted.keys() and all(
            np.array_equal(np.asarray(held[key]), np.asarray(wanted[key])) for key in held
        )
        return SAME if same else EITHER

    return rule


def npz(path: Path) -> dict[str, object]:
    """The arrays of an archive."""
    with np.load(path, allow_pickle=False) as held:
        return {key: held[key] for key in held.files}


def safetensors(path: Path) -> dict[str, object]:
    """The tensors of float32 of a file by the published format, and its metadata."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    if length > len(data) - 8:
        raise ValueError("the header is cut off")
    header = json.loads(data[8 : 8 + length].decode())
    numbers, found, covered = data[8 + length :], {}, []
    for key, entry in header.items():
        if key == "__metadata__":
            found[key] = json.dumps(entry, sort_keys=True)
            continue
        start, end = entry["data_offsets"]
        count = int(np.prod(entry["shape"], dtype=object)) if entry["shape"] else 1
        if entry["dtype"] != "F32" or end - start != 4 * count or not 0 <= start <= end:
            raise ValueError(f"{key} is not of its size")
        found[key] = np.frombuffer(numbers[start:end], "<f4").reshape(entry["shape"])
        covered.append((start, end))
    ends = [0, *(end for _, end in sorted(covered))]
    if [start for start, _ in sorted(covered)] != ends[:-1] or ends[-1] != len(numbers):
        raise ValueError("tensors overlap, or leave bytes out")
    return found


def parquet(path: Path) -> dict[str, object]:
    """The columns of a table."""
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(path)
    return {key: json.dumps(table[key].to_pylist(), default=str) for key in table.column_names}
