"""A user's own triplets: one file of annotations, images anywhere below the raw directory.

The file is `triplets.jsonl` or `triplets.csv`.

JSONL: an object a line, UTF-8.

    {"reference": "shoes/1.jpg", "text": "the same in red", "target": "shoes/7.jpg"}
    {"reference": "1", "texts": ["in red", "with laces"], "targets": ["7", "9.jpg"], "id": "a",
     "split": "test", "attributes": {"color": "red", "closure": "laces"}, "kind": "color"}

(the second on one line). `text` or `texts`, and `target` or `targets`: one of each two, not both.
`attributes` is an object or a list of `name=value`. What is optional may be left out, null or
empty; other fields are ignored.

CSV: RFC 4180 (fields in double quotes may hold commas, line ends, and quotes that are doubled),
UTF-8, a header. More captions are in `text_2`, `text_3` and so on, where these are not empty.
Several targets, or several attributes, are separated by `|`.

    reference,text,text_2,target,id,split,attributes,kind
    shoes/1.jpg,in red,with laces,shoes/7.jpg|9.jpg,a,test,color=red|closure=laces,color

The columns `reference`, `text` and `target` must be there, the others may be; columns of other
names are ignored, and so are spaces around values other than texts. Blank lines are skipped, in
both formats, and rows of empty fields.

The rules:

-   **Images.** A name is a path relative to the raw directory (with or without `./`) or to a folder
    below it, so also a file's name alone, each with or without its suffix. The id of an image is
    its path from the raw directory. That always means one file; any other name that fits several
    files is ambiguous, and an unknown image id.
-   **Gallery.** Every image below the raw directory, for all splits.
-   **Splits.** `train`, `val` or `validation`, `test`. If no record states one, a hash of the
    reference's path (SHA-256) assigns 80% of the references to train, 10% to validation, 10% to
    test, so that the queries of one reference stay together. If some do, the others are malformed.
-   **Targets.** Several targets are all that are relevant. With one, what else is, is unknown. In
    test it may be missing, then the query has no labels.
-   **Ids.** The number of the (first) line by default.
-   **Text.** Kept as it is, also if it is empty.
-   **Malformed** is a record that is not UTF-8, not JSON or not well quoted; that has more or fewer
    fields than the header; that lacks a reference, a text or, outside of test, a target; a field of
    another type; an unknown split; an attribute without name or value; an id that an earlier record
    of the split has. Only that record is lost. It is named by its first line, `triplets.jsonl:17`.
-   A record that is left out and whose split cannot be told counts in train, only there.
"""

from __future__ import annotations

import codecs
import collections
import functools
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence

from etils import epath

from dqe_jax.data.annotations.schema import (
    AnnotatedQuery,
    Annotations,
    Collector,
    RawFormat,
    field,
    filled,
    strings,
)
from dqe_jax.data.csv_rows import read_rows
from dqe_jax.data.raw_files import IMAGE_SUFFIXES, ImageNames, RawFiles
from dqe_jax.utils.errors import UserError
from dqe_jax.utils.files import read_bytes

SPLITS = {"train": "train", "validation": "validation", "test": "test"}
JSONL, CSV = FILES = ("triplets.jsonl", "triplets.csv")
REQUIRED_COLUMNS = ("reference", "text", "target")
# Changing it, or the shares, moves references to other splits.
_SPLIT_SALT = "triplets/split/1"
_SPLIT_ENDS = (("train", 0.8), ("validation", 0.9), ("test", 1.0))
_STATED_SPLITS = {"val": "validation", **SPLITS}
_MORE_TEXTS = re.compile(r"text_([2-9]|[1-9][0-9]+)")

# Each with its first line; the object of a line of JSONL, or anything else if it is malformed.
_Records = Iterator[tuple[int, object]]


def read(files: RawFiles, split: str) -> Annotations:
    """Reads a split.

    Args:
      files: with the annotations and all images.
      split: a key of `SPLITS`.

    Raises:
      UserError: there is no file of annotations, or there are two; the CSV's header cannot be
        used; there are no images.
    """
    path = _annotation_file(files)
    _check_images(files)
    data = read_bytes(path).removeprefix(codecs.BOM_UTF8)
    records = list(_jsonl(data) if path.name == JSONL else _csv(data, path))
    stated = any(_stated_split(record) in _STATED_SPLITS for _, record in records)
    images = ImageNames(files.image_paths)
    chosen = [(line, record) for line, record in records if _split(record, images, stated) == split]
    collector = Collector({"": files.image_paths})
    query_of = functools.partial(_query, images=images, split=split, stated=stated)
    collector.add_records(path.name, chosen, query_of)
    return collector.finish()


def _annotation_file(files: RawFiles) -> epath.Path:
    found = [name for name in FILES if files.has(name)]
    if not found:
        raise UserError(f"{files.root} lacks the file {JSONL} or {CSV}; put one of them there.")
    if len(found) > 1:
        raise UserError(f"{files.root} holds both {JSONL} and {CSV}; remove one.")
    return files.find(found[0])


def _check_images(files: RawFiles) -> None:
    if not files.image_paths:
        raise UserError(f"{files.root} holds no images ({', '.join(IMAGE_SUFFIXES)}).")
    for path in files.image_paths:
        try:
            path.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{files.root}: the name of image {path!a} is not UTF-8; rename it."
            ) from error


