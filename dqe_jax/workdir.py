"""The directory of a run: whose it is, and that one process at a time trains there."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from typing import Any, TextIO

from etils import epath

from dqe_jax.config import differences
from dqe_jax.utils.errors import UserError

LOCK = "trainer.lock"


def claim_workdir(workdir: str | os.PathLike[str], config: Any) -> epath.Path:
    """Makes the workdir and writes `config.json` there.

    Raises:
      UserError: it is not writable, or holds a run of another config.
    """
    path = epath.Path(workdir).expanduser().absolute()
    file = path / "config.json"
    try:
        path.mkdir(parents=True, exist_ok=True)
        if file.exists() and _has_trained(path):
            held = json.loads(file.read_text())
            changed = differences(config.to_dict(), held)
            if changed:
                raise UserError(
                    f"{path} holds a run of another config; it differs in {'; '.join(changed)}: "
                    "take another --workdir, or the config of that run."
                )
        file.write_text(json.dumps(config.to_dict(), indent=2) + "\n")
    except OSError as error:
        raise UserError(
            f"--workdir: cannot write to {path} ({error.strerror}); name a writable directory."
        ) from error
    except json.JSONDecodeError as error:
        raise UserError(
            f"{file} is not JSON ({error}); remove it or take another --workdir."
        ) from error
    return path


def _has_trained(workdir: epath.Path) -> bool:
    """Whether there is a checkpoint: a run that ended before its first one is no obstacle."""
    root = workdir / "checkpoints"
    return root.is_dir() and any(child.name.isdigit() for child in root.iterdir())


def lock_workdir(path: epath.Path) -> TextIO | None:
    """Keeps other trainers out until this process ends, however it ends.

    The lock is the system's: of one machine, or of a network disk that has locks. Bucket storage
    (`gs://`) has none: there this is None, and nothing keeps a second trainer out.

    Raises:
      UserError: another process trains there.
    """
    if "://" in os.fspath(path):
        return None
    file = open(os.fspath(path / LOCK), "a+")  # noqa: SIM115 (open as long as it is locked)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise UserError(
            f"{holder} trains in {path}: wait until it ends, or take another --workdir."
        ) from error
    file.truncate(0)
    file.write(f"process {os.getpid()} of {socket.gethostname()}\n")
    file.flush()
    return file
