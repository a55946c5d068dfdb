"""An index on disk.

| file | what it holds |
| --- | --- |
| `index.json` | the model's path and fingerprint, the folder, the shape of an embedding |
| `shard-000000/` ... | embeddings, features and thumbnails, each under its file's digest |
| `images.parquet` | the images of the index: path, digest, size, time of change, and columns |

A shard is written once and appears when it is whole; so does `images.parquet`, which is written
last and alone says which images are in the index. A killed process loses what it had not yet
written, and the next one takes up the shards that are there. Two images with equal files share one
embedding.

Features are what queries read of a reference image (`Model.encode_references`): a search whose
reference is in the index looks them up, and encodes only its text. An index may have none, and a
shard of an older index has none: such images are encoded when they are a reference.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from dqe_jax.feature_store import shards as files
from dqe_jax.feature_store.keys import row_keys
from dqe_jax.feature_store.shards import KEY_BYTES, RowSpec, Shard
from dqe_jax.search.tables import Column
from dqe_jax.utils.errors import UserError, reason_of
from dqe_jax.utils.files import cannot_write, read_json

FACTS, IMAGES, LOCK = "index.json", "images.parquet", "lock"
FORMAT = 1
EMBEDDINGS, THUMBNAILS, ENDS = "embeddings", "thumbnails", "thumbnail_ends"
_COLUMN = "column:"  # before the names of columns of metadata
_FEATURE = "feature_"  # before the names of features among the arrays of a shard
AGAIN = "delete the directory and make the index again"
# A shard is written after so many images, bytes or seconds.
SHARD_ROWS, SHARD_BYTES, SHARD_SECONDS = 4096, 256 * 2**20, 30.0


@dataclasses.dataclass(frozen=True)
class Facts:
    """What an index is of.

    Attributes:
      fingerprint: of the model.
      model: its path.
      step: of its checkpoint.
      attributes: names of its attributes.
      tokens: `M`.
      width: `d`.
      images: the folder.
      store: of `milvus.py`; "" for exact search on the devices.
      features: that are kept of each image, by name; none where references are encoded anew.
    """

    fingerprint: str
    model: str
    step: int
    attributes: tuple[str, ...]
    tokens: int
    width: int
    images: str
    store: str = ""
    features: Mapping[str, RowSpec] = dataclasses.field(default_factory=dict)

    @property
    def specs(self) -> dict[str, RowSpec]:
        """Of the arrays that each shard has, with a row for each image."""
        return {EMBEDDINGS: RowSpec((self.tokens, self.width), np.dtype(np.float32))}

    @property
    def feature_specs(self) -> dict[str, RowSpec]:
        """Of the arrays that a shard has besides if features are kept."""
        return {_FEATURE + name: spec for name, spec in self.features.items()}

    @property
    def row_bytes(self) -> int:
        """Bytes of an image in a shard, without its thumbnail."""
        return sum(spec.nbytes for spec in (*self.specs.values(), *self.features.values()))


@dataclasses.dataclass(frozen=True)
class Entry:
    """An image of the index.

    Attributes:
      content: digest of its file, see `content_of`.
      size: of the file in bytes.
      changed: when it was changed last, in nanoseconds.
    """

    content: bytes
    size: int
    changed: int


@dataclasses.dataclass(frozen=True)
class Listing:
    """What `images.parquet` says.

    Attributes:
      entries: by id.
      columns: of metadata, in the order of the entries.
      problems: why files are not in the index, by their paths.
    """

    entries: dict[str, Entry]
    columns: dict[str, Column]
    problems: dict[str, str]


def content_of(data: bytes) -> bytes:
    """The key of a file's content, `KEY_BYTES` long."""
    digest = np.frombuffer(hashlib.sha256(data).digest()[: KEY_BYTES - 1], np.uint8)
    return row_keys(digest[None]).tobytes()


