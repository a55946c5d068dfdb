"""GeneCIS's annotations: four tasks, each query with a small gallery of its own.

Files, from github.com/facebookresearch/genecis (folder `genecis`): `focus_attribute.json`,
`change_attribute.json`, `focus_object.json`, `change_object.json`, each a list of records.

    {"condition": "color", "reference": {"image_id": "2316576", "instance_bbox": [72, 101, 56, 69]},
     "target": {"image_id": "2366087", "instance_bbox": [379, 83, 52, 20]},
     "gallery": [{"image_id": "2378121", "instance_bbox": [277, 94, 138, 51]}, ...]}
    {"condition": "cardboard", "reference": {"val_image_id": 189213},
     "target": {"val_image_id": 153527}, "gallery": [{"val_image_id": 121506}, ...]}

The images of the attribute tasks are regions of photos of Visual Genome 1.2, `<image_id>.jpg`;
those of the object tasks are photos of COCO `val2017`, `<id, twelve digits>.jpg`. There is one
split, a test set.

The rules:

-   An image's id is the photo's, with the box of a region: `2316576@72,101,56,69` or
    `000000189213`. `regions.py` says what is cut out. Candidates are told apart by photo and box,
    never by photo alone.
-   A task is a pool of its own, and the kind of its queries. A query's id is its task and its
    index: `focus_attribute-17`.
-   `subset` is the query's gallery: the target, then the distractors in their order. One that is
    the same as an earlier image of that gallery (so in twelve queries, in two of them as the target
    itself) stays a candidate of its own, under its id with `#2` added, and so on.
-   A record is malformed if a field is missing or of another type, if there is no distractor, or if
    a box is not four numbers with a width and height above zero.
-   Identical records are kept.
-   Which other candidates are relevant is not known.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Iterator

from dqe_jax.data.annotations.schema import (
    AnnotatedQuery,
    Annotations,
    Collector,
    RawFormat,
    field,
    filled,
)
from dqe_jax.data.raw_files import RawFiles
from dqe_jax.data.regions import Region
from dqe_jax.utils.files import read_json

TASKS = ("focus_attribute", "change_attribute", "focus_object", "change_object")
SPLITS = {"test": "test"}
AGAIN = "#"
MOST = 1e9  # pixels of a box


def stem(image_id: str) -> str:
    """Name of the photo's file, without its suffix."""
    return image_id.split(AGAIN)[0].split("@")[0]


def region(image_id: str) -> Region | None:
    """The box of an image id; None for a whole photo."""
    _, _, box = image_id.split(AGAIN)[0].partition("@")
    if not box:
        return None
    x, y, width, height = map(float, box.split(","))
    return x, y, width, height


def read(files: RawFiles, split: str) -> Annotations:
    """Reads the split.

    Args:
      files: with the records of all tasks.
      split: a key of `SPLITS`.

    Raises:
      UserError: a file is missing, or is no JSON list.
    """
    del split  # there is one
    records: dict[str, list[object]] = {}
    for task in TASKS:
        records[task] = read_json(files.find(f"{task}.json", folder="genecis"), list)
    pools, unranked = {}, list[str]()
    for task in TASKS:
        sound = list(_sound(task, records[task]))
        pools[task] = list(dict.fromkeys(image for query in sound for image in query.subset))
        unranked += [query.reference for query in sound]
    collector = Collector(pools, unranked)
    for task in TASKS:
        query_of = functools.partial(_query, task=task)
        collector.add_records(f"{task}.json", enumerate(records[task]), query_of)
    return collector.finish()


def _sound(task: str, records: list[object]) -> Iterator[AnnotatedQuery]:
    for index, record in enumerate(records):
        try:
            yield _query(index, record, task=task)
        except ValueError:  # it is counted when it is added
            continue


def _query(index: int, record: object, *, task: str) -> AnnotatedQuery:
    name = _region if task.endswith("attribute") else _photo
    distractors = field(record, "gallery", list)
    if not distractors:
        raise ValueError("gallery must not be empty")
    seen: collections.Counter[str] = collections.Counter()
    subset = []
    for candidate in (field(record, "target", dict), *distractors):
        image = name(candidate)
        seen[image] += 1
        subset.append(image if seen[image] == 1 else f"{image}{AGAIN}{seen[image]}")
    return AnnotatedQuery(
        id=f"{task}-{index}",
        texts=(filled(record, "condition"),),
        reference=name(field(record, "reference", dict)),
        target=subset[0],
        known_positives=(subset[0],),
        pool=task,
        subset=tuple(subset),
        kinds=(task,),
    )


def _photo(record: object) -> str:
    number = field(record, "val_image_id", int)
    if number < 0:
        raise ValueError("val_image_id must not be negative")
    return str(number).zfill(12)


def _region(record: object) -> str:
    box, image = field(record, "instance_bbox", list), filled(record, "image_id")
    # A number that is not finite is not below the limit either.
    if len(box) != 4 or not all(type(n) in (int, float) and abs(n) < MOST for n in box):
        raise ValueError("instance_bbox must be four numbers")
    if min(box[2:]) <= 0 or not (image.isascii() and image.isdecimal()):
        raise ValueError("instance_bbox must have a width and height, and image_id be a number")
    return f"{image}@{','.join(map(str, box))}"


def _files(split: str) -> tuple[str, ...]:
    return tuple(f"{task}.json" for task in TASKS)


RAW = RawFormat(
    files=_files,
    read=read,
    read_labels=read,
    shared_gallery=False,
    stem=stem,
    preprocess="squash",
    region=region,
)
