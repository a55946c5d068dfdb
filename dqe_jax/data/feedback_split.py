"""A training split with what users picked and rejected: the log of `feedback.py` as queries.

Each query of the log with a pick becomes queries of the split, one for each picked image, which is
its target. All picks are known positives of the query, and of a query of the split with the same
reference and text. What users rejected are its rejected images: they join the negatives that are
drawn for it. Images that the gallery lacks are put behind it; copies of its images are known by
their content, and not added.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from absl import logging

from dqe_jax.data import feedback
from dqe_jax.data.builders.fashion_raw import DECODE_SIDE
from dqe_jax.data.digest import CONTENT_BYTES
from dqe_jax.data.examples import Queries
from dqe_jax.data.feedback import Judged
from dqe_jax.data.image_formats import encode_image
from dqe_jax.data.photos import MAX_BYTES, open_photo
from dqe_jax.data.preprocess import PREPROCESS
from dqe_jax.data.settings import DataConfig
from dqe_jax.data.splits import Gallery, Split
from dqe_jax.utils.errors import UserError
from dqe_jax.utils.files import is_regular

REJECTED = 16  # rejected images of a query that are used, the most
SHOWN = 3


class _UnusableError(Exception):
    """An image of the log cannot be used; the text says why."""


class ExtendedGallery(Gallery):
    """A gallery with further images behind its own."""

    def __init__(
        self, first: Gallery, ids: Sequence[str], images: Sequence[np.ndarray], digests: np.ndarray
    ):
        """Adds images.

        Args:
          first: the gallery.
          ids: of the further images.
          images: uint8 `[H, W, 3]` each.
          digests: of them, as `Gallery.contents`.
        """
        self._first, self._more, self._digests = first, list(images), digests
        self.ids = [*first.ids, *ids]
        more = len(first) + np.arange(len(self._more), dtype=np.int32)
        self.image_ids = np.concatenate([first.image_ids, more])
        self.image_shape = first.image_shape

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> np.ndarray:
        """As of `Gallery`."""
        own = int(row) - len(self._first)
        return self._first[row] if own < 0 else self._more[own]

    def contents(self) -> np.ndarray:
        """As of `Gallery`."""
        return np.concatenate([self._first.contents(), self._digests])


class _Images:
    """Rows of the images of a log in an extended gallery."""

    def __init__(self, gallery: Gallery, data: DataConfig, log: Path):
        self._gallery, self._data, self._log = gallery, data, log
        self._row = {
            digest.tobytes(): row for row, digest in reversed([*enumerate(gallery.contents())])
        }
        self._of_name: dict[tuple[str, str], int | str] = {}
        self.ids: list[str] = []
        self.images: list[np.ndarray] = []
        self._digests: list[np.ndarray] = []
        self.problems: collections.Counter[str] = collections.Counter()
        self.examples: dict[str, str] = {}

    def row(self, folder: str, name: str) -> int | None:
        """The row of an image; None if it cannot be used, which is counted."""
        key = (folder, name)
        if key not in self._of_name:
            try:
                self._of_name[key] = self._read(folder, name)
            except _UnusableError as error:
                self._of_name[key] = str(error)
        found = self._of_name[key]
        if isinstance(found, str):
            self.problems[found] += 1
            self.examples.setdefault(found, name)
            return None
        return found

    def _read(self, folder: str, name: str) -> int:
        path = PurePosixPath(name)
        if name.startswith(feedback.UPLOAD):
            key = name.removeprefix(feedback.UPLOAD)
            if not key.isalnum():
                raise _UnusableError("lies outside of its folder")
            file = feedback.upload_file(self._log, key)
        elif path.is_absolute() or ".." in path.parts:
            raise _UnusableError("lies outside of its folder")
        else:
            file = Path(folder, name)
        try:
            if not is_regular(file) or file.stat().st_size > MAX_BYTES:
                raise _UnusableError("is no image")
            side = DECODE_SIDE if self._data.dataset == "fashion_products" else None
            photo = open_photo(file.read_bytes(), side)[0]
        except FileNotFoundError as error:
            raise _UnusableError("is not there any more") from error
        except _UnusableError:
            raise
        except Exception as error:  # decoders of damaged files raise nearly anything
            raise _UnusableError("cannot be read") from error
        image = PREPROCESS[self._data.preprocess](photo, self._data.image_size)
        data = encode_image(image, self._data.image_format)
        digest = hashlib.sha256(data).digest()[:CONTENT_BYTES]
        if digest not in self._row:
            self._row[digest] = len(self._gallery) + len(self.images)
            self.ids.append(f"feedback:{name}")
            self.images.append(image)
            self._digests.append(np.frombuffer(digest, np.uint8))
        return self._row[digest]

    def gallery(self) -> Gallery:
        if not self.images:
            return self._gallery
        return ExtendedGallery(self._gallery, self.ids, self.images, np.stack(self._digests))


def with_feedback(split: Split, data: DataConfig, path: Path, share: float) -> Split:
    """A training split with the queries of a log.

    Args:
      split: the training split.
      data: `config.data`: how its images are made.
      path: of the log.
      share: of the queries of an epoch that are the log's: they are repeated as often as that
        needs. Above 0 and below 1.

    Raises:
      UserError: the log cannot be read, or holds no pick that can be used.
    """
    if not 0 < share < 1:
        raise UserError(f"--feedback_share is {share:g}: give a number above 0 and below 1.")
    log = feedback.read_log(path)
    every = feedback.judged(log.clicks)
    images = _Images(split.gallery, data, path)
    made = list(_queries(every, images))
    _tell(path, log, every, made, images)
    if not made:
        raise UserError(
            f"the log {path} holds no query with a picked image that can be used: nothing can be "
            "learned from it."
        )
    gallery = images.gallery()
    own = _own_columns(made)
    base = _joined(split, own, gallery)
    repeats = max(1, round(share / (1 - share) * len(split.queries) / len(own.ids)))
    rows = np.concatenate([np.arange(len(base)), np.tile(np.arange(len(own)), repeats) + len(base)])
    rejected = np.full((len(base) + len(own), _widest(made)), -1, np.int32)
    for line, query in zip(rejected[len(base) :], made):
        line[: len(query.rejected)] = query.rejected
    logging.info(
        "The log gives %d queries with %d rejections and %d images that are new; each is taken %d "
        "times in an epoch, which then has %d queries.",
        *(len(own), int((rejected >= 0).sum()), len(images.images), repeats, len(rows)),
    )
    facts = json.dumps([dataclasses.astuple(one) for one in every] + [share])
    digest = hashlib.sha256(f"{split.digest} {facts}".encode()).hexdigest()[:32]
    return dataclasses.replace(
        split,
        queries=_concatenated(base, own).take(rows),
        gallery=gallery,
        digest=digest if split.digest else "",
        rejected=rejected[rows] if rejected.shape[1] else None,
    )


@dataclasses.dataclass(frozen=True)
class _Made:
    """A query of the log in rows of the gallery."""

    text: str
    reference: int
    target: int
    picked: tuple[int, ...]
    rejected: tuple[int, ...]


def _queries(every: Sequence[Judged], images: _Images) -> Iterator[_Made]:
    for one in every:
        if not one.picked or len(one.references) > 1:  # a training query has one reference
            continue
        reference = images.row(one.folder, one.references[0])
        if reference is None:
            continue
        picked = [images.row(one.folder, name) for name in one.picked]
        if all(row is None for row in picked):
            continue
        rejected = [images.row(one.folder, name) for name in one.rejected]
        rows = tuple(dict.fromkeys(row for row in picked if row is not None))
        away = {row for row in rejected if row is not None} - set(rows) - {reference}
        for target in rows:
            yield _Made(one.text, reference, target, rows, tuple(sorted(away))[:REJECTED])


def _tell(
    path: Path,
    log: feedback.Log,
    every: Sequence[Judged],
    made: Sequence[_Made],
    images: _Images,
) -> None:
    """Says in the log of the run what of the log was read, and what cannot be used."""
    unpicked = sum(not one.picked for one in every)
    several = sum(bool(one.picked) and len(one.references) > 1 for one in every)
    logging.info(
        "%s: %d clicks and %d damaged lines; %d queries, of which %d have no picked image and %d "
        "have several reference images, and are not used.",
        *(path, len(log.clicks), log.skipped, len(every), unpicked, several),
    )
    for reason, count in images.problems.most_common():
        logging.warning(
            "%s: %d times an image is not used, such as %s, since it %s.",
            *(path, count, images.examples[reason], reason),
        )


def _widest(made: Sequence[_Made]) -> int:
    return max((len(query.rejected) for query in made), default=0)


def _own_columns(made: Sequence[_Made]) -> Queries:
    none = np.zeros(0, np.int32)
    count = len(made)
    return Queries(
        ids=[f"feedback-{i:06d}" for i in range(count)],
        texts=[query.text for query in made],
        reference=np.array([query.reference for query in made], np.int32),
        target=np.array([query.target for query in made], np.int32),
        known_positives=[np.array(query.picked, np.int32) for query in made],
        relevant=[none] * count,
        kinds=[()] * count,
        attributes=[()] * count,
        pools=[""] * count,
        subset=[none] * count,
        captions=[(query.text,) for query in made],
    )


def _joined(split: Split, own: Queries, gallery: Gallery) -> Queries:
    """The split's own queries, with picks of the same query among their known positives."""
    queries, before = split.queries, len(split.gallery)
    picks: dict[tuple[int, str], set[int]] = collections.defaultdict(set)
    for i, text in enumerate(own.texts):
        asked = int(gallery.image_ids[own.reference[i]]), text.strip().lower()
        picks[asked].update(own.known_positives[i].tolist())
    known = list(queries.known_positives)
    for i, text in enumerate(queries.texts):
        asked = int(gallery.image_ids[queries.reference[i]]), text.strip().lower()
        if asked in picks:
            more = np.array(sorted(picks[asked]), np.int32)
            known[i] = np.concatenate([known[i], more])
    # Numbers beyond the gallery stood for images that are not at hand.
    relevant = [rows[rows < before] for rows in queries.relevant]
    return dataclasses.replace(queries, known_positives=known, relevant=relevant)


def _concatenated(first: Queries, second: Queries) -> Queries:
    def both(name: str) -> np.ndarray | list[object]:
        a, b = getattr(first, name), getattr(second, name)
        if isinstance(a, np.ndarray):
            return np.concatenate([a, b])
        if name == "captions" and not len(a):
            return []
        return [*a, *b]

    return Queries(**{field.name: both(field.name) for field in dataclasses.fields(Queries)})  # type: ignore[arg-type]
