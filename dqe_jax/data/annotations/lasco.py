"""LaSCo's annotations (Levy et al., AAAI 2024): queries of VQA answers over COCO 2014.

Files of a split (`train`, `val`), from github.com/levymsn/LaSCo (folder `downloads`):

-   `lasco_<split>_corpus.json`: the gallery in its order, a list of objects (val), or an object of
    names and paths (train, as public loaders read it).

        {"id": 42, "path": "val/val2014/COCO_val2014_000000000042.jpg"}

-   `lasco_<split>.json`: a list of records.

        {"qid": 28714000, "query-text": "The person is riding the bike",
         "query-image": [28714, "val2014/COCO_val2014_000000028714.jpg"],
         "target-image": [277005, "val2014/COCO_val2014_000000277005.jpg"]}

The rules:

-   An image's id is its file's name without the suffix: the two files write paths differently.
-   A query's id is its `qid`.
-   A record is malformed if a field is missing or of another type, an image is not a list of a
    number and a path, or an earlier record has its `qid`.
-   Which images are truly relevant is not known.
"""

from __future__ import annotations

import os

from etils import epath

from dqe_jax.data.annotations.schema import (
    AnnotatedQuery,
    Annotations,
    Collector,
    RawFormat,
    field,
    filled,
    gallery,
)
from dqe_jax.data.raw_files import RawFiles
from dqe_jax.utils.errors import UserError
from dqe_jax.utils.files import read_json

SPLITS = {"train": "train", "validation": "val"}


def read(files: RawFiles, split: str) -> Annotations:
    """Reads a split.

    Args:
      files: with its queries and its gallery.
      split: a key of `SPLITS`.

    Raises:
      UserError: a file is missing, is no JSON list or object, or the gallery holds something else
        than paths.
    """
    queries, corpus = _files(split)
    path = files.find(corpus)
    collector = Collector({"": gallery(path, map(_name, _paths(path, split)))})
    path = files.find(queries)
    collector.add_records(path.name, enumerate(read_json(path, list)), _query)
    return collector.finish()


def _paths(path: epath.Path, split: str) -> list[str]:
    """Paths of the images of a gallery's list."""
    try:
        if split == "train":
            content = read_json(path, dict)
            return [filled(content, name) for name in content]
        return [filled(record, "path") for record in read_json(path, list)]
    except ValueError as error:
        raise UserError(f"{path}: an image's {error}; get the file again.") from error


def _name(path: str) -> str:
    return os.path.splitext(path.rpartition("/")[2])[0]


def _query(index: int, record: object) -> AnnotatedQuery:
    del index  # `qid` names the record
    target = _image(record, "target-image")
    return AnnotatedQuery(
        id=str(field(record, "qid", int)),
        texts=(field(record, "query-text", str),),
        reference=_image(record, "query-image"),
        target=target,
        known_positives=(target,),
    )


def _image(record: object, name: str) -> str:
    image = field(record, name, list)
    if len(image) != 2 or type(image[1]) is not str or not _name(image[1]):
        raise ValueError(f"{name} must be a number and a path")
    return _name(image[1])


def _files(split: str) -> tuple[str, ...]:
    return f"lasco_{SPLITS[split]}.json", f"lasco_{SPLITS[split]}_corpus.json"


RAW = RawFormat(
    files=_files,
    read=read,
    read_labels=read,
    shared_gallery=False,
    stem=str,
    preprocess="squash",
)
