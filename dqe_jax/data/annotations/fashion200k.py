"""The annotations of Fashion200k (Han et al., ICCV 2017), with the test queries of TIRG.

Files:

-   `<category>_test_detect_all.txt`, from github.com/xthan/fashion-200k (folder `labels`), for
    dress, jacket, pants, skirt and top: the gallery. A line is a path, a detection score and a
    description, with tabs between them.

        women/dresses/casual_and_day_dresses/56037632/56037632_0.jpeg<TAB>-5.07<TAB>a red dress

-   `test_queries.txt`, from TIRG (Vo et al., CVPR 2019): a reference's and a target's path a line,
    with a space between them.

The rules, which are TIRG's:

-   An image's id is its path. Galleries are joined in the order of the categories' names.
-   In a description `.`, `?`, `&` and `*` become the words `dotmark`, `questionmark`, `andmark` and
    `starmark`, glued to what they follow.
-   The text is `replace A with B`: A is the first word of the reference's description that the
    target's lacks, B the other way round; the last word where there is none.
-   `relevant` are all images with the target's description, the target among them.
-   A query's id is its line's index: `test-17`. Its kind is its target's category.
-   A line of queries is malformed if it is not two paths; a line of a gallery must not be. A query
    whose image is in no gallery is left out as an unknown id.
-   Train pairs have no list: each method draws its own. So there is no training split.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence

from etils import epath

from dqe_jax.data.annotations.schema import AnnotatedQuery, Annotations, Collector, RawFormat
from dqe_jax.data.raw_files import RawFiles
from dqe_jax.utils.errors import UserError
from dqe_jax.utils.files import read_text

CATEGORIES = ("dress", "jacket", "pants", "skirt", "top")
SPLITS = {"test": "test"}
QUERIES = "test_queries.txt"
_MARKS = {".": "dotmark", "?": "questionmark", "&": "andmark", "*": "starmark"}


def read(files: RawFiles, split: str) -> Annotations:
    """Reads the split.

    Args:
      files: with the labels of all categories and the queries.
      split: a key of `SPLITS`.

    Raises:
      UserError: a file is missing, or a line of a gallery is malformed.
    """
    described: dict[str, str] = {}
    category: dict[str, str] = {}
    listed: list[str] = []
    for name, file in zip(CATEGORIES, _files(split)):
        for image, description in _labels(files.find(file)):
            listed.append(image)
            described.setdefault(image, description)
            category.setdefault(image, name)
    alike: dict[str, list[str]] = collections.defaultdict(list)
    for image, description in described.items():
        alike[description].append(image)
    same = {description: tuple(images) for description, images in alike.items()}

    def query_of(index: int, record: object) -> AnnotatedQuery:
        paths = str(record).split()
        if len(paths) != 2:
            raise ValueError("a line must be two paths")
        reference, target = paths
        if not (reference in described and target in described):  # it is counted as unknown
            return AnnotatedQuery(f"test-{index}", (), reference, target)
        return AnnotatedQuery(
            id=f"test-{index}",
            texts=(replacement(described[reference], described[target]),),
            reference=reference,
            target=target,
            relevant=same[described[target]],
            kinds=(category[target],),
        )

    collector = Collector({"": listed})
    path = files.find(QUERIES)
    collector.add_records(path.name, enumerate(_lines(path)), query_of)
    return collector.finish()


def replacement(reference: str, target: str) -> str:
    """The text of a query, of two descriptions with a word at the least."""
    ours, theirs = reference.split(), target.split()
    return f"replace {_first_other(ours, theirs)} with {_first_other(theirs, ours)}"


def _first_other(words: Sequence[str], others: Sequence[str]) -> str:
    return next((word for word in words if word not in others), words[-1])


def description_of(text: str) -> str:
    """A description as TIRG writes it."""
    text = text.strip()
    for mark, word in _MARKS.items():
        text = text.replace(mark, word)
    return text


def _labels(path: epath.Path) -> list[tuple[str, str]]:
    found = []
    for number, line in enumerate(_lines(path), 1):
        parts = line.split("\t")
        if len(parts) != 3 or not parts[0] or not parts[2].strip():
            raise UserError(
                f"{path}: line {number} must be a path, a score and a description with tabs "
                f"between them, not {line[:80]!r}; get the file again."
            )
        found.append((parts[0], description_of(parts[2])))
    return found


def _lines(path: epath.Path) -> list[str]:
    return [line for line in read_text(path).splitlines() if line.strip()]


def _files(split: str) -> tuple[str, ...]:
    return (*(f"{category}_{split}_detect_all.txt" for category in CATEGORIES), QUERIES)


RAW = RawFormat(
    files=_files,
    read=read,
    read_labels=read,
    shared_gallery=False,
    stem=str,
    preprocess="squash",
)
