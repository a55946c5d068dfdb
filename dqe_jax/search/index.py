"""An index over a folder of images, and search in it."""

from __future__ import annotations

import dataclasses
import functools
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import cast, overload

import numpy as np

from dqe_jax.evaluation.placed import PlacedGallery
from dqe_jax.feature_store.shards import RowSpec
from dqe_jax.search import images as photos
from dqe_jax.search import store as files
from dqe_jax.search.asks import Ask, Known, Reference, Turn
from dqe_jax.search.building import Report, update
from dqe_jax.search.folder import folder_of
from dqe_jax.search.images import AnyImage, Encoded, UnreadableError
from dqe_jax.search.loading import load
from dqe_jax.search.milvus import Engine, expression, number_of, store_of
from dqe_jax.search.model import Model, Query, queries_of
from dqe_jax.search.relevance import MOVES, Moves, moved
from dqe_jax.search.results import Result, Results
from dqe_jax.search.store import Facts, Listing, Vectors
from dqe_jax.search.tables import Column, Filter, allowed_rows
from dqe_jax.utils.errors import UserError
from dqe_jax.utils.paths import is_remote

# Tokens of images that pass a filter, up to which an index in a store ranks them itself.
FEW = 2**18
# Bytes of an image's features, up to which a new index keeps them: as many as those of an embedding
# of 32 tokens of 256 numbers.
FEATURE_BYTES = 2**15


