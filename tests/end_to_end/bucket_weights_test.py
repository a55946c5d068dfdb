"""Converted weights in a bucket: written there, and the start of a run, while requests go wrong.

`python -m pytest -n 0 -m slow -s tests/end_to_end/bucket_weights_test.py` prints the faults. It
needs `pip install 'dqe_jax[bucket-test]'`.
"""

import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dqe_jax.testing.bucket import KINDS, Bucket, Faults
from dqe_jax.testing.pretrained import copy_weights
from dqe_jax.testing.small_runs import compiles_quickly

for _name in ("gcsfs", "gcp_storage_emulator"):
    pytest.importorskip(_name)
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

ROOT = Path(__file__).resolve().parents[2]
RATES = {"slow": 0.05, "429": 0.03, "503": 0.03, "dropped": 0.02, "lost": 0.01}
FIELDS = {
    "total_steps": 2,
    "checkpoint_every": 2,
    "eval_every": 2,
    "log_every": 1,
    "num_devices": 1,
    "optimizer.warmup_steps": 1,
    "batch.references": 4,
    "batch.queries_per_reference": 1,
    "data.max_length": 12,
    "model.backbone": "clip",
    "model.clip.variant": "auto",
    "model.clip.composer_width": 16,
    "model.clip.composer_heads": 2,
    "model.attributes.width": 8,
}
# What a start reads of converted weights, beside what it reads of those that were converted.
EQUAL = """
import dataclasses, sys
import jax, numpy as np
from dqe_jax.models.settings import ModelConfig
from dqe_jax.models.weights.initial import open_pretrained
def opened(weights):
    config = ModelConfig(backbone="clip", weights=weights)
    return open_pretrained(
        dataclasses.replace(config, clip=dataclasses.replace(config.clip, variant="auto"))
    )
held, source = map(opened, sys.argv[1:])
assert held.sizes == source.sizes and held.tokenizer and held.source is None
jax.tree.map(np.testing.assert_array_equal, held.read(), source.read())
"""


@pytest.fixture
def bucket():
    logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)
    with Bucket() as made:
        yield made


@pytest.fixture
def run(tmp_path, bucket):
    """Runs a command that sees the bucket; returns what it printed."""
    (tmp_path / "home").mkdir()
    env = {
        **os.environ,
        **compiles_quickly(),
        **bucket.environment(),
        **{"JAX_PLATFORMS": "cpu", "HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)},
    }

    def run(*arguments, status=0):
        done = subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=ROOT,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=1800,
        )
        assert done.returncode == status, done.stdout
        return done.stdout

    return run


@pytest.fixture
def source(tmp_path):
    """A small CLIP with random weights and a tokenizer, as `save_pretrained` writes it."""
    copy_weights(ROOT / "tests" / "golden" / "clip", "clip", tmp_path / "clip")
    return tmp_path / "clip"


@pytest.mark.parametrize("rates", [{}, RATES], ids=["no faults", "faults"])
def test_weights_are_converted_to_a_bucket(bucket, run, source, rates):
    bucket.inject(Faults(rates, delay_s=0.3, seed=1))
    began = time.time()
    convert = ("-m", "dqe_jax.convert", f"--source={source}", "--output=gs://bucket/clip")
    assert "parameters of clip, with a tokenizer" in run(*convert)
    run("-c", EQUAL, "gs://bucket/clip", source)
    counts = " ".join(f"{kind} {bucket.counts[kind]}" for kind in KINDS)
    seconds = time.time() - began
    print(f"\n{bucket.counts['requests']} requests, {counts}, {seconds:.0f} s; equal to the byte")
    assert any(bucket.counts[kind] for kind in rates) == bool(rates)
    bucket.inject(Faults({}))
    assert "--output: gs://bucket/clip already holds weights; name another" in run(
        *convert, status=2
    )
    # Killed before the end, a conversion leaves parameters without facts.
    bucket.forward("DELETE", "/storage/v1/b/bucket/o/clip%2Fweights.json")
    assert "holds params/ of a conversion that did not end; remove it" in run(*convert, status=2)


def test_a_run_starts_from_weights_in_a_bucket(tmp_path, bucket, run, source):
    """As one from the weights on a disk, to the byte."""
    run("-m", "dqe_jax.convert", f"--source={source}", "--output=gs://bucket/clip")
    bucket.inject(Faults(RATES, delay_s=0.3, seed=2))
    for name, weights in (("bucket", "gs://bucket/clip"), ("disk", source)):
        fields = {
            **FIELDS,
            "data.prepared_dir": tmp_path / "data",
            "model.weights": weights,
        }
        run(
            *("-m", "dqe_jax.main", "--config=configs/shapes.py:smoke"),
            f"--workdir={tmp_path / name}",
            *(f"--config.{key}={value}" for key, value in fields.items()),
        )
    logs = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("bucket", "disk")]
    assert logs[0] == logs[1]
    assert logs[0].count(b"loss") >= 2


def test_a_directory_without_converted_weights_is_refused(run):
    said = run(
        *("-m", "dqe_jax.main", "--config=configs/shapes.py:smoke", "--workdir=x"),
        *("--config.model.backbone=clip", "--config.model.clip.variant=auto"),
        "--config.model.weights=gs://bucket/nothing",
        status=2,
    )
    assert "weights 'gs://bucket/nothing': there are no converted weights in this" in said
    assert "Traceback" not in said
