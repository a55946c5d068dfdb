"""Runs whose directory and data lie in a bucket, emulated on this machine, with faults or without.

`python -m pytest -n 0 -m slow -s tests/end_to_end/bucket_run_test.py` prints what was injected, how
often, and what the run did. It needs `pip install 'dqe_jax[bucket-test]'`.
"""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from dqe_jax.testing.bucket import KINDS, Bucket, Faults
from dqe_jax.testing.small_runs import compiles_quickly

for _name in ("gcsfs", "gcp_storage_emulator"):
    pytest.importorskip(_name)
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]  # five processes compile

ROOT = Path(__file__).resolve().parents[2]
STEPS = 24
FIELDS = {
    "total_steps": STEPS,
    "checkpoint_every": 6,
    "eval_every": 12,
    "eval.curve": True,
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
    "negatives.refresh_every": 8,
    "negatives.warmup": "rule",
}
# Shares of all requests; every seventh goes wrong.
RATES = {"slow": 0.05, "429": 0.03, "503": 0.03, "dropped": 0.02, "lost": 0.01}
RUN = "gs://bucket/run"
COMPLETE = "run/checkpoints/6/commit_success.txt"


@pytest.fixture
def bucket():
    logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)
    with Bucket() as made:
        yield made


class Runs:
    """Starts processes that see a bucket, or none, and reads what they write there."""

    def __init__(self, base, bucket=None):
        (base / "home").mkdir()
        self.bucket = bucket
        self.env = {
            **os.environ,
            **compiles_quickly(),
            **({} if bucket is None else bucket.environment()),
            "JAX_PLATFORMS": "cpu",
            "HOME": str(base / "home"),  # copies of data are kept there
        }

    def start(self, module, *flags, workdir=RUN, prepared="gs://bucket/data"):
        fields = {**FIELDS, "data.prepared_dir": prepared}
        return subprocess.Popen(
            [
                *(sys.executable, "-m", module, "--config=configs/shapes.py:smoke"),
                f"--workdir={workdir}",
                *(f"--config.{name}={value}" for name, value in fields.items()),
                *flags,
            ],
            cwd=ROOT,
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def finish(self, *args, status=0, **kwargs):
        process = self.start(*args, **kwargs)
        said, _ = process.communicate(timeout=1800)
        assert process.returncode == status, said
        return said

    def text(self, name):
        path = f"/storage/v1/b/bucket/o/{name.replace('/', '%2F')}?alt=media"
        status, _, content = self.bucket.forward("GET", path)
        return content.decode() if status == 200 else ""

    def logged(self):
        return len(self.text("run/metrics.jsonl").splitlines())

    def kill_after(self, process, lines):
        """Kills a run that has logged, and whose first checkpoint is complete: they come later."""
        while self.logged() < lines or COMPLETE not in self.bucket.names():
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.2)
        process.send_signal(signal.SIGKILL)
        process.communicate()

    def rows(self, name):
        return [json.loads(line) for line in self.text(name).split("\n") if line]


def params_of(env, workdir):
    """The last parameters, read by a process that looks at the bucket."""
    code = (
        "import sys, jax, numpy as np; from dqe_jax.checkpoints import store;"
        "m = store.open_for_reading(sys.argv[1]);"
        f"leaves = jax.tree.leaves(store.restore_params(m, {STEPS}));"
        "np.savez(sys.argv[2], *leaves)"
    )
    place = Path(env["HOME"]) / "params.npz"
    command = [sys.executable, "-c", code, str(workdir), str(place)]
    subprocess.run(command, env={**env, "PYTHONPATH": str(ROOT)}, check=True, timeout=900)
    with np.load(place) as found:
        return [found[name] for name in found.files]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run on a disk that nothing disturbs."""
    base = tmp_path_factory.mktemp("disk")
    Runs(base).finish("dqe_jax.main", workdir=base / "whole", prepared=str(base / "data"))
    return base / "whole"


@pytest.mark.parametrize("rates", [{}, RATES], ids=["no faults", "faults"])
def test_a_run_in_a_bucket(tmp_path, bucket, whole, rates):
    """Killed, resumed, followed and evaluated: as a run on a disk, to the byte."""
    runs = Runs(tmp_path, bucket)
    bucket.inject(Faults(rates, delay_s=1.0, seed=1))
    began = time.time()
    first = runs.start("dqe_jax.main")
    runs.kill_after(first, 9)
    # What it prepared is in the bucket; this machine's copy is lost, as that of another machine.
    assert any(name.startswith("data/shapes/") for name in bucket.names())
    subprocess.run(["rm", "-r", str(tmp_path / "home" / ".cache" / "dqe_jax" / "buckets")])
    watcher = runs.start("dqe_jax.evaluate", "--watch", "--poll_s=2", "--split=validation")
    resumed = runs.start("dqe_jax.main")
    said, _ = resumed.communicate(timeout=1800)
    assert resumed.returncode == 0, said
    assert "looking for 60 s whether it renews its lease" in said
    assert "Resumed from step " in said, said
    watched, _ = watcher.communicate(timeout=1800)
    assert watcher.returncode == 0, watched
    evaluated = runs.finish("dqe_jax.evaluate", "--split=test")
    seconds = time.time() - began
    bucket.inject(Faults({}))

    assert runs.text("run/metrics.jsonl") == (whole / "metrics.jsonl").read_text()
    assert "run/trainer.lease" not in bucket.names()
    assert any(name.startswith("run/events/") for name in bucket.names())
    lines = runs.rows("run/watch-validation/metrics.jsonl")
    assert {line["step"] for line in lines} == {6, 12, 18, 24}
    assert "R@1" in evaluated
    for name in ("curve/test-12.npz", "curve/test-24.npz", "eval/test-24.json"):
        assert f"run/{name}" in bucket.names()
    jax.tree.map(
        np.testing.assert_array_equal,
        params_of(runs.env, RUN),
        params_of(runs.env, whole),
    )
    counts = " ".join(f"{kind} {bucket.counts[kind]}" for kind in KINDS)
    print(f"\n{bucket.counts['requests']} requests, {counts}, {seconds:.0f} s; as on a disk")
    assert all(bucket.counts[kind] for kind in rates)


def test_a_second_trainer_is_kept_out(tmp_path, bucket):
    runs = Runs(tmp_path, bucket)
    data = str(tmp_path / "data")
    first = runs.start("dqe_jax.main", "--config.total_steps=100000", prepared=data)
    while not runs.logged():  # before its first steps SIGTERM ends it at once, and leaves the lease
        assert first.poll() is None, first.communicate()[0]
        time.sleep(0.2)
    said = runs.finish("dqe_jax.main", status=2, prepared=data)
    assert f"process {first.pid} of " in said
    assert "trains in gs://bucket/run: wait until it ends, or take another --workdir." in said
    first.send_signal(signal.SIGTERM)
    said, _ = first.communicate(timeout=900)
    assert first.returncode == 143, said
    assert "run/trainer.lease" not in bucket.names()
