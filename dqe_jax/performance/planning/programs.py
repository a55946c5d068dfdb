"""The programs of a config with the shapes of what they take: nothing is placed or computed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import cast

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from dqe_jax.config import RunConfig
from dqe_jax.data.datasets import expected_shape
from dqe_jax.data.packing import check_parts
from dqe_jax.distributed import mesh
from dqe_jax.embedding.encoders import encoders
from dqe_jax.feature_store.features import sizes_of, states_spec, stored_kinds
from dqe_jax.method.arrays import Array, Tree
from dqe_jax.method.batch import Batch, MinedNegatives
from dqe_jax.method.mining import Bank, MiningRule
from dqe_jax.models import setup
from dqe_jax.models.build import DTYPES, build_model
from dqe_jax.models.features import StoredText
from dqe_jax.performance.planning.stores import Counts, Kind, Machines, Stored, kind_of, place_all
from dqe_jax.training import bank_programs
from dqe_jax.training.accumulate import make_accumulation
from dqe_jax.training.state import TrainState, make_optimizer
from dqe_jax.training.step import batch_spec, make_step, uses_bank

# Images of a training gallery of unknown size.
OTHER_GALLERY = 20_000
# Queries mined by one call at a refresh.
MINED_AT_ONCE = 1024
UNKNOWN = Machines()
NAMES = ("step", "bank step", "bank refresh", "mining", "gallery embedding")


@dataclasses.dataclass(frozen=True)
class Program:
    """A mapped program, ready to be lowered.

    Attributes:
      name: one of `NAMES`.
      mapped: of `mesh.pmap`.
      arguments: shapes; those that are sharded have a leading axis of devices.
      inputs: bytes a device of each kind of argument, without padding.
      resident: bytes a device of what lies there meanwhile and is no argument.
      queries: training queries, or images, that one call takes on all devices.
    """

    name: str
    mapped: mesh.Program[..., object]
    arguments: tuple[Tree, ...]
    inputs: dict[str, int]
    resident: int
    queries: int


def size_of(tree: Tree) -> int:
    """Bytes of all arrays of a tree of shapes."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def make_programs(
    config: RunConfig,
    devices: Sequence[jax.Device],
    *,
    counts: Counts,
    vocabulary: int,
    names: Sequence[str] = NAMES,
    machines: Machines = UNKNOWN,
) -> tuple[list[Program], tuple[Stored, ...]]:
    """The programs that a run of a config compiles, in the order of `NAMES`, and what it stores.

    Args:
      config: of a run, whose batch divides by the devices.
      devices: of a slice.
      counts: of the data set.
      vocabulary: words of the tiny backbone.
      names: those that are wanted; what the config does not run is left out.
      machines: that the devices are of.

    Returns:
      The programs, and what is stored of frozen towers.

    Raises:
      UserError: the model cannot be built.
    """
    maker = _Maker(config, devices, vocabulary)
    bank = maker.bank(counts.images) if uses_bank(config.negatives) else None
    made = {"step": maker.step, "gallery embedding": lambda: maker.gallery_embedding(bank)}
    if bank is not None:
        made["bank step"] = lambda: maker.bank_step(bank)
        made["bank refresh"] = lambda: maker.bank_refresh(bank)
        if config.negatives.mining == "refresh":
            made["mining"] = lambda: maker.mining(bank)
    programs = [made[name]() for name in NAMES if name in names and name in made]
    stored = maker.stored(counts, bank, machines)
    each = sum(one.of_device for one in stored if one.place == "device")
    return [dataclasses.replace(p, resident=p.resident + each) for p in programs], stored


def _spec(dtype: DTypeLike, *shape: int) -> Array:
    """What stands for an array of this shape."""
    return cast(Array, jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)))


