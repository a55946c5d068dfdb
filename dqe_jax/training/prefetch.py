"""Training batches on the devices before they are asked for.

One thread takes batches from the loader and sends them to the devices, a few ahead of the steps.
Unlike Grain's own prefetching (`grain.experimental.device_put`), it knows whether the next batch is
there already: only so can a run tell how long its devices had nothing to do for want of data.
"""

from __future__ import annotations

import collections
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeAlias

import jax

from dqe_jax.data.augmentation import augment_all
from dqe_jax.data.pipeline import Batches
from dqe_jax.distributed import mesh
from dqe_jax.method.arrays import Tree
from dqe_jax.method.batch import Batch
from dqe_jax.utils.files import JsonObject

# Batches that wait on the devices, at most; each takes the memory of its images.
AHEAD = 2
_Read: TypeAlias = "tuple[Batch, JsonObject]"


def send(batch: Batch, devices: Sequence[jax.Device]) -> Batch:
    """Sends a batch to this process's devices, and augments its images there.

    Args:
      batch: of the loader, `[R, ...]`.
      devices: of all processes.

    Returns:
      Arrays `[own devices, R / own devices, ...]`, perhaps still on their way.
    """
    return augment_all(mesh.place(batch, devices))


class DeviceBatches:
    """An endless iterator over training batches that lie on the devices: `data.pipeline.Batches`.

    Its state is that of the batches that were taken; those that wait do not count. An error of the
    loader is raised where its batch is asked for.
    """

    def __init__(self, batches: Batches, place: Callable[[Batch], Batch], ahead: int = AHEAD):
        """Reads nothing before the first batch is asked for.

        Args:
          batches: of the loader, NumPy arrays `[R, ...]`.
          place: sends a batch to the devices.
          ahead: batches that wait on the devices, at most; at least 1.
        """
        self._batches, self._place, self._ahead = batches, place, ahead
        self._state = batches.get_state()
        self._waiting: collections.deque[Future[_Read]] = collections.deque()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="batches")

    def wait(self, busy: Tree = None) -> float:
        """Waits until the next batch is there.

        Args:
          busy: arrays that the devices are still computing, of the step before.

        Returns:
          For how many seconds they had nothing to compute meanwhile.
        """
        self._fill()
        following = self._waiting[0]
        if following.done():
            return 0.0
        jax.block_until_ready(busy)  # costs nothing: there is no step to begin
        start = time.perf_counter()
        wait([following])
        return time.perf_counter() - start

    def __next__(self) -> Batch:
        """The next batch, of arrays `[own devices, ...]`."""
        self._fill()
        try:
            batch, self._state = self._waiting.popleft().result()
        except BaseException:
            self._drop()  # they come after the one that failed
            raise
        self._fill()
        return batch

    def get_state(self) -> JsonObject:
        """As `Batches` says."""
        return self._state

    def set_state(self, state: JsonObject) -> None:
        """As `Batches` says."""
        self._drop()
        self._batches.set_state(state)
        self._state = self._batches.get_state()

    def close(self) -> None:
        """Reads no more; does not wait for a batch that is being read."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _fill(self) -> None:
        while len(self._waiting) < self._ahead:
            self._waiting.append(self._pool.submit(self._read))

    def _drop(self) -> None:
        """Forgets the batches that wait, once none is being read."""
        waiting, self._waiting = self._waiting, collections.deque()
        wait([future for future in waiting if not future.cancel()])

    def _read(self) -> _Read:
        batch = self._place(next(self._batches))
        return jax.block_until_ready(batch), self._batches.get_state()
