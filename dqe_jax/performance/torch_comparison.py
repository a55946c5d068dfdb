"""Times our step against the same work in PyTorch, in the same run.

The same work: towers, composer, attribute weights, InfoNCE over the batch and the terms over
attributes, clipping and AdamW, for a batch of the same shape, on the same parameters. Before
anything is timed, embeddings and loss of both must agree in float32 without dropout. Then rounds
take turns, with as many threads for PyTorch as XLA takes. Nothing is mined, on either side.

A user of PyTorch computes frozen towers in each step. Ours is timed so too, and as it runs by
default: with what they make looked up.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from dqe_jax.config import AnyConfig, RunConfig
from dqe_jax.distributed import mesh
from dqe_jax.feature_store.features import stored_kinds
from dqe_jax.method.arrays import Array, Params
from dqe_jax.method.batch import Batch, TrainOutput
from dqe_jax.method.objective import Objective
from dqe_jax.models import setup
from dqe_jax.models.given import GivenSizes
from dqe_jax.models.weights.sizes import PretrainedSizes
from dqe_jax.performance import records
from dqe_jax.performance import step_benchmark as steps_of
from dqe_jax.performance.records import Seconds, Spread
from dqe_jax.performance.step_benchmark import VOCABULARY, StepReport, StepTime
from dqe_jax.utils.errors import UserError, reason_of
from dqe_jax.utils.files import JsonObject
from dqe_jax.utils.text_table import text_table

OURS, STORED = "dqe_jax", "dqe_jax, stored"
EAGER, COMPILED = "PyTorch", "PyTorch, compiled"
# By which embeddings and losses of both may differ: absolutely, a loss above 1 relatively.
TOLERANCE = 1e-4
# Backbones that are written in PyTorch too.
COMPARED = ("tiny", "clip", "blip2")
# What the comparison changes of a config: nothing is mined.
SAME_WORK: dict[str, object] = {"negatives.rule": "in_batch"}


@dataclasses.dataclass(frozen=True)
class Agreement:
    """By how much both differ in float32, on the same batch and parameters.

    Attributes:
      embeddings: the largest difference of a number of an embedding of length 1.
      loss: the difference of the losses.
      value: our loss.
    """

    embeddings: float
    loss: float
    value: float

    @property
    def holds(self) -> bool:
        """Whether both are within `TOLERANCE`; numbers that are not finite are not."""
        return self.embeddings <= TOLERANCE and self.loss <= TOLERANCE * max(1.0, abs(self.value))


@dataclasses.dataclass(frozen=True)
class Ratio:
    """Our time as a share of PyTorch's.

    Attributes:
      median: of the medians of both.
      lowest: of a round.
      highest: of a round.
      processor: of processor time, in the median round.
    """

    median: float
    lowest: float
    highest: float
    processor: float


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What `compare_with_torch` measured.

    Attributes:
      ours: the report of our steps, `OURS` and perhaps `STORED`.
      theirs: seconds of PyTorch's steps, `EAGER` and perhaps `COMPILED`.
      first: seconds of the first step of each, compiling included.
      agreement: before anything was timed.
      ratios: of each of ours to the faster of theirs.
      threads: of PyTorch.
      notes: what did not work, in sentences.
    """

    ours: StepReport
    theirs: Mapping[str, Spread]
    first: Mapping[str, float]
    agreement: Agreement
    ratios: Mapping[str, Ratio]
    threads: int
    notes: tuple[str, ...]

    @property
    def fastest(self) -> str:
        """The faster of PyTorch's steps."""
        return min(self.theirs, key=lambda name: self.theirs[name].median)

    def as_json(self) -> JsonObject:
        """All figures, those that follow from others too."""
        content = dataclasses.asdict(self) | {"ours": self.ours.as_json(), "fastest": self.fastest}
        for name, spread in self.theirs.items():
            content["theirs"][name]["examples_per_second"] = self.ours.queries / spread.median
        return content


