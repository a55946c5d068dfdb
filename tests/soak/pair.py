"""Two processes that train one run together, and what can be seen of them from outside."""

from __future__ import annotations

import atexit
import faulthandler
import importlib
import json
import os
import pkgutil
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 400.0  # seconds in which anything that is waited for must happen
# Lines that process 0 writes while it starts.
START_LINES = ("is connected to", "A batch has", "tower is not computed", "Ready after")
_AS_NEW = "import sys; from tests.soak.pair import train; train(sys.argv[1:])"
_LIBRARIES = (
    *("jax", "flax.linen", "optax", "orbax.checkpoint", "tensorflow_datasets", "grain"),
    *("tokenizers", "safetensors.numpy", "absl.app", "ml_collections.config_flags", "tqdm"),
    *("scipy.stats", "array_record.python", "jax.experimental.multihost_utils", "PIL.Image"),
)
_NOT_IMPORTED = ("dqe_jax.cli.", "dqe_jax.testing.", "dqe_jax.performance.", "dqe_jax.serving.")


def warm() -> None:
    """Imports what a run imports, so that forks start at once; asks JAX for no device."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    from dqe_jax.testing.small_runs import quick_xla_flags

    os.environ["XLA_FLAGS"] = quick_xla_flags(1)
    for name in _LIBRARIES:
        importlib.import_module(name)
    import dqe_jax

    for module in pkgutil.walk_packages(dqe_jax.__path__, "dqe_jax."):
        if not module.name.startswith(_NOT_IMPORTED) and "__main__" not in module.name:
            try:
                importlib.import_module(module.name)
            except ImportError:  # of an extra
                continue
    importlib.import_module("dqe_jax.cli.commands")


def compiling(cache: Path, *, writes: bool) -> dict[str, str]:
    """Settings of JAX, as variables, with which programs are kept and found.

    A killed process could leave half a program: runs that are killed only read.
    """
    return {
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_COMPILATION_CACHE_MAX_SIZE": "-1",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0" if writes else "1e9",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def train(words: Sequence[str]) -> NoReturn:
    """`dqe-jax train WORD...` with small shards of features, up to the end of the process."""
    from dqe_jax.cli import commands
    from dqe_jax.feature_store import store

    store.SHARD_BYTES = 1  # a shard of each batch
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    status = 1
    sys.argv = ["dqe-jax train", *words]
    try:
        commands.run("train", words)
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
        if isinstance(ended.code, str):
            sys.stderr.write(ended.code + "\n")
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    # As the interpreter ends, which a fork cannot do from here.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    os._exit(status)


class Process:
    """One of the two.

    Attributes:
      pid: its id.
      log: the file of what it prints.
      status: of its end; negative for a signal, None while it lives.
    """

    def __init__(
        self, words: Sequence[str], log: Path, variables: Mapping[str, str], *, forked: bool
    ):
        self.log, self.status, self._started = log, None, None
        log.touch()
        if not forked:
            with log.open("ab") as file:
                self._started = subprocess.Popen(
                    [sys.executable, "-c", _AS_NEW, *words],
                    cwd=ROOT,
                    env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=file,
                    start_new_session=True,
                )
            self.pid = self._started.pid
            return
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if not self.pid:
            try:
                _begin(log, variables)
                train(words)
            finally:
                os._exit(1)

    def ended(self) -> bool:
        """Whether it has ended."""
        if self.status is None and self._started is not None:
            self.status = self._started.poll()
        elif self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
        return self.status is not None

    def send(self, number: int) -> None:
        """Sends a signal, if it lives."""
        if not self.ended():
            os.kill(self.pid, number)

    def said(self) -> str:
        """What it has printed so far."""
        return self.log.read_text(errors="replace")


def _begin(log: Path, variables: Mapping[str, str]) -> None:
    """A fork, before its command: its output, and what JAX reads of the environment."""
    os.setsid()
    for number, path, flags in (
        (0, "/dev/null", os.O_RDONLY),
        (1, log, os.O_WRONLY | os.O_APPEND),
        (2, log, os.O_WRONLY | os.O_APPEND),
    ):
        descriptor = os.open(path, flags)
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdin = os.fdopen(0)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    import logging
    from multiprocessing import util

    logging.getLogger().handlers.clear()
    # It would end the processes of the harness, such as the one that reads checkpoints.
    atexit.unregister(util._exit_function)
    os.environ |= variables
    import jax

    for name, value in variables.items():
        field = name.lower()
        if field in jax.config.values:
            held = jax.config.values[field]
            if isinstance(held, bool):
                jax.config.update(field, value == "true")
            else:
                kind = type(held) if held is not None else str
                jax.config.update(field, kind(float(value)) if kind in (int, float) else value)


class Pair:
    """The two processes of one start of a run."""

    def __init__(
        self,
        flags: Sequence[str],
        workdir: Path,
        logs: Path,
        name: str,
        variables: Mapping[str, str],
        own: Sequence[Mapping[str, str]] = ({}, {}),
        *,
        forked: bool = True,
    ):
        """Starts them.

        Args:
          flags: of the command, but for those that join processes.
          workdir: of the run.
          logs: directory for what they print.
          name: of the start.
          variables: environment of both.
          own: that of each.
          forked: whether they are forks of this process, or begin with an interpreter of their own.
        """
        self.workdir = workdir
        self.before = last_step(workdir)
        coordinator = f"localhost:{_free_port()}"
        self.both = [
            Process(
                [
                    f"--workdir={workdir}",
                    *flags,
                    f"--coordinator={coordinator}",
                    "--num_processes=2",
                    f"--process_id={i}",
                ],
                logs / f"{name}-{i}.txt",
                {**variables, **own[i]},
                forked=forked,
            )
            for i in range(2)
        ]

    def ended(self) -> bool:
        """Whether both have ended."""
        return all([process.ended() for process in self.both])

    def ready(self) -> bool:
        """Whether process 0 has said that the first step comes."""
        return "Ready after" in self.both[0].said()

    def own_step(self) -> int:
        """The last step that is logged; -1 until this start has logged one."""
        if "The first step was done" not in self.both[0].said():
            return -1
        return last_step(self.workdir)

    def wait(self, what: Callable[[], bool], limit: float = LIMIT) -> bool:
        """Waits until something holds; False if a process ends before, or the time is over."""
        until = time.monotonic() + limit
        while not what():
            if any([process.ended() for process in self.both]) or time.monotonic() > until:
                return what()
            time.sleep(0.002)
        return True

    def wait_for_end(self, limit: float = LIMIT) -> bool:
        """Waits until both have ended; whether they did."""
        until = time.monotonic() + limit
        while not self.ended():
            if time.monotonic() > until:
                return False
            time.sleep(0.005)
        return True

    def close(self) -> None:
        """Ends what still lives, after it has said where it is."""
        for process in self.both:
            process.send(signal.SIGCONT)
        for process in self.both:
            process.send(signal.SIGUSR1)
        if not self.ended():
            time.sleep(0.5)
        for process in self.both:
            process.send(signal.SIGKILL)
        self.wait_for_end(60)


def last_step(workdir: Path) -> int:
    """The step of the last whole line of a run's log; 0 without one."""
    try:
        with (workdir / "metrics.jsonl").open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 8192))
            lines = file.read().split(b"\n")[:-1]
    except OSError:
        return 0
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError):
            continue
    return 0


def _free_port() -> int:
    with socket.socket() as held:
        held.bind(("localhost", 0))
        return int(held.getsockname()[1])
