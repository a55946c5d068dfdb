"""PinPoint's annotations: many valid targets, explicit negatives, one or two reference images.

Files, from github.com/pinterest/pinpoint-dataset:

-   `pinpoint_licensed.parquet`: a row for each query. The columns that are read:

        query_id                 "query_00001"
        query_image_signature    "da9391c91ec61ec5048beef0ffb9f8d1"
        query_image_signature2   the same, or the text "None" where there is one image
        instruction              "Show a dress appropriate for this place"
        positive_candidates      ["21495ece1faf8f6f8ce68dd53413f0c9", ...]
        negative_candidates      the same; a null in most rows
        query_category           "Context Fit"

-   `index_signatures.txt`: a signature a line, the gallery in its order.

Photos are named `<signature>.jpg`. There is one split, a test set. The labels were replaced several
times: figures of different versions do not compare.

The rules:

-   A query's id is its `query_id`; its kinds are its category and, with two images, `two images`.
-   `relevant` and `negatives` are the lists as published. What one names twice counts twice in its
    length, and a null counts in the length of the negatives: the published metrics divide by it.
-   There is no single target, and nothing is known for training.
-   A reference that is among its own positives or negatives stays there.
-   A record is malformed if a column holds another type, an id or the instruction is empty, there
    is no positive, or an earlier record has its `query_id`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from dqe_jax.data.annotations.schema import (
    AnnotatedQuery,
    Annotations,
    Collector,
    RawFormat,
    field,
    filled,
    gallery,
    strings,
)
from dqe_jax.data.raw_files import RawFiles
from dqe_jax.utils.errors import UserError, reason_of
from dqe_jax.utils.files import is_regular, read_text

SPLITS = {"test": "test"}
QUERIES, INDEX = "pinpoint_licensed.parquet", "index_signatures.txt"
TWO = "two images"
_NO_IMAGE = "None"
_COLUMNS = (
    *("query_id", "query_image_signature", "query_image_signature2", "instruction"),
    *("positive_candidates", "negative_candidates", "query_category"),
)


def read(files: RawFiles, split: str) -> Annotations:
    """Reads the split.

    Args:
      files: with the queries and the index.
      split: a key of `SPLITS`.

    Raises:
      UserError: a file is missing, is no Parquet file, lacks a column, or the index holds something
        else than signatures.
    """
    del split  # there is one
    path = files.find(INDEX)
    collector = Collector({"": gallery(path, read_text(path).splitlines())})
    path = files.find(QUERIES)
    collector.add_records(path.name, enumerate(_rows(path)), _query)
    return collector.finish()


def _rows(path: os.PathLike[str]) -> Iterator[object]:
    """The rows of a Parquet file as objects."""
    import pyarrow.parquet  # takes a while

    try:
        if not is_regular(path):  # a pipe would be read for ever
            raise UserError(f"{path} cannot be read: it is no regular file.")
        file = pyarrow.parquet.ParquetFile(path)
        lacking = [name for name in _COLUMNS if name not in file.schema_arrow.names]
        table = None if lacking else file.read(columns=list(_COLUMNS))
    except UserError:
        raise
    except Exception as error:  # pyarrow raises many types
        raise UserError(
            f"{path} cannot be read as Parquet ({reason_of(error)}); get the file again."
        ) from error
    if table is None:
        raise UserError(f"{path} lacks the column {lacking[0]!r}; get the file again.")
    yield from table.to_pylist()


def _query(index: int, record: object) -> AnnotatedQuery:
    del index  # `query_id` names the record
    second = filled(record, "query_image_signature2")
    positives = strings(record, "positive_candidates")
    if not positives or not all(positives):
        raise ValueError("positive_candidates must name images")
    negatives = ["" if n is None else n for n in field(record, "negative_candidates", list)]
    two = second != _NO_IMAGE
    return AnnotatedQuery(
        id=filled(record, "query_id"),
        texts=(filled(record, "instruction"),),
        reference=filled(record, "query_image_signature"),
        references=(second,) if two else (),
        relevant=positives,
        negatives=strings({"negative_candidates": negatives}, "negative_candidates"),
        kinds=(filled(record, "query_category"), *([TWO] if two else [])),
    )


def _files(split: str) -> tuple[str, ...]:
    return QUERIES, INDEX


RAW = RawFormat(
    files=_files,
    read=read,
    read_labels=read,
    shared_gallery=False,
    stem=str,
    preprocess="squash",
    extras=("references", "negatives"),
)
