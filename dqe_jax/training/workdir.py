"""The directory of a run: whose it is, and that one process at a time trains there."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from typing import TextIO

from absl import logging
from etils import epath

from dqe_jax.config import RunConfig, differences
from dqe_jax.training.lease import BusyError, Lease, take_lease
from dqe_jax.utils.errors import UserError
from dqe_jax.utils.files import read_json, write_at_once
from dqe_jax.utils.paths import is_remote, whole_path

LOCK = "trainer.lock"


def claim_workdir(
    workdir: str | os.PathLike[str], config: RunConfig, *, alone: bool = True
) -> tuple[epath.Path, TextIO | Lease | None]:
    """Makes the workdir, keeps other trainers out of it and writes `config.json` there.

    What a trained run holds stays as it is: whether it may go on is known later, see
    `write_config`.

    Args:
      workdir: of the run.
      config: of the run.
      alone: whether this process is to have the lock: of several that train together one has.

    Returns:
      The workdir, and the lock as `lock_workdir` gives it.

    Raises:
      UserError: it is not writable, another process trains there, or it holds a run of another
        config.
    """
    path = whole_path(workdir)
    file = path / "config.json"
    try:
        path.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            # The lock comes first: only one trainer may do what follows.
            lock = lock_workdir(path) if alone else None
            if lock is not None:
                stack.enter_context(lock)
            if _has_trained(path) and (file.exists() or os.path.islink(file)):
                _check_config(file, config)
            else:
                write_config(path, config)
            stack.pop_all()  # all is well: the lock stays
    except OSError as error:
        raise UserError(
            f"--workdir: cannot write to {path} ({error.strerror}); name a writable directory."
        ) from error
    return path, lock


def _check_config(file: epath.Path, config: RunConfig) -> None:
    """Raises a `UserError` if something was trained here by another config."""
    held = read_json(file, dict, "remove it or take another --workdir")
    changed = differences(config, held)
    if changed:
        raise UserError(
            f"{file.parent} holds a run of another config; it differs in {'; '.join(changed)}: "
            "take another --workdir, or the config of that run."
        )


def write_config(workdir: epath.Path, config: RunConfig) -> None:
    """Writes `config.json`, unless it says the same; fields that are free to differ may.

    Raises:
      OSError: it cannot be written.
    """
    file, text = workdir / "config.json", config.to_json()
    if not file.exists() or file.read_bytes() != text.encode():
        write_at_once(file, text)  # a watcher may read it, and this process be killed


def _has_trained(workdir: epath.Path) -> bool:
    """Whether there is a checkpoint: a run that ended before its first one is no obstacle."""
    root = workdir / "checkpoints"
    return root.is_dir() and any(child.name.isdigit() for child in root.iterdir())


def lock_workdir(path: epath.Path) -> TextIO | Lease | None:
    """Keeps other trainers out until this process ends, however it ends.

    The lock is the system's: of one machine, or of a network disk that has locks. In a bucket
    (`gs://`), which has none, it is a lease, see `lease.py`; None where there is neither.

    Args:
      path: of an existing directory.

    Raises:
      BusyError: another process trains there.
    """
    if is_remote(path):
        return take_lease(path)
    file = open(os.fspath(path / LOCK), "a+")  # noqa: SIM115 (open as long as it is locked)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise BusyError(
            f"{holder} trains in {path}: wait until it ends, or take another --workdir."
        ) from error
    except OSError as error:
        logging.warning(
            "The disk of %s has no locks (%s): nothing keeps a second trainer out.",
            *(path, error.strerror),
        )
    file.truncate(0)
    file.write(f"process {os.getpid()} of {socket.gethostname()}\n")
    file.flush()
    return file