def compare_with_torch(
    config: AnyConfig,
    *,
    rounds: int = 10,
    steps: int = 3,
    tower_layers: int = 0,
    trace: str | os.PathLike[str] | None = None,
    label: str = "",
    started: float | None = None,
    torch_compile: bool = True,
) -> Comparison:
    """Times our step and PyTorch's on one device, and logs a table.

    Args:
      config: of a run; it needs no data and no weights.
      rounds: that take turns, at least 1.
      steps: of each in a round, at least 1.
      tower_layers: as for `step_benchmark.benchmark_step`; so are the rest.
      trace: for a profile of our step.
      label: the config's name.
      started: seconds in which the process came here.
      torch_compile: whether PyTorch's step is also timed by `torch.compile`.

    Raises:
      UserError: PyTorch or transformers is missing or has no such model, the config is not sound,
        or both do not agree.
    """
    config = comparable(config)
    devices = mesh.devices_of(1)
    shape = steps_of.check(config, devices)
    from dqe_jax.performance.in_torch import step as in_torch  # needs PyTorch

    sizes = pretrained_sizes(config, tower_layers)
    model = steps_of.model_of(config, tower_layers)
    params = setup.init_params(model, config.model, config.data, config.seed)
    device, threads = in_torch.device_for(devices[0].platform), records.threads()
    in_torch.set_threads(threads)
    agreement = agree(config, params, sizes, tower_layers)
    if not agreement.holds:
        raise UserError(
            f"--vs=torch: on the same batch embeddings differ by {agreement.embeddings:.2g} and "
            f"losses by {agreement.loss:.2g}, more than {TOLERANCE:g}: both do not do the same "
            f"work, and nothing is timed. Please report it with the config and the versions of "
            "torch and transformers."
        )

    logging.info(
        "Embeddings and loss agree (%.1e, %.1e): both steps are compiled now, which takes minutes.",
        *(agreement.embeddings, agreement.loss),
    )
    maker, runners = steps_of.Maker(devices, tower_layers, started), {}
    plain = config.with_changes({"features.place": "off"})
    batch = steps_of.random_batch(plain, model, params)
    theirs = in_torch.make_torch_step(config, params, sizes, VOCABULARY, batch, device)
    runners[OURS] = maker.make(plain, params)
    if stored_kinds(config, model):
        runners[STORED] = maker.make(config, params)
    del params
    first: dict[str, float] = {}
    notes: list[str] = []
    runs: dict[str, Callable[[int], None]] = {name: one.run for name, one in runners.items()}
    first[EAGER] = _seconds(theirs.run)
    runs[EAGER] = theirs.run
    if torch_compile:
        compiled = theirs.compiled()
        before = in_torch.graph_breaks()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of its own internals
                first[COMPILED] = _seconds(compiled.run)
            runs[COMPILED] = compiled.run
        except Exception as error:  # of a compiler, of any kind
            notes.append(f"torch.compile did not work: {reason_of(error)}.")
        if broken := in_torch.graph_breaks() - before:
            notes.append(f"torch.compile left compiled code at {broken} places.")
    for run in runs.values():
        run(1)
    seconds = steps_of.in_turns(runs, rounds, steps)
    ours = StepReport(
        config=label,
        settings=steps_of.settings_of(config, tower_layers),
        devices=f"1 x {devices[0].device_kind}",
        num_devices=1,
        platform=devices[0].platform,
        references=shape.references,
        queries=shape.queries,
        ceiling=steps_of.ceiling_of(config, devices),
        times={name: one.time(seconds[name]) for name, one in runners.items()},
        device_peak=records.device_peak(devices),
    )
    spreads = {name: Spread.of(seconds[name]) for name in seconds if name not in runners}
    fastest = min(spreads, key=lambda name: spreads[name].median)
    comparison = Comparison(
        ours=ours,
        theirs=spreads,
        first=first,
        agreement=agreement,
        ratios={name: _ratio(seconds[name], seconds[fastest]) for name in runners},
        threads=threads,
        notes=tuple(notes),
    )
    logging.info("%s", table(comparison))
    if trace is not None:
        steps_of.write_trace(trace, runners[OURS].run, steps)
    return comparison


