"""i-CIR's annotations (Psomas et al., NeurIPS 2025): each instance has a database of its own.

Files, from github.com/billpsomas/icir: `query_files.csv` and `database_files.csv`, without a
header. A line is an image's path, a text and an instance. As in the published code a line is cut at
every comma, and its first three parts count.

    query/0001/001.jpg,with a crowd,0001

The rules:

-   An image's id is its path. An instance is a pool of its own: its queries rank its database
    alone. Query images are not ranked.
-   `relevant` are the images of the instance's database whose text is the query's. There is no
    single target.
-   An image that a database lists several times with other texts is one image, and relevant for
    each of them; it counts as a repeated id.
-   A query's id is its line's index.
-   A line of queries is malformed if it has fewer than three parts or an empty one; a line of the
    database must not be. A query whose instance has no database is left out as an unknown id.
"""

from __future__ import annotations

import collections

from dqe_jax.data.annotations.schema import AnnotatedQuery, Annotations, Collector, RawFormat
from dqe_jax.data.raw_files import RawFiles
from dqe_jax.utils.errors import UserError
from dqe_jax.utils.files import read_text

SPLITS = {"test": "test"}
QUERIES, DATABASE = "query_files.csv", "database_files.csv"


def read(files: RawFiles, split: str) -> Annotations:
    """Reads the split.

    Args:
      files: with both lists.
      split: a key of `SPLITS`.

    Raises:
      UserError: a file is missing, or a line of the database is malformed.
    """
    del split  # there is one
    path = files.find(DATABASE, folder="icir")
    pools: dict[str, list[str]] = collections.defaultdict(list)
    fitting: dict[tuple[str, str], dict[str, None]] = collections.defaultdict(dict)
    for number, line in enumerate(read_text(path).splitlines(), 1):
        try:
            image, text, instance = parse(line)
        except ValueError as error:
            raise UserError(
                f"{path}: line {number} must be a path, a text and an instance, not {line[:80]!r}; "
                "get the file again."
            ) from error
        pools[instance].append(image)
        fitting[instance, text][image] = None
    path = files.find(QUERIES, folder="icir")
    lines = read_text(path).splitlines()
    collector = Collector(pools, [line.split(",")[0] for line in lines])

    def query_of(index: int, record: object) -> AnnotatedQuery:
        image, text, instance = parse(str(record))
        return AnnotatedQuery(
            id=str(index),
            texts=(text,),
            reference=image,
            relevant=tuple(fitting.get((instance, text), ())),
            pool=instance,
        )

    collector.add_records(path.name, enumerate(lines), query_of)
    return collector.finish()


def parse(line: str) -> tuple[str, str, str]:
    """The path, the text and the instance of a line.

    Raises:
      ValueError: one is missing.
    """
    image, text, instance = line.split(",")[:3]
    if not (image and text and instance):
        raise ValueError("a part is empty")
    return image, text, instance


def _files(split: str) -> tuple[str, ...]:
    return QUERIES, DATABASE


RAW = RawFormat(
    files=_files,
    read=read,
    read_labels=read,
    shared_gallery=False,
    stem=str,
    preprocess="squash",
)
