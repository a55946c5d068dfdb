"""Times the training step of a config on random data, beside simpler baselines in the same process.

Rounds take turns among the variants of a step, so that a busy machine slows all alike; a variant's
time is its median round. FLOP are those of XLA's cost analysis of the step as it is written: before
it is optimised, without recomputation, each layer counted. Their share of what one large matrix
product reaches in the same dtype and the same run is the MFU (model FLOP utilisation).
"""

from __future__ import annotations

import dataclasses
import functools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.typing import DTypeLike

from dqe_jax.config import AnyConfig, RunConfig, check_batch
from dqe_jax.data.datasets import expected_shape
from dqe_jax.data.packing import check_parts
from dqe_jax.distributed import mesh
from dqe_jax.feature_store.features import given_kinds, sizes_of, states_spec, stored_kinds
from dqe_jax.method.arrays import Params, Tree
from dqe_jax.method.batch import Batch
from dqe_jax.method.mining import Bank
from dqe_jax.models import setup
from dqe_jax.models.build import DTYPES, build_model
from dqe_jax.models.clip import ClipSizes
from dqe_jax.models.dino import DinoSizes
from dqe_jax.models.dqe import DQE
from dqe_jax.models.features import StoredText
from dqe_jax.models.given import GivenSizes
from dqe_jax.models.weights.sizes import Sizes
from dqe_jax.performance import made_bank, records
from dqe_jax.performance.records import Seconds, Spread
from dqe_jax.training import state as states
from dqe_jax.training.state import TrainState
from dqe_jax.training.step import batch_spec, make_step, uses_bank
from dqe_jax.utils.errors import UserError
from dqe_jax.utils.files import JsonObject
from dqe_jax.utils.text_table import text_table

VOCABULARY = 100
BASELINE = "InfoNCE"
# What each variant changes of the config.
VARIANTS: dict[str, dict[str, object]] = {
    "config": {},
    "no mined negatives": {"negatives.rule": "in_batch"},
    "no attribute weights": {"model.attributes.enabled": False},
    BASELINE: {"negatives.rule": "in_batch", "model.attributes.enabled": False},
}
# Timed beside them where the output of a frozen tower is stored.
WITHOUT_STORE = "towers in each step"
# The step whose FLOP are counted: a loop would count as one pass, recomputation as more work, and
# cuDNN's attention not at all.
COUNTED: dict[str, object] = {
    "model.scan_layers": False,
    "model.remat": False,
    "model.attention": "xla",
    "batch.chunks": 1,
}


@dataclasses.dataclass(frozen=True)
class FirstStep:
    """Seconds until a first step has been taken.

    Attributes:
      started: from the start of the process to that of the benchmark: Python, imports, the config.
        None in a program that has done other things before.
      building: the model, its parameters, the optimiser and a batch.
      compiling: tracing and compiling, or finding the program in the cache.
      running: the step.
    """

    started: float | None
    building: float
    compiling: float
    running: float


@dataclasses.dataclass(frozen=True)
class StepTime:
    """What a step takes.

    Attributes:
      spread: seconds of one step, over the rounds.
      flop: of one step, on all devices.
      memory: bytes of a device that the program needs, by XLA's memory analysis.
      first: how long it took to the first step.
    """

    spread: Spread
    flop: float
    memory: int
    first: FirstStep

    @property
    def seconds(self) -> float:
        """Of one step, in the median round."""
        return self.spread.median


@dataclasses.dataclass(frozen=True)
class StepReport:
    """What `benchmark_step` measured.

    Attributes:
      config: its name; "" if it has none.
      settings: what decides the figures, of the config.
      devices: that were used, in words.
      num_devices: how many.
      platform: of them, "cpu", "gpu" or "tpu".
      references: slots of references of a batch, over all devices.
      queries: rows of queries of a batch.
      ceiling: FLOP a second of one device in a large matrix product.
      times: by variant.
      device_peak: the most bytes that a device has held in this process, where devices count them.
    """

    config: str
    settings: JsonObject
    devices: str
    num_devices: int
    platform: str
    references: int
    queries: int
    ceiling: float
    times: Mapping[str, StepTime]
    device_peak: int | None

    def mfu(self, name: str) -> float:
        """The share of the ceiling that a variant reaches."""
        one = self.times[name]
        return one.flop / one.seconds / (self.ceiling * self.num_devices)

    def as_json(self) -> JsonObject:
        """All figures, those that follow from others too."""
        content = dataclasses.asdict(self)
        for name, one in self.times.items():
            content["times"][name] |= {
                "examples_per_second": self.queries / one.seconds,
                "flop_per_second": one.flop / one.seconds,
                "mfu": self.mfu(name),
            }
        return content


