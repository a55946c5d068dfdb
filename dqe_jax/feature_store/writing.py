"""Who writes to a store, and that only one process does; what the disk says ends in a sentence."""

from __future__ import annotations

import contextlib
import fcntl
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from absl import logging

from dqe_jax.distributed import processes
from dqe_jax.feature_store import shards as files
from dqe_jax.feature_store.shards import RowSpec
from dqe_jax.utils.errors import UserError
from dqe_jax.utils.files import JsonObject, is_of_disk

FACTS = "store.json"
LOCK = "lock"  # of a store
LOCK_OF_IMPORTS = ".lock"  # of the directory of all stores; no store can have this name


@contextlib.contextmanager
def open_for_writing(directory: Path) -> Iterator[bool]:
    """Keeps other runs from writing to a store; gives whether this process writes.

    Of several processes one writes to each disk: each disk gets one copy.
    """
    with contextlib.suppress(OSError):  # told by the process that writes
        directory.mkdir(parents=True, exist_ok=True)
    writes = processes.leads_on_disk(directory)
    with contextlib.ExitStack() as stack:
        if writes:
            stack.enter_context(locked(directory))
        processes.wait_for_all(f"the lock of {directory.name}")
        yield writes
        processes.wait_for_all(f"features {directory.name}")


def make(directory: Path, lock: str = LOCK) -> None:
    """Makes a directory and its lock; raises a `UserError` if nothing can be written there."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / lock).touch()
    except OSError as error:
        raise cannot_write(directory, error) from error


@contextlib.contextmanager
def locked(directory: Path, lock: str = LOCK) -> Iterator[bool]:
    """Waits until no other process writes there; gives whether the disk has locks at all.

    A process that is killed loses its lock.

    Args:
      directory: a store, or that of all stores while features are imported; is made.
      lock: name of the file that is locked.
    """
    make(directory, lock)
    with (directory / lock).open("a+") as file:
        has_locks = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logging.info("Another process writes features to %s: waiting for it.", directory)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # shards are whole or not there
            logging.warning("The disk of %s has no locks.", directory)
            has_locks = False
        yield has_locks


def write_facts(directory: Path, facts: JsonObject, specs: Mapping[str, RowSpec]) -> None:
    """Writes what a store holds; raises a `UserError` if that cannot be."""
    arrays = {n: {"shape": list(s.shape), "dtype": str(s.dtype)} for n, s in specs.items()}
    try:
        partial = directory / f"{FACTS}.partial"
        partial.write_text(json.dumps({**facts, "arrays": arrays}, indent=2) + "\n")
        partial.replace(directory / FACTS)
    except OSError as error:
        raise cannot_write(directory, error) from error


def write(directory: Path, number: int, keys: np.ndarray, arrays: Mapping[str, np.ndarray]) -> None:
    """As `shards.write_shard`; raises a `UserError` if the disk cannot be written."""
    try:
        files.write_shard(directory, number, keys, arrays)
    except OSError as error:
        if is_of_disk(error):
            raise cannot_write(directory, error) from error
        raise


def cannot_write(directory: Path, error: OSError) -> UserError:
    """The error that says that a store cannot be written."""
    return UserError(
        f"features cannot be written to {directory} ({error.strerror or error}): what is there "
        "stays; free space or name a writable config.features.directory, and run the same command "
        "again."
    )
