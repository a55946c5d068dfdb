"""CIRCO's annotations: several ground truths a query, and one gallery for both splits.

Files, in a folder `annotations` or elsewhere below the raw directory:

-   `val.json`, `test.json`, from github.com/miccunifi/CIRCO: lists of records; in test there are
    only `id`, `reference_img_id`, `relative_caption` and `shared_concept`.

        {"reference_img_id": 271520, "target_img_id": 355099, "id": 0,
         "relative_caption": "shows two people and has a more colorful background",
         "shared_concept": "a girl with a traditional Chinese umbrella",
         "gt_img_ids": [355099, 528417, 534704], "semantic_aspects": ["cardinality", ...]}

-   `image_info_unlabeled2017.json`, from cocodataset.org: the gallery, in its order.

        {"images": [{"id": 8, "file_name": "000000000008.jpg", ...}, ...], ...}

The rules:

-   Image ids are the integers in decimal, as submissions want them: "8". Files are named by twelve
    digits, see `stem`.
-   `known_positives` and `relevant` are the ground truths, `target_img_id` first.
-   The text is `relative_caption`; `shared_concept` is not part of the query.
-   `kinds` are the semantic aspects.
-   A record is malformed if a field is missing or of another type, or if an earlier one has its
    `id`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

from dqe_jax.data.annotations.schema import (
    AnnotatedQuery,
    Annotations,
    Collector,
    RawFormat,
    field,
    strings,
)
from dqe_jax.data.raw_files import RawFiles
from dqe_jax.utils.errors import UserError
from dqe_jax.utils.files import read_json

SPLITS = {"validation": "val", "test": "test"}
IMAGE_INFO = "image_info_unlabeled2017.json"


def stem(image_id: str) -> str:
    """Name of an image's file, without its suffix."""
    return image_id.zfill(12)


def read(files: RawFiles, split: str, *, gallery: bool = True) -> Annotations:
    """Reads a split.

    Args:
      files: with its queries and, if `gallery`, COCO's list of images.
      split: a key of `SPLITS`.
      gallery: whether to read the list of images. Without it the pool is the images that the
        queries name.

    Raises:
      UserError: a file is missing, is not JSON, or holds something else.
    """
    path = files.find(f"{SPLITS[split]}.json", folder="annotations")
    records = list(enumerate(read_json(path, list)))
    query_of = functools.partial(_query, labelled=split != "test")
    collector = Collector({"": read_gallery(files) if gallery else _named(records, query_of)})
    collector.add_records(path.name, records, query_of)
    return collector.finish()


def read_gallery(files: RawFiles) -> list[str]:
    """Ids of the images of COCO's list, in its order.

    Raises:
      UserError: the file is missing, is not JSON, or holds something else.
    """
    path = files.find(IMAGE_INFO, folder="annotations")
    images = read_json(path, dict).get("images")
    if not isinstance(images, list):
        raise UserError(f"{path} must hold a list named 'images'; get the file again.")
    try:
        return [str(field(image, "id", int)) for image in images]
    except ValueError as error:
        raise UserError(
            f"{path}: the {error} for each of the 'images'; get the file again."
        ) from error


def _named(
    records: Iterable[tuple[int, object]], query_of: Callable[[int, object], AnnotatedQuery]
) -> list[str]:
    """The images that sound records name, in order of first mention."""
    named: dict[str, None] = {}
    for index, record in records:
        try:
            query = query_of(index, record)
        except ValueError:  # it is counted when it is added
            continue
        named.update(dict.fromkeys((query.reference, *query.known_positives)))
    return list(named)


def _query(index: int, record: object, *, labelled: bool) -> AnnotatedQuery:
    del index  # `id` names the record
    targets = _targets(record) if labelled else ()
    return AnnotatedQuery(
        id=str(field(record, "id", int)),
        texts=(field(record, "relative_caption", str),),
        reference=str(field(record, "reference_img_id", int)),
        target=targets[0] if targets else "",
        known_positives=targets,
        relevant=targets,
        kinds=strings(record, "semantic_aspects") if labelled else (),
    )


def _targets(record: object) -> tuple[str, ...]:
    truths = field(record, "gt_img_ids", list)
    if not all(type(truth) is int for truth in truths):
        raise ValueError("gt_img_ids must be a list of integers")
    return tuple(str(i) for i in dict.fromkeys((field(record, "target_img_id", int), *truths)))


def _files(split: str) -> tuple[str, ...]:
    return f"{SPLITS[split]}.json", IMAGE_INFO


RAW = RawFormat(
    files=_files,
    read=read,
    read_labels=functools.partial(read, gallery=False),
    shared_gallery=True,
    stem=stem,
    preprocess="squash",
)