def benchmark_step(
    config: AnyConfig,
    *,
    rounds: int = 10,
    steps: int = 3,
    names: Sequence[str] = (),
    tower_layers: int = 0,
    bank_images: int = 0,
    trace: str | os.PathLike[str] | None = None,
    label: str = "",
    started: float | None = None,
) -> StepReport:
    """Times variants of a step on the devices of the config, and logs a table.

    Where a frozen tower is stored, a step that computes it is timed too (`WITHOUT_STORE`).

    Args:
      config: of a run; it needs no data and no weights.
      rounds: over the variants, at least 1.
      steps: of a variant in a round, at least 1.
      names: of `VARIANTS`, or `WITHOUT_STORE`; none for all. A variant of other parameters holds a
        state of its own.
      tower_layers: of the vision tower of a pretrained backbone, which is cut or repeated to them;
        0 for those that it has.
      bank_images: of the bank, if the config mines from one; 0 for those of the published gallery.
      trace: directory for a profile of a few steps of the first variant, taken after the rounds.
      label: the config's name, for the report.
      started: seconds in which the process came here, for `FirstStep`.

    Raises:
      UserError: the config is not sound, or it has no such variant.
    """
    config = RunConfig.of(config)
    devices = mesh.devices_of(config.num_devices)
    shape = check(config, devices)
    variants = dict(VARIANTS)
    model = model_of(config, tower_layers)
    if set(stored_kinds(config, model)) - set(given_kinds(model)):
        variants[WITHOUT_STORE] = {"features.place": "off"}
    unknown = [name for name in names if name not in variants]
    if unknown:
        raise UserError(f"--variants={unknown[0]}: give some of {', '.join(variants)}.")
    maker = Maker(devices, tower_layers, started, bank_images)
    runners = {
        name: maker.make(config.with_changes(changes))
        for name, changes in variants.items()
        if name in (names or variants)
    }
    seconds = in_turns({name: runner.run for name, runner in runners.items()}, rounds, steps)
    report = StepReport(
        config=label,
        settings=settings_of(config, tower_layers),
        devices=f"{len(devices)} x {devices[0].device_kind}",
        num_devices=len(devices),
        platform=devices[0].platform,
        references=shape.references,
        queries=shape.queries,
        ceiling=ceiling_of(config, devices),
        times={name: runner.time(seconds[name]) for name, runner in runners.items()},
        device_peak=records.device_peak(devices),
    )
    logging.info("%s", table(report))
    if trace is not None:
        write_trace(trace, next(iter(runners.values())).run, steps)
    return report


def check(config: RunConfig, devices: Sequence[jax.Device]) -> Any:
    """The shape of the batches of a config that can run on the devices; raises a `UserError`."""
    check_batch(config, len(devices))
    shape = expected_shape(config.data.dataset, config.batch)
    check_parts(shape, len(devices), config.batch.chunks)
    return shape


