"""The annotations of Shoes: relative captions, and a list of images for each split.

Files, from github.com/XiaoxiaoGuo/fashion-retrieval (folder `dataset`):

-   `relative_captions_shoes.json`: a list of records of both splits. `ImageName` is the target.

        {"ImageName": "img_womens_clogs_851.jpg",
         "ReferenceImageName": "img_womens_clogs_512.jpg",
         "RelativeCaption": "is more of a textured material"}

-   `train_im_names.txt`, `eval_im_names.txt`: a file name a line, the galleries in their order.

Photos are those of the Attribute Discovery data set (Berg et al., ECCV 2010), in any folders.

The rules:

-   A record is of the split whose list holds its target. One that is malformed, or whose target no
    list holds, counts in both splits.
-   A query's id is its split and its index in the file: `eval-17`.
-   Captions are kept as published. Where target and reference are the same image, so is the query,
    though its target is left out of the ranking with its reference (one query of eval).
-   A record is malformed if a field is missing, empty or of another type.
-   Which images are truly relevant is not known.
"""

from __future__ import annotations

import functools

from dqe_jax.data.annotations.schema import (
    AnnotatedQuery,
    Annotations,
    Collector,
    RawFormat,
    filled,
    gallery,
)
from dqe_jax.data.raw_files import RawFiles
from dqe_jax.utils.files import read_json, read_text

SPLITS = {"train": "train", "validation": "eval"}
CAPTIONS = "relative_captions_shoes.json"


def stem(image_id: str) -> str:
    """Name of an image's file, without its suffix."""
    return image_id.rpartition(".")[0] or image_id


def read(files: RawFiles, split: str) -> Annotations:
    """Reads a split.

    Args:
      files: with the captions and the lists of both splits.
      split: a key of `SPLITS`.

    Raises:
      UserError: a file is missing, is no JSON list, or a list holds an empty line.
    """
    names = {key: _names(files, official) for key, official in SPLITS.items()}
    others = {name for key, listed in names.items() if key != split for name in listed}
    path = files.find(CAPTIONS)
    records = [
        (index, record)
        for index, record in enumerate(read_json(path, list))
        if not (isinstance(record, dict) and _is_in(record.get("ImageName"), others))
    ]
    collector = Collector({"": names[split]})
    collector.add_records(path.name, records, functools.partial(_query, official=SPLITS[split]))
    return collector.finish()


def _is_in(name: object, names: set[str]) -> bool:
    return isinstance(name, str) and name in names


def _names(files: RawFiles, official: str) -> list[str]:
    path = files.find(_list_of(official))
    return gallery(path, (line.strip() for line in read_text(path).splitlines()))


def _list_of(official: str) -> str:
    return f"{official}_im_names.txt"


def _query(index: int, record: object, *, official: str) -> AnnotatedQuery:
    target = filled(record, "ImageName")
    return AnnotatedQuery(
        id=f"{official}-{index}",
        texts=(filled(record, "RelativeCaption"),),
        reference=filled(record, "ReferenceImageName"),
        target=target,
        known_positives=(target,),
    )


def _files(split: str) -> tuple[str, ...]:
    return CAPTIONS, *map(_list_of, SPLITS.values())


RAW = RawFormat(
    files=_files,
    read=read,
    read_labels=read,
    shared_gallery=False,
    stem=stem,
    preprocess="target_pad",
)
