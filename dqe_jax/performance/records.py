"""What all benchmarks record beside their figures: the machine, the versions, the settings."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import psutil
from etils import epath

from dqe_jax import __version__
from dqe_jax.utils.files import JsonObject, make_directory, write_json

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
IN_TORCH = ("torch", "transformers")


class Seconds(NamedTuple):
    """Seconds by the clock, and of processor time of all threads of this process."""

    clock: float
    processor: float


def time_of(run: Callable[[], object], count: int = 1) -> Seconds:
    """What a call takes, divided by `count`."""
    used, start = time.process_time(), time.perf_counter()
    run()
    return Seconds(
        (time.perf_counter() - start) / count, max(time.process_time() - used, 1e-9) / count
    )


@dataclasses.dataclass(frozen=True)
class Spread:
    """Seconds of something that was timed in rounds.

    Attributes:
      median: of the rounds.
      p95: 95th percentile of the rounds, interpolated.
      quartiles: 25th and 75th percentile.
      rounds: how many.
      processor: seconds of processor time of this process, of all threads, in the median round.
        Other programs hardly change it.
    """

    median: float
    p95: float
    quartiles: tuple[float, float]
    rounds: int
    processor: float

    @classmethod
    def of(cls, rounds: Sequence[Seconds]) -> Spread:
        """Of the times of each round."""
        clock = [one.clock for one in rounds]
        low, median, high, p95 = (float(x) for x in np.percentile(clock, (25, 50, 75, 95)))
        processor = float(np.median([one.processor for one in rounds]))
        return cls(median, p95, (low, high), len(rounds), processor)

    @property
    def relative(self) -> float:
        """Half the distance of the quartiles, as a share of the median."""
        return (self.quartiles[1] - self.quartiles[0]) / 2 / self.median


def seconds_since_start() -> float:
    """Seconds since this process was started."""
    return time.time() - psutil.Process().create_time()


def threads() -> int:
    """Processors that this process may use: XLA takes as many threads."""
    affinity = getattr(os, "sched_getaffinity", None)  # not everywhere
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def machine(devices: Sequence[jax.Device]) -> JsonObject:
    """The hardware; `load` is the mean number of threads that wanted it in the last minute."""
    return {
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "platform": devices[0].platform,
        "processor": processor(),
        "cores": threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "load": round(psutil.getloadavg()[0], 1),
        "system": platform.platform(),
    }


def busy() -> str | None:
    """A sentence where other programs wanted the processors too; None where they hardly did."""
    load, own = psutil.getloadavg()[0], threads()
    if load < 1.5 * own:
        return None
    return (
        f"Other programs were running (load {load:.1f} on {own} processors): take the ratios, not "
        "the times, and those with care."
    )


def processor() -> str:
    """The name of the processor, as the system says it."""
    file = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", file.read_text()) if file.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def versions(more: Sequence[str] = ()) -> dict[str, str]:
    """Releases of what a step is made of, and of more packages."""
    named = {name: importlib.metadata.version(name) for name in (*PACKAGES, *more)}
    return {"dqe_jax": __version__, "python": platform.python_version(), **named}


def device_peak(devices: Sequence[jax.Device]) -> int | None:
    """The most bytes that any of the devices has held, where devices count them."""
    stats = [device.memory_stats() for device in devices]
    peaks = [int(s["peak_bytes_in_use"]) for s in stats if s and "peak_bytes_in_use" in s]
    return max(peaks, default=None)


def claim(file: str | os.PathLike[str] | None) -> None:
    """Makes the directory of a report before anything is timed.

    Raises:
      UserError: it cannot be made.
    """
    if file is not None:
        make_directory(epath.Path(file).parent)


def write(
    file: str | os.PathLike[str] | None,
    benchmark: str,
    results: Mapping[str, JsonObject],
    *,
    devices: Sequence[jax.Device],
    settings: JsonObject,
    packages: Sequence[str] = (),
) -> None:
    """Writes a report as JSON, if there is a file for it.

    Args:
      file: that is written; None for none.
      benchmark: which one: "step", "data", "mine" or "features".
      results: by name of the config, or of what was measured.
      devices: that were used.
      settings: of the benchmark.
      packages: that matter beside `PACKAGES`.

    Raises:
      UserError: it cannot be written.
    """
    if file is None:
        return
    report = {
        "benchmark": benchmark,
        "command": sys.argv,
        "machine": machine(devices),
        "versions": versions(packages),
        "settings": settings,
        "results": dict(results),
    }
    write_json(epath.Path(file), report)
