"""CIRCLED's annotations (Takeda et al., 2026): sessions of several turns over three benchmarks.

Files, from huggingface.co/datasets/tk1441/CIRCLED (folder `data`; fields from its card and from
`src/convert_to_public.py` of github.com/mti-lab/circled, which writes them): `<subset>.json`, a
list of sessions, for the subsets `fashioniq_dress_val`, `fashioniq_shirt_val`,
`fashioniq_toptee_val`, `cirr_val` and `circo_val`. Those of train are not read.

    {"session_id": "cirr_val_0000", "subset": "cirr_val",
     "ground_truth_ids": ["dev-1042-2-img1"], "num_turns": 2,
     "turns": [
       {"turn": 1, "reference_image_id": "dev-1044-1-img1", "relative_caption": "..."},
       {"turn": 2, "reference_image_id": "dev-1044-0-img0", "relative_caption": "..."}]}

The gallery of a subset is that of its benchmark: `split.<category>.val.json` of FashionIQ,
`split.rc2.val.json` of CIRR, `image_info_unlabeled2017.json` of COCO for CIRCO. Photos are those of
the benchmarks, in any folders.

The rules:

-   Subsets whose file is not there are left out; one must be there. Each ranks its own gallery.
-   Every turn is a query of its own, an image and a text, without what was said before it. Its id
    is the session's with the turn, `cirr_val_0000/2`; its kinds are the subset and `turn 2`.
-   `relevant` are the ground truths; the first is the target. Ids of CIRCO may be numbers.
-   A turn is malformed if a field of it or of its session is missing, empty or of another type, or
    an earlier one has its id; a session without a list of turns counts as one.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

from dqe_jax.data.annotations.circo import IMAGE_INFO, read_gallery
from dqe_jax.data.annotations.circo import stem as coco_stem
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

SPLITS = {"test": "val"}
# Galleries by subset.
GALLERIES = {
    "fashioniq_dress_val": "split.dress.val.json",
    "fashioniq_shirt_val": "split.shirt.val.json",
    "fashioniq_toptee_val": "split.toptee.val.json",
    "cirr_val": "split.rc2.val.json",
    "circo_val": IMAGE_INFO,
}
_LONGEST = 9  # digits of an id of COCO; ids of FashionIQ have ten characters


class _Turn(NamedTuple):
    """A turn with its session; what they hold is checked when a query is made."""

    session: object
    turn: object


def stem(image_id: str) -> str:
    """Name of an image's file, without its suffix."""
    coco = image_id.isdecimal() and len(image_id) <= _LONGEST
    return coco_stem(image_id) if coco else image_id


def read(files: RawFiles, split: str) -> Annotations:
    """Reads the val subsets that are there.

    Args:
      files: with sessions, and the galleries of their subsets.
      split: a key of `SPLITS`.

    Raises:
      UserError: there is no subset, or a file is missing, is not JSON, or holds something else.
    """
    del split  # there is one
    subsets = [subset for subset in GALLERIES if files.has(f"{subset}.json")]
    if not subsets:
        names = ", ".join(f"{subset}.json" for subset in GALLERIES)
        raise UserError(f"{files.root} lacks the sessions of CIRCLED; put some of {names} there.")
    collector = Collector({subset: _ranked(files, subset) for subset in subsets})
    for subset in subsets:
        path = files.find(f"{subset}.json")
        query_of = functools.partial(_query, subset=subset)
        collector.add_records(path.name, _turns(read_json(path, list)), query_of)
    return collector.finish()


def _ranked(files: RawFiles, subset: str) -> list[str]:
    if GALLERIES[subset] == IMAGE_INFO:
        return read_gallery(files)
    path = files.find(GALLERIES[subset])
    if subset == "cirr_val":  # an object of names and paths
        return gallery(path, read_json(path, dict))
    return gallery(path, read_json(path, list))


def _turns(sessions: list[object]) -> Iterator[tuple[int, _Turn]]:
    for number, session in enumerate(sessions):
        turns = session.get("turns") if isinstance(session, dict) else None
        for turn in turns if isinstance(turns, list) and turns else [None]:
            yield number, _Turn(session, turn)


def _query(number: int, record: object, *, subset: str) -> AnnotatedQuery:
    del number  # `session_id` names the session
    assert isinstance(record, _Turn)
    session, turn = record
    which = field(turn, "turn", int)
    targets = tuple(map(_image, field(session, "ground_truth_ids", list)))
    if not targets:
        raise ValueError("ground_truth_ids must name images")
    return AnnotatedQuery(
        id=f"{filled(session, 'session_id')}/{which}",
        texts=(filled(turn, "relative_caption"),),
        reference=_image(turn.get("reference_image_id") if isinstance(turn, dict) else None),
        target=targets[0],
        known_positives=targets,
        relevant=targets,
        pool=subset,
        kinds=(subset, f"turn {which}"),
    )


def _image(image: object) -> str:
    if type(image) is int and image >= 0:
        return str(image)
    return filled({"image": image}, "image")


RAW = RawFormat(
    files=lambda split: (),
    read=read,
    read_labels=read,
    shared_gallery=False,
    stem=stem,
    preprocess="squash",
)
