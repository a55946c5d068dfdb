"""What the readers of all benchmarks give: one split's queries and galleries, by image id.

A record that is not sound is left out, counted under one of `REASONS`, and named by its file and
its place in it: `cap.dress.val.json:17`. The others are kept. A gallery's list that is not sound is
an error, since ranks depend on all of it.
"""

from __future__ import annotations

import collections
import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from dqe_jax.data.raw_files import RawFiles
from dqe_jax.data.regions import Region
from dqe_jax.utils.errors import UserError

# Why a record is left out. Each is counted, named, and limited by --max_missing.
MALFORMED = "malformed record"  # not an object, a field is missing or of another type
UNKNOWN_IMAGE = "unknown image id"  # an image that the gallery's list does not hold
NO_REFERENCE = "reference missing"  # no file, or it cannot be read
NO_TARGET = "target missing"
REASONS = (MALFORMED, UNKNOWN_IMAGE, NO_REFERENCE, NO_TARGET)

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class AnnotatedQuery:
    """One query of a benchmark; images are named by their ids.

    Attributes:
      id: unique within the split.
      texts: captions of the modification, as published, in their order.
      reference: the reference image.
      target: the target image; "" where the split has no labels.
      known_positives: images annotated as targets, `target` first: what training may know.
      relevant: images that are truly relevant, `target` included; () where truth is unknown.
      pool: the gallery that it ranks, a key of `Annotations.pools`.
      subset: images of a small set that are ranked among themselves too (CIRR), or ().
      kinds: by which results are broken down.
      attributes: `name=value` strings that the text changes.
      references: further reference images, which with `reference` make one question.
      negatives: images that are stated to be wrong; "" for one that no image is named for.
    """

    id: str
    texts: tuple[str, ...]
    reference: str
    target: str = ""
    known_positives: tuple[str, ...] = ()
    relevant: tuple[str, ...] = ()
    pool: str = ""
    subset: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    attributes: tuple[str, ...] = ()
    references: tuple[str, ...] = ()
    negatives: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Annotations:
    """A split as annotated.

    Attributes:
      queries: the records that are sound.
      pools: galleries by name, image ids in the published order, each once.
      dropped: records that are not sound: reason (of `REASONS`) to their names.
      repeated_ids: image ids that a gallery's list holds more than once; the first place counts.
      unranked: images that queries name as references and that no query ranks. Where there are
        any, each pool has a name.
    """

    queries: Sequence[AnnotatedQuery]
    pools: Mapping[str, Sequence[str]]
    dropped: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    repeated_ids: Sequence[str] = ()
    unranked: Sequence[str] = ()

    @property
    def images(self) -> list[str]:
        """All images, each once, in the order of first mention: the pools', then the others."""
        ranked = (image for pool in self.pools.values() for image in pool)
        return list(dict.fromkeys((*ranked, *self.unranked)))

    @property
    def official_queries(self) -> int:
        """Queries of the published file, sound or not."""
        return len(self.queries) + sum(len(names) for names in self.dropped.values())


@dataclasses.dataclass(frozen=True)
class RawFormat:
    """How the raw files of a data set are read.

    Attributes:
      files: names of the annotation files of a split, by our name of it; () where a reader finds
        them by itself.
      read: gives the annotations of a split, by our name of it.
      read_labels: the same to score files of predictions: images need not be listed where the
        annotations do without, and then the pools are the images that the queries name.
      shared_gallery: whether all splits rank one gallery.
      stem: of an image id, what `RawFiles.image` is asked for.
      preprocess: how photos become square by default, a name of `preprocess.PREPROCESS`.
      region: of an image id, the part of the photo that it names, or None for all of it; None
        where images are whole photos.
      extras: fields of `examples.EXTRAS` that the queries have.
    """

    files: Callable[[str], tuple[str, ...]]
    read: Callable[[RawFiles, str], Annotations]
    read_labels: Callable[[RawFiles, str], Annotations]
    shared_gallery: bool
    stem: Callable[[str], str]
    preprocess: str
    region: Callable[[str], Region | None] | None = None
    extras: tuple[str, ...] = ()


# Pool, references and texts.
_Question = tuple[str, str, tuple[str, ...], tuple[str, ...]]


