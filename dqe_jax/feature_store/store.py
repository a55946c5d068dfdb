"""The store of one tower: computes what is missing, and puts the rows where a job reads them."""

from __future__ import annotations

import functools
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax.traverse_util import flatten_dict, unflatten_dict

from dqe_jax.config import RunConfig
from dqe_jax.distributed import mesh, processes
from dqe_jax.feature_store import keys as row_names
from dqe_jax.feature_store import shards as files
from dqe_jax.feature_store import tables, writing
from dqe_jax.feature_store.needs import Need, distinct
from dqe_jax.feature_store.shards import RowSpec
from dqe_jax.feature_store.tables import Table
from dqe_jax.method.arrays import Array, Params
from dqe_jax.models import freeze
from dqe_jax.models.build import DTYPES, parts_of
from dqe_jax.models.dqe import DQE
from dqe_jax.utils import progress
from dqe_jax.utils.ahead import read_ahead
from dqe_jax.utils.errors import UserError
from dqe_jax.utils.files import JsonObject

# Fields of a backbone on which its towers depend beside their parameters.
FIELDS = {
    "tiny": ("pixel_mean", "pixel_std", "patch_size", "cell_size", "heads"),
    "clip": ("features",),
    "siglip": ("features",),
    "dino": ("features",),
    "blip2": (),
}
# Bytes of a shard, about.
SHARD_BYTES = 64 * 2**20


class NoRoomError(UserError):
    """A disk is too small for a store or cannot be written; all processes raise it together."""


