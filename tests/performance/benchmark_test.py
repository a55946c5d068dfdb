"""The benchmarks: steps beside their baseline, features of towers, and mining beside NumPy."""

import json
import re
from pathlib import Path

import pytest

from configs import fiq, shapes
from dqe_jax.config import RunConfig
from dqe_jax.performance import step_benchmark
from dqe_jax.performance.features_benchmark import COMPUTED, COPIED, WRITTEN, benchmark_features
from dqe_jax.performance.mining_benchmark import Workload, benchmark_mining
from dqe_jax.performance.step_benchmark import benchmark_step
from dqe_jax.testing.commands import run_module
from dqe_jax.testing.small_models import BACKBONES, small_model_config
from dqe_jax.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def binary(name, *arguments):
    done = run_module(f"dqe_jax.{name}", *arguments, cwd=ROOT)
    return done.returncode, done.stderr


SMALLER = (
    *("--config.model.tiny.image_depth=0", "--config.model.tiny.text_depth=0"),
    *("--config.model.tiny.composer_depth=1", "--rounds=2", "--steps=1"),
)
COLUMNS = ["step", "ms", "p95", "+-", "cpu", "ms", "examples/s", "TFLOP/s", "MFU", "GiB", "ratio"]


@pytest.mark.slow
def test_the_table_has_all_variants_and_a_ratio_to_the_baseline():
    flags = ("--config.num_devices=2", "--config.batch.accumulate=2")
    status, said = binary("benchmark", "--config=configs/shapes.py:smoke", *SMALLER, *flags)
    assert status == 0, said
    lines = [line for line in said.splitlines() if not line.startswith("Other programs were")]
    renamed, head, machine, columns, *rows, first = lines
    assert renamed == "This is `dqe-jax benchmark step` now; this name stays."
    each = "32 queries of 8 references in each of the 2 batches of an update."
    assert head == f"shapes:smoke: tiny, float32, {each}"
    assert machine.startswith("2 x cpu, jax ")
    assert columns.split() == COLUMNS
    assert max(map(len, said.splitlines())) <= 120
    found = {row[:20].strip(): row[20:].split() for row in rows}
    assert list(found) == ["config", "no mined negatives", "no attribute weights", "InfoNCE"]
    assert found["InfoNCE"][-1] == "1.00"
    for milliseconds, p95, _, _, rate, *_, ratio in found.values():
        assert abs(float(rate) * float(milliseconds) / 1e3 - 32) < 1
        assert float(p95) >= float(milliseconds)
        assert abs(float(ratio) - float(milliseconds) / float(found["InfoNCE"][0])) < 0.02
    numbers = re.fullmatch(
        r"First step of 'config' after ([\d.]+) s: ([\d.]+) s to start, ([\d.]+) s to build, "
        r"([\d.]+) s to compile, ([\d.]+) s for the step\.",
        first,
    ).groups()
    total, *parts = map(float, numbers)
    assert abs(total - sum(parts)) < 0.3


