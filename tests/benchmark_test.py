"""The benchmark times every variant beside its baseline."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def benchmark(*arguments):
    done = subprocess.run(
        [sys.executable, "-m", "dqe_jax.benchmark", *arguments],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stderr


def test_the_table_has_all_variants_and_a_ratio_to_the_baseline():
    status, said = benchmark(
        *("--config=configs/shapes.py:smoke", "--config.num_devices=2", "--rounds=2", "--steps=1"),
        *("--config.model.tiny.image_depth=0", "--config.model.tiny.text_depth=0"),
    )
    assert status == 0, said
    head, _, *rows = said.splitlines()[-6:]
    assert head.startswith("2 x cpu, jax ")
    assert "32 queries of 8 references" in head
    found = {row[:22].strip(): [float(x) for x in row[22:].split()] for row in rows}
    assert list(found) == ["config", "no mined negatives", "no attribute weights", "InfoNCE"]
    assert found["InfoNCE"][-1] == 1.0
    for milliseconds, rate, _, ratio in found.values():
        assert abs(rate * milliseconds / 1e3 - 32) < 1
        assert abs(ratio - milliseconds / found["InfoNCE"][0]) < 0.02


def test_a_scanned_stack_is_refused():
    status, said = benchmark("--config=configs/fiq.py", "--config.data.max_length=16")
    assert status == 2
    assert re.fullmatch(r"error: config\.model\.scan_layers is True: .*\n", said)
