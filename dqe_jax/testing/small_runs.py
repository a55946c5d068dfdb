"""Configs whose runs take seconds, programs that are compiled once, and when runs agree."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import ConfigDict

from dqe_jax.cli.config_files import load_config
from dqe_jax.config import RunConfig
from dqe_jax.method.arrays import Params

# Pixels a side of the images of `small_benchmark_config`.
BENCHMARK_SIZE = 16


def small_config(prepared_dir: str | os.PathLike[str], **changes: object) -> ConfigDict:
    """A run on `shapes` on two devices; `changes` by dotted name."""
    config = load_config("shapes:smoke")
    config.data.prepared_dir = str(prepared_dir)
    config.num_devices = 2
    config.batch.queries_per_reference = 2
    config.model.tiny.image_depth = config.model.tiny.text_depth = 0
    config.update_from_flattened_dict(changes)
    return config


def run_config(prepared_dir: str | os.PathLike[str], **changes: object) -> RunConfig:
    """`small_config` as what is inside a job."""
    return RunConfig.of(small_config(prepared_dir, **changes))


def small_benchmark_config(
    name: str, data_dir: str | os.PathLike[str], **changes: object
) -> ConfigDict:
    """A config of a benchmark with a tiny model and two steps on two devices.

    Args:
      name: of the config with its variants, `smoke` among them: "fiq:smoke".
      data_dir: the benchmark, prepared with images of `BENCHMARK_SIZE`.
      **changes: by dotted name.
    """
    config = load_config(name)
    model = config.model
    model.backbone, model.frozen, model.dtype, model.scan_layers = "tiny", (), "float32", False
    model.weights = ""
    model.tiny.patch_size, model.tiny.cell_size = 8, 4
    model.tiny.image_depth = model.tiny.text_depth = 0
    model.attributes.width, model.attributes.heads = 32, 4
    config.data.image_size, config.data.max_length = BENCHMARK_SIZE, 12
    config.data.data_dir = str(data_dir)
    config.total_steps = config.eval_every = config.checkpoint_every = 2
    config.batch.references, config.num_devices = 4, 2
    config.update_from_flattened_dict(changes)
    return config


@contextlib.contextmanager
def compiled_once(directory: str | os.PathLike[str]) -> Iterator[None]:
    """Compiles quickly, and lets runs of one shape share their programs through `directory`."""
    settings = {
        "jax_disable_most_optimizations": True,
        "jax_compilation_cache_dir": str(directory),
        "jax_persistent_cache_min_compile_time_secs": 0.2,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: jax.config.values[name] for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def assert_params_agree(one: Params, other: Params, *, learning_rate: float) -> None:
    """Asserts that runs of a few steps with other numbers of devices have the same parameters.

    Within 1e-5; biases of keys within the learning rate. The softmax of attention does not change
    with them: their true gradient is 0, and they follow the rounding of sums.

    Args:
      one: parameters of a run.
      other: of the other run.
      learning_rate: of both, at most 1e-3.
    """
    first, second = (flatten_dict(params, sep="/") for params in (one, other))
    assert first.keys() == second.keys()
    for path, value in first.items():
        tolerance = np.where(_is_bias_of_keys(path, value), learning_rate, 1e-5)
        apart = np.abs(np.asarray(value, np.float64) - second[path])
        assert (apart <= tolerance).all(), f"{path}: {apart.max()} apart"


def _is_bias_of_keys(path: str, value: np.ndarray) -> np.ndarray:
    """Which numbers of a parameter are biases of keys (`layers.Attention`), bool of its shape."""
    found = np.zeros(np.shape(value), bool)
    if path.endswith("/qkv/bias"):
        found[len(value) // 3 : 2 * len(value) // 3] = True
    if path.endswith("/key_value/bias"):
        found[: len(value) // 2] = True
    return found
