"""Metadata of images from a CSV file, and filters on it.

The first line names the columns. The column `image`, `id`, `path`, `file`, `filename` or `photo`
says which image a line is of, or else the first column: its path from the folder, its file name, or
this without the suffix. Cells are separated by commas, semicolons or tabs. A column whose cells are
all numbers holds numbers; empty cells have no value.
"""

from __future__ import annotations

import collections
import csv
import dataclasses
import io
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from absl import logging

from dqe_jax.utils.errors import UserError
from dqe_jax.utils.files import read_text
from dqe_jax.utils.paths import whole_path

ID_COLUMNS = ("image", "id", "path", "file", "filename", "photo")
SHOWN = 5
# Values of a column, one for each image; None where there is none.
Column: TypeAlias = "list[str | None] | list[float | None]"
# A value, several of them, or (least, most), of which either may be None.
Condition: TypeAlias = "str | float | Sequence[str | float] | tuple[float | None, float | None]"
Filter: TypeAlias = "Mapping[str, Condition]"


@dataclasses.dataclass(frozen=True)
class Table:
    """Lines of a CSV file.

    Attributes:
      path: of the file.
      key: name of the column that says which image a line is of.
      lines: cells by column, by the value of that column.
      columns: names of the others.
    """

    path: str
    key: str
    lines: dict[str, dict[str, str]]
    columns: tuple[str, ...]


def read_table(path: str | os.PathLike[str]) -> Table:
    """Reads a CSV file.

    Raises:
      UserError: it cannot be read, has no columns, or a line is not right; the sentence names it.
    """
    file = whole_path(path)
    text = read_text(file)
    first = text.partition("\n")[0]
    delimiter = max(",;\t", key=first.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        header = [name.strip() for name in next(reader, [])]
        if len(header) < 2 or "" in header or len(set(header)) < len(header):
            raise UserError(
                f"{file}: its first line must name at least two columns, each once, such as "
                f"'image,brand'; it is {first[:60]!r}."
            )
        lower = [name.lower() for name in header]
        at = next((lower.index(name) for name in ID_COLUMNS if name in lower), 0)
        lines: dict[str, dict[str, str]] = {}
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) != len(header):
                raise UserError(
                    f"{file}, line {reader.line_num}: it has {len(cells)} cells, and there are "
                    f"{len(header)} columns; mend it."
                )
            key = cells[at].strip().removeprefix("./")
            if key in lines:
                raise UserError(
                    f"{file}, line {reader.line_num}: there is another line of {key!r}; keep one."
                )
            own = {name: cell.strip() for name, cell in zip(header, cells)}
            own.pop(header[at])
            lines[key] = own
    except csv.Error as error:
        raise UserError(f"{file}, line {reader.line_num}: {error}.") from error
    return Table(str(file), header[at], lines, tuple(n for i, n in enumerate(header) if i != at))


def columns_of(table: Table, ids: Sequence[str]) -> dict[str, Column]:
    """The columns of a table for images, in the order of their ids.

    Says in the log how many images have no line, and how many lines no image.

    Raises:
      UserError: no line is of any image.
    """
    names = collections.Counter(key.rsplit("/", 1)[-1] for key in table.lines)
    by_name = {key.rsplit("/", 1)[-1]: key for key in table.lines}
    found: list[str | None] = []
    for id_ in ids:
        base = id_.rsplit("/", 1)[-1]
        stem = os.path.splitext(base)[0]
        exact = (id_, os.path.splitext(id_)[0], base, stem)
        key = next((name for name in exact if name in table.lines), None)
        if key is None:
            key = next((by_name[n] for n in (base, stem) if names.get(n) == 1), None)
        found.append(key)
    used = {key for key in found if key is not None}
    if ids and not used:
        raise UserError(
            f"{table.path}: no line is of any of the {len(ids)} images; the column {table.key!r} "
            f"holds values such as {next(iter(table.lines), '')!r}, and images are such as "
            f"{ids[0]!r}."
        )
    lacking = [id_ for id_, key in zip(ids, found) if key is None]
    unused = [key for key in table.lines if key not in used]
    for what, some in (("images have no line", lacking), ("lines are of no image", unused)):
        if some:
            shown = ", ".join(some[:SHOWN]) + (", ..." if len(some) > SHOWN else "")
            logging.warning("%s: %d %s: %s", table.path, len(some), what, shown)
    return {
        name: _typed([table.lines[key][name] if key is not None else "" for key in found])
        for name in table.columns
    }


def _typed(cells: Sequence[str]) -> Column:
    """Cells as numbers, if they all are, or else as texts."""
    numbers: list[float | None] = []
    for cell in cells:
        try:
            if re.match(r"0\d", cell):  # a code, not a number
                return [text or None for text in cells]
            number = float(cell) if cell else None
        except ValueError:
            return [text or None for text in cells]
        if number is not None and not math.isfinite(number):
            return [text or None for text in cells]
        numbers.append(number)
    return numbers


def allowed_rows(columns: Mapping[str, Column], count: int, wanted: Filter) -> np.ndarray:
    """Which images a filter lets pass: bool `[count]`.

    Args:
      columns: of the index.
      count: its images.
      wanted: all conditions must hold: a value that the column has, a list of such values, or a
        tuple (least, most) of numbers, either of which may be None.

    Raises:
      UserError: there is no such column, or a condition does not fit it.
    """
    passed = np.ones(count, bool)
    for name, condition in wanted.items():
        if name not in columns:
            known = ", ".join(columns) or "none: give a table when you make it"
            raise UserError(f"filter: the index has no column {name!r}; it has {known}.")
        passed &= _holds(name, columns[name], condition)
    return passed


def _holds(name: str, column: Column, condition: Condition) -> np.ndarray:
    is_number = any(isinstance(value, float) for value in column)
    if isinstance(condition, tuple):
        if len(condition) != 2 or not is_number:
            has = "numbers" if is_number else "texts"
            raise UserError(
                f"filter: {name} is {condition!r}: a tuple means (least, most) of a column of "
                f"numbers, and this one holds {has}; give a list for several values."
            )
        ends = [_number(name, end) if end is not None else None for end in condition]
        least = -math.inf if ends[0] is None else ends[0]
        most = math.inf if ends[1] is None else ends[1]
        return np.array(
            [isinstance(value, float) and least <= value <= most for value in column], bool
        )
    values = list(condition) if isinstance(condition, (list, set, frozenset)) else [condition]
    wanted = {_number(name, v) if is_number else str(v) for v in values}
    return np.array([value in wanted for value in column], bool)


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise UserError(
            f"filter: {name} is {value!r}: this column holds numbers; give a number."
        ) from None
