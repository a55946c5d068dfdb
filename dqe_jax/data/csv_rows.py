"""Rows of a CSV file (RFC 4180), of which a bad one costs no other."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence


def read_rows(
    text: str, delimiter: str = ","
) -> tuple[list[str] | None, Iterator[tuple[int, list[str] | None]]]:
    """The header and the rows of a CSV file.

    Args:
      text: of the file; half surrogates stand for bytes that are not UTF-8.
      delimiter: between cells.

    Returns:
      The header, None if it is not sound; and each row with the number of its first line. A row is
      None if its quoting is wrong, it has more or fewer cells than the header, or holds a half
      surrogate. Rows of empty cells are left out.
    """
    lines = list(io.StringIO(text, newline=""))
    header, start = _row(lines, 0, delimiter)
    return header, _rows(lines, start, delimiter, len(header or ()))


def _rows(
    lines: Sequence[str], start: int, delimiter: str, cells: int
) -> Iterator[tuple[int, list[str] | None]]:
    while start < len(lines):
        number = start + 1
        row, end = _row(lines, start, delimiter)
        # A stray quote reaches to the next one: only the line that holds it is lost.
        sound = row if row is not None and len(row) == cells else None
        start = start + 1 if sound is None else end
        if row is None or "".join(row).strip():
            yield number, sound


def _row(lines: Sequence[str], start: int, delimiter: str) -> tuple[list[str] | None, int]:
    """Fields of the record that begins at a line, and the line after it.

    The fields are None if the quoting is wrong or a character is not UTF-8.
    """
    # A new reader is made: after an error the old one would continue in the middle of a record.
    rest = (lines[i] for i in range(start, len(lines)))
    reader = csv.reader(rest, delimiter=delimiter, strict=True)
    try:
        row = next(reader, [])
        "".join(row).encode()
    except (csv.Error, UnicodeEncodeError):
        return None, start + 1
    return row, start + reader.line_num
