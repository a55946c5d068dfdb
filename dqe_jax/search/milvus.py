"""Nearest neighbours in Milvus, for indexes that are larger than the memory of the devices.

The engine is Milvus Lite, in a file of this machine, or a Milvus server, by one client. The score
`max_m <q, T_m>` is a search for the nearest token, grouped by image: a row is a token, with the
number of its image and the image's metadata, so that filters run in the engine. The directory of
the index stays the truth: `Engine.sync` makes the rows agree with it, whatever a killed process
has left, and can make them anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from etils import epath

from dqe_jax.search.store import Facts, Listing, Vectors
from dqe_jax.search.tables import Column, Filter
from dqe_jax.utils.errors import UserError, reason_of
from dqe_jax.utils.files import cannot_write
from dqe_jax.utils.progress import progress

WRITTEN = "milvus.npz"  # what the store holds, in the directory of the index
ROWS = 2000  # token rows that are sent at a time
READ = 10_000  # rows that are read at a time
# Of HNSW: search width and its most, links of a node, width of building.
EF, MOST, LINKS, BUILD = 512, 16_384, 16, 200
TEXT = 1024  # bytes of a cell of metadata
QUERIES = 64  # that are searched in one request
DROPPED = 100  # images that are left out after a search; more are a filter of the search


def is_server(store: str) -> bool:
    """Whether a store is a server, not a file."""
    return "://" in store


def store_of(store: str) -> str:
    """A store as an index remembers it: a server's address, or the absolute path of a file.

    Raises:
      UserError: it is neither.
    """
    if is_server(store):
        return store
    if not store.endswith(".db"):
        raise UserError(
            f"--store={store}: name a file such as index.db, or a server such as "
            "http://localhost:19530."
        )
    return str(Path(store).expanduser().absolute())


def _client(store: str) -> Any:
    try:
        import pymilvus
    except ImportError as error:
        raise UserError(
            "--store needs the package pymilvus, which is not installed: run "
            "`pip install 'dqe_jax[milvus]'`."
        ) from error
    logging.getLogger("pymilvus").setLevel(logging.ERROR)  # it warns of what Milvus Lite lacks
    if not is_server(store):  # so does its own server, with tracebacks
        logging.getLogger("grpc._server").setLevel(logging.CRITICAL)
    try:
        return pymilvus.MilvusClient(store, token=os.environ.get("MILVUS_TOKEN", ""))
    except Exception as error:  # pymilvus raises many types
        raise UserError(
            f"Milvus at {store} cannot be reached ({reason_of(error)}): start it, or name a file "
            "such as index.db."
        ) from error


class Engine:
    """The token rows of an index in a store."""

    def __init__(self, directory: Path, facts: Facts):
        """Opens the store.

        Raises:
          UserError: it cannot be reached, or pymilvus is not installed.
        """
        self._facts, self._client = facts, _client(facts.store)
        place = hashlib.sha256(str(directory).encode()).hexdigest()[:8]
        self._name = f"dqe_{facts.fingerprint[:16]}_{place}"
        self._written = directory / WRITTEN

    def close(self) -> None:
        """Lets go of the store."""
        self._client.close()

    def sync(self, listing: Listing, vectors: Vectors) -> int:
        """Makes the rows agree with an index; gives how many images were written.

        Only images that are new or have changed are written. Killed at any moment, the next call
        does the rest.
        """
        with _told(self._facts.store):
            return self._sync(listing, vectors)

    def _sync(self, listing: Listing, vectors: Vectors) -> int:
        fields = _fields(listing.columns)
        if self._client.has_collection(self._name) and self._held_fields() != fields:
            self._client.drop_collection(self._name)  # other columns: they are made anew
        if not self._client.has_collection(self._name):
            self._make(fields)
        self._client.load_collection(self._name)
        ids = list(listing.entries)
        versions = [_version(listing, row, id_) for row, id_ in enumerate(ids)]
        wanted = {number_of(id_): version for id_, version in zip(ids, versions)}
        held = self._remembered()
        if held is None:
            held = {}
            for row in self._rows():
                held.setdefault(int(row["image"]), []).append(row["version"])
        whole = {
            number
            for number, found in held.items()
            if found == [wanted.get(number)] * self._facts.tokens
        }
        gone = [
            f"{number}:{token}"
            for number in held
            if number not in wanted
            for token in range(self._facts.tokens)
        ]
        todo = [row for row, id_ in enumerate(ids) if number_of(id_) not in whole]
        if gone or todo:
            self._written.unlink(missing_ok=True)  # true again when all is written
        for start in range(0, len(gone), ROWS):
            self._client.delete(self._name, ids=gone[start : start + ROWS])
        size = max(1, ROWS // self._facts.tokens)
        starts = range(0, len(todo), size)
        for start in progress(starts, len(todo), "Writing to Milvus", size, 2 * size):
            here = todo[start : start + size]
            contents = [listing.entries[ids[row]].content for row in here]
            tokens = vectors.embeddings(contents)
            self._client.upsert(
                self._name,
                [
                    {
                        "key": f"{number_of(ids[row])}:{token}",
                        "image": number_of(ids[row]),
                        "version": versions[row],
                        "vector": vector,
                        **_cells(listing.columns, row),
                    }
                    for row, own in zip(here, tokens)
                    for token, vector in enumerate(own)
                ],
            )
        if gone or todo:
            self._client.flush(self._name)
        self._remember(wanted)
        return len(todo)

    def _remembered(self) -> dict[int, list[str]] | None:
        """Versions of the images' rows as of the last sync; None if the store must be read.

        Reading all rows takes longer than all else of an update that changes little.
        """
        try:
            with np.load(self._written, allow_pickle=False) as file:
                same = (str(file["store"]), str(file["name"])) == (self._facts.store, self._name)
                numbers, versions = file["numbers"].tolist(), file["versions"].tolist()
        except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile):
            return None  # there is none, or it is damaged
        tokens = self._facts.tokens
        if not same or self._count() != tokens * len(numbers):
            return None
        return {number: [version] * tokens for number, version in zip(numbers, versions)}

    def _remember(self, written: Mapping[int, str]) -> None:
        """Says in the directory of the index what the store holds."""
        aside = self._written.with_name(f"{WRITTEN}.partial")
        try:
            with aside.open("wb") as file:
                np.savez(
                    file,
                    store=self._facts.store,
                    name=self._name,
                    numbers=np.array(list(written), np.int64),
                    versions=np.array(list(written.values()), str),
                )
            aside.replace(self._written)
        except OSError as error:
            raise cannot_write(epath.Path(aside.parent), error) from error

    def _count(self) -> int:
        """Rows in the store."""
        (found,) = self._client.query(self._name, filter="", output_fields=["count(*)"])
        return int(found["count(*)"])

    def rank(
        self,
        queries: np.ndarray,
        k: int,
        excluded: Sequence[Sequence[int]],
        condition: str,
        share: float = 1.0,
    ) -> list[list[tuple[int, float]]]:
        """Numbers and scores of the `k` nearest images of each query `[Q, d]`, best first.

        Args:
          queries: float `[Q, d]`.
          k: length of the lists.
          excluded: for each query, numbers of images that must not be found.
          condition: an expression on metadata, or "".
          share: of the images that pass it: the fewer, the wider the search must be.
        """
        found: dict[int, list[tuple[int, float]]] = {}
        # One request for many queries: Milvus Lite looks at every row in each request.
        few = [i for i, numbers in enumerate(excluded) if len(set(numbers)) <= DROPPED]
        with _told(self._facts.store):
            for start in range(0, len(few), QUERIES):
                rows = few[start : start + QUERIES]
                more = max(len(set(excluded[i])) for i in rows)
                for i, hits in zip(rows, self._search(queries[rows], k + more, condition, share)):
                    out = frozenset(excluded[i])
                    found[i] = [one for one in hits if one[0] not in out][:k]
            for i in sorted(set(range(len(queries))) - found.keys()):
                others = f"image not in {sorted(set(excluded[i]))}"
                parts = [condition, others] if condition else [others]
                (found[i],) = self._search(queries[i : i + 1], k, " and ".join(parts), share)
        return [found[i] for i in range(len(queries))]

    def _search(
        self, queries: np.ndarray, k: int, condition: str, share: float
    ) -> list[list[tuple[int, float]]]:
        """The images that are nearest to each query."""
        answer = self._client.search(
            self._name,
            data=list(np.asarray(queries, np.float32)),
            anns_field="vector",
            limit=k,
            group_by_field="image",
            output_fields=["image"],
            filter=condition,
            search_params={"params": {"ef": min(int(max(EF, 20 * k) / share), MOST)}},
        )
        return [
            [(int(hit["entity"]["image"]), float(hit["distance"])) for hit in hits]
            for hits in answer
        ]

    def open(self) -> None:
        """Makes the rows ready for search.

        Raises:
          UserError: they are not there.
        """
        if not self._client.has_collection(self._name):
            raise UserError(
                f"{self._facts.store} does not hold the rows of this index: run dqe-jax index "
                "again with the same --store, which writes them."
            )
        self._client.load_collection(self._name)

    def _make(self, fields: Mapping[str, str]) -> None:
        from pymilvus import DataType, MilvusClient

        schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field("key", DataType.VARCHAR, is_primary=True, max_length=64)
        schema.add_field("image", DataType.INT64)
        schema.add_field("version", DataType.VARCHAR, max_length=64)
        schema.add_field("vector", DataType.FLOAT_VECTOR, dim=self._facts.width)
        for name, kind in fields.items():
            more = {"max_length": TEXT} if kind == "VARCHAR" else {}
            schema.add_field(name, DataType[kind], nullable=True, **more)
        indexes = MilvusClient.prepare_index_params()
        indexes.add_index(
            "vector",
            index_type="HNSW",
            metric_type="IP",
            params={"M": LINKS, "efConstruction": BUILD},
        )
        self._client.create_collection(self._name, schema=schema, index_params=indexes)

    def _held_fields(self) -> dict[str, str]:
        described = self._client.describe_collection(self._name)["fields"]
        return {f["name"]: f["type"].name for f in described if f["name"].startswith("c_")}

    def _rows(self) -> Iterator[Mapping[str, Any]]:
        """Image and version of all rows."""
        pages = self._client.query_iterator(
            self._name, output_fields=["image", "version"], batch_size=READ
        )
        while page := pages.next():
            yield from page
        pages.close()


@contextlib.contextmanager
def _told(store: str) -> Iterator[None]:
    """Raises a `UserError` for what a store says."""
    from pymilvus.exceptions import MilvusException

    try:
        yield
    except MilvusException as error:
        raise UserError(
            f"Milvus at {store} fails ({reason_of(error)}): see that it runs, and run the same "
            "command again."
        ) from error


def number_of(id_: str) -> int:
    """The number of an image in a store: 63 bits of a digest of its id."""
    return int.from_bytes(hashlib.sha256(id_.encode()).digest()[:8], "big") >> 1


def expression(columns: Mapping[str, Column], wanted: Filter) -> str:
    """A filter, checked by `tables.allowed_rows`, as an expression of Milvus."""
    parts = []
    for name, condition in wanted.items():
        field = field_of(name)
        is_number = any(isinstance(value, float) for value in columns[name])
        if isinstance(condition, tuple):
            least, most = condition
            ends = [f"{field} >= {float(least)}"] if least is not None else []
            ends += [f"{field} <= {float(most)}"] if most is not None else []
            parts += ends or [f"{field} is not null"]
            continue
        values = list(condition) if isinstance(condition, (list, set, frozenset)) else [condition]
        if is_number:
            cells = [repr(float(cast(float, value))) for value in values]
        else:
            cells = [json.dumps(str(value), ensure_ascii=False) for value in values]
        parts.append(f"{field} in [{', '.join(cells)}]")
    return " and ".join(parts)


def field_of(name: str) -> str:
    """The name of a column in a store, which allows letters, digits and underscores."""
    plain = re.sub(r"[^A-Za-z0-9]", "_", name)[:40]
    return f"c_{plain}_{hashlib.sha256(name.encode()).hexdigest()[:6]}"


def _fields(columns: Mapping[str, Column]) -> dict[str, str]:
    return {
        field_of(name): "DOUBLE" if any(isinstance(x, float) for x in column) else "VARCHAR"
        for name, column in columns.items()
    }


def _cells(columns: Mapping[str, Column], row: int) -> dict[str, Any]:
    """Metadata of an image; long texts are cut, as the store has a limit."""
    cells = {field_of(name): column[row] for name, column in columns.items()}
    return {
        name: x.encode()[:TEXT].decode(errors="ignore") if isinstance(x, str) else x
        for name, x in cells.items()
    }


def _version(listing: Listing, row: int, id_: str) -> str:
    """Changes with the image and with its metadata."""
    cells = json.dumps(_cells(listing.columns, row), sort_keys=True)
    return hashlib.sha256(listing.entries[id_].content + cells.encode()).hexdigest()[:32]
