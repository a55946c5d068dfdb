"""Times the training step of a config on random data, beside simpler baselines in the same process.

Rounds take turns among the variants of a step, so that a busy machine slows all alike; a variant's
time is its median round, its ratio that to InfoNCE without attribute weights. TFLOP/s are those of
XLA's cost analysis over that time, beside what one large matrix product reaches on the device.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence

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
from dqe_jax.models import setup
from dqe_jax.models.build import DTYPES, build_model
from dqe_jax.models.dqe import DQE
from dqe_jax.models.features import StoredText
from dqe_jax.training import state as states
from dqe_jax.training.step import batch_spec, make_step
from dqe_jax.utils.errors import UserError

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


@dataclasses.dataclass(frozen=True)
class StepTime:
    """What a step takes.

    Attributes:
      seconds: of one step, in the median round.
      flop: of one step, on all devices.
    """

    seconds: float
    flop: float


def benchmark_step(
    config: AnyConfig, *, rounds: int = 10, steps: int = 3, names: Sequence[str] = ()
) -> dict[str, StepTime]:
    """Times variants of a step on the devices of the config, and logs a table.

    Where a frozen tower is stored, a step that computes it is timed too (`WITHOUT_STORE`).

    Args:
      config: of a run; it needs no data.
      rounds: over the variants, at least 1.
      steps: of a variant in a round, at least 1.
      names: of `VARIANTS`, or `WITHOUT_STORE`; none for all. Each holds a state of its own.

    Raises:
      UserError: the config is not sound, its layers are scanned, or it has no such variant.
    """
    config = RunConfig.of(config)
    devices = mesh.devices_of(config.num_devices)
    check_batch(config, len(devices))
    shape = expected_shape(config.data.dataset, config.batch)
    check_parts(shape, len(devices), config.batch.chunks)
    if config.model.scan_layers:
        # A loop over layers would be counted as one layer.
        raise UserError("config.model.scan_layers is True: time with --config.model.scan_layers=0.")
    variants = dict(VARIANTS)
    model = _model_of(config)
    if set(stored_kinds(config, model)) - set(given_kinds(model)):
        variants[WITHOUT_STORE] = {"features.place": "off"}
    unknown = [name for name in names if name not in variants]
    if unknown:
        raise UserError(f"--variants={unknown[0]}: give some of {', '.join(variants)}.")
    runners = {
        name: make_runner(config.with_changes(changes), devices)
        for name, changes in variants.items()
        if name in (names or variants)
    }
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(rounds):
        for name, (run, _) in runners.items():
            start = time.perf_counter()
            run(steps)
            seconds[name].append((time.perf_counter() - start) / steps)
    times = {
        name: StepTime(float(np.median(seconds[name])), flop) for name, (_, flop) in runners.items()
    }
    ceiling = matrix_product_rate(
        DTYPES[config.model.dtype], 1024 if devices[0].platform == "cpu" else 8192
    )
    logging.info("%s", table(config, devices, times, ceiling))
    return times


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

    return Batch(
        reference_image=stored("image", below("reference_image", 256)),
        reference_id=count("reference_id"),
        reference_mask=np.ones(shape.references, bool),
        reference=None if shape.even else slot.ravel().astype(np.int32),
        query=count("query"),
        text=stored("text", 1 + below("text", VOCABULARY - 1)),
        target_image=stored("image", below("target_image", 256)),
        target_id=count("target_id", shape.references),
        target_row=count("target_row"),
        known_positives=below("known_positives", 1) - 1,
        relevant=count("relevant"),
        mentions=below("mentions", 2),
        query_mask=below("query_mask", 1) == 0,
    )


def make_runner(
    config: RunConfig, devices: list[jax.Device]
) -> tuple[Callable[[int], None], float]:
    """A function that takes some steps and waits for them; and the FLOP of one step."""
    model = _model_of(config)
    params = setup.init_params(model, config.model, config.data, config.seed)
    made = states.make_optimizer(config, params, len(devices))
    # There is no bank here: negatives are mined from the batch.
    config = config.with_changes({"negatives.pool": "batch"})
    step = make_step(config, model, made, devices)
    state = states.init_state(config, made, params, devices)
    batch = mesh.shard(random_batch(config, model, params), len(devices))
    stop = np.zeros((len(devices), 1), np.int32)
    compiled = step.lower(state, batch, stop).compile()
    analysis = compiled.cost_analysis()
    analysis = analysis[0] if isinstance(analysis, list) else analysis
    holder = [state]

    def run(steps: int) -> None:
        for _ in range(steps):
            holder[0] = compiled(holder[0], batch, stop).state
        jax.block_until_ready(holder[0])

    run(1)
    return run, float((analysis or {}).get("flops", 0.0)) * len(devices)


def _model_of(config: RunConfig) -> DQE:
    """The model of a config, over a small vocabulary where it has none of its own."""
    pretrained = setup.describe_weights(config.model, config.data)
    return build_model(
        config.model,
        vocab_size=VOCABULARY,
        max_length=config.data.max_length,
        image_size=config.data.image_size,
        sizes=sizes_of(config, pretrained),
    )


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


def table(
    config: RunConfig, devices: Sequence[jax.Device], times: Mapping[str, StepTime], ceiling: float
) -> str:
    """The times of the variants as text.

    Args:
      config: of the run.
      devices: that it was timed on.
      times: of variants.
      ceiling: FLOP a second of one device in a large matrix product.
    """
    shape = expected_shape(config.data.dataset, config.batch)
    queries = shape.queries
    lines = [
        f"{len(devices)} x {devices[0].device_kind}, jax {jax.__version__}, {config.model.dtype}, "
        f"{queries} queries of {shape.references} references a step; a matrix product "
        f"reaches {ceiling / 1e12:.3g} TFLOP/s on one device.",
        f"{'step':<22}{'ms':>9}{'queries/s':>11}{'TFLOP/s':>10}{'ratio':>8}",
    ]
    for name, found in times.items():
        ratio = f"{found.seconds / times[BASELINE].seconds:.2f}" if BASELINE in times else ""
        lines.append(
            f"{name:<22}{1e3 * found.seconds:>9.1f}{queries / found.seconds:>11.0f}"
            f"{found.flop / found.seconds / 1e12:>10.3g}{ratio:>8}".rstrip()
        )
    if {"config", WITHOUT_STORE} <= times.keys():
        stored, computed = times["config"], times[WITHOUT_STORE]
        lines.append(
            f"Stored features make a step {computed.seconds / stored.seconds:.2f} times faster; by "
            f"the count of FLOP it is {computed.flop / max(stored.flop, 1):.2f} times cheaper."
        )
    return "\n".join(lines)
