"""Features that come from outside the model: imported ones, by id, and those that encoders compute.

The config names sources (`config.model.features`). One is a set of imported features (`imports.py`)
or an encoder (`encoders.py`). Imported features may name their encoder: it then computes images or
texts that they lack. What an encoder computes is stored under its name, its version and its code,
one row for each content, as with the towers of a model.
"""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from absl import logging

from dqe_jax.config import RunConfig
from dqe_jax.distributed import processes
from dqe_jax.feature_store import keys as row_names
from dqe_jax.feature_store import shards as files
from dqe_jax.feature_store import tables, writing
from dqe_jax.feature_store.encoders import Encoder, names_encoder, open_encoder
from dqe_jax.feature_store.needs import Need
from dqe_jax.feature_store.shards import KEY_BYTES, RowSpec, Shard
from dqe_jax.feature_store.store import SHARD_BYTES, dtype_of
from dqe_jax.feature_store.tables import Part, Table
from dqe_jax.method.arrays import Params
from dqe_jax.models.given import GivenArray, GivenSizes, GivenSource, state_name
from dqe_jax.utils import progress
from dqe_jax.utils.ahead import read_ahead
from dqe_jax.utils.errors import UserError
from dqe_jax.utils.files import JsonObject, read_json

IMPORTED = "imported"  # what `store.json` of imported features says in place of a backbone
# Rows of a shard, at most: an encoder may take a second a row, and what is stored is not lost.
SHARD_ROWS = 1024
# Rows that features are standardized by.
SAMPLE = 4096


@dataclasses.dataclass(frozen=True)
class Opened:
    """A source that is opened.

    Attributes:
      name: as the config gives it.
      encoder: its name, "" if there is none.
      version: of the encoder, where it is the source.
      imported: directory of imported features, or None.
      specs: of its arrays.
    """

    name: str
    encoder: str
    version: str
    imported: Path | None
    specs: Mapping[str, RowSpec]

    def described(self) -> GivenSource:
        """What the model needs to know."""
        arrays = (GivenArray(n, s.shape, str(s.dtype)) for n, s in self.specs.items())
        return GivenSource(self.name, f"{self.encoder} {self.version}".strip(), tuple(arrays))


def given_sizes(config: RunConfig, root: Path) -> GivenSizes:
    """What the features of a config are.

    Args:
      config: of a run with the backbone "features".
      root: directory of all stores.

    Raises:
      UserError: none are named, or they are not found.
    """
    names = config.model.features
    if not names.images:
        raise UserError(
            "config.model.features.images is empty: name imported features, or an encoder as "
            "package.module:function."
        )
    for field, given in (("images", names.images), ("texts", names.texts)):
        if len(set(given)) < len(given):
            raise UserError(f"config.model.features.{field} names a source twice: {given}.")
    return GivenSizes(
        *(
            tuple(open_source(config, kind, name, root).described() for name in given)
            for kind, given in (("image", names.images), ("text", names.texts))
        )
    )


def open_source(config: RunConfig, kind: str, name: str, root: Path) -> Opened:
    """A source of features, by its name in a config.

    Args:
      config: of the run.
      kind: "image" or "text".
      name: of an encoder or of imported features.
      root: directory of all stores.

    Raises:
      UserError: there is no such encoder, or there are no such features.
    """
    if names_encoder(name):
        encoder = open_encoder(name)
        return Opened(name, name, encoder.version, None, _specs_of(config, kind, encoder, root))
    facts = _facts_in(root / name)
    if facts is None or facts.get("backbone") != IMPORTED:
        known = sorted(path.parent.name for path in root.glob(f"*/{writing.FACTS}"))
        known = [n for n in known if (_facts_in(root / n) or {}).get("backbone") == IMPORTED]
        raise UserError(
            f"config.model.features: there are no imported features {name!r} in {root}; there are "
            f"{', '.join(known) or 'none'}: import them with dqe-jax features, or name an encoder "
            "as package.module:function."
        )
    held, made_by = facts.get("kind"), facts.get("encoder")
    if not isinstance(held, str) or not isinstance(made_by, str):
        raise _damaged(root / name / writing.FACTS)
    if held != kind:
        raise UserError(
            f"config.model.features: {name!r} holds features of {held}s, not of {kind}s."
        )
    return Opened(name, made_by, "", root / name, _specs_in(facts))


