"""FashionIQ's annotations: three categories, each with its own gallery.

Files of a category (`dress`, `shirt`, `toptee`) and a split (`train`, `val`, `test`), from
github.com/XiaoxiaoGuo/fashion-iq:

-   `split.<category>.<split>.json`: a list of image ids, the gallery in its order.
-   `cap.<category>.<split>.json`: a list of records; `target` is not in the test files.

        {"target": "B0084Y8XIU", "candidate": "B005X4PL1G",
         "captions": ["is shiny and silver with shorter sleeves", "fit and flare"]}

The rules:

-   A category is a pool of its own, and the kind of its queries. An id may be in several pools.
-   A query's id is its category, split and index in the file: `dress-val-17`.
-   Both captions are kept as published, an empty one or a placeholder (`na`) too.
-   Ids are strings; some are all digits.
-   A record is malformed if a field is missing or of another type, if an id is empty, or if it has
    other than two captions.
-   Which images are truly relevant is not known: others may show what the captions ask for.
"""

from __future__ import annotations

import functools
import re

from dqe_jax.data.annotations.schema import (
    AnnotatedQuery,
    Annotations,
    Collector,
    RawFormat,
    filled,
    gallery,
    strings,
)
from dqe_jax.data.raw_files import RawFiles
from dqe_jax.utils.files import read_json, read_text

CATEGORIES = ("dress", "shirt", "toptee")
SPLITS = {"train": "train", "validation": "val", "test": "test"}


def read(files: RawFiles, split: str) -> Annotations:
    """Reads a split.

    Args:
      files: with the captions and image splits of all categories.
      split: a key of `SPLITS`.

    Raises:
      UserError: a file is missing, is no JSON list, or a gallery's list holds something else than
        ids.
    """
    official = SPLITS[split]
    pools = {}
    for category in CATEGORIES:
        path = files.find(f"split.{category}.{official}.json")
        pools[category] = gallery(path, read_json(path, list))
    collector = Collector(pools)
    for category in CATEGORIES:
        path = files.find(f"cap.{category}.{official}.json")
        query_of = functools.partial(_query, category=category, official=official)
        collector.add_records(path.name, enumerate(read_json(path, list)), query_of)
    return collector.finish()


def read_addresses(files: RawFiles) -> tuple[dict[str, str], list[str]]:
    """Addresses of the photos, by id, and the names of lines that are none.

    They are in `asin2url.<category>.txt`, from github.com/hongwang600/fashion-iq-metadata (folder
    `image_url`): an id and an address a line, with a tab and spaces between them. Of an id that
    several categories list the first address counts.

    Args:
      files: with the lists of all categories.

    Raises:
      UserError: a file is missing.
    """
    names = [f"asin2url.{category}.txt" for category in CATEGORIES]
    files.require(names)
    addresses: dict[str, str] = {}
    malformed = []
    for name in names:
        for number, line in enumerate(read_text(files.find(name)).splitlines()):
            image, _, address = (part.strip() for part in line.partition("\t"))
            # An id names a file, so nothing else may stand there.
            if re.fullmatch("[A-Z0-9]{10}", image) and address:
                addresses.setdefault(image, address)
            else:
                malformed.append(f"{name}:{number}")
    return addresses, malformed


def _query(index: int, record: object, *, category: str, official: str) -> AnnotatedQuery:
    texts = strings(record, "captions")
    if len(texts) != 2:
        raise ValueError("captions must be two")
    target = "" if official == "test" else filled(record, "target")
    return AnnotatedQuery(
        id=f"{category}-{official}-{index}",
        texts=texts,
        reference=filled(record, "candidate"),
        target=target,
        known_positives=(target,) if target else (),
        pool=category,
        kinds=(category,),
    )


def _files(split: str) -> tuple[str, ...]:
    kinds = ("split", "cap")
    return tuple(f"{kind}.{c}.{SPLITS[split]}.json" for kind in kinds for c in CATEGORIES)


RAW = RawFormat(
    files=_files,
    read=read,
    read_labels=read,
    shared_gallery=False,
    stem=str,
    preprocess="target_pad",
)
