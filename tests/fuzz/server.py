"""Runs commands in forks of one process that has imported everything, each watched.

A new interpreter imports JAX and TFDS for seconds; a fork starts at once. The process must not have
asked JAX for a device yet. A fork ends without the interpreter's own end, which `fresh` has.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib
import logging
import os
import pkgutil
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[2]
MOST_BYTES = 6 * 2**30  # of memory that a case can get; stacks of threads count
_LIBRARIES = (
    *("jax", "flax.linen", "optax", "orbax.checkpoint", "tensorflow_datasets", "grain"),
    *("tokenizers", "safetensors.numpy", "pyarrow.parquet", "huggingface_hub", "PIL.Image"),
    *("absl.app", "ml_collections.config_flags", "tqdm", "scipy.stats", "array_record.python"),
)
# Modules that define flags, or need an extra, are left to each fork.
_NOT_IMPORTED = ("dqe_jax.cli.", "dqe_jax.testing.torch", "dqe_jax.performance.in_torch")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
      status: its exit status; negative for a signal, None if it was stopped at its time limit.
      said: what it printed, both streams.
      seconds: that it took.
      memory: bytes, the most that it held.
      outside: paths beyond its own directories that it wrote to, as Python's own calls tell.
    """

    status: int | None
    said: str
    seconds: float
    memory: int
    outside: tuple[str, ...]


def warm() -> None:
    """Imports what commands import, and sets what JAX reads once."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    os.environ["HF_TOKEN"] = "hf_nobody"  # without one, push reads no file
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import jax

    from dqe_jax.testing.small_runs import quick_settings, quick_xla_flags

    os.environ["XLA_FLAGS"] = quick_xla_flags()
    for name, value in quick_settings().items():
        jax.config.update(name, value)
    for name in _LIBRARIES:
        importlib.import_module(name)
    import dqe_jax

    for module in pkgutil.walk_packages(dqe_jax.__path__, "dqe_jax."):
        if not module.name.startswith(_NOT_IMPORTED) and module.name != "dqe_jax.__main__":
            try:
                importlib.import_module(module.name)
            except ImportError:  # of an extra
                continue
    importlib.import_module("dqe_jax.cli.commands")
    gc.freeze()


def run(
    arguments: Sequence[str], work: Path, *, limit: float, writable: Sequence[Path] = ()
) -> Ended:
    """Runs `dqe-jax ARGUMENT...` in a fork, with directories of its own, and waits for it.

    Args:
      arguments: of the command, its name first.
      work: its working directory; home and temporary directory lie beside it.
      limit: seconds after which it is stopped with all that it started.
      writable: more directories that it may write to, such as that of compiled programs.
    """
    home, temporary, told = (work.parent / name for name in ("home", "tmp", "told"))
    for place in (home, temporary):
        place.mkdir(exist_ok=True)
    outside = work.parent / "outside"
    began = time.monotonic()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if not child:
        allowed = tuple(map(str, (work.parent, *writable)))
        _begin(work, home, temporary, told, outside, allowed)
        _command(arguments)
    status, usage = _wait(child, began + limit)
    return Ended(
        status,
        told.read_text(errors="replace") if told.exists() else "",
        time.monotonic() - began,
        usage.ru_maxrss * 1024,
        tuple(dict.fromkeys(outside.read_text().splitlines())) if outside.exists() else (),
    )


def fresh(arguments: Sequence[str], work: Path, *, limit: float) -> Ended:
    """Runs `python -m dqe_jax ARGUMENT...` as a process of its own; memory is not measured."""
    home, temporary = (work.parent / name for name in ("home", "tmp"))
    for place in (home, temporary):
        place.mkdir(exist_ok=True)
    began = time.monotonic()
    variables = {**os.environ, "HOME": str(home), "TMPDIR": str(temporary)}
    variables["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, "-m", "dqe_jax", *arguments],
        cwd=work,
        env=variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=limit)
        status: int | None = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        said, status = process.communicate()[0], None
    return Ended(status, said.decode(errors="replace"), time.monotonic() - began, 0, ())


def _wait(child: int, until: float) -> tuple[int | None, resource.struct_rusage]:
    """The status of a child, which is stopped at a time, with what it started."""
    pause = 0.002
    stopped = False
    while True:
        ended, status, usage = os.wait4(child, os.WNOHANG)
        if ended:
            break
        if time.monotonic() > until:
            stopped = True
            _kill(child)
            _, status, usage = os.wait4(child, 0)
            break
        time.sleep(pause)
        pause = min(pause * 1.5, 0.05)
    _kill(child)  # what it started and left
    return None if stopped else os.waitstatus_to_exitcode(status), usage


def _kill(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return


def _begin(
    work: Path, home: Path, temporary: Path, told: Path, outside: Path, allowed: tuple[str, ...]
) -> None:
    """The child, before its command: its own directories, output, limits, and a watch on writes."""
    os.setsid()
    for number, path in ((0, "/dev/null"), (1, told), (2, told)):
        flags = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND
        descriptor = os.open(path, flags, 0o600)
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdin = os.fdopen(0)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    logging.getLogger().handlers.clear()
    os.chdir(work)
    os.environ |= {"HOME": str(home), "TMPDIR": str(temporary), "XDG_CACHE_HOME": str(home)}
    os.environ.pop("DQE_TOKEN", None)
    tempfile.tempdir = None
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (MOST_BYTES, hard))
    log = os.open(outside, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    sys.addaudithook(_watch(log, (*allowed, "/dev/null", "/dev/shm", "/proc/self")))


def _watch(log: int, allowed: tuple[str, ...]) -> Callable[[str, tuple[object, ...]], None]:
    """An audit hook that notes each path beyond `allowed` that is written to, made or removed."""
    changes = ("os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.chmod", "os.utime")

    def note(path: object, made: bool = False) -> None:
        if isinstance(path, bytes):
            path = os.fsdecode(path)
        if not isinstance(path, str | os.PathLike):
            return  # a descriptor
        whole = os.path.abspath(os.path.join(os.getcwd(), path))
        if made and os.path.isdir(whole):
            return  # it is there already
        if not any(whole == one or whole.startswith(one + "/") for one in allowed):
            os.write(log, (whole + "\n").encode(errors="replace"))

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments[:3]
            writes = isinstance(flags, int) and flags & _WRITES
            if isinstance(mode, str):
                writes = bool(set(mode) & set("wax+"))
            if writes:
                note(path)
        elif event in changes:
            if arguments[-1] in (-1, None) or event in ("os.truncate", "os.utime"):
                note(arguments[0], event == "os.mkdir")
        elif event in ("os.rename", "os.link", "os.symlink") and arguments[-1] in (-1, None):
            note(arguments[1])
            if event == "os.rename":
                note(arguments[0])

    return hook


def _command(arguments: Sequence[str]) -> NoReturn:
    """The child: the command, and the end of the process with its status."""
    from dqe_jax.cli import commands

    status = 1
    sys.argv = ["dqe-jax", *arguments]
    try:
        commands.main(list(arguments))
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
        if isinstance(ended.code, str):
            sys.stderr.write(ended.code + "\n")
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
