"""What can go wrong in a run: steps that are not finite, and failures of the machine."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import jax
from absl import logging
from etils import epath

from dqe_jax.checkpoints import store
from dqe_jax.distributed.interrupts import Interrupted
from dqe_jax.training.step import Control
from dqe_jax.utils.errors import UserError, reason_of
from dqe_jax.utils.files import is_of_disk

if TYPE_CHECKING:
    import orbax.checkpoint as ocp  # slow to import


@contextlib.contextmanager
def in_sentences(workdir: epath.Path, data_dir: epath.Path) -> Iterator[None]:
    """Raises a `UserError` for what the machine does to a run, the end of saving included."""
    try:
        yield
    except (UserError, Interrupted):
        raise
    except Exception as error:
        sentence = _in_a_sentence(error, workdir, data_dir)
        if sentence is None:
            raise
        raise sentence from error


def _in_a_sentence(error: Exception, workdir: epath.Path, data_dir: epath.Path) -> UserError | None:
    """The `UserError` for what the machine did to a run; None for anything else."""
    steps = store.steps_of(workdir)
    kept = f"step {steps[-1]} is saved" if steps else "nothing is saved yet"
    if not data_dir.is_dir():
        sentence = f"the data in {data_dir} is gone: {kept}; put it back"
    elif is_of_disk(error):
        sentence = (
            f"cannot write to {workdir} ({reason_of(error)}): {kept}; free space or make it "
            "writable"
        )
    else:
        return None
    return UserError(f"{sentence}, and run the same command again: it continues from there.")


class Guard:
    """Looks at steps shortly after they were taken, so that the device never waits for the host.

    All processes see the same values at the same step, and so act alike.
    """

    BEHIND = 2

    def __init__(self, max_bad_steps: int, manager: ocp.CheckpointManager):
        self._most, self._manager = max_bad_steps, manager
        self._waiting: collections.deque[tuple[int, Control]] = collections.deque()

    def check(self, step: int, control: Control) -> int:
        """Notes a step; the number of the signal that came by `BEHIND` steps before, or 0.

        Raises:
          UserError: too many steps in a row were not finite.
        """
        self._waiting.append((step, control))
        return self._look() if len(self._waiting) > self.BEHIND else 0

    def check_all(self) -> int:
        """Looks at all that are left; returns and raises as `check`."""
        return max([self._look() for _ in range(len(self._waiting))], default=0)

    def _look(self) -> int:
        step, control = self._waiting.popleft()
        seen = jax.device_get((control.stop, control.bad_in_a_row, control.whole))
        stop, bad, whole = (int(x) for x in seen)
        if not whole:  # never of a step: it takes back what is not finite
            raise UserError(
                f"the parameters are not finite at step {step}, as they were at the start: look at "
                "config.model.weights, or at the checkpoint that the run goes on from."
            )
        if bad == 1:
            logging.warning(
                "Step %d: the loss, a gradient or a parameter is not finite; it is skipped.", step
            )
        if bad >= self._most:
            newest = self._manager.latest_step()
            kept = "no checkpoint is saved" if newest is None else f"step {newest} is saved"
            raise UserError(
                f"the loss, a gradient or a parameter was not finite in {bad} steps in a row, up "
                f"to step {step}: lower config.optimizer.learning_rate, or look at the data of "
                f"these steps (config.max_bad_steps is {self._most}); {kept}."
            )
        return stop
