"""Compiled programs are kept for the next start, unless the run has several processes."""

import subprocess
import sys

import jax
import pytest

from dqe_jax.distributed import compiled

CODE = """
import jax, jax.numpy as jnp
from jax import monitoring
from dqe_jax.distributed import compiled
compiled.LEAST_SECONDS = 0.0
compiled.keep_programs()
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
hits = []
monitoring.register_event_listener(lambda name, **_: hits.append(name))
print(float(jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((8, 8)))[0, 0]))
print("hit" if any("cache_hits" in name for name in hits) else "miss")
"""


def start(cache):
    environ = {
        "XDG_CACHE_HOME": str(cache),
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": ":".join(sys.path),
    }
    command = [sys.executable, "-c", CODE]
    out = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
    return out.stdout.split()


def test_a_second_start_finds_the_programs_of_the_first(tmp_path):
    value, first = start(tmp_path)
    assert first == "miss"
    assert start(tmp_path) == [value, "hit"]
    (place,) = (tmp_path / "dqe_jax" / "programs").iterdir()
    assert place.name.startswith(jax.__version__)


@pytest.mark.parametrize("case", ["chosen", "several processes", "a file", "no device"])
def test_what_is_chosen_stays(tmp_path, monkeypatch, case):
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path) if case == "chosen" else None)
    home = tmp_path / "home"
    if case == "several processes":
        monkeypatch.setattr(jax, "process_count", lambda: 2)
    if case == "a file":
        home.write_text("in the way")
    if case == "no device":
        monkeypatch.setattr(jax, "devices", no_device)
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    try:
        chosen = jax.config.jax_compilation_cache_dir
        compiled.keep_programs()
        assert jax.config.jax_compilation_cache_dir == chosen
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def no_device():
    raise RuntimeError("no backend")
