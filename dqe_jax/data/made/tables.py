"""Any table of products: which photo each row is of, and the values of its attributes.

The rules:

-   **File.** A CSV file whose first line names the columns. It is UTF-8, or UTF-16 if it begins
    with the mark of that; a file that is neither is read as Windows-1252, which is said. Cells are
    separated by commas, semicolons, tabs or vertical bars, whichever the first line has most of,
    and may be in double quotes, within which a quote is doubled. Lines may end in any way; blank
    ones are skipped.
-   **Bad rows.** A row with more or fewer cells than columns, or with wrong quotes, is lost; so is
    one without the name of a photo. They are counted and named by their line.
-   **Photos.** A row names its photo by a path, by the name of the file, or by this without its
    suffix: what leads to the file and the suffix may differ from what is there. A photo that is not
    there, does not decode, or whose name fits several files is a lost row. Of several rows of one
    photo the first is kept. The id of a product is the path of its photo below the folder, so it
    does not depend on how the table calls it.
-   **Columns.** Case and spaces of their names do not matter.
-   **Values.** Spaces around a value are removed, and several in it count as one. Values that
    differ in case alone are one value, written as it is written most often; such cells are counted
    as respelled. A value of more than `LONGEST` characters, or one with control characters or the
    mark of characters that could not be read, is a bad cell: it counts as not stated.
-   **Not stated** is an empty cell, or one that holds a word of `MISSING` in any case. That is a
    value like any other in deciding which products agree, but no query asks for it. So a product
    without a stated colour is relevant only where the reference has none either.
"""

from __future__ import annotations

import codecs
import collections
import dataclasses
import difflib
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

from absl import logging
from etils import epath

from dqe_jax.data.csv_rows import read_rows
from dqe_jax.data.made.folder import warn
from dqe_jax.data.made.grammar import NA
from dqe_jax.data.raw_files import ImageNames
from dqe_jax.utils.errors import UserError
from dqe_jax.utils.files import JsonObject, read_bytes
from dqe_jax.utils.paths import whole_path

# Columns that are looked for, in this order, if none is named as that of the photos.
IMAGE_COLUMNS = ("image", "photo", "file", "filename", "path", "id")
MISSING = ("na", "n/a", "nan", "null", "-", "?")
LONGEST = 60
_DELIMITERS = ",;\t|"
_NAME = re.compile(r"[^\W_][^=\[\]#,:|]*")