class Collector:
    """Collects the sound records of a split, and why others are not."""

    def __init__(self, pools: Mapping[str, Sequence[str]], unranked: Sequence[str] = ()):
        """Starts with the galleries, and images that may be references though they are in none."""
        self._ranked = frozenset(image for images in pools.values() for image in images)
        self.unranked = [i for i in dict.fromkeys(unranked) if i not in self._ranked]
        if self.unranked and "" in pools:
            raise ValueError("a gallery without a name is all images, the unranked ones too")
        self._references = frozenset(unranked)
        self.pools = {name: list(dict.fromkeys(images)) for name, images in pools.items()}
        self._known = {name: frozenset(images) for name, images in self.pools.items()}
        self.repeated = [
            image
            for images in pools.values()
            for image, count in collections.Counter(images).items()
            if count > 1
        ]
        self.queries: list[AnnotatedQuery] = []
        self.dropped: dict[str, list[str]] = {}
        self._ids: set[str] = set()

    def drop(self, reason: str, name: str) -> None:
        """Leaves a record out."""
        self.dropped.setdefault(reason, []).append(name)

    def add(self, query: AnnotatedQuery, name: str = "") -> None:
        """Adds a query, unless an earlier one has its id or its pool lacks one of its images.

        Args:
          query: to be added.
          name: of its record, where it is left out; its id by default.
        """
        named = (query.target, *query.known_positives, *query.relevant, *query.subset)
        named = tuple(filter(None, (*named, *query.negatives)))
        asked = (query.reference, *query.references)
        known = self._known.get(query.pool, frozenset())
        if query.id in self._ids:
            self.drop(MALFORMED, name or query.id)
        elif (
            query.pool not in self._known
            or not known.issuperset(named)
            or not self._knows(asked, known)
        ):
            self.drop(UNKNOWN_IMAGE, name or query.id)
        else:
            self.queries.append(query)
        self._ids.add(query.id)

    def _knows(self, references: Iterable[str], ranked: frozenset[str]) -> bool:
        """Whether images are of a query's gallery, or are there as references."""
        return all(image in ranked or image in self._references for image in references)

    def add_records(
        self,
        file: str,
        records: Iterable[tuple[int, object]],
        query_of: Callable[[int, object], AnnotatedQuery],
    ) -> None:
        """Adds the queries of records.

        Args:
          file: name of the file that holds them.
          records: each with its number in the file.
          query_of: makes the query of a number and a record; by a ValueError it says that the
            record is malformed.
        """
        for number, record in records:
            name = f"{file}:{number}"
            try:
                query = query_of(number, record)
            except ValueError:
                self.drop(MALFORMED, name)
            else:
                self.add(query, name)

    def finish(self) -> Annotations:
        """The split; targets of queries with the same reference and texts are shared.

        Such queries are one question to a model: a target of one is never a negative of another.
        """
        shared: dict[_Question, dict[str, None]] = collections.defaultdict(dict)
        for query in self.queries:
            shared[_question(query)].update(dict.fromkeys(query.known_positives))
        queries = [
            dataclasses.replace(
                query,
                known_positives=tuple(
                    dict.fromkeys((*query.known_positives, *shared[_question(query)]))
                ),
            )
            for query in self.queries
        ]
        return Annotations(queries, self.pools, self.dropped, self.repeated, self.unranked)


def _question(query: AnnotatedQuery) -> _Question:
    return query.pool, query.reference, query.references, query.texts


def field(record: object, name: str, kind: type[T]) -> T:
    """A field of a record.

    Raises:
      ValueError: the record is not an object, lacks the field, or it is of another type.
    """
    value = record.get(name) if isinstance(record, dict) else None
    if type(value) is not kind:
        raise ValueError(f"{name} must be a {kind.__name__}")
    if isinstance(value, str):
        _check_text(value)
    return value


def filled(record: object, name: str) -> str:
    """A field that is a string, not the empty one.

    Raises:
      ValueError: it is not.
    """
    value = field(record, name, str)
    if not value:
        raise ValueError(f"{name} must not be empty")
    return value


def strings(record: object, name: str) -> tuple[str, ...]:
    """A field that is a list of strings.

    Raises:
      ValueError: it is not.
    """
    values = field(record, name, list)
    if not all(isinstance(value, str) for value in values):
        raise ValueError(f"{name} must be a list of strings")
    _check_text("".join(values))
    return tuple(values)


def gallery(path: os.PathLike[str], ids: Iterable[object]) -> list[str]:
    """The image ids of a gallery's list, checked.

    Raises:
      UserError: one is not a string, or is empty.
    """
    checked = []
    for index, image in enumerate(ids):
        if not isinstance(image, str) or not image or not _is_text(image):
            raise UserError(
                f"{path}: item {index} must be an image id, not {image!r}; get the file again."
            )
        checked.append(image)
    return checked


def _is_text(text: str) -> bool:
    try:
        _check_text(text)
    except ValueError:
        return False
    return True


def _check_text(text: str) -> None:
    # JSON can escape half of a surrogate pair, which no UTF-8 holds: that is a ValueError too.
    text.encode()
