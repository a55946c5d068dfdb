"""Brings an index up to date with a folder: embeds what is new or has changed, and nothing else."""

from __future__ import annotations

import collections
import dataclasses
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import cast

import numpy as np
from absl import logging

from dqe_jax.feature_store.shards import first_not_finite, remove_damaged
from dqe_jax.search import images as photos
from dqe_jax.search import store, tables
from dqe_jax.search.folder import File, find_images
from dqe_jax.search.images import Preprocessing, UnreadableError
from dqe_jax.search.model import Model
from dqe_jax.search.store import Entry, Listing, Vectors, Writer
from dqe_jax.utils.ahead import read_ahead
from dqe_jax.utils.errors import UserError
from dqe_jax.utils.progress import progress

SHOWN = 10  # problems in the log


@dataclasses.dataclass(frozen=True)
class Report:
    """What an update of an index has found and done: numbers of images.

    Attributes:
      images: in the index.
      added: that were not there before.
      changed: whose file is another one.
      renamed: that are known under another name: added and removed, and not embedded again.
      removed: that are not in the folder any more.
      duplicates: whose file equals that of another image; both are in the index.
      embedded: by the model, now.
      problems: why files are left out, by their paths.
    """

    images: int
    added: int
    changed: int
    renamed: int
    removed: int
    duplicates: int
    embedded: int
    problems: dict[str, str]

    def __str__(self) -> str:
        parts = [
            f"{getattr(self, name):,} {name}"
            for name in ("added", "changed", "renamed", "removed", "duplicates")
            if getattr(self, name)
        ]
        parts.append(f"{self.embedded:,} embedded")
        if self.problems:
            parts.append(f"{len(self.problems):,} left out")
        return f"{self.images:,} images: {', '.join(parts)}"


@dataclasses.dataclass(frozen=True)
class _Read:
    """A file that was read: pixels and a thumbnail where it must be embedded."""

    file: File
    content: bytes = b""
    pixels: np.ndarray | None = None
    thumbnail: bytes = b""
    reason: str = ""


def update(
    model: Model,
    root: Path,
    directory: Path,
    *,
    table: str | os.PathLike[str] | None = None,
    listed: Listing | None = None,
) -> Report:
    """Brings an index up to date. The caller holds its lock.

    Args:
      model: the index's own.
      root: the folder of images.
      directory: of the index, with its facts.
      table: a CSV file of metadata; None keeps the columns that the index has.
      listed: the images of the index before; None for a new one.

    Raises:
      UserError: there is no image, the table cannot be used, or the disk cannot be written.
    """
    facts = store.read_facts(directory)
    assert facts is not None, "the caller has written it"
    lines = tables.read_table(table) if table is not None else None
    found, problems = find_images(root)
    if not found:
        raise UserError(f"there is no JPEG, PNG or WebP image in {root}: name another folder.")
    before = listed.entries if listed else {}
    vectors = Vectors(directory, facts)
    remove_damaged(vectors.damaged)
    entries: dict[str, Entry] = {}
    unread = []
    for file in found:
        old = before.get(file.id)
        same = old is not None and (old.size, old.changed) == (file.size, file.changed)
        if old is not None and same and vectors.is_complete(old.content):
            entries[file.id] = old
        else:
            unread.append(file)
    embedded = 0
    if unread:
        logging.info("Reading %s of %s images.", f"{len(unread):,}", f"{len(found):,}")
        writer = Writer(directory, facts)
        keeps = bool(facts.features)
        for one, is_new in _embed(model, root, unread, vectors, writer, keeps):
            embedded += is_new
            if one.reason:
                problems[one.file.id] = one.reason
            else:
                entries[one.file.id] = Entry(one.content, one.file.size, one.file.changed)
        writer.flush()
    if not entries:
        path, reason = next(iter(problems.items()))
        raise UserError(f"no image in {root} can be used, such as {path}, which {reason}.")
    entries = {id_: entries[id_] for id_ in sorted(entries)}
    if lines is not None:
        columns = tables.columns_of(lines, list(entries))
    else:
        columns = _kept(listed, list(entries))
    listing = Listing(entries, columns, dict(sorted(problems.items())))
    store.write_listing(directory, listing)
    Vectors(directory, facts).compact({entry.content for entry in entries.values()})
    report = _report(before, listing, embedded)
    _tell(listing.problems)
    return report