# --- Reading lines --------------------------------------------------------------------------------


def _jsonl(data: bytes) -> _Records:
    for number, line in enumerate(data.split(b"\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line.decode("utf-8"))
            except (ValueError, RecursionError):
                yield number, None


def _csv(data: bytes, path: epath.Path) -> _Records:
    # Not decoded strictly: one bad byte would be an error of the whole file.
    found, rows = read_rows(data.decode("utf-8", errors="surrogateescape"))
    header = _header(found, path)
    for number, row in rows:
        yield number, None if row is None else _object(header, row)


def _header(row: Sequence[str] | None, path: epath.Path) -> list[str]:
    if row is None:
        raise UserError(
            f"{path}: the header is not UTF-8 or not well quoted; save it as CSV, UTF-8."
        )
    header = [column.strip() for column in row]
    for column in REQUIRED_COLUMNS:
        if column not in header:
            raise UserError(
                f"{path} has no column {column!r}; it has {', '.join(header) or 'none'}, so name "
                "the columns in its first line."
            )
    for column, count in collections.Counter(header).items():
        if column and count > 1:
            raise UserError(f"{path} has {count} columns {column!r}; rename or remove one.")
    return header


def _object(header: Sequence[str], row: Sequence[str]) -> dict[str, object]:
    """A row as the object that a line of JSONL would hold."""
    cells = dict(zip(header, row))
    more = sorted((int(m[1]), m[0]) for m in map(_MORE_TEXTS.fullmatch, header) if m)
    return {
        "reference": cells["reference"].strip(),
        "texts": [cells["text"], *filter(None, (cells[column] for _, column in more))],
        "targets": _listed(cells["target"]),
        "attributes": _listed(cells.get("attributes", "")),
        **{name: cells.get(name, "").strip() for name in ("id", "split", "kind")},
    }


def _listed(cell: str) -> list[str]:
    return [value.strip() for value in cell.split("|") if value.strip()]


# --- Records --------------------------------------------------------------------------------------


def _split(record: object, images: ImageNames, stated: bool) -> str:
    """The split of a record, train if it cannot be told."""
    name = _stated_split(record)
    if name or stated:
        return _STATED_SPLITS.get(name, "train")
    try:
        reference = images.path(filled(record, "reference"))
    except ValueError:
        return "train"
    return _hashed_split(reference) if reference in images.paths else "train"


def _stated_split(record: object) -> str:
    """The split as the record states it, sound or not; "" if it states none."""
    value = record.get("split") if isinstance(record, dict) else None
    return "" if value is None else str(value)


def _hashed_split(reference: str) -> str:
    digest = hashlib.sha256(f"{_SPLIT_SALT}/{reference}".encode()).digest()
    place = int.from_bytes(digest[:6], "big") / 2**48
    return next(split for split, end in _SPLIT_ENDS if place < end)


def _query(
    line: int, record: object, *, images: ImageNames, split: str, stated: bool
) -> AnnotatedQuery:
    reference = images.path(filled(record, "reference"))
    assert isinstance(record, dict), "it has a field"
    name = _stated_split(record)
    if (name or stated) and name not in _STATED_SPLITS:
        raise ValueError(f"split must be one of {', '.join(_STATED_SPLITS)}")
    texts = _one_or_more(record, "text")
    if not texts:
        raise ValueError("text or texts must be given")
    names = filter(None, _one_or_more(record, "target"))
    targets = tuple(dict.fromkeys(images.path(name) for name in names))
    if not targets and split != "test":
        raise ValueError("target or targets must be given")
    kind = _optional(record, "kind")
    return AnnotatedQuery(
        id=_id(record) or str(line),
        texts=texts,
        reference=reference,
        target=targets[0] if targets else "",
        known_positives=targets,
        relevant=targets if len(targets) > 1 else (),
        kinds=(kind,) if kind else (),
        attributes=_attributes(record),
    )


def _optional(record: Mapping[str, object], name: str) -> str:
    """A field that is a string; "" if it is left out."""
    return "" if record.get(name) is None else field(record, name, str)


def _one_or_more(record: Mapping[str, object], name: str) -> tuple[str, ...]:
    """The string of a field, or those of the field that is named in the plural."""
    several = f"{name}s"
    if record.get(several) is None:
        return () if record.get(name) is None else (field(record, name, str),)
    if record.get(name) is not None:
        raise ValueError(f"{name} and {several} must not both be given")
    return strings(record, several)


def _id(record: Mapping[str, object]) -> str:
    value = record.get("id")
    return str(value) if type(value) is int else _optional(record, "id")


def _attributes(record: Mapping[str, object]) -> tuple[str, ...]:
    value = record.get("attributes")
    if isinstance(value, dict):
        if not all(type(part) in (str, int, float) for part in value.values()):
            raise ValueError("attributes must be strings or numbers")
        value = [f"{name}={part}" for name, part in value.items()]
    pairs = strings({"attributes": value or []}, "attributes")
    if not all(name and part for name, _, part in (pair.partition("=") for pair in pairs)):
        raise ValueError("attributes must be name=value")
    return pairs


RAW = RawFormat(
    files=lambda split: (),  # one of two, which `read` looks for
    read=read,
    read_labels=read,
    shared_gallery=True,
    stem=str,
    preprocess="pad",
)
