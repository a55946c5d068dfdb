"""Several processes as one run: joining, taking turns, and ending together.

Process 0 leads: it alone writes files and logs. Everything else is the same in all of them.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from dqe_jax.utils.errors import UserError, reason_of

MODES = ("auto", "on", "off")
# Seconds without a word from a process after which JAX ends the others. It gives word every half of
# them, so that a process may stand still for the other half: more than a minute.
HEARTBEAT_S = 180
# What JAX and the libraries below it say, in errors of many types, when another process is gone.
_LOST = (
    *("Gloo", "closed by peer", "reset by peer", "remote process exited", "heartbeat"),
    *("coordination service", "CoordinationService"),
)
T = TypeVar("T")


def join(
    mode: str = "auto",
    *,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout_s: int = 300,
    environ: Mapping[str, str] = os.environ,
) -> None:
    """Joins the other processes of a run; must come before JAX is asked for a device.

    Args:
      mode: "off" never joins; "on" lets JAX find the others out (Cloud TPU, Slurm, Open MPI and
        what else it knows); "auto" joins if the three arguments are given or Slurm started several
        tasks.
      coordinator: `host:port` of process 0.
      num_processes: how many there are.
      process_id: which one this is, from 0.
      timeout_s: seconds to wait for the others.
      environ: the environment.

    Raises:
      UserError: the arguments do not fit together, or the others did not come.
    """
    explicit = _is_explicit(mode, coordinator, num_processes, process_id)
    # A batch script of Slurm has the count too, but only a task that srun started has a step.
    slurm = "SLURM_STEP_NODELIST" in environ and int(environ.get("SLURM_NTASKS", "1")) > 1
    if mode == "off" or not (explicit or slurm or mode == "on"):
        return
    # Training handles SIGTERM by itself, in all processes alike.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            *(coordinator, num_processes, process_id),
            initialization_timeout=timeout_s,
            heartbeat_timeout_seconds=HEARTBEAT_S,
        )
        leading = leads()  # asks for the devices of all, which waits for the others too
    except (RuntimeError, ValueError) as error:
        atexit.register(_exit, 2)  # JAX would wait for the others at the end
        where = coordinator or "the others of this run"
        raise UserError(
            f"this process could not join {where} ({reason_of(error)}): start all processes, with "
            "the same --coordinator, or pass --distributed=off."
        ) from error
    if not leading:
        logging.set_verbosity(logging.WARNING)


def _is_explicit(
    mode: str, coordinator: str | None, num_processes: int | None, process_id: int | None
) -> bool:
    """Whether arguments say how the processes find each other.

    Raises:
      UserError: they do not fit together.
    """
    given = {
        "--coordinator": coordinator,
        "--num_processes": num_processes,
        "--process_id": process_id,
    }
    missing = [name for name, value in given.items() if value is None]
    if num_processes is None or process_id is None or missing:
        if len(missing) == len(given):
            return False
        raise UserError(
            f"{' and '.join(missing)} missing: --coordinator, --num_processes and --process_id "
            "belong together."
        )
    if not 0 <= process_id < num_processes:
        raise UserError(
            f"--process_id is {process_id}: with --num_processes={num_processes} it must be from "
            f"0 to {num_processes - 1}."
        )
    if mode == "off":
        raise UserError("--distributed=off and --coordinator contradict each other: drop one.")
    return True


def leads() -> bool:
    """Whether this process writes files and logs."""
    return jax.process_index() == 0


def wait_for_all(what: str) -> None:
    """Returns when all processes have come here; `what` is the same in all."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def all_agree(flag: bool) -> bool:
    """Whether a flag is true in all processes, which call this together."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.asarray(flag)).all())


def leads_on_disk(directory: Path) -> bool:
    """Whether this process is the first of those that see one another's files in a directory.

    All call this together. On a disk that all share it is process 0.

    Args:
      directory: exists, unless it cannot be made.
    """
    if jax.process_count() == 1:
        return True
    token = int(multihost_utils.broadcast_one_to_all(np.frombuffer(os.urandom(4), np.uint32))[0])
    names = [directory / f"process-{i}-{token:08x}" for i in range(jax.process_count())]
    own = names[jax.process_index()]
    with contextlib.suppress(OSError):  # who may not write does not lead, if another one does
        own.touch()
    wait_for_all(f"{token:08x} is written")
    first = next((name for name in names if name.exists()), own)
    wait_for_all(f"{token:08x} was looked for")
    with contextlib.suppress(OSError):
        own.unlink()
    return first == own


def any_of(flags: np.ndarray) -> np.ndarray:
    """Flags that are true in any process; all call this together."""
    if jax.process_count() == 1:
        return flags
    gathered: np.ndarray = multihost_utils.process_allgather(flags)
    return np.logical_or.reduce(gathered)


def leader_first(what: str, fn: Callable[[], T]) -> T:
    """Runs `fn` in process 0, and then in the others, which find what it left on a shared disk."""
    if leads():
        result = fn()
        wait_for_all(what)
        return result
    wait_for_all(what)
    return fn()


def leave_at_once(status: int) -> None:
    """Makes this process end with `status` without waiting for the others, which then end too.

    Otherwise its exit would wait for processes that wait for it.
    """
    if jax.process_count() > 1:
        atexit.register(_exit, status)


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """An error of what is inside ends this process at once, and so the others.

    Raises:
      UserError: another process has ended, or cannot be reached.
    """
    try:
        yield
    except UserError:
        leave_at_once(2)
        raise
    except Exception as error:
        if jax.process_count() > 1 and _is_of_another(error):
            leave_at_once(2)
            raise UserError(
                f"another process of this run has ended or cannot be reached ({reason_of(error)}): "
                "see what it said, and run the same command again in all processes; what is saved "
                "stays, and they go on from there."
            ) from error
        leave_at_once(1)
        raise


def _is_of_another(error: BaseException | None) -> bool:
    """Whether an error says that another process is gone, or one that led to it does."""
    while error is not None:
        if any(words in str(error) for words in _LOST):
            return True
        error = error.__cause__ or error.__context__
    return False


def _exit(status: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
