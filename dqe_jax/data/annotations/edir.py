"""EDIR's annotations (Song et al., ACL 2026): targets that were made by editing the reference.

Files, from huggingface.co/datasets/EDIR-BENCH/EDIR. The fields are those that the script reads by
which mteb's task `EDIRIT2IRetrieval` was made of revision `2aed46dc` of that repository:

-   `corpus.jsonl`: the gallery in its order, an object a line; `image` is equal to `id`.

        {"id": "510_007464815_2.png", "image": "510_007464815_2.png"}

-   `queries.jsonl`: an object for each query.

        {"id": "...", "image": "510_007464815_1.png", "text": "make it red",
         "metadata": {"subcategory": "color"}}

-   `instances.jsonl`: an object for each query: its one target, and images of the gallery that are
    like it and wrong.

        {"qid": "...", "pos": ["510_007464815_2.png"], "neg": ["510_007464815_3.png"]}

Photos are in the parts of `imgs_mc.tar`, in any folders, as `image` names them. The public gallery
lacks the distractors of the paper: the paper's figures are of another gallery.

The rules:

-   A query's id is its `id`, its kind the subcategory.
-   A reference may be missing from the gallery; if it is there, it is ranked too.
-   No measure looks at the wrong images, so they are not kept.
-   A line of queries is malformed if it is not such an object, its text is empty, an earlier line
    has its `id`, or `instances.jsonl` has none or several for it, or one without exactly one target
    or without a list of wrong images. A line of the gallery must not be.
-   Which other images are relevant is not known.
"""

from __future__ import annotations

import collections
import functools
import json
from collections.abc import Iterator, Mapping

from etils import epath

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
from dqe_jax.utils.errors import UserError
from dqe_jax.utils.files import read_text

SPLITS = {"test": "test"}
CORPUS, QUERIES, INSTANCES = "corpus.jsonl", "queries.jsonl", "instances.jsonl"
POOL = "corpus"


def stem(image_id: str) -> str:
    """Name of an image's file, without its suffix."""
    return image_id.rpartition(".")[0] or image_id


def read(files: RawFiles, split: str) -> Annotations:
    """Reads the split.

    Args:
      files: with the three lists.
      split: a key of `SPLITS`.

    Raises:
      UserError: a file is missing, or a line of the gallery is malformed.
    """
    del split  # there is one
    path = files.find(CORPUS)
    ranked = gallery(path, [_image(path, *line) for line in _lines(path)])
    judged: dict[str, list[object]] = collections.defaultdict(list)
    for _, record in _lines(files.find(INSTANCES)):
        if isinstance(record, dict):
            judged[str(record.get("qid"))].append(record)
    path = files.find(QUERIES)
    records = list(_lines(path))
    references = [_reference(record) for _, record in records]
    collector = Collector({POOL: ranked}, [image for image in references if image])
    collector.add_records(path.name, records, functools.partial(_query, judged=judged))
    return collector.finish()


def _lines(path: epath.Path) -> Iterator[tuple[int, object]]:
    """Number and content of the lines of a file; None for one that is not JSON."""
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError):
                yield number, None


def _image(path: epath.Path, number: int, record: object) -> str:
    try:
        if filled(record, "image") != filled(record, "id"):
            raise ValueError("image and id differ")
        return filled(record, "image")
    except ValueError as error:
        raise UserError(f"{path}: line {number}: {error}; get the file again.") from error


def _reference(record: object) -> str:
    image = record.get("image") if isinstance(record, dict) else None
    return image if isinstance(image, str) else ""


def _query(number: int, record: object, *, judged: Mapping[str, list[object]]) -> AnnotatedQuery:
    del number  # `id` names the record
    name = filled(record, "id")
    found = judged.get(name, [])
    if len(found) != 1:
        raise ValueError(f"there must be one instance of {name}, not {len(found)}")
    targets = strings(found[0], "pos")
    strings(found[0], "neg")
    if len(targets) != 1 or not targets[0]:
        raise ValueError("pos must name one image")
    return AnnotatedQuery(
        id=name,
        texts=(filled(record, "text"),),
        reference=filled(record, "image"),
        target=targets[0],
        known_positives=targets,
        pool=POOL,
        kinds=(filled(field(record, "metadata", dict), "subcategory"),),
    )


def _files(split: str) -> tuple[str, ...]:
    return CORPUS, QUERIES, INSTANCES


RAW = RawFormat(
    files=_files,
    read=read,
    read_labels=read,
    shared_gallery=False,
    stem=stem,
    preprocess="squash",
)