def in_turns(
    runs: Mapping[str, Callable[[int], None]], rounds: int, steps: int
) -> dict[str, list[Seconds]]:
    """What one step takes, in each round: all take turns."""
    seconds: dict[str, list[Seconds]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            seconds[name].append(records.time_of(functools.partial(run, steps), steps))
    return seconds


def write_trace(directory: str | os.PathLike[str], run: Callable[[int], None], steps: int) -> None:
    """Writes a profile of some steps, for TensorBoard and, as `perfetto_trace.json.gz`, Perfetto.

    Raises:
      UserError: it cannot be written.
    """
    try:
        with jax.profiler.trace(os.fspath(directory), create_perfetto_trace=True):
            run(steps)
    except OSError as error:
        raise UserError(
            f"--trace={os.fspath(directory)} cannot be written ({error.strerror}); name a "
            "directory that can."
        ) from error
    logging.info(
        "A profile of %d steps is in %s: see it by `tensorboard --logdir` with "
        "tensorboard-plugin-profile, or open its perfetto_trace.json.gz at ui.perfetto.dev.",
        *(steps, os.fspath(directory)),
    )


def random_batch(config: RunConfig, model: DQE, params: Params) -> Batch:
    """A batch of random images and texts, or of what frozen towers make of some; ids are distinct.

    Args:
      config: of a run.
      model: of the config.
      params: shapes of its parameters.
    """
    rng, shape = np.random.default_rng(0), expected_shape(config.data.dataset, config.batch)
    spec, (rows, slots) = batch_spec(config, shape), shape.of_unit
    # Units are all alike: their rows are spread over their slots as evenly as can be.
    slot = np.arange(shape.units)[:, None] * slots + np.arange(rows) * slots // rows

    def below(name: str, high: int) -> np.ndarray:
        array = getattr(spec, name)
        return rng.integers(0, high, array.shape).astype(array.dtype)

    def count(name: str, first: int = 0) -> np.ndarray:
        array = getattr(spec, name)
        return np.arange(first, first + array.size, dtype=array.dtype).reshape(array.shape)

    def stored(kind: str, inputs: np.ndarray) -> Tree:
        """Random states in place of inputs, where a run would look them up."""
        shape = jax.ShapeDtypeStruct(inputs.shape, inputs.dtype)
        wanted = states_spec(config, model, params, kind, shape)
        if wanted is shape:
            return inputs
        states = jax.tree.map(
            lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype),
            wanted.states if kind == "text" else wanted,
        )
        return StoredText(inputs, states) if kind == "text" else states

    target_id = count("target_id", shape.references)
    # The target is known to be positive, and nothing else.
    known = np.full(spec.known_positives.shape, -1, spec.known_positives.dtype)
    known[:, 0] = target_id
    return Batch(
        reference_image=stored("image", below("reference_image", 256)),
        reference_id=count("reference_id"),
        reference_mask=np.ones(shape.references, bool),
        reference=None if shape.even else slot.ravel().astype(np.int32),
        query=count("query"),
        text=stored("text", random_texts(rng, shape.queries, config.data.max_length, model)),
        target_image=stored("image", below("target_image", 256)),
        target_id=target_id,
        target_row=count("target_row"),
        known_positives=known,
        relevant=count("relevant"),
        mentions=below("mentions", 2),
        query_mask=below("query_mask", 1) == 0,
    )


