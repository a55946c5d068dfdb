"""The curve of bounds: its settings, its arithmetic, its files, and its errors."""

import json
import re

import jax
import numpy as np
import pytest
from PIL import Image

from configs import shapes
from dqe_jax.config import RunConfig, flatten
from dqe_jax.experiments import bound_curve
from dqe_jax.experiments.bound_curve import Point
from dqe_jax.testing.small_runs import small_config
from dqe_jax.training import loop
from dqe_jax.utils.errors import UserError


def changed_fields(config, other):
    before, after = (flatten(c.to_dict()) for c in (config, other))
    return {name: after[name] for name in before if before[name] != after[name]}


def test_a_point_changes_the_bounds_and_no_other_field():
    config = RunConfig.of(shapes.get_config())
    own = bound_curve.config_at(config, 0.1, "floor", 4)
    assert changed_fields(config, own) == {"negatives.lower": 0.1, "seed": 4}
    own = bound_curve.config_at(config, 0.02, "free", 0)
    assert changed_fields(config, own) == {"negatives.floor": -np.inf}
    bounds = {"rule": "hardest", "bounds": "absolute", "lower": 0.1, "upper": 0.4}
    config = config.with_changes({f"negatives.{name}": value for name, value in bounds.items()})
    own = bound_curve.config_at(config, 0.2, "floor", 0)
    changes = {"rule": "trns", "bounds": "quantile", "lower": 0.2, "upper": 1.0}
    found = changed_fields(config, own)
    assert found == {f"negatives.{name}": value for name, value in changes.items()}


@pytest.mark.parametrize(
    ("words", "found"), [(["0.1", "0", "1e-1"], [0, 0.1]), (["0.005"], [0.005])]
)
def test_read_lowers(words, found):
    assert bound_curve.read_lowers(words) == found


@pytest.mark.parametrize("words", [["-0.1"], ["1"], ["nan"], ["0", "few"]])
def test_lowers_that_are_none(words):
    with pytest.raises(UserError, match=r"--lowers="):
        bound_curve.read_lowers(words)


def test_means_are_over_the_steps_that_mined():
    log = [
        {"step": 1, "loss": 1.0},
        {"step": 2, "negatives/delta": 0.2, "negatives/false": 0.5},
        {"step": 3, "negatives/delta": 0.4, "negatives/false": 0.0},
    ]
    found = bound_curve.means_of_drawn(log)
    assert found == pytest.approx({"delta": 0.3, "false": 0.25})
    del log[1]["negatives/false"], log[2]["negatives/false"]
    assert bound_curve.means_of_drawn(log) == pytest.approx({"delta": 0.3})


def test_rows_and_table():
    points = [
        Point(0.1, "floor", seed, {"R@1": value}, {"false": 0.2, "delta": 0.1}, "x")
        for seed, value in ((0, 0.5), (1, 0.7))
    ] + [Point(0.1, "free", 0, {"R@1": 0.4}, {"false": 0.6, "delta": 0.0}, "y")]
    rows = bound_curve.summarize(points)
    assert [(row["lower"], row["floor"], row["runs"]) for row in rows] == [
        (0.1, "floor", 2),
        (0.1, "free", 1),
    ]
    assert rows[0]["R@1"] == pytest.approx((0.6, np.sqrt(0.02)))
    assert rows[1]["R@1"] == (0.4, None)
    assert bound_curve.table_cells(rows) == [
        ("lower quantile", "floor", "runs", "R@1", "false", "delta"),
        ("0.1", "delta > floor", "2", "0.6000 ± 0.1414", "0.2000 ± 0.0000", "0.1000 ± 0.0000"),
        ("0.1", "none", "1", "0.4000", "0.6000", "0.0000"),
    ]


def config_of(base):
    return small_config(
        base / "prepared",
        **{
            "data.variant": "coarse_smoke",
            "total_steps": 4,
            "log_every": 1,
            "eval_every": 4,
            "checkpoint_every": 4,
            "num_devices": 1,
            "eval.sheet_queries": 1,
        },
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    base = tmp_path_factory.mktemp("curve")
    config = config_of(base)
    with pytest.MonkeyPatch.context() as patch:
        # `ablate_test.py` looks at it.
        patch.setattr(jax, "clear_caches", lambda: None)
        points = bound_curve.run_curve(config, base / "runs", lowers=(0.0,), seeds=1)
    return config, base / "runs", points


@pytest.mark.slow  # two runs
def test_what_it_writes(finished):
    _, workdir, points = finished
    assert [point.directory for point in points] == [
        "lower-0-floor-0",
        "lower-0-free-0",
    ]
    facts = json.loads((workdir / "bounds.json").read_text())
    assert [row["lower"] for row in facts["rows"]] == [0, 0]
    for point, written in zip(points, facts["points"]):
        report = json.loads((workdir / point.directory / "eval" / "test-4.json").read_text())
        assert written["metrics"]["mAP@10"] == report["metrics"]["mAP@10"]
        lines = map(json.loads, (workdir / point.directory / "metrics.jsonl").open())
        false = [line["negatives/false"] for line in lines if "negatives/false" in line]
        assert len(false) == 4
        assert written["drawn"]["false"] == pytest.approx(np.mean(false))
    # The floor keeps the hardest out.
    delta = {point.floor: point.drawn["delta"] for point in points}
    assert delta["floor"] > delta["free"]
    text = (workdir / "bounds.md").read_text()
    assert re.findall(r"^\| 0 \| (none|delta > floor) \| 1 \|", text, re.M) == [
        "delta > floor",
        "none",
    ]
    with Image.open(workdir / "bounds.png") as image:
        assert image.width == round(150 * 3 * 3.6)
        assert len(image.convert("RGB").getcolors(1 << 20)) > 10


@pytest.mark.slow
def test_a_complete_curve_is_only_read(finished, monkeypatch):
    config, workdir, points = finished
    monkeypatch.setattr(loop, "train_and_evaluate", None)
    assert bound_curve.run_curve(config, workdir, lowers=(0.0,), seeds=1) == points


def test_a_curve_needs_a_floor(tmp_path):
    config = RunConfig.of(config_of(tmp_path)).with_changes({"negatives.floor": -np.inf})
    with pytest.raises(UserError, match=r"negatives\.floor is -inf"):
        bound_curve.run_curve(config, tmp_path, lowers=(0.1,), seeds=1)


def test_a_curve_needs_something_mined(tmp_path):
    """Said before anything is trained."""
    config = shapes.get_config()
    config.negatives.update(pool="bank", first_refresh=config.total_steps)
    with pytest.raises(UserError, match=r"first_refresh is 1500: nothing would be mined"):
        bound_curve.run_curve(config, tmp_path, lowers=(0.1,), seeds=1)
