"""CIRR's annotations, release rc2: one gallery a split, and a small set of images for each query.

Files of a split (`train`, `val`, `test1`), from branch `cirr_dataset` of
github.com/Cuberick-Orion/CIRR. The captions of train, `cap.rc2.train.json`, are there too; some
copies lack them, for the file is large.

-   `split.rc2.<split>.json`: an object, image name to path; its keys, in order, are the gallery.
-   `cap.rc2.<split>.json`: a list of records; `target_hard` and `target_soft` are not in test1.

        {"pairid": 12060, "reference": "dev-244-0-img0", "target_hard": "dev-1028-1-img1",
         "target_soft": {"dev-1028-1-img1": 1.0}, "caption": "show three bottles of soft drink",
         "img_set": {"members": ["dev-430-3-img0", "dev-63-0-img1", ...], ...}}

The rules:

-   A query's id is its `pairid`.
-   `target` is `target_hard`, always. `targets` adds the images that `target_soft` gives a positive
    weight, but for the reference (37 records of val give it one) and for images that are not in the
    gallery.
-   `subset` holds `img_set.members`, the reference among them.
-   A record is malformed if a field is missing or of another type, if a name is empty, if a weight
    is no number, or if an earlier record has its `pairid`.
-   Which images are truly relevant is not known: `target_soft` was judged for a few images only.
"""

from __future__ import annotations

import functools
from collections.abc import Container

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
from dqe_jax.utils.files import read_json

SPLITS = {"train": "train", "validation": "val", "test": "test1"}


def read(files: RawFiles, split: str) -> Annotations:
    """Reads a split.

    Args:
      files: with its captions and image split.
      split: a key of `SPLITS`.

    Raises:
      UserError: a file is missing, is not JSON, or is no list or object as it should be.
    """
    official = SPLITS[split]
    path = files.find(f"split.rc2.{official}.json")
    names = gallery(path, read_json(path, dict))
    path = files.find(f"cap.rc2.{official}.json")
    collector = Collector({"": names})
    query_of = functools.partial(_query, known=frozenset(names), labelled=split != "test")
    collector.add_records(path.name, enumerate(read_json(path, list)), query_of)
    return collector.finish()


def _query(index: int, record: object, *, known: Container[str], labelled: bool) -> AnnotatedQuery:
    del index  # `pairid` names the record
    reference = filled(record, "reference")
    targets = _targets(record, reference, known) if labelled else ()
    return AnnotatedQuery(
        id=str(field(record, "pairid", int)),
        texts=(field(record, "caption", str),),
        reference=reference,
        target=targets[0] if targets else "",
        known_positives=targets,
        subset=strings(field(record, "img_set", dict), "members"),
    )


def _targets(record: object, reference: str, known: Container[str]) -> tuple[str, ...]:
    """`target_hard`, then the other images that are targets too."""
    weights = field(record, "target_soft", dict)
    if not all(type(weight) in (int, float) for weight in weights.values()):
        raise ValueError("target_soft must hold numbers")
    soft = [
        image
        for image, weight in weights.items()
        if weight > 0 and image in known and image != reference
    ]
    return tuple(dict.fromkeys((filled(record, "target_hard"), *soft)))


def _files(split: str) -> tuple[str, ...]:
    official = SPLITS[split]
    return f"split.rc2.{official}.json", f"cap.rc2.{official}.json"


RAW = RawFormat(
    files=_files,
    read=read,
    read_labels=read,
    shared_gallery=False,
    stem=str,
    preprocess="squash",
)
