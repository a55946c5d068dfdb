"""Runs the tests on eight CPU devices unless XLA_FLAGS already says how many; compiles quickly."""

import gc
import os
import shutil
from pathlib import Path

import hypothesis
import jax
import pytest

from dqe_jax.testing.shapes import check_shapes

# Shapes and dtypes of these rooms' functions are checked at every call.
check_shapes("dqe_jax.method", "dqe_jax.models", "dqe_jax.embedding")

from dqe_jax.data import datasets  # noqa: E402
from dqe_jax.testing.small_runs import (  # noqa: E402
    compiled_once,
    quick_settings,
    quick_xla_flags,
    run_config,
)

# XLA reads the flags once, when jax first asks for a device. The last value of a flag counts:
# that of the environment. A worker of pytest-xdist finds them set.
_flags = os.environ.get("XLA_FLAGS", "")
if quick_xla_flags(8) not in _flags:
    os.environ["XLA_FLAGS"] = f"{quick_xla_flags(8)} {_flags}".strip()
for name, value in quick_settings().items():
    jax.config.update(name, value)

# The same cases at every run. `HYPOTHESIS_PROFILE=search` draws others, and many more.
hypothesis.settings.register_profile(
    "tests", max_examples=30, derandomize=True, database=None, deadline=None
)
hypothesis.settings.register_profile("search", max_examples=1000, database=None, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "tests"))

# Tracing makes many objects, and Python would look through all of them again and again.
gc.set_threshold(50_000, 20, 20)


def pytest_collection_finish():
    """What is imported by now lives until the end: Python looks for no garbage in it."""
    gc.freeze()


# Files that take longest, which start first: then no process is left alone with one of them.
LONG = (
    *("models", "run", "plan", "guards", "multi_process", "train_step", "pretrained_run", "bank"),
    *("fault", "audit", "torch_comparison", "prepare", "given", "damaged", "zero"),
    *("benchmark_runs", "mining", "benchmark", "page", "ablate", "trns", "accumulate", "parity"),
    *("parallel", "feedback_run", "average", "weights", "launch", "command", "evaluate", "train"),
    *("encoders", "fashion_products", "shapes", "own_table", "digest", "own_photos", "watch"),
    *("protocols", "made_table", "errors", "exported", "chunks", "configs"),
)


def pytest_collection_modifyitems(items):
    names = [f"{name}_test" for name in LONG]
    place = {name: at for at, name in enumerate(names)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))  # stable


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """A function of a directory: gives it a copy, `prepared/`, of what `shapes:smoke` is read from.

    All processes of the tests prepare it once, together.
    """
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    datasets.open_dataset(run_config(shared / "prepared").data)
    return lambda directory: shutil.copytree(shared / "prepared", directory / "prepared")


@pytest.fixture(autouse=True, scope="session")
def _steps_compiled_once():
    """Runs of a process whose steps are the same share them."""
    with compiled_once():
        yield


@pytest.fixture(autouse=True, scope="module")
def _drop_programs():
    """Drops the compiled programs at the end of a file when there are many.

    Each holds dozens of memory mappings: those of the whole suite in two processes come near the
    65,530 that Linux allows a process, and beyond them it dies.
    """
    yield
    maps = Path("/proc/self/maps")
    if not maps.exists() or maps.read_bytes().count(b"\n") > 20_000:
        gc.collect()
        jax.clear_caches()
