"""How long the devices of a run waited for data, and what to do about it."""

from __future__ import annotations

import os

from absl import logging

from dqe_jax.config import RunConfig

# Above this share of the time a run is told what to do.
MUCH = 0.2
# Seconds of training over which it is measured before anything is said: a short run is no matter.
LEAST_SECONDS = 10.0


class DataWait:
    """Adds up the time that the devices of this process waited for data; warns once."""

    def __init__(self, config: RunConfig, *, stored: bool = False):
        """Of a run; `stored` says whether it looks up features in place of images."""
        self._config, self._stored, self._told = config, stored, False
        self._waited = 0.0  # since the last line
        self._window, self._seconds = 0.0, 0.0  # waited, and of training, since last looked at

    def add(self, seconds: float) -> None:
        """Seconds that were waited before a step."""
        self._waited += seconds

    def take(self, seconds: float) -> dict[str, float]:
        """What the log says of the time since the last call.

        Args:
          seconds: of training in this time.

        Returns:
          `data_wait_seconds`, and `data_wait`, which is their share of the time.
        """
        waited, self._waited = self._waited, 0.0
        self._window, self._seconds = self._window + waited, self._seconds + seconds
        if self._seconds >= LEAST_SECONDS:
            share = self._window / self._seconds
            if share > MUCH and not self._told:
                self._told = True
                logging.warning(
                    "%s", advice(self._config, share, os.cpu_count() or 1, stored=self._stored)
                )
            self._window = self._seconds = 0.0
        return {"data_wait_seconds": waited, "data_wait": min(waited / max(seconds, 1e-9), 1.0)}


def advice(config: RunConfig, share: float, cores: int, *, stored: bool = False) -> str:
    """What a user can do about a run that waits for data.

    Args:
      config: of the run.
      share: of the time, in which the devices had nothing to do.
      cores: of this machine.
      stored: whether the run looks up features in place of images.
    """
    data, ways = config.data, []
    if data.num_threads < cores:
        ways.append(
            f"read with more threads (config.data.num_threads is {data.num_threads}, this machine "
            f"has {cores} cores)"
        )
    if stored and config.features.place in ("auto", "disk"):
        ways.append("keep features in memory (config.features.place)")
    if not stored and not data.cache_images:
        ways.append("keep decoded images in memory (config.data.cache_images=True)")
    if not stored and data.dataset != "shapes" and data.image_format == "png":
        ways.append("store images as JPEG or raw (config.data.image_format)")
    if not ways:
        ways.append("take a machine with more or faster cores")
    said = " or ".join([", ".join(ways[:-1]), ways[-1]] if ways[1:] else ways)
    return (
        f"For {share:.0%} of the time the devices waited for data: {said}; `dqe-jax benchmark "
        "data` measures what these give."
    )