def random_texts(rng: np.random.Generator, count: int, length: int, model: DQE) -> np.ndarray:
    """Token ids int32 `[count, length]` of texts of half to all of the length, padded with 0."""
    sizes = getattr(model.backbone, "sizes", None)
    words = min(getattr(sizes, "vocab_size", VOCABULARY), VOCABULARY)
    ids = rng.integers(1, words - 1, (count, length)).astype(np.int32)
    last = rng.integers((length - 1) // 2, length, count)
    ids[np.arange(length) > last[:, None]] = 0
    sizes = sizes.text if isinstance(sizes, DinoSizes) else sizes
    if isinstance(sizes, ClipSizes):
        ids[np.arange(count), last] = sizes.end_id
    return ids


@dataclasses.dataclass
class Runner:
    """A compiled step with its batch.

    Attributes:
      compiled: the program.
      batch: that it takes.
      stop: likewise.
      bank: likewise, where negatives are mined from one.
      holder: the state, shared with other steps of the same parameters: each changes it.
      flop: of a step, on all devices.
      first: how long it took to the first step.
    """

    compiled: Any
    batch: Batch
    stop: np.ndarray
    bank: tuple[Bank, ...]
    holder: list[TrainState]
    flop: float
    first: FirstStep

    def run(self, steps: int) -> None:
        """Takes some steps and waits for them."""
        for _ in range(steps):
            self.holder[0] = self.compiled(self.holder[0], self.batch, self.stop, *self.bank).state
        jax.block_until_ready(self.holder[0])

    def time(self, seconds: Sequence[Seconds]) -> StepTime:
        """What the rounds say of it."""
        return StepTime(Spread.of(seconds), self.flop, memory_of(self.compiled), self.first)


class Maker:
    """Makes steps that share a state where they have the same parameters."""

    def __init__(
        self,
        devices: Sequence[jax.Device],
        tower_layers: int = 0,
        started: float | None = None,
        bank_images: int = 0,
    ):
        """Arguments are those of `benchmark_step`."""
        self._devices, self._layers, self._started = list(devices), tower_layers, started
        self._bank_images = bank_images
        self._held: dict[object, list[TrainState]] = {}

    def make(self, config: RunConfig, params: Params | None = None) -> Runner:
        """A step of a config that has been taken once.

        Args:
          config: of a run.
          params: to start from; random ones by default. A state that is there already stays.
        """
        began, devices = time.perf_counter(), self._devices
        model = model_of(config, self._layers)
        key = config.model, config.optimizer
        if key not in self._held:
            if params is None:
                params = setup.init_params(model, config.model, config.data, config.seed)
            made = states.make_optimizer(config, params, len(devices))
            self._held[key] = [states.init_state(config, made, params, devices)]
        holder = self._held[key]
        # On the devices already, where a run's batches are ahead of its steps.
        made_batch = random_batch(config, model, holder[0].params)
        bank: tuple[Bank, ...] = ()
        if uses_bank(config.negatives):
            images = made_bank.images_of(config, self._bank_images, len(made_batch.query))
            held, made_batch = made_bank.make_bank(
                config, model, holder[0].params, made_batch, images, devices
            )
            bank = (held,)
        batch = mesh.place(made_batch, devices)
        stop = np.zeros((len(devices), 1), np.int32)
        jax.block_until_ready(holder[0])
        built = time.perf_counter()
        made = states.make_optimizer(config, holder[0].params, len(devices))
        step_of = functools.partial(make_step, devices=devices, bank=bool(bank))
        lowered = step_of(config, model, made).lower(holder[0], batch, stop, *bank)
        compiled = lowered.compile()
        done = time.perf_counter()
        counted = config.with_changes(COUNTED)
        if counted != config:  # its parameters may be others: layers one by one
            model = model_of(counted, self._layers)
            shapes = setup.param_shapes(model, counted.model, counted.data)
            made = states.make_optimizer(counted, shapes, len(devices))
            step = jnp.zeros((), jnp.int32)
            state = TrainState(step, shapes, made.shapes)
            lowered = step_of(counted, model, made).lower(state, batch, stop, *bank)
        flop = flop_of(lowered) * len(devices)
        runner = Runner(compiled, batch, stop, bank, holder, flop, FirstStep(None, 0, 0, 0))
        start = time.perf_counter()
        runner.run(1)
        ran = time.perf_counter() - start
        runner.first = FirstStep(self._started, built - began, done - built, ran)
        return runner


def flop_of(lowered: jax.stages.Lowered) -> float:
    """FLOP of a program on one device, by XLA's cost analysis before it is optimised."""
    return float((lowered.cost_analysis() or {}).get("flops", 0.0))


def memory_of(compiled: Any) -> int:
    """Bytes of a device that a program needs, arguments and results included."""
    found = compiled.memory_analysis()
    found = found[0] if isinstance(found, list) else found
    if found is None:
        return 0
    return int(
        found.argument_size_in_bytes
        + found.output_size_in_bytes
        + found.temp_size_in_bytes
        - found.alias_size_in_bytes
    )


def sizes_for(config: RunConfig, tower_layers: int = 0) -> Sizes | None:
    """The sizes of a config's model, its vision tower cut or repeated to so many layers.

    Raises:
      UserError: it has no such tower.
    """
    pretrained = setup.describe_weights(config.model, config.data)
    sizes = sizes_of(config, pretrained)
    if not tower_layers:
        return sizes
    if sizes is None or isinstance(sizes, GivenSizes):
        raise UserError(
            f"--tower_layers={tower_layers}: the backbone {config.model.backbone!r} has no "
            "pretrained vision tower; leave the flag out."
        )
    vision = dataclasses.replace(sizes.vision, depth=tower_layers)
    return dataclasses.replace(sizes, vision=vision)


def model_of(config: RunConfig, tower_layers: int = 0) -> DQE:
    """The model of a config, over a small vocabulary where it has none of its own."""
    return build_model(
        config.model,
        vocab_size=VOCABULARY,
        max_length=config.data.max_length,
        image_size=config.data.image_size,
        sizes=sizes_for(config, tower_layers),
    )


def ceiling_of(config: RunConfig, devices: Sequence[jax.Device]) -> float:
    """FLOP a second of one device in a large matrix product of the config's dtype."""
    side = 2048 if devices[0].platform == "cpu" else 8192
    return matrix_product_rate(DTYPES[config.model.dtype], side)


def matrix_product_rate(dtype: DTypeLike, side: int) -> float:
    """FLOP a second of one device in square matrix products of that dtype."""
    x = jnp.ones((side, side), dtype)
    multiply = jax.jit(lambda a: a @ a / side)
    x = jax.block_until_ready(multiply(x))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(4):
            x = multiply(x)
        jax.block_until_ready(x)
        times.append((time.perf_counter() - start) / 4)
    return 2 * side**3 / min(times)


def settings_of(config: RunConfig, tower_layers: int = 0) -> JsonObject:
    """What of a config decides the time of its step."""
    shown = {
        "backbone": config.model.backbone,
        "variant": getattr(getattr(config.model, config.model.backbone), "variant", ""),
        "dtype": config.model.dtype,
        "frozen": list(config.model.frozen),
        "frozen_dtype": config.model.frozen_dtype,
        "features": config.features.place,
        "image_size": config.data.image_size,
        "max_length": config.data.max_length,
        "negatives": config.negatives.rule,
        "pool": config.negatives.pool,
        "chunks": config.batch.chunks,
        "accumulate": config.batch.accumulate,
    }
    return shown | ({"tower_layers": tower_layers} if tower_layers else {})


def heading(report: StepReport) -> str:
    """What was timed, on what."""
    shown, layers = report.settings, report.settings.get("tower_layers")
    parts = [str(shown[key]) for key in ("backbone", "variant") if shown[key]]
    model = " ".join([*parts, *([f"with {layers} tower layers"] if layers else [])])
    batches = shown["accumulate"]
    each = f"in each of the {batches} batches of an update" if batches > 1 else "a step"
    return (
        f"{report.config + ': ' if report.config else ''}{model}, {shown['dtype']}, "
        f"{report.queries} queries of {report.references} references {each}.\n"
        f"{report.devices}, jax {jax.__version__}; a matrix product reaches "
        f"{report.ceiling / 1e12:.3g} TFLOP/s on one device."
    )


def table(report: StepReport) -> str:
    """A report as text.

    The last column is the time as a share of that of InfoNCE without attribute weights.
    """
    baseline = report.times.get(BASELINE)
    rows: list[tuple[str, ...]] = [
        ("step", "ms", "p95", "+-", "cpu ms", "examples/s", "TFLOP/s", "MFU", "GiB", "ratio")
    ]
    for name, found in report.times.items():
        rows.append(
            (
                name,
                f"{1e3 * found.seconds:.1f}",
                f"{1e3 * found.spread.p95:.1f}",
                f"{found.spread.relative:.0%}",
                f"{1e3 * found.spread.processor:.1f}",
                f"{report.queries / found.seconds:.0f}",
                f"{found.flop / found.seconds / 1e12:.3g}",
                f"{report.mfu(name):.0%}",
                f"{found.memory / 2**30:.2f}",
                f"{found.seconds / baseline.seconds:.2f}" if baseline else "",
            )
        )
    lines = [heading(report), text_table(rows), first_step_line(report.times)]
    if report.device_peak is not None:
        lines.append(f"A device has held at most {report.device_peak / 2**30:.2f} GiB.")
    if {"config", WITHOUT_STORE} <= report.times.keys():
        stored, computed = report.times["config"], report.times[WITHOUT_STORE]
        lines.append(
            f"Stored features make a step {computed.seconds / stored.seconds:.2f} times faster; by "
            f"the count of FLOP it is {computed.flop / max(stored.flop, 1):.2f} times cheaper."
        )
    if report.platform == "cpu" and (busy := records.busy()):
        lines.append(busy)
    return "\n".join(lines)


def first_step_line(times: Mapping[str, StepTime]) -> str:
    """How long the first of the steps took to be taken once."""
    name, found = next(iter(times.items()))
    one = found.first
    parts = [
        *([] if one.started is None else [f"{one.started:.1f} s to start"]),
        f"{one.building:.1f} s to build",
        f"{one.compiling:.1f} s to compile",
        f"{one.running:.2f} s for the step",
    ]
    total = (one.started or 0.0) + one.building + one.compiling + one.running
    return f"First step of {name!r} after {total:.1f} s: {', '.join(parts)}."
