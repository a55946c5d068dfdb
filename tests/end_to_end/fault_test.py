"""A run that is killed again and again ends as one that was left alone, to the byte.

The short form kills once, the slow one at least 20 times:
`python -m pytest -m slow tests/end_to_end/fault_test.py`.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

from dqe_jax.checkpoints import store
from dqe_jax.cli.config_files import load_config
from dqe_jax.testing.small_runs import compiles_quickly
from dqe_jax.training import loop

ROOT = Path(__file__).resolve().parents[2]
END = 40  # steps before the end in which nothing is killed
EVERY = {"checkpoint_every": 10, "eval_every": 15, "negatives.refresh_every": 8}
FIELDS = {
    **EVERY,
    "log_every": 1,
    "keep_checkpoints": 1000,
    "num_devices": 1,
    "optimizer.warmup_steps": 4,
    "batch.references": 4,
    "batch.queries_per_reference": 2,
    "model.tiny.image_depth": 0,
    "model.tiny.text_depth": 0,
    "model.tiny.composer_depth": 1,
    "negatives.pool": "bank",
    "negatives.first_refresh": 4,
    "negatives.warmup": "rule",
}


class Runs:
    """Runs of one config in directories of their own."""

    def __init__(self, base, total_steps, cache):
        self.base, self.fields = base, {**FIELDS, "total_steps": total_steps}
        self.cache = cache  # the environment that says where compiled programs are kept
        self.fields["data.prepared_dir"] = str(base / "prepared")

    def start(self, name):
        flags = [f"--config.{field}={value}" for field, value in self.fields.items()]
        with (self.base / f"{name}.log").open("a") as log:
            return subprocess.Popen(
                [
                    *(sys.executable, "-m", "dqe_jax.main", "--config=configs/shapes.py:smoke"),
                    f"--workdir={self.base / name}",
                    *flags,
                ],
                cwd=ROOT,
                env={
                    **os.environ,
                    "JAX_PLATFORMS": "cpu",
                    **self.cache,
                },
                stdout=log,
                stderr=log,
            )

    def said(self, name):
        return (self.base / f"{name}.log").read_text()

    def finish(self, name):
        process = self.start(name)
        assert process.wait(600) == 0, self.said(name)

    def alone(self, name):
        """A run of this process."""
        config = load_config("shapes:smoke")
        config.update_from_flattened_dict(self.fields)
        loop.train_and_evaluate(config, self.base / name)

    def logged_steps(self, name):
        """How many steps the log holds; a line that is being written does not count."""
        path = self.base / name / "metrics.jsonl"
        if not path.exists():
            return 0
        lines = path.read_bytes().split(b"\n")[:-1]
        return json.loads(lines[-1])["step"] if lines else 0

    def kill_at(self, name, step, delay, number):
        """Starts the run and kills it `delay` seconds after it has logged a step of its own.

        Kills nothing, and lets it end, if it goes on so near to its end that it could be missed.
        """
        log = self.base / f"{name}.log"
        before = self.said(name).count("Ready after") if log.exists() else 0
        process, resumed = self.start(name), None
        until = time.time() + 600
        while resumed is None or self.logged_steps(name) < max(step, resumed + 1):
            if resumed is None and self.said(name).count("Ready after") > before:
                resumed = self.logged_steps(name)
                if resumed > self.fields["total_steps"] - END:
                    assert process.wait(600) == 0, self.said(name)
                    return False
            assert process.poll() is None, self.said(name)
            assert time.time() < until, self.said(name)
            time.sleep(0.005)
        time.sleep(delay)
        process.send_signal(number)
        assert process.wait(300) == {signal.SIGKILL: -9, signal.SIGTERM: 143}[number], self.said(
            name
        )
        return True

    def checkpoints(self, name):
        return store.steps_of(epath.Path(self.base / name))

    def arrays(self, name, step):
        manager = store.open_for_reading(epath.Path(self.base / name))
        names = ("params", "opt_state")
        args = {item: ocp.args.StandardRestore() for item in names}
        items = manager.restore(step, args=ocp.args.Composite(**args))
        return jax.tree.map(np.asarray, {item: items[item] for item in names})


def check_kills(base, total_steps, kills, least, seed):
    # Of its own: a kill may leave half a program.
    cache = compiles_quickly(base / "compiled")
    runs, rng = Runs(base, total_steps, cache), random.Random(seed)
    runs.finish("whole")
    # Always well before the end; saves, evaluations and refreshes are all within reach.
    steps = sorted(rng.randint(1, total_steps - END) for _ in range(kills))
    newest, killed = 0, 0
    for i, step in enumerate(steps):
        number = signal.SIGTERM if i % 2 else signal.SIGKILL
        killed += runs.kill_at("killed", step, rng.uniform(0, 0.1), number)
        held = runs.checkpoints("killed")
        assert max(held, default=0) >= newest, "a checkpoint was lost"
        newest = max(held, default=0)
        # What is there is whole.
        assert not held or len(jax.tree.leaves(runs.arrays("killed", newest))) > 50
    runs.finish("killed")
    assert killed >= least
    assert runs.said("killed").count("Resumed from step") >= 1
    check_same(runs)


def check_same(runs):
    """The runs "whole" and "killed" have the same log, and the same arrays at the end."""
    base, total_steps = runs.base, runs.fields["total_steps"]
    one, other = (base / name / "metrics.jsonl" for name in ("whole", "killed"))
    assert one.read_bytes() == other.read_bytes()
    assert runs.checkpoints("whole") == runs.checkpoints("killed")
    assert runs.checkpoints("whole")[-1] == total_steps
    final = (runs.arrays(name, total_steps) for name in ("whole", "killed"))
    jax.tree.map(np.testing.assert_array_equal, *final)


def test_a_kill(tmp_path, prepared):
    """A signal that asks to end is sent in `multi_process_test.py` and `guards_test.py`."""
    prepared(tmp_path)
    # Programs are read and never written.
    cache = {**compiles_quickly(), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1e9"}
    runs = Runs(tmp_path, 60, cache)
    runs.alone("whole")
    # The bank has been filled again since the checkpoint of step 10, which has that of step 4.
    assert runs.kill_at("killed", 19, 0.03, signal.SIGKILL)
    newest = max(runs.checkpoints("killed"))
    assert newest >= 10
    assert len(jax.tree.leaves(runs.arrays("killed", newest))) > 50  # it is whole
    runs.alone("killed")
    check_same(runs)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1])
def test_many_kills(tmp_path, seed):
    check_kills(tmp_path, total_steps=800, kills=24, least=20, seed=seed)