def comparable(config: AnyConfig) -> RunConfig:
    """The config of the same work on one device.

    Raises:
      UserError: PyTorch or transformers is missing, or it has no model for the backbone.
    """
    config = RunConfig.of(config)
    for package in ("torch", "transformers"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"--vs=torch needs {package}: run `pip install torch transformers`.")
    if config.model.backbone == "features":
        raise UserError(
            "--vs=torch: config.model.backbone is 'features', whose encoders are not part of the "
            "step; compare 'tiny', 'clip' or 'blip2'."
        )
    if config.model.lora.rank:
        raise UserError(
            f"--vs=torch: config.model.lora.rank is {config.model.lora.rank}, and adapters are not "
            "compared; set it to 0."
        )
    if config.model.backbone not in COMPARED:
        raise UserError(
            f"--vs=torch: config.model.backbone is {config.model.backbone!r}, which is not written "
            "in PyTorch here; compare 'tiny', 'clip' or 'blip2'."
        )
    if config.loss.in_batch_form != "softmax":
        raise UserError(
            f"--vs=torch: config.loss.in_batch_form is {config.loss.in_batch_form!r}, which is not "
            "written in PyTorch here; set it to 'softmax'."
        )
    if config.num_devices > 1:
        raise UserError(
            f"--vs=torch: config.num_devices is {config.num_devices}, and PyTorch works on one "
            "device here; set it to 1."
        )
    return config.with_changes({**SAME_WORK, "num_devices": 1, "batch.chunks": 1})


def pretrained_sizes(config: RunConfig, tower_layers: int) -> PretrainedSizes | None:
    """The sizes of a pretrained backbone; None for `tiny`."""
    sizes = steps_of.sizes_for(config, tower_layers)
    assert not isinstance(sizes, GivenSizes), "`comparable` refuses those"
    return sizes


def _seconds(run: Callable[[int], None]) -> float:
    start = time.perf_counter()
    run(1)
    return time.perf_counter() - start


def _ratio(ours: list[Seconds], theirs: list[Seconds]) -> Ratio:
    clock, processor = np.array(ours).T / np.array(theirs).T
    one, other = Spread.of(ours), Spread.of(theirs)
    return Ratio(
        median=one.median / other.median,
        lowest=float(clock.min()),
        highest=float(clock.max()),
        processor=float(np.median(processor)),
    )


# --------------------------------------------------------------------------------- the same result


def agree(
    config: RunConfig, params: Params, sizes: PretrainedSizes | None, tower_layers: int = 0
) -> Agreement:
    """Compares the forward pass and the loss of both in float32, without dropout.

    Args:
      config: of `comparable`.
      params: of its model.
      sizes: of a pretrained backbone, or None.
      tower_layers: as for `compare_with_torch`.
    """
    from dqe_jax.performance.in_torch import step as in_torch  # needs PyTorch

    exact = {"model.dtype": "float32", "model.frozen_dtype": "float32", "features.place": "off"}
    no_dropout = {f"model.{name}.dropout": 0.0 for name in ("tiny", "blip2")}
    config = config.with_changes({**exact, **no_dropout})
    params = without_zeros(params)
    model = steps_of.model_of(config, tower_layers)
    batch = steps_of.random_batch(config, model, params)
    device = in_torch.device_for(jax.default_backend())
    theirs = in_torch.forward_once(config, params, sizes, VOCABULARY, batch, device)
    ours = forward_once(config, params, batch, tower_layers)
    differences = {name: float(np.abs(ours[name] - theirs[name]).max()) for name in ours}
    loss = differences.pop("loss")
    # The largest of numbers with one that is none must be none.
    return Agreement(float(np.max(list(differences.values()))), loss, float(ours["loss"]))


