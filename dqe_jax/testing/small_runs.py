"""Configs whose runs take seconds, programs that are compiled once, and when runs agree."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import platform
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar
from unittest import mock

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from dqe_jax.cli.config_files import load_config
from dqe_jax.config import RunConfig
from dqe_jax.method.arrays import Params
from dqe_jax.models.dqe import DQE
from dqe_jax.training import session
from dqe_jax.training.state import Optimizer

_Step = TypeVar("_Step")
# Pixels a side of the images of `small_benchmark_config`.
BENCHMARK_SIZE = 16


def small_config(prepared_dir: str | os.PathLike[str], **changes: object) -> ConfigDict:
    """A run on `shapes` on two devices; `changes` by dotted name."""
    config = load_config("shapes:smoke")
    config.data.prepared_dir = str(prepared_dir)
    config.num_devices = 2
    config.batch.queries_per_reference = 2
    tiny = config.model.tiny
    tiny.image_depth, tiny.text_depth, tiny.composer_depth = 0, 0, 1
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
    model.tiny.image_depth, model.tiny.text_depth, model.tiny.composer_depth = 0, 0, 1
    model.attributes.width, model.attributes.heads = 32, 4
    config.data.image_size, config.data.max_length = BENCHMARK_SIZE, 12
    config.data.data_dir = str(data_dir)
    config.total_steps = config.eval_every = config.checkpoint_every = 2
    config.batch.references, config.num_devices = 4, 2
    config.update_from_flattened_dict(changes)
    return config


def cache_directory() -> Path:
    """Where tests keep compiled programs: one directory for this jax and this processor.

    `DQE_TEST_CACHE` names another place than the user's cache. It may be removed at any time.
    """
    cpuinfo = Path("/proc/cpuinfo")
    flags = re.search(r"flags.*", cpuinfo.read_text()) if cpuinfo.exists() else None
    machine = f"{platform.machine()} {flags and flags[0]}"
    key = f"{jax.__version__}-{hashlib.sha256(machine.encode()).hexdigest()[:12]}"
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    place = Path(os.environ.get("DQE_TEST_CACHE") or Path(home, "dqe_jax", "tests")) / key
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError:  # such as a home that cannot be written
        place = Path(tempfile.gettempdir(), "dqe_jax-tests", key)
    return place


def compiles_quickly(directory: str | os.PathLike[str] | None = None) -> dict[str, str]:
    """Environment in which a process compiles quickly: `quick_settings` for another process.

    Args:
      directory: of compiled programs; None takes `cache_directory()`.
    """
    return {
        name.upper(): str(value).lower() if isinstance(value, bool) else str(value)
        for name, value in quick_settings(directory).items()
    }


def quick_settings(
    directory: str | os.PathLike[str] | None = None,
) -> dict[str, str | float | bool]:
    """Settings of jax by which tests compile quickly, and each program once for all processes.

    Args:
      directory: of compiled programs; None takes `cache_directory()`.
    """
    return {
        "jax_disable_most_optimizations": True,
        "jax_compilation_cache_dir": str(directory or cache_directory()),
        # With a limit jax locks the directory, which several processes use.
        "jax_compilation_cache_max_size": 2**30,
        "jax_persistent_cache_min_compile_time_secs": 0.2,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }


def quick_xla_flags(devices: int = 1) -> str:
    """XLA_FLAGS of a process that compiles quickly, on so many CPU devices."""
    flags = [f"--xla_force_host_platform_device_count={devices}"]
    # The emitters of fusions take most of the time of compiling, and compute the same. Only these
    # releases let them be left out, and XLA ends a process that names a flag it does not know.
    if jax.__version_info__[:2] == (0, 10):
        flags.append("--xla_cpu_use_fusion_emitters=false")
    # One part for each program: the cores have other tests to run.
    flags.append("--xla_cpu_parallel_codegen_split_count=1")
    return " ".join(flags)


@contextlib.contextmanager
def compiled_once(*, alike: bool = False) -> Iterator[None]:
    """Runs of this process share their steps, so that a step is traced and compiled once.

    Args:
      alike: whether they share them even if seed and length of the run differ: for tests that do
        not look at what is learnt.
    """
    with (
        mock.patch.object(session, "make_step", _remembered(session.make_step, alike)),
        mock.patch.object(
            session, "make_accumulation", _remembered(session.make_accumulation, alike)
        ),
    ):
        yield


def _remembered(make_step: Callable[..., _Step], alike: bool) -> Callable[..., _Step]:
    """`make_step` or its like, which gives an earlier run's step again if nothing differs."""
    steps: dict[str, _Step] = {}

    def remembered(
        config: RunConfig,
        model: DQE,
        made: Optimizer,
        devices: Sequence[jax.Device],
        *,
        bank: bool = False,
    ) -> _Step:
        # The loop decides when a bank is made, so the step does not depend on it.
        negatives = dataclasses.replace(config.negatives, first_refresh=0, refresh_every=1)
        parts = (config.model, config.optimizer, negatives, config.loss, config.batch)
        numbers = () if alike else (config.seed, config.total_steps)
        key = repr((config.mapping, parts, numbers, [device.id for device in devices], bank, model))
        if key not in steps:
            steps[key] = make_step(config, model, made, devices, bank=bank)
        return steps[key]

    return remembered


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