def read_facts(directory: Path) -> Facts | None:
    """What an index is of; None if there is none.

    Raises:
      UserError: the directory is damaged, or of a newer version.
    """
    path = directory / FACTS
    if not path.is_file():
        return None
    held = read_json(epath.Path(path), dict, AGAIN)
    if held.get("format") != FORMAT:
        raise UserError(
            f"{path} has format {held.get('format')!r:.20}, and this version of dqe_jax reads "
            f"format {FORMAT}: {AGAIN}."
        )
    try:
        held.setdefault("features", {})  # that of an older version
        own = {field.name: held[field.name] for field in dataclasses.fields(Facts)}
        own["features"] = {
            name: RowSpec.of(tuple(map(int, spec["shape"])), str(spec["dtype"]))
            for name, spec in own["features"].items()
        }
        own["attributes"] = tuple(map(str, own["attributes"]))
        for name in ("step", "tokens", "width"):
            own[name] = int(own[name])
        return Facts(**own)
    except (AttributeError, KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise UserError(f"{path} is damaged ({reason_of(error)}): {AGAIN}.") from error


def write_facts(directory: Path, facts: Facts) -> None:
    """Writes what an index is of."""
    content = {"format": FORMAT, **vars(facts)}
    content["features"] = {
        name: {"shape": list(spec.shape), "dtype": spec.dtype.name}
        for name, spec in facts.features.items()
    }
    _replace(directory / FACTS, (json.dumps(content, indent=2) + "\n").encode())


def read_listing(directory: Path) -> Listing | None:
    """The images of an index; None if no run has finished yet.

    Raises:
      UserError: the file is damaged.
    """
    import pyarrow.parquet  # slow

    path = directory / IMAGES
    if path.exists() and not path.is_file():  # a pipe would be read for ever
        raise UserError(f"{path} is no file: {AGAIN}.")
    if not path.exists():
        return None
    try:
        table = pyarrow.parquet.read_table(path)
        held = table.to_pydict()
        rows = zip(held["content"], held["size"], held["changed"])
        entries = {id_: Entry(*row) for id_, row in zip(held["id"], rows)}
        columns = {n.removeprefix(_COLUMN): x for n, x in held.items() if n.startswith(_COLUMN)}
        problems = json.loads(table.schema.metadata[b"problems"])
        return Listing(entries, columns, problems)
    except Exception as error:  # pyarrow raises many types
        raise UserError(f"{path} is damaged ({reason_of(error)}): {AGAIN}.") from error


def write_listing(directory: Path, listing: Listing) -> None:
    """Writes the images of an index, all of them or nothing."""
    import pyarrow as pa
    import pyarrow.parquet

    entries = listing.entries
    arrays: dict[str, Any] = {
        "id": pa.array(list(entries), pa.string()),
        "content": pa.array([entry.content for entry in entries.values()], pa.binary()),
        "size": pa.array([entry.size for entry in entries.values()], pa.int64()),
        "changed": pa.array([entry.changed for entry in entries.values()], pa.int64()),
    }
    for name, column in listing.columns.items():
        is_number = any(isinstance(value, float) for value in column)
        arrays[_COLUMN + name] = pa.array(column, pa.float64() if is_number else pa.string())
    table = pa.table(arrays).replace_schema_metadata({"problems": json.dumps(listing.problems)})
    sink = pa.BufferOutputStream()
    pyarrow.parquet.write_table(table, sink)
    _replace(directory / IMAGES, sink.getvalue().to_pybytes())


def _replace(path: Path, content: bytes) -> None:
    """Writes a file that appears when it is whole."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise cannot_write(epath.Path(path.parent), error) from error


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Keeps other processes from writing to an index; a killed process loses its lock.

    Raises:
      UserError: another process writes to it, or it cannot be written to.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = (directory / LOCK).open("a+")
    except OSError as error:
        raise cannot_write(epath.Path(directory), error) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another process writes to the index {directory}: wait until it has ended."
            ) from None
        except OSError:  # a disk without locks: shards are whole or not there
            pass
        for partial in directory.glob("*.partial"):  # of killed processes; shards' have no lock
            if partial.is_file():
                partial.unlink(missing_ok=True)
        yield


class Vectors:
    """Embeddings, features and thumbnails of an index, by the content of files."""

    def __init__(self, directory: Path, facts: Facts):
        """Opens the shards that are whole."""
        self._directory, self._facts = directory, facts
        self.shards, self.damaged = files.open_shards(directory, facts.specs)
        # Of what was written twice, the last counts.
        self._place = {
            key.tobytes(): (number, row)
            for number, shard in enumerate(self.shards)
            for row, key in enumerate(shard.keys)
        }
        both = facts.specs | facts.feature_specs
        whole = files.open_shards(directory, both)[0] if facts.features else []
        rich = {shard.directory for shard in whole}
        self._rich = {n for n, shard in enumerate(self.shards) if shard.directory in rich}

    def __contains__(self, content: bytes) -> bool:
        return content in self._place

    @property
    def tokens(self) -> int:
        """`M`."""
        return self._facts.tokens

    def __len__(self) -> int:
        return len(self._place)

    def is_complete(self, content: bytes) -> bool:
        """Whether a content is there with all that the index keeps of it."""
        place = self._place.get(content)
        return place is not None and (not self._facts.features or place[0] in self._rich)

    def embeddings(self, contents: Sequence[bytes]) -> np.ndarray:
        """float32 `[n, M, d]` of contents that are there."""
        spec = self._facts.specs[EMBEDDINGS]
        out = np.zeros((len(contents), *spec.shape), spec.dtype)
        places = np.array([self._place[content] for content in contents], np.int64).reshape(-1, 2)
        for number in np.unique(places[:, 0]):
            here = np.flatnonzero(places[:, 0] == number)
            out[here] = self.shards[number].array(EMBEDDINGS, spec)[places[here, 1]]
        return out

    def features(self, content: bytes) -> dict[str, np.ndarray] | None:
        """The features of an image by name; None if they are not kept, or not any more."""
        number, row = self._place.get(content, (-1, -1))
        if number not in self._rich:
            return None
        try:
            return {
                name.removeprefix(_FEATURE): np.array(self.shards[number].array(name, spec)[row])
                for name, spec in self._facts.feature_specs.items()
            }
        except (OSError, ValueError):  # a newer index has removed the shard
            return None

    def thumbnail(self, content: bytes) -> bytes:
        """A JPEG; b"" if it is not there any more."""
        try:
            number, row = self._place[content]
            directory = self.shards[number].directory
            ends = np.load(directory / f"{ENDS}.npy", mmap_mode="r")
            begin = int(ends[row - 1]) if row else 0
            held = np.load(directory / f"{THUMBNAILS}.npy", mmap_mode="r")
            return held[begin : int(ends[row])].tobytes()
        except (KeyError, OSError, ValueError):  # a newer index has removed the shard
            return b""

    def compact(self, used: set[bytes]) -> None:
        """Removes rows that no image has any more, where they are more than the others.

        Features that are not kept any more are removed as well. The rows that stay are written anew
        before any is removed.
        """
        total = sum(len(shard.keys) for shard in self.shards)
        live = {number for content, (number, _) in self._place.items() if content in used}
        empty = [shard for number, shard in enumerate(self.shards) if number not in live]
        surplus = not self._facts.features and any(
            next(self.shards[number].directory.glob(f"{_FEATURE}*"), None) for number in live
        )
        if total > 2 * len(used) or surplus:
            writer = Writer(self._directory, self._facts)
            for content in sorted(used):
                (embedding,) = self.embeddings([content])
                kept = self.features(content) or {}
                writer.add(content, embedding, self.thumbnail(content), kept)
            writer.flush()
            empty = self.shards
        for shard in empty:
            shutil.rmtree(shard.directory, ignore_errors=True)


class Writer:
    """Adds rows to an index, a shard at a time."""

    def __init__(self, directory: Path, facts: Facts):
        """Writes nothing yet."""
        self._directory, self._facts = directory, facts
        self._next = files.next_number([Shard(p, np.zeros(0)) for p in _numbered(directory)])
        self._rows: list[tuple[bytes, np.ndarray, bytes, Mapping[str, np.ndarray]]] = []
        self._most = max(1, min(SHARD_ROWS, SHARD_BYTES // facts.row_bytes))
        self._written_at = time.monotonic()

    def add(
        self,
        content: bytes,
        embedding: np.ndarray,
        thumbnail: bytes,
        features: Mapping[str, np.ndarray],
    ) -> None:
        """Adds a row; a shard is written when it is large, or after some time.

        Args:
          content: key of the image.
          embedding: float32 `[M, d]`.
          thumbnail: a JPEG.
          features: as the facts say.
        """
        self._rows.append((content, embedding, thumbnail, features))
        late = time.monotonic() - self._written_at >= SHARD_SECONDS
        if late or len(self._rows) >= self._most:
            self.flush()

    def flush(self) -> None:
        """Writes what was added; raises a `UserError` if the disk cannot be written."""
        if self._rows:
            contents, embeddings, thumbnails, features = zip(*self._rows)
            keys = np.frombuffer(b"".join(contents), np.uint8).reshape(-1, KEY_BYTES)
            arrays: dict[str, np.ndarray] = {
                EMBEDDINGS: np.stack(embeddings).astype(np.float32),
                THUMBNAILS: np.frombuffer(b"".join(thumbnails), np.uint8),
                ENDS: np.cumsum([len(one) for one in thumbnails]),
            }
            for name in self._facts.features:
                arrays[_FEATURE + name] = np.stack([one[name] for one in features])
            try:
                files.write_shard(self._directory, self._next, keys, arrays)
            except OSError as error:
                raise cannot_write(epath.Path(self._directory), error) from error
            self._next, self._rows = self._next + 1, []
        self._written_at = time.monotonic()


def _numbered(directory: Path) -> list[Path]:
    """Directories of shards, damaged ones too, whose numbers are taken."""
    return [path for path in directory.glob("shard-*") if path.name[6:].isdigit()]