class GivenStore:
    """The features of images, or of texts, from all sources that the config names."""

    def __init__(
        self,
        kind: str,
        config: RunConfig,
        sizes: GivenSizes,
        devices: Sequence[jax.Device],
        root: Path,
    ):
        """Opens the sources.

        Args:
          kind: "image" or "text".
          config: of the run.
          sizes: that the model takes.
          devices: of all processes.
          root: directory of all stores.

        Raises:
          UserError: a source is not found, or is another one than that of the model.
        """
        self.kind, self._config, self._devices, self._root = kind, config, list(devices), root
        self._sources = [open_source(config, kind, own.name, root) for own in sizes.of(kind)]
        for source, own in zip(self._sources, sizes.of(kind)):
            found = source.described()
            if found != own:
                raise UserError(
                    f"the features {own.name!r} are not those that the model was trained on: "
                    f"{_words(found)}, not {_words(own)}."
                )
        self._needs: list[Need] = []
        self._table: Table | None = None
        self._parts: list[Part] = []
        self.specs = {
            state_name(source.name, name): spec
            for source in self._sources
            for name, spec in source.specs.items()
        }

    @property
    def table(self) -> Table:
        """Where the rows lie."""
        assert self._table is not None, "the store is not filled yet"
        return self._table

    def add(self, needs: Sequence[Need]) -> None:
        """Registers rows, which `fill` then sees to."""
        self._needs += needs
        self._table = None

    def compute(self, params: Params) -> None:
        """Computes what encoders have not computed yet, and looks for what is imported.

        Args:
          params: are not needed.

        Raises:
          UserError: something is missing, an encoder fails, or the disk cannot be written.
        """
        del params
        self._locate()

    def fill(self, params: Params) -> None:
        """As `compute`, and puts the rows where a job reads them."""
        if self._table is not None:
            return
        began = time.time()
        del params
        parts, numbers = self._locate()
        self._parts = parts
        count = len(parts[0].rows)
        nbytes = count * sum(spec.nbytes for spec in self.specs.values())
        place = tables.choose_place(self._config.features.place, nbytes, self._devices)
        self._table = tables.make_table(place, parts, self._devices)
        for need, rows in zip(self._needs, numbers):
            need.rows = rows
        if processes.leads():
            where = {"device": "in the memory of the devices", "host": "in the host's memory"}
            logging.info(
                "Features of %s %ss (%.2f GB) from %s lie %s; this took %.0f s.",
                *(f"{count:,}", self.kind, nbytes / 1e9),
                ", ".join(source.name for source in self._sources),
                *(where.get(place, "on disk"), time.time() - began),
            )

    def moments(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Mean and standard deviation `[D]` of each array, by its name among the states.

        They are those of up to `SAMPLE` rows, evenly spread, of what was asked for first: the
        images, or the texts, of the training split.
        """
        rows = np.unique(self._needs[0].rows)
        rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), SAMPLE)).astype(np.int64)]
        found = {}
        for part in self._parts:
            for name, array in part.read(rows).items():
                x = array.astype(np.float64).reshape(-1, array.shape[-1])
                found[name] = (x.mean(0), x.std(0))
        return found

    def _locate(self) -> tuple[list[Part], list[np.ndarray]]:
        """The rows of each source, and the numbers of each need's rows among these."""
        rows = _Rows(self._needs)
        return [self._part(source, rows) for source in self._sources], rows.numbers

    def _part(self, source: Opened, rows: _Rows) -> Part:
        names = {name: state_name(source.name, name) for name in source.specs}
        at = np.full(len(rows.first), -1, np.int64)
        shards: list[Shard] = []
        if source.imported is not None:
            shards, _ = files.open_shards(source.imported, source.specs)
            plain = np.flatnonzero(rows.contents[:, -1] == 0)
            at[plain] = files.find_rows(shards, rows.ids[plain])
            rows.check_distinct(np.flatnonzero(at >= 0), source.name, self.kind)
        missing = np.flatnonzero(at < 0)
        if not processes.any_of(at < 0).any():
            return Part(shards, source.specs, at, names)
        if not source.encoder:
            raise self._missing(source, rows, missing)
        encoder = open_encoder(source.encoder)
        directory = self._root / _store_of(self._config, self.kind, encoder)
        computed = self._compute(directory, source, encoder, rows, missing)
        at[missing] = len_of(shards) + files.find_rows(computed, rows.contents[missing])
        return Part([*shards, *computed], source.specs, at, names)

    def _missing(self, source: Opened, rows: _Rows, missing: np.ndarray) -> UserError:
        names = [rows.name(row) for row in missing[:3]]
        shown = ", ".join(map(repr, names)) + (", ..." if len(missing) > len(names) else "")
        if (rows.contents[missing, -1] == 1).all():
            return UserError(
                f"config.data.augment is 'flip': {source.name!r} is imported and has no features "
                "of mirrored images; take 'none', or import with --encoder."
            )
        return UserError(
            f"the imported features {source.name!r} lack {len(missing):,} of {len(rows.first):,} "
            f"{self.kind}s that the data need ({shown}): import them all, or import with "
            "--encoder, which then computes what is missing."
        )

    def _compute(
        self, directory: Path, source: Opened, encoder: Encoder, rows: _Rows, wanted: np.ndarray
    ) -> list[Shard]:
        """The shards of an encoder's store; rows that they lack are computed first."""
        shards, _ = files.open_shards(directory, source.specs)
        keys = rows.contents[wanted]
        lacking = processes.any_of(files.find_rows(shards, keys) < 0)
        if not lacking.any():
            return shards
        with writing.open_for_writing(directory) as writes:
            if writes:
                shards, damaged = files.open_shards(directory, source.specs)
                files.remove_damaged(damaged)
                lacking = files.find_rows(shards, keys) < 0
                self._write(directory, source, encoder, rows, wanted[lacking], shards)
        return files.open_shards(directory, source.specs)[0]

    def _write(
        self,
        directory: Path,
        source: Opened,
        encoder: Encoder,
        rows: _Rows,
        wanted: np.ndarray,
        shards: Sequence[Shard],
    ) -> None:
        """Computes rows, shard by shard: what is written stays if the process is killed."""
        began, row_bytes = time.time(), sum(spec.nbytes for spec in source.specs.values())
        check_space(directory, len(wanted), row_bytes)
        facts = {"kind": self.kind, "backbone": encoder.name, **encoder.facts}
        writing.write_facts(directory, facts, source.specs)
        batch = min(self._config.eval.batch_size, 64)
        per_shard = max(1, min(SHARD_BYTES // row_bytes, SHARD_ROWS) // batch) * batch
        number, parts, start = files.next_number(shards), [], 0
        inputs = self._inputs(rows, wanted, batch)
        starts = range(0, len(wanted), batch)
        for at in progress.progress(starts, len(wanted), f"{encoder.name}, {self.kind}s", batch):
            end = min(at + batch, len(wanted))
            what = f"{self.kind} {rows.name(wanted[at])!r} and those after it"
            made = encoder(next(inputs), what)
            names = [rows.name(row) for row in wanted[at:end]]
            parts.append(_fitted(made, source, encoder, names))
            if (end % per_shard == 0) or end == len(wanted):
                arrays = {n: np.concatenate([part[n] for part in parts]) for n in source.specs}
                writing.write(directory, number, rows.contents[wanted[start:end]], arrays)
                number, parts, start = number + 1, [], end
        if processes.leads():
            logging.info(
                "%s has computed features of %s %ss in %.0f s. Store: %s",
                *(encoder.name, f"{len(wanted):,}", self.kind, time.time() - began, directory),
            )

    def _inputs(
        self, rows: _Rows, wanted: np.ndarray, batch: int
    ) -> Iterator[np.ndarray | list[str]]:
        """What the encoder takes, batch by batch; images are read by threads ahead."""
        chunks = [wanted[i : i + batch] for i in range(0, len(wanted), batch)]
        if self.kind == "text":
            return iter([[rows.name(row) for row in chunk] for chunk in chunks])

        def read(row: int) -> np.ndarray:
            need, at = rows.first[row]
            one = np.asarray(self._needs[need].read(int(at)))
            return one[:, ::-1] if self._needs[need].view else one

        threads = self._config.data.num_threads
        return read_ahead(lambda chunk: np.stack([read(row) for row in chunk]), chunks, threads)


class _Rows:
    """The distinct rows of several needs.

    Attributes:
      ids: keys of their ids, uint8 `[n, KEY_BYTES]`.
      contents: keys of their contents, uint8 `[n, KEY_BYTES]`.
      first: int64 `[n, 2]`, the first need and its row that has each.
      numbers: int64 `[n]` of each need, its rows' numbers.
    """

    def __init__(self, needs: Sequence[Need]):
        seen: dict[bytes, int] = {}
        first: list[tuple[int, int]] = []
        self.numbers: list[np.ndarray] = []
        for number, need in enumerate(needs):
            both = np.concatenate([id_keys(need.names), need.keys], axis=1)
            rows = np.zeros(len(both), np.int64)
            for row, key in enumerate(both):
                rows[row] = seen.setdefault(key.tobytes(), len(seen))
                if rows[row] == len(first):
                    first.append((number, row))
            self.numbers.append(rows)
        keys = np.frombuffer(b"".join(seen), np.uint8).reshape(-1, 2 * KEY_BYTES)
        self.ids, self.contents = keys[:, :KEY_BYTES], keys[:, KEY_BYTES:]
        self.first = np.array(first, np.int64).reshape(-1, 2)
        self._needs = needs

    def name(self, row: int) -> str:
        """The id of an image, or a text."""
        need, at = self.first[row]
        return self._needs[need].names[at]

    def check_distinct(self, rows: np.ndarray, source: str, kind: str) -> None:
        """Raises a `UserError` if an id that is looked up has several contents."""
        contents: dict[bytes, bytes] = {}
        for row in rows:
            own = self.contents[row].tobytes()
            if contents.setdefault(self.ids[row].tobytes(), own) != own:
                raise UserError(
                    f"the imported features {source!r} know {kind}s by id, and the data have two "
                    f"different {kind}s with id {self.name(row)!r}: name an encoder "
                    "in their place, as package.module:function."
                )


def id_keys(names: Sequence[str]) -> np.ndarray:
    """Keys of imported rows by their ids: uint8 `[n, KEY_BYTES]`."""
    digests = [hashlib.sha256(b"id:" + name.encode()).digest()[: KEY_BYTES - 1] for name in names]
    return row_names.row_keys(np.frombuffer(b"".join(digests), np.uint8).reshape(len(names), -1))


def len_of(shards: Sequence[Shard]) -> int:
    """How many rows some shards have."""
    return sum(len(shard.keys) for shard in shards)


def check_space(directory: Path, count: int, row_bytes: int) -> None:
    """Raises a `UserError` if a disk is too small for so many rows."""
    needed, free = count * row_bytes, shutil.disk_usage(directory).free
    if needed > free:
        raise UserError(
            f"{directory} has {free / 1e9:.2f} GB free: the features of {count:,} rows take "
            f"{needed / 1e9:.2f} GB; free space, or name another config.features.directory."
        )


def _store_of(config: RunConfig, kind: str, encoder: Encoder) -> str:
    """The name of the store of what an encoder makes of a config's images or texts."""
    facts: JsonObject = {**encoder.facts, "kind": kind, "dtype": str(dtype_of(config))}
    if kind == "image":
        data = config.data
        facts |= {"image_size": data.image_size, "preprocess": data.preprocess}
    return row_names.store_key(facts, {})


def _specs_of(config: RunConfig, kind: str, encoder: Encoder, root: Path) -> dict[str, RowSpec]:
    """What an encoder gives: as its store says, or else of one blank image or text."""
    facts = _facts_in(root / _store_of(config, kind, encoder))
    if facts is not None:
        return _specs_in(facts)
    side = config.data.image_size
    blank = np.full((1, side, side, 3), 255, np.uint8) if kind == "image" else ["a"]
    made = encoder(blank, f"a blank {kind}")
    dtype = np.dtype(dtype_of(config))
    return {name: RowSpec(array.shape[1:], dtype) for name, array in sorted(made.items())}


def _fitted(
    made: Mapping[str, np.ndarray], source: Opened, encoder: Encoder, names: Sequence[str]
) -> dict[str, np.ndarray]:
    """What an encoder gives of some images or texts, in the dtype of the source.

    Raises:
      UserError: it is not what the source holds, or not finite.
    """
    shapes = {name: array.shape[1:] for name, array in made.items()}
    wanted = {name: spec.shape for name, spec in source.specs.items()}
    if shapes != wanted:
        raise UserError(
            f"the encoder {encoder.name} gives {shapes} for {names[0]!r}, and the features "
            f"{source.name!r} are {wanted}: it is another encoder, or gives other shapes each time."
        )
    found = {name: made[name].astype(spec.dtype) for name, spec in source.specs.items()}
    for name, array in found.items():
        row = files.first_not_finite(array)
        if row is not None:
            raise UserError(
                f"the encoder {encoder.name} gives {name!r} of {names[row]!r} that "
                f"is not finite in {array.dtype}: mend the encoder, or take "
                "config.features.dtype='float32'."
            )
    return found


def _facts_in(directory: Path) -> JsonObject | None:
    """What `store.json` says, or None if there is none."""
    path = directory / writing.FACTS
    if not path.is_file():
        return None
    facts: JsonObject = read_json(path, dict, "delete the directory, and make it again")
    try:
        _specs_in(facts)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise _damaged(path) from error
    return facts


def _damaged(path: Path) -> UserError:
    return UserError(f"{path} is damaged: delete its directory, and make it again.")


def _specs_in(facts: JsonObject) -> dict[str, RowSpec]:
    return {n: RowSpec.of(a["shape"], a["dtype"]) for n, a in facts["arrays"].items()}


def _words(source: GivenSource) -> str:
    arrays = ", ".join(f"{a.name} {list(a.shape)} {a.dtype}" for a in source.arrays)
    return f"{arrays} of {source.origin or 'an encoder that is not named'}"