@pytest.mark.slow
def test_several_configs_are_named_and_their_figures_written(tmp_path):
    done = run_module(
        *("dqe_jax", "benchmark", "step", "shapes:smoke", "shapes:coarse,smoke"),
        *(*SMALLER, "--variants=config", f"--json={tmp_path}/a/found.json"),
        *(f"--trace={tmp_path}/trace", "--config.batch.references=4"),
        "--config.num_devices=2",
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    held = json.loads((tmp_path / "a" / "found.json").read_text())
    assert held.keys() == {*("benchmark", "command", "machine", "versions", "settings", "results")}
    assert held["benchmark"] == "step"
    assert held["settings"] == {"rounds": 2, "steps": 1, "vs": ""}
    assert held["machine"].keys() >= {"devices", "processor", "cores", "memory_gib"}
    assert {"dqe_jax", "jax", "flax", "python"} <= held["versions"].keys()
    assert list(held["results"]) == ["shapes:smoke", "shapes:coarse,smoke"]
    for name, found in held["results"].items():
        assert found["config"] == name
        assert found["queries"] == 16  # the override is for all
        (time,) = found["times"].values()
        spread = time["spread"]
        assert spread["quartiles"][0] <= spread["median"] <= spread["p95"]
        assert time["examples_per_second"] == pytest.approx(16 / spread["median"])
        assert time["mfu"] == pytest.approx(
            time["flop"] / spread["median"] / (found["ceiling"] * found["num_devices"])
        )
        assert 0 < time["mfu"] < 1
        assert time["memory"] > 1e5
        assert min(time["first"][key] for key in ("building", "compiling", "running")) > 0
        profile = tmp_path / "trace" / name
        assert list(profile.rglob("*.xplane.pb"))
        assert list(profile.rglob("perfetto_trace.json.gz"))


@pytest.mark.slow
def test_a_stored_tower_is_timed_beside_one_in_each_step(caplog):
    config = shapes.get_config("smoke")
    config.model.frozen, config.num_devices = ("vision", "text"), 1
    with caplog.at_level("INFO"):
        times = benchmark_step(config, rounds=1, steps=1).times
    assert list(times)[-1] == "towers in each step"
    assert times["towers in each step"].flop > 1.2 * times["config"].flop
    said = re.search(
        r"Stored features make a step ([\d.]+) times faster; by the count of FLOP it is "
        r"([\d.]+) times cheaper\.",
        caplog.text,
    )
    assert float(said[2]) > 1.2


@pytest.mark.slow
def test_flop_are_those_of_all_layers_however_they_are_computed(monkeypatch):
    monkeypatch.setattr(
        step_benchmark, "sizes_for", lambda config, layers: BACKBONES[config.model.backbone].sizes
    )
    times = {}
    for scanned in (False, True):
        changes = {"model.scan_layers": scanned, "model.remat": scanned, "num_devices": 1}
        config = small_model_config("clip", **changes)
        report = benchmark_step(config, rounds=1, steps=1, names=["InfoNCE"])
        times[scanned] = report.times["InfoNCE"]
    assert times[True].flop == times[False].flop > 1e5


@pytest.mark.slow
@pytest.mark.parametrize("mining", ["step", "refresh"])
def test_a_step_that_mines_from_a_bank_is_timed(mining):
    config = shapes.get_config("smoke")
    config.num_devices, config.negatives.pool, config.negatives.mining = 2, "bank", mining
    wanted = ["config", "InfoNCE"]
    report = benchmark_step(config, rounds=1, steps=1, names=wanted, bank_images=600)
    assert list(report.times) == wanted
    assert report.settings["pool"] == "bank"
    # 600 embeddings, padded to 512 rows of each device, are in the memory of the mined step.
    more = report.times["config"].memory - report.times["InfoNCE"].memory
    assert more > 512 * config.model.tiny.embed_dim * 4


def test_a_bank_has_room_for_the_targets_of_a_batch():
    config = shapes.get_config("smoke")
    config.negatives.pool, config.num_devices = "bank", 1
    with pytest.raises(UserError, match=r"--bank_images=5: a batch has 32 targets"):
        benchmark_step(config, rounds=1, steps=1, bank_images=5)


def test_layers_of_a_tower_are_cut():
    sizes = step_benchmark.sizes_for(RunConfig.of(fiq.get_config()), 8)
    assert (sizes.vision.depth, sizes.vision.width, sizes.depth) == (8, 1408, 12)
    with pytest.raises(UserError, match=r"--tower_layers=8: the backbone 'tiny' has no"):
        benchmark_step(shapes.get_config("smoke"), tower_layers=8)


@pytest.mark.slow  # compiles a step for each way
def test_features_of_frozen_towers_are_timed(tmp_path):
    done = run_module(
        *("dqe_jax", "benchmark", "features", "shapes:smoke", "--rounds=2"),
        *("--config.model.frozen=('vision','text')", "--config.eval.batch_size=16"),
        *(f"--json={tmp_path}/found.json", f"--config.data.prepared_dir={tmp_path}"),
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    held = json.loads((tmp_path / "found.json").read_text())
    assert held["benchmark"] == "features"
    towers = held["results"]["shapes:smoke"]["towers"]
    assert towers.keys() == {"image", "text"}
    for kind, one in towers.items():
        assert one["rows_per_second"].keys() == {COMPUTED, COPIED, WRITTEN}
        assert 0 < one["mfu"] < 1
        assert f"{kind}s, {WRITTEN}" in done.stderr
    assert towers["image"]["row_bytes"] == 9 * 32 * 4  # tokens, width, float32
    assert not list(tmp_path.glob("tmp*"))


def test_features_of_a_config_that_stores_nothing():
    with pytest.raises(UserError, match=r"shapes: no tower of this config is stored; freeze one"):
        benchmark_features(shapes.get_config("smoke"), label="shapes")


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


def test_mining_is_timed_without_flags(tmp_path):
    workload = Workload(queries=64, tokens=2, width=8, timed_queries=32, bounds="std")
    (found,) = benchmark_mining([100], workload, baseline_queries=0, json_file=tmp_path / "m.json")
    held = json.loads((tmp_path / "m.json").read_text())
    assert held["results"] == {"100 images": vars(found)}
    assert held["settings"]["bounds"] == "std"
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
