"""The benchmarks: every variant of a step beside its baseline, and mining beside NumPy."""

import re
from pathlib import Path

import pytest

from configs import fiq, shapes
from dqe_jax.performance.mining_benchmark import Workload, benchmark_mining
from dqe_jax.performance.step_benchmark import benchmark_step
from dqe_jax.testing.commands import run_module
from dqe_jax.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def binary(name, *arguments):
    done = run_module(f"dqe_jax.{name}", *arguments, cwd=ROOT)
    return done.returncode, done.stderr


def test_the_table_has_all_variants_and_a_ratio_to_the_baseline():
    status, said = binary(
        *("benchmark", "--config=configs/shapes.py:smoke", "--rounds=2", "--steps=1"),
        *("--config.model.tiny.image_depth=0", "--config.model.tiny.text_depth=0"),
        "--config.model.tiny.composer_depth=1",
        "--config.num_devices=2",
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


def test_a_stored_tower_is_timed_beside_one_in_each_step(caplog):
    config = shapes.get_config("smoke")
    config.model.frozen, config.num_devices = ("vision", "text"), 1
    with caplog.at_level("INFO"):
        times = benchmark_step(config, rounds=1, steps=1)
    assert list(times)[-1] == "towers in each step"
    assert times["towers in each step"].flop > 1.2 * times["config"].flop
    said = re.search(
        r"Stored features make a step ([\d.]+) times faster; by the count of FLOP it is "
        r"([\d.]+) times cheaper\.",
        caplog.text,
    )
    assert float(said[2]) > 1.2


def test_a_scanned_stack_is_refused():
    config = fiq.get_config()
    config.data.max_length = 16
    with pytest.raises(UserError, match=r"config\.model\.scan_layers is True: "):
        benchmark_step(config)


SMALL = ("--queries=200", "--tokens=2", "--width=8", "--timed_queries=50", "--rule=hardest")


def test_the_table_of_mining_has_a_line_for_each_gallery():
    status, said = binary("mining_benchmark", "--gallery=300,1200", "--baseline_queries=4", *SMALL)
    assert status == 0, said
    head, _, *rows, last = said.splitlines()[-5:]
    assert head.endswith("200 queries, 2 tokens of width 8, float32, rule hardest.")
    assert [row.split()[0] for row in rows] == ["300", "1,200"]
    assert {len(row.split()) for row in rows} == {7}
    assert re.fullmatch(
        r"QuRe in NumPy and Python, 300 images: \d+ s \(from 4 queries\), [\d.]+ times that\.", last
    )


def test_mining_is_timed_without_flags():
    workload = Workload(queries=64, tokens=2, width=8, timed_queries=32, bounds="std")
    (found,) = benchmark_mining([100], workload, baseline_queries=0)
    assert found.seconds > 0
    assert found.gflops > 0
    assert found.bank > 0
    with pytest.raises(UserError, match=r"--gallery=1,5: give at least 2 images"):
        benchmark_mining([1, 5], workload)
    with pytest.raises(UserError, match=r"--gallery=: give at least 2 images"):
        benchmark_mining([], workload)


def test_galleries_that_are_no_numbers():
    status, said = binary("mining_benchmark", "--gallery=x")
    assert status == 2
    assert said.endswith("error: --gallery=x: give whole numbers.\n")