class Store:
    """The store of one tower.

    Attributes:
      kind: "image" or "text".
      specs: of its arrays, once it is filled.
      given_up: whether there is no room for it and the tower is computed in each step.
    """

    def __init__(
        self,
        kind: str,
        config: RunConfig,
        model: DQE,
        devices: Sequence[jax.Device],
        root: Path,
    ):
        self.kind, self._config, self._devices, self._root = kind, config, list(devices), root
        self._needs: list[Need] = []
        self._filled = ""
        self._table: Table | None = None
        self.given_up = False
        self._dtype = dtype_of(config)
        self._states = states_of(model, kind, self._dtype)
        self._parts = parts_of(config.model.backbone)
        self._towers = model.backbone.TOWERS[kind]
        self._facts = _facts(kind, config, model, self._dtype)
        self.specs: dict[str, RowSpec] = {}

    @property
    def table(self) -> Table:
        """Where the rows lie."""
        assert self._table is not None, "the store is not filled yet"
        return self._table

    def add(self, needs: Sequence[Need]) -> None:
        """Registers rows, which `fill` then sees to."""
        self._needs += needs
        self._filled = ""

    def compute(self, params: Params) -> None:
        """As `Features.compute` says, for this tower."""
        began = time.time()
        directory, keys, computed = self._ensure(self._name_of(params), params)
        nbytes = len(keys) * sum(spec.nbytes for spec in self.specs.values())
        if processes.leads():
            logging.info(
                "What the frozen %s tower makes of %s (%.2f GB, %s) is stored; %s of them were "
                "computed now, in %.0f s. Store: %s",
                *(self.kind, f"{len(keys):,} {self.kind}s", nbytes / 1e9, self._dtype),
                *(f"{computed:,}", time.time() - began, directory),
            )

    def _name_of(self, params: Params) -> str:
        return row_names.store_key(self._facts, self._tower(params))

    def _ensure(self, name: str, params: Params) -> tuple[Path, np.ndarray, int]:
        """Computes what is missing; the store's directory, all keys, and how many it were."""
        directory = self._root / name
        self.specs = self._row_specs(params)
        keys, first = distinct(self._needs)
        return directory, keys, self._compute(directory, params, keys, first)

    def fill(self, params: Params) -> None:
        """As `Features.fill` says, for this tower."""
        began = time.time()
        name = self._name_of(params)
        if name == self._filled:
            return
        try:
            directory, keys, computed = self._ensure(name, params)
        except NoRoomError as error:
            if self._config.features.place != "auto":
                raise
            self.given_up = True
            if processes.leads():
                text = "The frozen %s tower is computed in each step, which takes longer: %s"
                logging.warning(text, self.kind, error)
            return
        self.given_up = False
        shards, _ = files.open_shards(directory, self.specs)
        at = files.find_rows(shards, keys)
        if (at < 0).any():
            raise UserError(f"{directory} changes while it is read: run the same command again.")
        nbytes = len(keys) * sum(spec.nbytes for spec in self.specs.values())
        place = tables.choose_place(self._config.features.place, nbytes, self._devices)
        part = tables.Part(shards, self.specs, at, {name: name for name in self.specs})
        self._table = tables.make_table(place, [part], self._devices)
        number = {key.tobytes(): i for i, key in enumerate(keys)}
        for need in self._needs:
            need.rows = np.array([number[key.tobytes()] for key in need.keys], np.int64)
        self._filled = directory.name
        if processes.leads():
            what = {"image": "images", "text": "texts"}[self.kind]
            where = {"device": "in the memory of the devices", "host": "in the host's memory"}
            logging.info(
                "The frozen %s tower is not computed in each step: what it makes of %s %s "
                "(%.2f GB, %s) lies %s; %s of them were computed now, in %.0f s. Store: %s",
                *(self.kind, f"{len(keys):,}", what, nbytes / 1e9, self._dtype),
                *(where.get(place, "on disk"), f"{computed:,}", time.time() - began, directory),
            )

    def _tower(self, params: Params) -> Params:
        """The parameters of the tower, as NumPy arrays."""
        flat = flatten_dict(params, sep="/")
        own = {p: x for p, x in flat.items() if freeze.part_of(p, self._parts) in self._towers}
        return unflatten_dict({path: np.asarray(x) for path, x in own.items()}, sep="/")

    def _row_specs(self, params: Params) -> dict[str, RowSpec]:
        need = self._needs[0]
        one = np.asarray(need.read(0))[None]
        made = jax.eval_shape(self._states, params, one)
        return {name: RowSpec(x.shape[1:], np.dtype(x.dtype)) for name, x in made.items()}

    def _compute(self, directory: Path, params: Params, keys: np.ndarray, first: np.ndarray) -> int:
        """Computes and stores the rows that are missing; how many these were."""
        shards, _ = files.open_shards(directory, self.specs)
        if not processes.any_of(files.find_rows(shards, keys) < 0).any():
            return 0  # a store that cannot be written will do
        self._check_writable(directory)
        with writing.open_for_writing(directory) as writes:
            shards, damaged = files.open_shards(directory, self.specs)
            if writes:
                files.remove_damaged(damaged)
            rows = np.flatnonzero(processes.any_of(files.find_rows(shards, keys) < 0))
            if not len(rows):  # another run has computed them meanwhile
                return 0
            self._check_space(directory, len(rows), writes)
            if writes:
                writing.write_facts(directory, self._facts, self.specs)
            self._compute_rows(
                directory if writes else None,
                files.next_number(shards),
                params,
                keys[rows],
                first[rows],
            )
            return len(rows)

    def _check_writable(self, directory: Path) -> None:
        """Raises `NoRoomError` if any process cannot write there; all call this together."""
        refused = "another process cannot write features to its disk: look at its log."
        try:
            writing.make(directory)
            able = True
        except UserError as error:
            refused, able = str(error), False
        if not processes.all_agree(able):
            raise NoRoomError(refused)

    def _check_space(self, directory: Path, count: int, writes: bool) -> None:
        """Raises `NoRoomError` if a disk that is written is too small; all call this together."""
        needed = count * sum(spec.nbytes for spec in self.specs.values())
        free = shutil.disk_usage(directory).free
        if not processes.all_agree(not writes or needed <= free):
            raise NoRoomError(
                f"{directory} has {free / 1e9:.2f} GB free: the features of {count:,} rows take "
                f"{needed / 1e9:.2f} GB; free space, name another config.features.directory, or "
                "take config.features.dtype='bfloat16' or config.features.place='off'."
            )

    def _compute_rows(
        self,
        directory: Path | None,
        number: int,
        params: Params,
        keys: np.ndarray,
        first: np.ndarray,
    ) -> None:
        """Computes rows and writes their shards; `first` says which need and row each is of."""
        devices, size = self._devices, self._config.eval.batch_size
        batch = -(-size // len(devices)) * len(devices)
        row_bytes = sum(spec.nbytes for spec in self.specs.values())
        per_shard = max(1, SHARD_BYTES // (row_bytes * batch)) * batch
        run = mesh.map_rows(self._states, columns=1, devices=devices)
        inputs = self._inputs(first, batch)
        parts: list[dict[str, Array]] = []
        what = {"image": "Computing features of images", "text": "Computing features of texts"}
        starts = range(0, len(first), batch)
        for row in progress.progress(starts, len(first), what[self.kind], batch):
            parts.append(run(params, next(inputs)))
            end = min(row + batch, len(first))
            if end % per_shard and end < len(first):
                continue
            start = (end - 1) // per_shard * per_shard
            arrays = {
                name: np.concatenate([part[name] for part in parts])[: end - start]
                for name in self.specs
            }
            parts = []
            names = [self._needs[n].names[r] for n, r in first[start:end]]
            files.check_finite(arrays, names)
            if directory is not None:
                writing.write(directory, number, keys[start:end], arrays)
            number += 1

    def _inputs(self, first: np.ndarray, batch: int) -> Iterator[np.ndarray]:
        """The inputs of this process's devices, batch by batch, read by threads ahead."""
        padded = mesh.pad_rows(first, batch)
        own = mesh.own_rows(padded, batch, self._devices)
        size = batch // len(self._devices) * mesh.count_own(self._devices)

        def read(at: tuple[int, int]) -> np.ndarray:
            need = self._needs[at[0]]
            one = np.asarray(need.read(int(at[1])))
            return one[:, ::-1] if need.view else one

        chunks = [own[i : i + size] for i in range(0, len(own), size)]
        threads = self._config.data.num_threads
        return read_ahead(lambda chunk: np.stack([read(at) for at in chunk]), chunks, threads)


def dtype_of(config: RunConfig) -> np.dtype:
    """The dtype of stored rows."""
    dtype = config.features.dtype
    return np.dtype(DTYPES[config.model.dtype if dtype == "auto" else dtype])


@functools.lru_cache(mesh.REMEMBERED)
def states_of(
    model: DQE, kind: str, dtype: np.dtype
) -> Callable[[Params, Array], dict[str, Array]]:
    """The tower as a function of parameters and of images or token ids."""

    def states(params: Params, inputs: Array) -> dict[str, Array]:
        made = model.apply({"params": params}, inputs, method=f"{kind}_states")
        assert isinstance(made, Mapping)
        return {name: jnp.asarray(x).astype(dtype) for name, x in made.items()}

    return states


def _facts(kind: str, config: RunConfig, model: DQE, dtype: np.dtype) -> JsonObject:
    """All that decides what a tower makes, beside its parameters and the content."""
    backbone = config.model.backbone
    fields, sizes = getattr(config.model, backbone), getattr(model.backbone, "sizes", None)
    facts: JsonObject = {
        "kind": kind,
        "backbone": backbone,
        "fields": {name: getattr(fields, name) for name in FIELDS[backbone]},
        "compute": config.model.dtype,
        "dtype": str(dtype),
    }
    if kind == "image":
        if model.upper_layers:
            facts["upper_layers"] = model.upper_layers
        data = config.data
        facts |= {"image_size": data.image_size, "preprocess": data.preprocess}
    # A vision tower does not depend on the sizes of what follows it.
    return facts | {"sizes": repr(getattr(sizes, "vision", sizes) if kind == "image" else sizes)}
