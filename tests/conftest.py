"""Runs the tests on eight CPU devices unless XLA_FLAGS already says how many."""

import os

_FLAG = "--xla_force_host_platform_device_count"

# XLA reads the flag once, when jax first asks for a device: set it before any test imports jax.
if _FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}=8".strip()
import gc  # noqa: E402

import jax  # noqa: E402
import pytest  # noqa: E402

from dqe_jax.testing.shapes import check_shapes  # noqa: E402

# Shapes and dtypes of these rooms' functions are checked at every call.
check_shapes("dqe_jax.method", "dqe_jax.models", "dqe_jax.embedding")


@pytest.fixture(autouse=True, scope="module")
def _drop_programs():
    """Drops a file's compiled programs at its end.

    Each holds dozens of memory mappings: those of the whole suite in two processes come near the
    65,530 that Linux allows a process, and beyond them it dies.
    """
    yield
    gc.collect()
    jax.clear_caches()
