"""Compiled programs are kept on disk, so that a second start does not compile them again."""

from __future__ import annotations

import hashlib
import os
import platform
import re
from pathlib import Path

import jax
from absl import logging

# Programs that compile more quickly are not worth a file.
LEAST_SECONDS = 1.0
MOST_BYTES = 2**31


def keep_programs() -> None:
    """Keeps programs in the user's cache, if this run has one process.

    Processes of one run would wait for each other where only some of them find a program. A cache
    that the user has chosen (`JAX_COMPILATION_CACHE_DIR`) stays, and so does the choice of none
    (`JAX_ENABLE_COMPILATION_CACHE=false`).
    """
    if jax.process_count() > 1 or jax.config.values["jax_compilation_cache_dir"]:
        return
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    try:
        place = Path(home, "dqe_jax", "programs", machine_key())
    except RuntimeError:  # no device: what asks for one next says so
        return
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        logging.info("%s: compiled programs are not kept (%s).", place, error.strerror)
        return
    for name, value in {
        "jax_compilation_cache_dir": str(place),
        "jax_compilation_cache_max_size": MOST_BYTES,
        "jax_persistent_cache_min_compile_time_secs": LEAST_SECONDS,
    }.items():
        jax.config.update(name, value)


def machine_key() -> str:
    """What compiled programs depend on: the version of jax, and the processor or accelerator."""
    device = jax.devices()[0]
    made_for = device.device_kind
    if device.platform == "cpu":
        cpuinfo = Path("/proc/cpuinfo")
        flags = re.search(r"flags.*", cpuinfo.read_text()) if cpuinfo.exists() else None
        made_for = f"{platform.machine()} {flags and flags[0]}"
    return f"{jax.__version__}-{hashlib.sha256(made_for.encode()).hexdigest()[:12]}"