class _Maker:
    """Makes the programs of a config over the devices of a slice."""

    def __init__(self, config: RunConfig, devices: Sequence[jax.Device], vocabulary: int):
        pretrained = setup.describe_weights(config.model, config.data)
        self.config, self.devices, self.num_devices = config, list(devices), len(devices)
        self.model = build_model(
            config.model,
            vocab_size=vocabulary,
            max_length=config.data.max_length,
            image_size=config.data.image_size,
            sizes=sizes_of(config, pretrained),
        )
        self.encode_gallery = encoders(self.model)[1]
        params = setup.param_shapes(self.model, config.model, config.data)
        self.optimizer = make_optimizer(config, params, self.num_devices)
        moments = self.optimizer.shapes
        self.state = TrainState(_spec(jnp.int32), params, moments, self.optimizer.average_shapes)
        self.weights = {"parameters": size_of(params)}
        self.moments = {"optimiser": self.optimizer.bytes_of_device()}
        shape = expected_shape(config.data.dataset, config.batch)
        check_parts(shape, self.num_devices, config.batch.chunks)
        plain = jax.tree.map(
            lambda x: self._sharded(x.dtype, *x.shape),
            batch_spec(config, shape.part(self.num_devices)),
        )
        self.batch: Batch = dataclasses.replace(
            plain,
            reference_image=self._stored("image", plain.reference_image),
            target_image=self._stored("image", plain.target_image),
            text=self._stored("text", plain.text),
        )

    def _sharded(self, dtype: DTypeLike, *shape: int) -> Array:
        """With a leading axis of devices."""
        return _spec(dtype, self.num_devices, *shape)

    def _stored(self, kind: str, inputs: Tree) -> Tree:
        """What stands for images or texts of these shapes in a batch."""
        return states_spec(self.config, self.model, self.state.params, kind, inputs)

    def stored(self, counts: Counts, bank: Bank | None, machines: Machines) -> tuple[Stored, ...]:
        """What is stored of a data set; nothing of towers that train."""
        text, kinds = self.batch.text, []
        stored = stored_kinds(self.config, self.model)
        if "image" in stored:
            images = (self.batch.reference_image, self.batch.target_image)
            kinds.append(self._kind("images", counts, self._images(1), images))
        if "text" in stored:
            assert isinstance(text, StoredText)
            one = jax.tree.map(lambda x: self._sharded(x.dtype, *x.shape[2:]), text.states)
            kinds.append(self._kind("texts", counts, one, text.states))
        held = sum((self.weights | self.moments | self._of_bank(bank)).values())
        return place_all(kinds, self.config.features.place, self.num_devices, machines, held)

    def _kind(self, name: str, counts: Counts, one: Tree, taken: Tree) -> Kind:
        """Rows of a tower: one on each device, and what a step takes on all devices."""
        row_bytes, read = (size_of(tree) // self.num_devices for tree in (one, taken))
        return kind_of(self.config, name, counts, row_bytes=row_bytes, read=read)

    def _images(self, count: int) -> Tree:
        side = self.config.data.image_size
        return self._stored("image", self._sharded(jnp.uint8, count, side, side, 3))

    def _step(self, name: str, bank: Bank | None) -> Program:
        config, batch = self.config, self.batch
        inputs = self.weights | self.moments
        if bank is not None:
            inputs |= self._of_bank(bank)
            if config.negatives.mining == "refresh":
                drawn = (batch.query.shape[1], config.negatives.per_query)
                rows, filled = self._sharded(jnp.int32, *drawn), self._sharded(bool, *drawn)
                batch = dataclasses.replace(batch, mined=MinedNegatives(rows, filled))
        inputs |= {"batch": size_of(batch) // self.num_devices}
        stop, held = self._sharded(jnp.int32, 1), [] if bank is None else [bank]
        sections = (config, self.model, self.optimizer, self.devices)
        if config.batch.accumulate == 1:
            step = make_step(*sections, bank=bank is not None)
            taken = (self.state, batch, stop, *held)
            return Program(name, step, taken, inputs, 0, batch.query.size)
        # One batch of several: the update, which follows them, needs less.
        parts = make_accumulation(*sections, bank=bank is not None)
        sums = jax.eval_shape(parts.zeros, self.state.params, stop)
        inputs = {k: x for k, x in inputs.items() if k not in self.moments}
        inputs |= {"batch": inputs["batch"] + size_of(sums) // self.num_devices}
        index = _spec(jnp.int32)
        added = (sums, self.state.step, self.state.params, batch, index, *held)
        resident = sum(self.moments.values())
        return Program(name, parts.add, added, inputs, resident, batch.query.size)

    def _of_bank(self, bank: Bank | None) -> dict[str, int]:
        return {} if bank is None else {"bank": size_of(bank) // self.num_devices}

    def bank(self, gallery: int) -> Bank:
        """Shapes of the bank."""
        one = jax.tree.map(lambda x: _spec(x.dtype, *x.shape[1:]), self._images(1))
        tokens = jax.eval_shape(self.encode_gallery, self.state.params, one).shape[1:]
        rows = bank_programs.rows_of_device(gallery, self.num_devices)
        dtype = DTYPES[self.config.negatives.bank_dtype]
        return Bank(
            self._sharded(dtype, rows, *tokens),
            self._sharded(jnp.int32, rows),
        )

    def step(self) -> Program:
        """The step of training without a bank."""
        return self._step("step", None)

    def bank_step(self, bank: Bank) -> Program:
        """The step of training with a bank."""
        return self._step("bank step", bank)

    def bank_refresh(self, bank: Bank) -> Program:
        """Embeds some rows of the bank."""
        count = bank_programs.rows_per_call(self.config.eval.batch_size, self.num_devices)
        images = self._images(count)
        taken = (self.state.params, images, _spec(jnp.int32), bank.tokens)
        inputs = self.weights | self._of_bank(bank)
        inputs |= {"batch": size_of(images) // self.num_devices}
        fill = bank_programs.make_fill(self.encode_gallery, bank.tokens.dtype, self.devices)
        resident = sum(self.moments.values())
        return Program("bank refresh", fill, taken, inputs, resident, count * self.num_devices)

    def mining(self, bank: Bank) -> Program:
        """Mines the bank for some queries, which are the same on all devices."""
        count, known = MINED_AT_ONCE, self.batch.known_positives.shape[-1]
        queries = (
            _spec(jnp.float32, count, bank.tokens.shape[-1]),
            _spec(jnp.int32, count),
            _spec(jnp.int32, count, known),
            _spec(jnp.int32, count),
        )
        taken = (jax.eval_shape(lambda: jax.random.key(0)), *queries, bank)
        inputs = self._of_bank(bank) | {"batch": size_of(queries)}
        resident = sum((self.weights | self.moments).values())
        negatives = self.config.negatives
        rule = MiningRule.named(negatives, negatives.rule)
        mine = bank_programs.make_mine(rule, self.devices)
        return Program("mining", mine, taken, inputs, resident, count)

    def gallery_embedding(self, bank: Bank | None) -> Program:
        """Embeds images in evaluation, while training waits."""
        count = -(-self.config.eval.batch_size // self.num_devices)
        embed = mesh.gather_rows(self.encode_gallery, columns=1, devices=self.devices)
        taken = (self.state.params, self._images(count))
        inputs = self.weights | {"batch": size_of(taken[1]) // self.num_devices}
        resident = sum((self.moments | self._of_bank(bank)).values())
        if self.optimizer.axes is not None:  # of a sharded average the whole is made
            resident += size_of(self.optimizer.average)
        return Program(
            "gallery embedding", embed, taken, inputs, resident, count * self.num_devices
        )