def without_zeros(params: Params) -> Params:
    """Parameters as float32, with small random numbers in place of arrays of zeros.

    A layer that starts at zero would hide what is wrong before it.
    """
    rng = np.random.default_rng(0)

    def filled(x: Array) -> Array:
        x = np.asarray(x, np.float32)
        return x if x.any() else rng.normal(0, 0.02, x.shape).astype(np.float32)

    return jax.tree.map(filled, params)


def forward_once(
    config: RunConfig, params: Params, batch: Batch, tower_layers: int = 0
) -> dict[str, np.ndarray]:
    """What our model makes of a batch: "query", "reference", "target" and "loss"."""
    model = steps_of.model_of(config, tower_layers)
    devices = mesh.devices_of(1)

    def forward(params: Params, batch: Batch) -> dict[str, Array]:
        made: list[TrainOutput] = []

        def apply(*args: Any, **kwargs: Any) -> TrainOutput:
            made.append(cast(TrainOutput, model.apply(*args, **kwargs)))
            return made[0]

        objective = Objective(apply, None, "none", config.loss, mesh.AXIS)
        _, metrics = objective(params, batch, jax.random.key(0))
        out = made[0]
        return {
            "query": out.query.embedding,
            "reference": out.reference,
            "target": out.target,
            "loss": metrics["loss"],
        }

    with jax.default_matmul_precision("highest"):
        run = mesh.pmap(forward, in_axes=(None, 0), out_axes=None, devices=devices)
        found = run(params, mesh.shard(batch, 1))
    return {name: np.asarray(jnp.asarray(x, jnp.float32)) for name, x in found.items()}


# ------------------------------------------------------------------------------------- the figures


def table(comparison: Comparison) -> str:
    """A comparison as text; the last column is a time as a share of PyTorch's faster one."""
    ours, fastest = comparison.ours, comparison.theirs[comparison.fastest].median
    rows: list[tuple[str, ...]] = [
        ("step", "ms", "p95", "+-", "cpu ms", "examples/s", "TFLOP/s", "MFU", "GiB", "ratio")
    ]
    times: dict[str, StepTime | Spread] = {**ours.times, **comparison.theirs}
    for name, one in times.items():
        spread = one if isinstance(one, Spread) else one.spread
        cells = ("", "", "")
        if isinstance(one, StepTime):
            rate = f"{one.flop / one.seconds / 1e12:.3g}"
            cells = (rate, f"{ours.mfu(name):.0%}", f"{one.memory / 2**30:.2f}")
        rows.append(
            (
                name,
                f"{1e3 * spread.median:.1f}",
                f"{1e3 * spread.p95:.1f}",
                f"{spread.relative:.0%}",
                f"{1e3 * spread.processor:.1f}",
                f"{ours.queries / spread.median:.1f}",
                *cells,
                f"{spread.median / fastest:.2f}",
            )
        )
    agreement = comparison.agreement
    versions = records.versions(records.IN_TORCH)
    lines = [
        steps_of.heading(ours),
        f"PyTorch {versions['torch']}, transformers {versions['transformers']}, "
        f"{comparison.threads} threads. Before timing, embeddings differ by at most "
        f"{agreement.embeddings:.1e} and the losses by {agreement.loss:.1e}.",
        text_table(rows),
        steps_of.first_step_line(ours.times),
        "First step of " + ", ".join(f"{n!r} {s:.1f} s" for n, s in comparison.first.items()) + ".",
    ]
    for name, ratio in comparison.ratios.items():
        lines.append(
            f"{name}: {ratio.median:.2f} of the time of {comparison.fastest!r} "
            f"({ratio.lowest:.2f} to {ratio.highest:.2f} in a round), {ratio.processor:.2f} of its "
            "processor time."
        )
    busy = records.busy() if ours.platform == "cpu" else None
    return "\n".join([*lines, *comparison.notes, *([busy] if busy else [])])
