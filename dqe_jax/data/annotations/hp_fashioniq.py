"""HP-FashionIQ: which of two sets of retrieved images people prefer for a query of FashionIQ.

The file is `hpfiq.json` of github.com/jackwaky/QuRe, folder `HP_FashionIQ`: users (`user_1` ...),
each with question sets (`question_set_1` ...), each with six lists of one length.

| list | an element |
| --- | --- |
| `ref_img_paths`, `targ_img_paths` | `"/-/image_data/shirt/B000LUIBH8.jpg"` |
| `sentences` | `"is blue colored and a logo  and has short sleeves"` |
| `retrieved_set1`, `retrieved_set2` | `{"img_path": [five paths], "user_score": "4"}` |
| `preferred set` | `"1"` or `"2"` |

The rules:

-   The last folder of a path is the category, its file name the id; what precedes is ignored.
-   Words that stand for punctuation are put back as such, see `restored`.
-   The file is a published one of known content: anything that is not as above is an error, and the
    sentence names the user, the question set and the index.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator

from etils import epath

from dqe_jax.data.annotations.schema import field, strings
from dqe_jax.utils.errors import UserError
from dqe_jax.utils.files import read_json

LISTS = (
    *("ref_img_paths", "targ_img_paths", "sentences"),
    *("retrieved_set1", "retrieved_set2", "preferred set"),
)
SET_SIZE = 5
_IMAGE_PATH = re.compile(r"(?:.*/)?(dress|shirt|toptee)/([^/]+)\.jpg")
_PUNCTUATION = {"dotmark": ".", "andmark": "&", "questionmark": "?"}


@dataclasses.dataclass(frozen=True)
class Judgement:
    """One person's choice between two sets of images.

    Attributes:
      user: such as `user_1`.
      question_set: such as `question_set_1`.
      index: position in the question set.
      reference: id of the query's reference image.
      target: id of its target image.
      category: of all images, as in FashionIQ.
      text: both captions, joined; punctuation restored.
      first: ids of the first set, in the order of retrieval.
      second: ids of the second set.
      preferred: 1 or 2.
      scores: that the person gave the first and the second set, 1 to 5.
    """

    user: str
    question_set: str
    index: int
    reference: str
    target: str
    category: str
    text: str
    first: tuple[str, ...]
    second: tuple[str, ...]
    preferred: int
    scores: tuple[int, int]


def read(path: str | os.PathLike[str]) -> list[Judgement]:
    """All judgements, in the order of the file.

    Raises:
      UserError: the file cannot be read, is not JSON, or holds something else; the sentence names
        the user, the question set and the index.
    """
    path = epath.Path(path)
    judgements = []
    for user, name, lists in _question_sets(path):
        where = f"{path}, {user}, {name}"
        try:
            rows = list(zip(*_columns(lists)))
        except ValueError as error:
            raise UserError(f"{where}: {error}; get the file again.") from error
        for index, row in enumerate(rows):
            try:
                judgements.append(_judgement(user, name, index, dict(zip(LISTS, row))))
            except ValueError as error:
                raise UserError(f"{where}, index {index}: {error}; get the file again.") from error
    return judgements


def restored(sentence: str) -> str:
    """A sentence with its punctuation, and one space between words.

    `dotmark`, `andmark` and `questionmark` stand for `.`, `&` and `?`; they are glued to the word
    before.
    """
    for word, mark in _PUNCTUATION.items():
        sentence = sentence.replace(word, mark)
    return " ".join(sentence.split())


def _question_sets(path: epath.Path) -> Iterator[tuple[str, str, object]]:
    for user, question_sets in read_json(path, dict).items():
        if not isinstance(question_sets, dict):
            raise UserError(f"{path}, {user}: must be an object; get the file again.")
        for name, lists in question_sets.items():
            yield user, name, lists


def _columns(lists: object) -> list[list[object]]:
    columns = [field(lists, name, list) for name in LISTS]
    if len({len(column) for column in columns}) > 1:
        lengths = ", ".join(f"{name} {len(column)}" for name, column in zip(LISTS, columns))
        raise ValueError(f"the lists must be of one length, not {lengths}")
    return columns


def _judgement(user: str, question_set: str, index: int, row: dict[str, object]) -> Judgement:
    if row["preferred set"] not in ("1", "2"):
        raise ValueError(f"preferred set must be '1' or '2', not {row['preferred set']!r}")
    sets = [strings(row[name], "img_path") for name in ("retrieved_set1", "retrieved_set2")]
    for number, paths in enumerate(sets, start=1):
        if len(paths) != SET_SIZE:
            raise ValueError(f"retrieved_set{number} must hold {SET_SIZE} images, not {len(paths)}")
    single = (field(row, "ref_img_paths", str), field(row, "targ_img_paths", str))
    images = [_image(path) for path in (*single, *sets[0], *sets[1])]
    categories = {category for category, _ in images}
    if len(categories) > 1:
        raise ValueError(f"images must be of one category, not {' and '.join(sorted(categories))}")
    ids = tuple(image for _, image in images)
    return Judgement(
        user=user,
        question_set=question_set,
        index=index,
        reference=ids[0],
        target=ids[1],
        category=images[0][0],
        text=restored(field(row, "sentences", str)),
        first=ids[2 : 2 + SET_SIZE],
        second=ids[2 + SET_SIZE :],
        preferred=int(row["preferred set"]),
        scores=(_score(row, "retrieved_set1"), _score(row, "retrieved_set2")),
    )


def _image(path: str) -> tuple[str, str]:
    """Category and id."""
    match = _IMAGE_PATH.fullmatch(path)
    if not match:
        raise ValueError(f"{path!r} must end in <category>/<id>.jpg")
    return match[1], match[2]


def _score(row: dict[str, object], name: str) -> int:
    score = field(row[name], "user_score", str)
    if score not in ("1", "2", "3", "4", "5"):
        raise ValueError(f"user_score of {name} must be '1' to '5', not {score!r}")
    return int(score)