@dataclasses.dataclass(frozen=True)
class Cells:
    """The cells of a table.

    Attributes:
      path: of the file.
      columns: their names.
      rows: each with the number of its line.
      bad_lines: numbers of the lines that are not sound.
    """

    path: epath.Path
    columns: Sequence[str]
    rows: Sequence[tuple[int, Sequence[str]]]
    bad_lines: Sequence[int]

    def column(self, name: str, flag: str) -> int:
        """The place of a column.

        Args:
          name: its name; case and spaces do not matter.
          flag: that names it, for an error.

        Raises:
          UserError: there is none of that name, or there are several.
        """
        found = [i for i, own in enumerate(self.columns) if _plain(own) == _plain(name)]
        exact = [i for i in found if self.columns[i] == name]
        if len(exact) == 1 or len(found) == 1:
            return (exact or found)[0]
        if found:
            raise UserError(f"{self.path} has {len(found)} columns {name!r}; rename one.")
        near = difflib.get_close_matches(name, self.columns, 1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise UserError(
            f"{self.path} has no column {name!r}, which --{flag} names; it has "
            f"{', '.join(self.columns)}{hint}"
        )


@dataclasses.dataclass(frozen=True)
class Column:
    """One attribute of a table.

    Attributes:
      column: its name in the file.
      name: of the attribute.
      values: of each row, `NA` where it is not stated.
      unstated: how many cells are empty, or say so.
      too_long: how many cells hold more than `LONGEST` characters.
      no_text: how many cells hold control characters, or marks of unreadable ones.
      respelled: how many cells differ in case from how their value is written most often.
    """

    column: str
    name: str
    values: Sequence[str]
    unstated: int
    too_long: int
    no_text: int
    respelled: int

    @property
    def counts(self) -> dict[str, int]:
        """The value's numbers of rows, `NA` left out; the most frequent first."""
        stated = collections.Counter(value for value in self.values if value != NA)
        return dict(stated.most_common())

    def facts(self) -> dict[str, object]:
        """For the report."""
        counts = self.counts
        numbers = {
            name: getattr(self, name) for name in ("unstated", "too_long", "no_text", "respelled")
        }
        total, stated = len(self.values), sum(counts.values())
        return {
            "column": self.column,
            "stated": stated,
            "share_stated": round(stated / total, 4) if total else 0.0,
            **numbers,
            "values": len(counts),
            "values_of_one_row": sum(count == 1 for count in counts.values()),
            "most_frequent": dict(list(counts.items())[:10]),
        }


@dataclasses.dataclass(frozen=True)
class Products:
    """The products of a table whose photo is named.

    Attributes:
      paths: of their photos, below the folder; each once.
      columns: the attributes.
      lost: why rows are lost, by their lines and what they call the photo.
      repeated: lines of further rows of a photo.
      without_row: photos that no row names.
    """

    paths: Sequence[str]
    columns: Sequence[Column]
    lost: Mapping[str, str]
    repeated: Sequence[str]
    without_row: Sequence[str]


def read_cells(path: str | os.PathLike[str]) -> Cells:
    """Reads a table.

    Raises:
      UserError: it cannot be read, or its first line does not name columns.
    """
    file = whole_path(path)
    text = _decoded(read_bytes(file), file)
    first = text.partition("\n")[0]
    delimiter = max(_DELIMITERS, key=first.count)
    header, rows = read_rows(text, delimiter)
    columns = [" ".join(name.split()) for name in header or ()]
    if not any(columns):
        raise UserError(f"{file}: its first line must name the columns; it is {first[:60]!r}.")
    found = [(line, row) for line, row in rows]
    return Cells(
        file,
        columns,
        [(line, row) for line, row in found if row is not None],
        [line for line, row in found if row is None],
    )


def _decoded(data: bytes, file: epath.Path) -> str:
    marked = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return data.decode("utf-16" if marked else "utf-8-sig")
    except UnicodeDecodeError:
        logging.warning("%s is not UTF-8: it is read as Windows-1252.", file)
        return data.decode("cp1252", errors="replace")


def parse_attributes(given: Sequence[str]) -> dict[str, str]:
    """Columns by the names of their attributes.

    Args:
      given: each `COLUMN`, or `COLUMN:NAME` where the attribute shall have another name.

    Raises:
      UserError: a name is given twice, or cannot be one.
    """
    found: dict[str, str] = {}
    for each in given:
        column, _, name = (" ".join(part.split()) for part in each.partition(":"))
        name = name or column
        if not _NAME.fullmatch(name):
            raise UserError(
                f"--attributes: {name!r} cannot be the name of an attribute; give it as "
                "COLUMN:NAME, with a NAME that begins with a letter and has none of =[]#,:| in it."
            )
        if name in found:
            raise UserError(f"--attributes names {name!r} twice; name it once.")
        found[name] = column
    if not found:
        raise UserError("--attributes names no column; name those that a query may change.")
    return found


def image_column(cells: Cells, named: str | None) -> int:
    """The place of the column that names photos.

    Args:
      cells: of the table.
      named: the name of the column; None to look for one of `IMAGE_COLUMNS`.

    Raises:
      UserError: there is none.
    """
    if named is not None:
        return cells.column(named, "image_column")
    lower = [_plain(name) for name in cells.columns]
    found = next((lower.index(name) for name in IMAGE_COLUMNS if name in lower), None)
    if found is None:
        raise UserError(
            f"{cells.path} has none of the columns {', '.join(IMAGE_COLUMNS)}; name that of the "
            f"photos by --image_column, one of {', '.join(cells.columns)}."
        )
    return found


def read_products(
    cells: Cells,
    images: Iterable[str],
    image: int,
    attributes: Mapping[str, str],
    longest: int = LONGEST,
) -> Products:
    """The products of a table, in its order; see the rules.

    Args:
      cells: of the table.
      images: paths of all photos, below their folder.
      image: place of the column that names photos.
      attributes: columns by the names of their attributes, as `parse_attributes` gives them.
      longest: characters of a value.

    Raises:
      UserError: there is no such column, or no row has a photo.
    """
    places = {name: cells.column(column, "attributes") for name, column in attributes.items()}
    named = Finder(images)
    lost = {f"line {line}": "is not sound" for line in cells.bad_lines}
    repeated: list[str] = []
    kept: dict[str, Sequence[str]] = {}
    for line, row in cells.rows:
        cell = row[image].strip()
        who = f"line {line}" + (f" ({cell})" if cell else "")
        found = named.paths(cell) if cell else []
        if not cell:
            lost[who] = "names no photo"
        elif len(found) != 1:
            lost[who] = f"fits {len(found)} photos" if found else "is of no photo"
        elif found[0] in kept:
            repeated.append(who)
        else:
            kept[found[0]] = row
    if not kept:
        example = next(iter(lost.items()), None)
        told = f" (for example {' '.join(example)})" if example else ""
        raise UserError(
            f"{cells.path}: no row names a photo{told}; name the column of the photos by "
            "--image_column, and their folder by --images."
        )
    return Products(
        list(kept),
        [
            read_column(cells.columns[at], name, [row[at] for row in kept.values()], longest)
            for name, at in places.items()
        ],
        lost,
        repeated,
        sorted(named.all - kept.keys()),
    )


def read_column(column: str, name: str, cells: Sequence[str], longest: int = LONGEST) -> Column:
    """The values of an attribute from its cells; see the rules."""
    texts = [unicodedata.normalize("NFC", " ".join(cell.split())) for cell in cells]
    unstated = [not text or text.casefold() in MISSING for text in texts]
    no_text = [any(not c.isprintable() or c == "\ufffd" for c in text) for text in texts]
    too_long = [len(text) > longest for text in texts]
    bad = [any(flags) for flags in zip(unstated, no_text, too_long)]
    written: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for text, skip in zip(texts, bad):
        if not skip:
            written[text.casefold()][text] += 1
    # Of equally frequent ones the first: `most_common` keeps their order.
    spelled = {key: counter.most_common(1)[0][0] for key, counter in written.items()}
    values = [NA if skip else spelled[text.casefold()] for text, skip in zip(texts, bad)]
    return Column(
        column=column,
        name=name,
        values=values,
        unstated=sum(unstated),
        too_long=sum(too_long),
        no_text=sum(a and not b for a, b in zip(no_text, too_long)),
        respelled=sum(not skip and a != b for skip, a, b in zip(bad, texts, values)),
    )


def check_lost(
    cells: Cells, products: Products, unseen: Mapping[str, str], most: float
) -> dict[str, str]:
    """Why rows are lost, by what they are called; says so in the log.

    Args:
      cells: of the table.
      products: of its rows.
      unseen: why photos cannot be used, by their paths.
      most: share of the rows that may be lost.

    Raises:
      UserError: more are lost.
    """
    lost = {**products.lost, **unseen}
    total = len(products.paths) + len(products.lost)
    warn(cells.path, "rows are lost", [f"{who} {why}" for who, why in lost.items()])
    warn(cells.path, "rows are of the photo of an earlier row", products.repeated)
    if len(lost) > most * total:
        who, why = next(iter(lost.items()))
        raise UserError(
            f"{cells.path}: {len(lost)} of {total} rows are lost (for example {who} {why}); mend "
            "the table, name other --image_column or --images, or accept it with --max_lost."
        )
    return lost


def lost_facts(products: Products, lost: Mapping[str, str]) -> JsonObject:
    """What is lost, for the report."""
    return {
        "rows": len(products.paths) + len(products.lost),
        "lost_rows": len(lost),
        "lost": dict(lost),
        "repeated_rows": len(products.repeated),
        "repeated": list(products.repeated),
        "photos_without_row": len(products.without_row),
        "photos_without_row_paths": list(products.without_row),
    }


class Finder:
    """Finds the photo that a cell means.

    Attributes:
      all: paths of the photos.
    """

    def __init__(self, images: Iterable[str]):
        self._names = ImageNames(images)
        self.all = self._names.paths

    def paths(self, cell: str) -> Sequence[str]:
        """The photos that a cell fits: with ever fewer of its folders, then without its suffix."""
        parts = [part for part in cell.replace("\\", "/").split("/") if part not in ("", ".")]
        for start in range(len(parts)):
            name = "/".join(parts[start:])
            if found := self._names.found(name):
                return found
        stem = os.path.splitext(parts[-1])[0] if parts else ""
        return self._names.found(stem) if stem else []


def _plain(name: str) -> str:
    return "".join(name.split()).casefold()