def _embed(
    model: Model,
    root: Path,
    files: Sequence[File],
    vectors: Vectors,
    writer: Writer,
    keeps: bool,
) -> Iterator[tuple[_Read, bool]]:
    """Reads files, and embeds those whose content is not known; gives also whether it was new.

    `keeps` says whether features are kept too.
    """
    known: set[bytes] = set()
    how, size = model.preprocessing, model.batch_size
    chunks = [files[i : i + size] for i in range(0, len(files), size)]
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as pool:

        def read(chunk: Sequence[File]) -> list[_Read]:
            return list(pool.map(lambda file: _read(file, root, how, vectors), chunk))

        ahead = read_ahead(read, chunks, 1)
        for parts in progress(ahead, len(files), "Embedding images", size, 2 * size):
            new: dict[bytes, _Read] = {}
            for one in parts:
                if one.pixels is not None and one.content not in known:
                    new.setdefault(one.content, one)
            if new:
                pixels = np.stack([one.pixels for one in new.values() if one.pixels is not None])
                features = model.encode_references(pixels) if keeps else {}
                embeddings = model.embed_features(features) if keeps else model.embed_pixels(pixels)
                bad = first_not_finite(embeddings)
                if bad is not None:
                    raise UserError(
                        f"the embedding of {[*new.values()][bad].file.id} is not finite: take a "
                        "checkpoint from before training diverged."
                    )
                for row, (one, embedding) in enumerate(zip(new.values(), embeddings)):
                    own = {name: array[row] for name, array in features.items()}
                    writer.add(one.content, embedding, one.thumbnail, own)
                known |= new.keys()
            for one in parts:
                yield one, new.get(one.content) is one


def _read(file: File, root: Path, how: Preprocessing, vectors: Vectors) -> _Read:
    """Reads a file, and decodes it if its content is not known."""
    try:
        data = photos.read_file(root / file.id)
        content = store.content_of(data)
        if vectors.is_complete(content):
            return _Read(file, content)
        photo = photos.decode(data, how.decode_side)
        return _Read(file, content, how.square(photo), photos.thumbnail(photo))
    except UnreadableError as error:
        return _Read(file, reason=str(error))


def _kept(listed: Listing | None, ids: Sequence[str]) -> dict[str, tables.Column]:
    """The columns that the index had, for these images."""
    if listed is None:
        return {}
    place = {id_: row for row, id_ in enumerate(listed.entries)}
    kept: dict[str, tables.Column] = {}
    for name, column in listed.columns.items():
        values = [column[place[id_]] if id_ in place else None for id_ in ids]
        kept[name] = cast(tables.Column, values)
    return kept


def _report(before: dict[str, Entry], listing: Listing, embedded: int) -> Report:
    now = listing.entries
    added = [id_ for id_ in now if id_ not in before]
    removed = [id_ for id_ in before if id_ not in now]
    gone = collections.Counter(before[id_].content for id_ in removed)
    come = collections.Counter(now[id_].content for id_ in added)
    renamed = (gone & come).total()
    return Report(
        images=len(now),
        added=len(added) - renamed,
        changed=sum(id_ in before and before[id_].content != now[id_].content for id_ in now),
        renamed=renamed,
        removed=len(removed) - renamed,
        duplicates=len(now) - len({entry.content for entry in now.values()}),
        embedded=embedded,
        problems=listing.problems,
    )


def _tell(problems: dict[str, str]) -> None:
    """Names the files that are left out."""
    for reason, count in collections.Counter(problems.values()).most_common():
        paths = [path for path, why in problems.items() if why == reason]
        if count == 1:
            logging.warning("Left out: %s, which %s.", paths[0], reason)
        else:
            shown = ", ".join(paths[:SHOWN]) + (", ..." if count > SHOWN else "")
            logging.warning("Left out: %d files, each of which %s: %s", count, reason, shown)