class Index:
    """Embeddings of the images of a folder, and search among them.

    Attributes:
      directory: of the index.
      model: that made it.
      ids: of the images: their paths from the folder.
      columns: of metadata, by name: a value for each image, None where there is none.
      problems: why files of the folder are not in the index, by their paths.
      report: what the update has done that this index was made by; None if it was only opened.
    """

    def __init__(
        self,
        directory: Path,
        model: Model,
        facts: Facts,
        listing: Listing,
        report: Report | None = None,
        keep: object = None,
    ):
        """Reads the embeddings; `keep` lives as long as the index does."""
        self.directory, self.model, self.report, self._keep = directory, model, report, keep
        self.ids = tuple(listing.entries)
        self.columns: dict[str, Column] = listing.columns
        self.problems = listing.problems
        self._root = Path(facts.images)
        self._contents = [entry.content for entry in listing.entries.values()]
        if facts.features and facts.features != model.reference_specs:
            # Another version of dqe_jax wrote them: references are encoded anew.
            facts = dataclasses.replace(facts, features={})
        self._vectors = Vectors(directory, facts)
        self._row = {id_: row for row, id_ in enumerate(self.ids)}
        if any(content not in self._vectors for content in self._contents):
            raise UserError(
                f"the index {directory} lacks embeddings that it should have: run dqe-jax index "
                "again, which computes them."
            )
        self._gallery: PlacedGallery | None = None
        self._engine: Engine | None = None
        if facts.store:
            self._engine = Engine(directory, facts)
            self._engine.open()
            self._row_of_number = {number_of(id_): row for row, id_ in enumerate(self.ids)}
        else:
            gallery = self._vectors.embeddings(self._contents)
            self._gallery = PlacedGallery(gallery, devices=model.devices)

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        lines = [f"Index of {len(self):,} images of {self._root} by {self.model!r}"]
        if self.columns:
            lines.append(f"columns: {', '.join(self.columns)}")
        if self.problems:
            lines.append(f"{len(self.problems):,} files are left out: see .problems")
        return "\n".join(lines)

    def thumbnail(self, id: str) -> bytes:
        """A small JPEG of an image of the index; b"" if it has been removed since."""
        return self._vectors.thumbnail(self._contents[self._rows_of([id], "thumbnail")[0]])

    @overload
    def search(
        self,
        image: AnyImage | Sequence[AnyImage],
        text: str,
        *,
        k: int = 10,
        weights: dict[str, float] | None = None,
        exclude: Sequence[str] = (),
        filter: Filter | None = None,
        include_reference: bool = False,
        rejected: Sequence[str] = (),
        earlier: Sequence[Turn] = (),
    ) -> Results: ...
    @overload
    def search(
        self,
        image: AnyImage | Sequence[AnyImage | Sequence[AnyImage]],
        text: list[str] | tuple[str, ...],
        *,
        k: int = 10,
        weights: dict[str, float] | None = None,
        exclude: Sequence[str] = (),
        filter: Filter | None = None,
        include_reference: bool = False,
        rejected: Sequence[str] = (),
        earlier: Sequence[Turn] = (),
    ) -> list[Results]: ...
    def search(
        self,
        image: AnyImage | Sequence[AnyImage | Sequence[AnyImage]],
        text: str | list[str] | tuple[str, ...],
        *,
        k: int = 10,
        weights: dict[str, float] | None = None,
        exclude: Sequence[str] = (),
        filter: Filter | None = None,
        include_reference: bool = False,
        rejected: Sequence[str] = (),
        earlier: Sequence[Turn] = (),
    ) -> Results | list[Results]:
        """Finds the images that fit reference images and texts best.

        The search is exact, unless the index has a store: then the engine's is approximate.

        Args:
          image: as for `Model.encode_query`; an id of the index stands for its image.
          text: what should change; "" asks for similar images. A list of texts is a batch of
            queries, and gives a list of results.
          k: how many images.
          weights: factors by attribute, by which the predicted weights are multiplied.
          exclude: ids that must not be found.
          filter: conditions by column: a value, a list of values, or a tuple (least, most).
          include_reference: whether the reference itself, and images whose files equal its own, may
            be found.
          rejected: ids that are not what is meant: the query moves away from them, and they are not
            found (`relevance.py`).
          earlier: the turns of the conversation so far, the oldest first: the query moves towards
            theirs.

        Raises:
          UserError: an image cannot be used, or there is no such id, attribute or column.
        """
        queries = queries_of(image, text)
        asks = [
            Ask(
                images=cast(tuple[AnyImage, ...], query.images),  # they are as given
                text=query.text,
                k=k,
                weights=weights or {},
                exclude=exclude,
                filter=filter,
                include_reference=include_reference,
                rejected=rejected,
                earlier=earlier,
            )
            for query in queries
        ]
        found = self.answer(asks)
        return found[0] if isinstance(text, str) else found

    @property
    def root(self) -> Path:
        """The folder of the images."""
        return self._root

    def has(self, id: str) -> bool:
        """Whether an image is in the index."""
        return id in self._row

    def check(self, ask: Ask) -> None:
        """Raises a `UserError` for what `answer` would refuse, without embedding anything."""
        if not isinstance(ask.k, int) or ask.k < 1:
            raise UserError(f"k is {ask.k!r}: give a number of images of at least 1.")
        self._rows_of(ask.exclude, "exclude")
        self._rows_of(ask.rejected, "rejected")
        self.model.factors(ask.weights)
        if ask.filter:
            allowed_rows(self.columns, len(self), ask.filter)

    def known(self, id: str) -> Known:
        """An image of the index, read once for several searches.

        Where the index keeps features, its file is not looked at.

        Raises:
          UserError: there is no such image, or its file cannot be read any more.
        """
        row = self._rows_of([id], "image")[0]
        if (features := self._vectors.features(self._contents[row])) is not None:
            return Known(id, Encoded(features), self._contents[row])
        try:
            data = photos.read_file(self._inside(id))
            photo = photos.decode(data, self.model.preprocessing.decode_side)
        except UnreadableError as error:
            raise _gone(id, error) from error
        return Known(id, self.model.preprocessing.square(photo), self._contents[row])

    def photo(self, id: str, side: int) -> bytes:
        """A JPEG of an image of the index with at most `side` pixels a side; raises as `known`."""
        self._rows_of([id], "image")
        try:
            return photos.thumbnail(photos.to_rgb(self._inside(id), side), side)
        except UnreadableError as error:
            raise _gone(id, error) from error

    def answer(self, asks: Sequence[Ask], moves: Moves = MOVES) -> list[Results]:
        """Searches of one batch, each with its own weights, filters and exclusions.

        Args:
          asks: at least one.
          moves: how far a conversation moves its query.

        Raises:
          UserError: an image cannot be used, or there is no such id, attribute or column.
        """
        for ask in asks:
            self.check(ask)
        # The earlier turns of all asks follow the asks themselves: one batch of queries.
        turns = [turn for ask in asks for turn in ask.earlier]
        everything: list[Ask | Turn] = [*asks, *turns]
        located = [Query(tuple(map(self._read, own.images)), own.text) for own in everything]
        weights = [*(ask.weights for ask in asks), *({} for _ in turns)]
        embedded = self.model.embed_queries(located, weights)
        queries = embedded.embedding[: len(asks)].copy()
        begin = len(asks)
        for i, ask in enumerate(asks):
            earlier = embedded.embedding[begin : begin + len(ask.earlier)]
            begin += len(ask.earlier)
            away = self._vectors.embeddings([self._contents[self._row[x]] for x in ask.rejected])
            queries[i] = moved(queries[i], earlier, away, moves)
        excluded = [
            [
                *self._rows_of([*ask.exclude, *ask.rejected], "exclude"),
                *([] if ask.include_reference else self._copies_of(ask.images)),
            ]
            for ask in asks
        ]
        rows, scores, empty = self._ranked(asks, queries, excluded)
        found = []
        for i, ask in enumerate(asks):
            warnings = embedded.warnings[i]
            if empty[i]:
                warnings += ("no image passes the filter",)
            places = [int(row) for row in rows[i] if row >= 0]
            found.append(
                Results(
                    text=ask.text,
                    references=tuple(_name_of(one, n + 1) for n, one in enumerate(ask.images)),
                    results=tuple(
                        self._result(row, float(score), not ask.text.strip())
                        for row, score in zip(places, scores[i])
                    ),
                    attribute_weights=embedded.weights(i),
                    warnings=warnings,
                    thumbnails=self._thumbnails(ask.images, places),
                )
            )
        return found

    def _ranked(
        self, asks: Sequence[Ask], queries: np.ndarray, excluded: Sequence[Sequence[int]]
    ) -> tuple[list[np.ndarray], list[np.ndarray], list[bool]]:
        """Of each ask: rows, scores, and whether its filter lets nothing pass.

        Those with the same filter are ranked together, for as many images as one of them asks for.
        """
        rows: list[np.ndarray] = [np.zeros(0, np.int32)] * len(asks)
        scores: list[np.ndarray] = [np.zeros(0, np.float32)] * len(asks)
        empty = [False] * len(asks)
        groups: dict[str, list[int]] = {}
        for i, ask in enumerate(asks):
            groups.setdefault(repr(ask.filter) if ask.filter else "", []).append(i)
        for own in groups.values():
            wanted = asks[own[0]].filter
            allowed = allowed_rows(self.columns, len(self), wanted) if wanted else None
            k = max(asks[i].k for i in own)
            best, values = self._rank(queries[own], k, [excluded[i] for i in own], allowed, wanted)
            for place, i in enumerate(own):
                rows[i], scores[i] = best[place][: asks[i].k], values[place][: asks[i].k]
                empty[i] = allowed is not None and not allowed.any()
        return rows, scores, empty

    def _rank(
        self,
        queries: np.ndarray,
        k: int,
        excluded: Sequence[Sequence[int]],
        allowed: np.ndarray | None,
        filter: Filter | None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Rows int32 `[Q, k]`, -1 where a list ends, and scores float32 `[Q, k]`."""
        if self._gallery is not None:
            return self._gallery.rank(queries, k, excluded=_padded(excluded), allowed=allowed)
        assert self._engine is not None, "an index has a gallery or an engine"
        share = 1.0
        if allowed is not None:
            passing = np.flatnonzero(allowed)
            if len(passing) * self._vectors.tokens <= FEW:
                return self._rank_few(queries, k, excluded, passing)
            share = len(passing) / len(allowed)
        numbers = [[number_of(self.ids[row]) for row in own] for own in excluded]
        condition = expression(self.columns, filter) if filter else ""
        rows = np.full((len(queries), k), -1, np.int32)
        scores = np.full((len(queries), k), -np.inf, np.float32)
        for i, hits in enumerate(self._engine.rank(queries, k, numbers, condition, share)):
            known = [(self._row_of_number[n], x) for n, x in hits if n in self._row_of_number]
            for place, (row, score) in enumerate(known):
                rows[i, place], scores[i, place] = row, score
        return rows, scores

    def _rank_few(
        self, queries: np.ndarray, k: int, excluded: Sequence[Sequence[int]], passing: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `_rank`, exactly, of the few rows `passing`: an engine's graph finds such badly."""
        if not len(passing):
            empty = (len(queries), k)
            return np.full(empty, -1, np.int32), np.full(empty, -np.inf, np.float32)
        embeddings = self._vectors.embeddings([self._contents[row] for row in passing])
        # A power of two of rows: few programs are compiled.
        size = 1 << max(len(passing) - 1, 511).bit_length()
        gallery = np.zeros((size, *embeddings.shape[1:]), np.float32)
        gallery[: len(passing)] = embeddings
        place = {int(row): i for i, row in enumerate(passing)}
        out = [[place[row] for row in own if row in place] for own in excluded]
        found, scores = PlacedGallery(gallery, devices=self.model.devices).rank(
            queries, k, excluded=_padded(out), allowed=np.arange(size) < len(passing)
        )
        rows = np.where(found >= 0, passing[np.maximum(found, 0)], -1)
        return rows.astype(np.int32), scores

    def _result(self, row: int, score: float, similar: bool) -> Result:
        metadata = {name: column[row] for name, column in self.columns.items()}
        curve = self.model.probability
        probability = None if curve is None or similar else float(curve.of(np.array(score)))
        return Result(self.ids[row], self._root / self.ids[row], score, probability, metadata)

    def _thumbnails(
        self, references: Sequence[Reference], rows: Sequence[int]
    ) -> Callable[[], tuple[list[bytes], list[bytes]]]:
        def thumbnail(image: Reference) -> bytes:
            if isinstance(image, Known):
                if isinstance(image.image, Encoded):
                    return self._vectors.thumbnail(image.content)
                return photos.thumbnail(photos.to_rgb(image.image))
            if isinstance(image, str) and image in self._row:
                return self._vectors.thumbnail(self._contents[self._row[image]])
            try:
                return photos.thumbnail(photos.to_rgb(image))
            except UnreadableError:  # removed since
                return b""

        def make() -> tuple[list[bytes], list[bytes]]:
            given = [thumbnail(one) for one in references]
            return given, [self._vectors.thumbnail(self._contents[row]) for row in rows]

        return make

    def _read(self, image: Reference) -> AnyImage | Encoded:
        """An image, or what is known of an id of the index: its features, or where its file is."""
        if isinstance(image, Known):
            return image.image
        if isinstance(image, str) and image in self._row:
            features = self._vectors.features(self._contents[self._row[image]])
            return self._root / image if features is None else Encoded(features)
        return image

    def _inside(self, id: str) -> Path:
        """The file of an image of the index, which a link may not have led elsewhere since."""
        path = self._root / id
        root, real = os.path.realpath(self._root), os.path.realpath(path)
        if os.path.commonpath([root, real]) != root:
            raise UnreadableError("is a link that leads out of the folder")
        return path

    def _copies_of(self, images: Sequence[Reference]) -> list[int]:
        """Rows of images of the index that are these, or whose files equal theirs."""
        rows: set[int] = set()
        for image in images:
            if isinstance(image, Known):
                rows.update(self._rows_with.get(image.content, ()))
            elif isinstance(image, str) and image in self._row:
                rows.update(self._rows_with[self._contents[self._row[image]]])
            elif isinstance(image, (str, os.PathLike)):
                content = files.content_of(photos.read_file(image))
                rows.update(self._rows_with.get(content, ()))
        return sorted(rows)

    @functools.cached_property
    def _rows_with(self) -> dict[bytes, list[int]]:
        """Rows by the content of their files."""
        rows: dict[bytes, list[int]] = {}
        for row, content in enumerate(self._contents):
            rows.setdefault(content, []).append(row)
        return rows

    def _rows_of(self, ids: Sequence[str], what: str) -> list[int]:
        if isinstance(ids, str):
            raise UserError(f"{what} is {ids!r}: give a list of ids.")
        for id_ in ids:
            if id_ not in self._row:
                raise UserError(f"{what}: there is no image {id_!r} in the index.")
        return [self._row[id_] for id_ in ids]


def build_index(
    model: Model,
    images: str | os.PathLike[str],
    *,
    output: str | os.PathLike[str] | None = None,
    table: str | os.PathLike[str] | None = None,
    store: str | None = None,
    keep_features: bool | None = None,
) -> Index:
    """Makes an index, or brings it up to date; see `Model.index`."""
    root = folder_of(images)
    keep = tempfile.TemporaryDirectory(prefix="dqe-index-") if output is None else None
    directory = _directory_of(output) if output is not None else Path(keep.name if keep else "")
    held = files.read_facts(directory)
    named = store_of(store) if store else ""
    if named and output is None:
        raise UserError("an index with a store needs a directory: name one as output.")
    if held is not None:
        _check_model(directory, held, model)
        named = named or held.store
    elif directory.is_dir() and any(directory.iterdir()) and not (directory / files.LOCK).exists():
        raise UserError(f"{directory} holds other files: name an empty or a new directory.")
    with files.locked(directory):
        listed = files.read_listing(directory)  # before anything is written: it may be damaged
        tokens, width = model.token_shape()
        facts = Facts(
            fingerprint=model.fingerprint,
            model=model.origin,
            step=model.step,
            attributes=model.attribute_names,
            tokens=tokens,
            width=width,
            images=str(root),
            store=named,
            features=_features_of(model, held, keep_features),
        )
        files.write_facts(directory, facts)
        report = update(model, root, directory, table=table, listed=listed)
        listing = files.read_listing(directory)
        assert listing is not None, "the update has written it"
        if named:
            engine = Engine(directory, facts)
            engine.sync(listing, Vectors(directory, facts))
            engine.close()
    return Index(directory, model, facts, listing, report, keep)


def _features_of(model: Model, held: Facts | None, keep: bool | None) -> Mapping[str, RowSpec]:
    """The features that an index keeps: as is asked, as it did before, or if they are small."""
    if keep is None and held is not None:
        keep = bool(held.features)
    if keep is False:
        return {}
    specs = model.reference_specs
    small = sum(spec.nbytes for spec in specs.values()) <= FEATURE_BYTES
    return specs if keep or small else {}


def open_index(directory: str | os.PathLike[str], *, model: Model | None = None) -> Index:
    """Opens an index for search.

    Args:
      directory: that `dqe-jax index` or `Model.index` wrote.
      model: that made it; None loads it from the path that the index knows.

    Raises:
      UserError: there is no index, or the model is another one.
    """
    place = _directory_of(directory)
    facts = files.read_facts(place)
    if facts is None:
        raise UserError(f"there is no index in {place}: make one with dqe-jax index.")
    listing = files.read_listing(place)
    if listing is None:
        raise UserError(f"the index {place} is not finished: run dqe-jax index again.")
    if model is None:
        try:
            model = load(facts.model)
        except UserError as error:
            raise UserError(
                f"the model of the index {place} cannot be loaded: {error} Name it by --model, or "
                "as model=..., if it has moved."
            ) from error
    _check_model(place, facts, model)
    return Index(place, model, facts, listing)


def _gone(id: str, error: UnreadableError) -> UserError:
    return UserError(f"the image {id!r} of the index {error}: index the folder again.")


def _name_of(image: Reference, number: int) -> str:
    return image.name if isinstance(image, Known) else photos.name_of(image, number)


def _directory_of(path: str | os.PathLike[str]) -> Path:
    if is_remote(path):
        raise UserError(f"{path}: an index lies on a disk of this machine; name a directory there.")
    return Path(path).expanduser().absolute()


def _check_model(directory: Path, facts: Facts, model: Model) -> None:
    if facts.fingerprint != model.fingerprint:
        raise UserError(
            f"the index {directory} was made by another model ({facts.model}, step {facts.step}, "
            f"fingerprint {facts.fingerprint[:8]}) than {model.origin}, step {model.step} "
            f"({model.fingerprint[:8]}): take that model, or make a new index."
        )


def _padded(rows: Sequence[Sequence[int]]) -> np.ndarray:
    """Ragged rows as int32 `[n, longest]`, padded with -1."""
    out = np.full((len(rows), max(map(len, rows), default=0)), -1, np.int32)
    for line, own in zip(out, rows):
        line[: len(own)] = own
    return out
