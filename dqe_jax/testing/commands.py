"""Runs modules as commands, in processes of their own that start at once.

A new interpreter imports JAX and TFDS for seconds. These processes are forks of one that has
imported them, and has not asked JAX for a device: each is as fresh as a new interpreter.
"""

from __future__ import annotations

import functools
import gc
import logging
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from multiprocessing.context import ForkServerContext
from pathlib import Path

from dqe_jax.testing.small_runs import compiles_quickly

# What is imported once. Nothing of dqe_jax: its flags and shape checks belong to each process.
_IMPORTED = (
    *("jax", "flax.linen", "optax", "orbax.checkpoint", "tensorflow_datasets", "grain"),
    *("absl.flags", "ml_collections.config_flags", "tokenizers", "PIL.Image", "tqdm"),
)


@functools.cache
def _context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_IMPORTED))
    return context


def run_module(
    module: str,
    *arguments: str,
    cwd: str | os.PathLike[str],
    env: Mapping[str, str] | None = None,
    timeout: float = 300,
) -> subprocess.CompletedProcess[str]:
    """Runs `python -m MODULE ARGUMENT...` on CPUs, compiling quickly, and waits for it.

    Args:
      module: such as `dqe_jax.prepare`.
      *arguments: of the command.
      cwd: its working directory.
      env: more variables; JAX has read its own already, from those of `compiles_quickly`.
      timeout: seconds after which it is killed.

    Returns:
      What it printed, and its exit status.

    Raises:
      subprocess.TimeoutExpired: it took longer.
    """
    variables = compiles_quickly() | {"JAX_PLATFORMS": "cpu"}
    before = {name: os.environ.get(name) for name in variables}
    with tempfile.TemporaryDirectory() as place:
        outputs = [Path(place, name) for name in ("stdout", "stderr")]
        os.environ.update(variables)  # the first call starts the process that the others fork
        try:
            more = {**variables, **(env or {})}
            process = _context().Process(
                target=_run, args=(module, arguments, os.fspath(cwd), more, outputs)
            )
            process.start()
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired([module, *arguments], timeout)
        stdout, stderr = (path.read_text(errors="replace") for path in outputs)
    return subprocess.CompletedProcess([module, *arguments], process.exitcode, stdout, stderr)


def _run(
    module: str, arguments: tuple[str, ...], cwd: str, env: dict[str, str], outputs: list[Path]
) -> None:
    """The child: its output goes to files, and its working directory is where modules are found."""
    for number, path in enumerate(outputs, 1):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.dup2(descriptor, number)
        os.close(descriptor)
    gc.freeze()  # what is imported stays; Python need not look through it for garbage
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    logging.getLogger().handlers.clear()  # an import may have made one
    os.environ.update(env)
    os.chdir(cwd)
    paths = [path for path in env.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = ["", *paths, *(path for path in sys.path if path not in ("", *paths))]
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
