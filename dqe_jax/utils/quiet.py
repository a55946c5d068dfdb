"""Libraries that talk, without their advice."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import pathlib
from collections.abc import Iterator
from types import ModuleType

# What libraries log that says nothing new to a user.
OLD_NEWS = (
    "OpenCV is not installed",  # an optional speed-up
    "CheckpointManagerOptions.read_only=True",  # what evaluation asks for
    "Given directory is read only",
    "Using custom data configuration",
    "in background save thread",  # with a traceback; the run raises the same error
)


@contextlib.contextmanager
def without_old_news() -> Iterator[None]:
    """Keeps libraries from logging `OLD_NEWS`, in programs that have no log of their own."""

    def is_news(record: logging.LogRecord) -> bool:
        return not any(text in record.getMessage() for text in OLD_NEWS)

    logger = logging.getLogger("absl")
    logger.addFilter(is_news)
    try:
        yield
    finally:
        logger.removeFilter(is_news)


def import_transformers() -> ModuleType:
    """`transformers`, which would advise to install PyTorch: nothing here needs it."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # read when it is imported
    import transformers  # slow

    return transformers


def skip_absent_tpu(devices: str | os.PathLike[str] = "/dev") -> None:
    """Keeps JAX from looking for a TPU where there is none: libtpu would print errors of its own.

    Call it before JAX is imported. It does nothing where a user has set JAX_PLATFORMS, where libtpu
    is not installed, where variables speak of a TPU, or where there is a device that may be one.

    Args:
      devices: where the system lists devices.
    """
    plugins = ("jax_plugins", "jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin")
    if "JAX_PLATFORMS" in os.environ or importlib.util.find_spec("libtpu") is None:
        return
    if any(importlib.util.find_spec(name) is not None for name in plugins):
        return  # of another accelerator: JAX decides
    root = pathlib.Path(devices)
    asked = any(name.startswith(("TPU_", "CLOUD_TPU", "JAX_FORCE_TPU")) for name in os.environ)
    # vfio/vfio alone is the driver's own, without a device.
    if not asked and not any(root.glob("accel*")) and not any(root.glob("vfio/[0-9]*")):
        os.environ["JAX_PLATFORMS"] = "cpu"
