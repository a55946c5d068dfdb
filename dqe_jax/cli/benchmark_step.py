"""Times the training step of a config on random data, beside simpler baselines in the same process.

python -m dqe_jax.benchmark --config=configs/shapes.py [--rounds=10] [--steps=3]

Rounds take turns among the variants of a step, so that a busy machine slows all alike; a variant's
time is its median round, its ratio that to InfoNCE without attribute weights. TFLOP/s are those of
XLA's cost analysis over that time, beside what one large matrix product reaches on the device.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags, logging
from ml_collections import config_flags

from dqe_jax.utils.errors import UserError

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config of the run.", lock_config=True)
_ROUNDS = flags.DEFINE_integer("rounds", 10, "Rounds over the variants.", 1)
_STEPS = flags.DEFINE_integer("steps", 3, "Steps of a variant in a round.", 1)

VOCABULARY = 100
BASELINE = "InfoNCE"
# What each variant changes of the config.
VARIANTS = {
    "config": {},
    "no mined negatives": {"negatives.rule": "in_batch"},
    "no attribute weights": {"model.attributes.enabled": False},
    BASELINE: {"negatives.rule": "in_batch", "model.attributes.enabled": False},
}
REQUIRED = ("config",)


def random_batch(config: Any) -> Any:
    """A `Batch` of random images and texts; ids are distinct."""
    import numpy as np

    from dqe_jax.data.pipeline import batch_spec
    from dqe_jax.method.batch import Batch

    rng, R = np.random.default_rng(0), config.batch.references
    spec = batch_spec(config, R)

    def below(name: str, high: int) -> np.ndarray:
        array = getattr(spec, name)
        return rng.integers(0, high, array.shape).astype(array.dtype)

    def count(name: str, first: int = 0) -> np.ndarray:
        array = getattr(spec, name)
        return np.arange(first, first + array.size, dtype=array.dtype).reshape(array.shape)

    return Batch(
        reference_image=below("reference_image", 256),
        reference_id=count("reference_id"),
        query=count("query"),
        text=1 + below("text", VOCABULARY - 1),
        target_image=below("target_image", 256),
        target_id=count("target_id", R),
        target_row=count("target_row"),
        known_positives=below("known_positives", 1) - 1,
        relevant=count("relevant"),
        mentions=below("mentions", 2),
        query_mask=below("query_mask", 1) == 0,
    )


def make_runner(config: Any, devices: list[Any]) -> tuple[Callable[[int], None], float]:
    """A function that takes some steps and waits for them; and the FLOP of one step."""
    import jax
    import numpy as np

    from dqe_jax import models
    from dqe_jax.distributed import mesh
    from dqe_jax.models import setup
    from dqe_jax.training import state as states
    from dqe_jax.training.step import make_step

    pretrained = setup.describe_weights(config)
    model = models.build_model(
        config.model,
        vocab_size=VOCABULARY,
        max_length=config.data.max_length,
        image_size=config.data.image_size,
        sizes=pretrained and pretrained.sizes,
    )
    params = setup.init_params(model, config, config.seed)
    made = states.make_optimizer(config, params, len(devices))
    # There is no bank here: negatives are mined from the batch.
    config.negatives.pool = "batch"
    step = make_step(config, model, made, devices)
    state = states.init_state(config, made, params, devices)
    batch = mesh.shard(random_batch(config), len(devices))
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
    return run, float(analysis.get("flops", 0.0)) * len(devices)


def matrix_product_rate(dtype: Any, side: int) -> float:
    """FLOP a second of one device in square matrix products of that dtype."""
    import jax
    import jax.numpy as jnp

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


def main(argv: Sequence[str]) -> None:
    """Times and prints a table."""
    del argv
    import jax
    import numpy as np

    from dqe_jax.config import check_batch, check_config
    from dqe_jax.distributed import mesh
    from dqe_jax.models import DTYPES

    config = _CONFIG.value
    check_config(config)
    devices = mesh.devices_of(config.num_devices)
    check_batch(config, len(devices))
    if config.model.scan_layers:
        # A loop over layers would be counted as one layer.
        raise UserError("config.model.scan_layers is True: time with --config.model.scan_layers=0.")
    runners = {}
    for name, changes in VARIANTS.items():
        variant = config.copy_and_resolve_references()
        variant.update_from_flattened_dict(changes)
        runners[name] = make_runner(variant, devices)
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(_ROUNDS.value):
        for name, (run, _) in runners.items():
            start = time.perf_counter()
            run(_STEPS.value)
            seconds[name].append((time.perf_counter() - start) / _STEPS.value)
    ceiling = matrix_product_rate(
        DTYPES[config.model.dtype], 1024 if devices[0].platform == "cpu" else 8192
    )
    queries = config.batch.references * config.batch.queries_per_reference
    lines = [
        f"{len(devices)} x {devices[0].device_kind}, jax {jax.__version__}, {config.model.dtype}, "
        f"{queries} queries of {config.batch.references} references a step; a matrix product "
        f"reaches {ceiling / 1e12:.3g} TFLOP/s on one device.",
        f"{'step':<22}{'ms':>9}{'queries/s':>11}{'TFLOP/s':>10}{'ratio':>8}",
    ]
    base = float(np.median(seconds[BASELINE]))
    for name, (_, flop) in runners.items():
        median = float(np.median(seconds[name]))
        lines.append(
            f"{name:<22}{1e3 * median:>9.1f}{queries / median:>11.0f}"
            f"{flop / median / 1e12:>10.3g}{median / base:>8.2f}"
        )
    logging.info("%s", "\n".join(lines))
