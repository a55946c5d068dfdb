"""What a run writes to a bucket, each on its own, while every seventh request goes wrong.

No run and no JAX: seconds of processor time each. `bucket_run_test.py` has whole runs.
`python -m pytest -n 0 -m slow -s tests/end_to_end/bucket_parts_test.py` prints the faults.
"""

import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dqe_jax.testing.bucket import KINDS, Bucket, Faults

for _name in ("gcsfs", "gcp_storage_emulator"):
    pytest.importorskip(_name)
pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
RATES = {"slow": 0.05, "429": 0.03, "503": 0.03, "dropped": 0.02, "lost": 0.01}
# A log that goes on from its tenth step.
LOG = """
from etils import epath
from dqe_jax.utils.metric_log import MetricLog
for start in (0, 10):
    log = MetricLog(epath.Path("gs://bucket/run"), start)
    for step in range(start + 1, start + 21):
        log.write(step, {"loss": 1 / step})
    log.close()
assert log.steps() == list(range(1, 31)), log.steps()
"""
# A holder that keeps its lease for long, a second trainer, and a holder that stops.
LEASE = """
import time
import tensorstore as ts
from dqe_jax.training.lease import BusyError, Lease

def take():
    return Lease(ts.KvStore.open("gs://bucket/run/").result(), "gs://bucket/run", 1.5)

def refused(fn, words):
    try:
        fn()
    except BusyError as error:
        assert words in str(error), error
    else:
        raise AssertionError(words)

held = take()
refused(take, "trains in gs://bucket/run: wait until it ends")
time.sleep(6)
held.check()
assert held._count > 8
held._closed.set()
held._thread.join()
other = take()
refused(held.check, "has taken over the run")
other.close()
"""
# 21 files, 60 MB, to the bucket and back.
COPY = """
import os, pathlib
from dqe_jax.data import bucket
place = bucket.local_of("gs://bucket/data") / "shapes" / "plain" / "1.0.0"
place.mkdir(parents=True)
data = os.urandom(3_000_000)
for i in range(20):
    (place / f"part{i}").write_bytes(data[i:])
(place / "dataset_info.json").write_text("{}")
bucket.send("gs://bucket/data", "shapes")
place.rmtree()
bucket.fetch("gs://bucket/data", "shapes")
assert all((place / f"part{i}").read_bytes() == data[i:] for i in range(20))
assert len(list(place.iterdir())) == 21
"""
# Ten points of a curve, written twice as by a run that goes on, and read by another process.
POINTS = """
from types import SimpleNamespace
import numpy as np
from etils import epath
from dqe_jax.evaluation import curve
curve.query_values = lambda *_: {"R@1": np.arange(3.0)}
curve.strata_of = lambda *_: np.zeros(3, np.int32)
queries = SimpleNamespace(reference=np.arange(3), kinds=[("color",), (), ("size", "shape")])
queries.take = lambda rows: queries
split = SimpleNamespace(name="validation", queries=queries)
evaluator = SimpleNamespace(split=split, labelled=np.arange(3), protocol=None)
result = SimpleNamespace(subset_rows=None, places=None, rows=np.zeros((3, 1)))
run = epath.Path("gs://bucket/run")
for step in (*range(1, 11), *range(6, 11)):
    curve.write_point(evaluator, result, run, step, step / 2)
assert curve.steps_of(run, "validation") == list(range(1, 11))
for step in range(1, 11):
    point = curve.read_point(run, "validation", step)
    assert point.epochs == step / 2 and point.values["R@1"].tolist() == [0, 1, 2]
"""
# A damaged checkpoint of 6 files is kept under another name.
ASIDE = """
from etils import epath
from dqe_jax.utils.files import move_directory
root = epath.Path("gs://bucket/run/checkpoints")
files = [f"{folder}/{i}" for folder in ("params", "params/d", "meta") for i in range(2)]
for file in files:
    (root / "6" / file).write_text(file)
move_directory(root / "6", root / "6.damaged")
assert [path.name for path in root.iterdir()] == ["6.damaged"]
assert all((root / "6.damaged" / file).read_text() == file for file in files)
"""
SCRIPTS = {"log": LOG, "lease": LEASE, "copy": COPY, "points": POINTS, "aside": ASIDE}


@pytest.fixture
def bucket():
    logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)
    with Bucket() as made:
        yield made


def run_part(part, bucket, home):
    """A script in a process of its own, which must end well."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPTS[part]],
        env={**os.environ, **bucket.environment(), "PYTHONPATH": str(ROOT), "HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("part", SCRIPTS)
def test_parts_get_through(tmp_path, bucket, part, seed):
    bucket.inject(Faults(RATES, delay_s=0.3, seed=seed))
    began = time.time()
    run_part(part, bucket, tmp_path)
    counts = " ".join(f"{kind} {bucket.counts[kind]}" for kind in KINDS)
    seconds = time.time() - began
    print(f"\n{part} seed {seed}: {bucket.counts['requests']} requests, {counts}, {seconds:.0f} s")
    assert sum(bucket.counts[kind] for kind in KINDS) > 0
    names = bucket.names()
    assert "run/trainer.lease" not in names
    if part == "log":
        assert {"run/metrics.jsonl", "run/timing.jsonl"} <= set(names)


@pytest.mark.parametrize("part", ["points", "aside"])
def test_what_was_done_though_its_answer_is_lost_counts(tmp_path, bucket, part):
    """Where files are moved, a move that is asked for again finds nothing."""
    bucket.inject(Faults({"lost": 0.3}))
    run_part(part, bucket, tmp_path)
    assert bucket.counts["lost"] > 3


def test_what_is_asked_again_too_often_ends_with_an_error(tmp_path, bucket):
    """The door does refuse: with no request answered nothing gets through."""
    bucket.inject(Faults({"503": 1.0}))
    code = "import tensorstore as ts; from dqe_jax.training.lease import take_lease\n"
    code += "from etils import epath; take_lease(epath.Path('gs://bucket/run'))"
    with pytest.raises(subprocess.TimeoutExpired):
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, **bucket.environment(), "PYTHONPATH": str(ROOT)},
            capture_output=True,
            timeout=15,
        )
    assert bucket.counts["503"] == bucket.counts["requests"] > 1
    assert not bucket.names()
