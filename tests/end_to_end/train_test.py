"""Training from end to end: what a run writes, resuming, and that it learns."""

import dataclasses
import json
import types

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath
from PIL import Image

from dqe_jax.checkpoints import store
from dqe_jax.config import RunConfig
from dqe_jax.data import datasets
from dqe_jax.data.builders import shapes as shapes_builder
from dqe_jax.evaluation.probability import Probability
from dqe_jax.testing.small_runs import small_config
from dqe_jax.training import loop
from dqe_jax.utils.metric_log import NoLog

STEPS = 40


@pytest.fixture(scope="module")
def base(tmp_path_factory, prepared):
    directory = tmp_path_factory.mktemp("train")
    prepared(directory)
    return directory


def config_of(base, **changes):
    changes = {
        "total_steps": STEPS,
        "log_every": 5,
        "eval_every": 20,
        "checkpoint_every": 20,
        "optimizer.warmup_steps": 4,
        "loss.alignment": 0.1,
        **changes,
    }
    return small_config(base / "prepared", **changes)


@pytest.fixture(scope="module")
def straight(base):
    """A run without interruption: (workdir, final metrics)."""
    workdir = base / "straight"
    return workdir, loop.train_and_evaluate(config_of(base), workdir)


@pytest.fixture(scope="module")
def resumed(base):
    """The same run, stopped half way and started again."""
    workdir = base / "resumed"
    measured = loop.train_and_evaluate(config_of(base), workdir, stop_at=20)
    assert not (workdir / "eval").exists()
    logged = [line for line in lines_of(workdir) if "validation/R@1" in line]
    assert [line["step"] for line in logged] == [20]
    assert logged[0]["validation/R@1"] == measured["R@1"]
    return workdir, loop.train_and_evaluate(config_of(base), workdir)


def lines_of(workdir, log="metrics"):
    return [json.loads(line) for line in (workdir / f"{log}.jsonl").read_text().splitlines()]


def steps_of(workdir, kind):
    """Logged steps of the lines that have a metric of this kind."""
    name = {"train": "loss", "validation": "validation/R@1", "test": "test/R@1"}[kind]
    return [line["step"] for line in lines_of(workdir) if name in line]


def arrays(workdir, step):
    manager = store.open_for_reading(epath.Path(workdir))
    names = ("params", "opt_state")
    items = manager.restore(
        step, args=ocp.args.Composite(**{name: ocp.args.StandardRestore() for name in names})
    )
    return jax.tree.map(np.asarray, {name: items[name] for name in names})


def test_what_a_run_writes(base, straight):
    workdir, metrics = straight
    assert json.loads((workdir / "config.json").read_text())["total_steps"] == STEPS
    assert {p.name for p in (workdir / "checkpoints").iterdir() if p.is_dir()} == {"20", "40"}
    assert list((workdir / "events").iterdir())
    assert steps_of(workdir, "train") == list(range(5, STEPS + 1, 5))
    assert steps_of(workdir, "validation") == [20, 40]
    assert steps_of(workdir, "test") == [40]
    last = [line for line in lines_of(workdir) if "loss" in line][-1]
    wanted = {
        *("loss/in_batch", "loss/preference", "loss/margin", "loss/intent", "loss/alignment"),
        *("negatives/zone", "negatives/fallback", "negatives/delta", "negatives/drawn"),
        *("tau", "grad_norm", "learning_rate", "bad_steps"),
    }
    assert wanted <= last.keys()
    assert all(np.isfinite(v) for line in lines_of(workdir) for v in line.values())
    report = json.loads((workdir / "eval" / "test-40.json").read_text())
    assert report["metrics"] == metrics
    assert (report["step"], report["split"]) == (40, "test")
    assert report["baselines"].keys() == {"random", "reference_only"}
    with Image.open(workdir / "eval" / "test-40.png") as sheet:
        sheet.load()
        assert 400 < sheet.width < 4000
        assert 300 < sheet.height < 4000


def test_checkpoints_of_a_validation_hold_the_probability_of_a_score(straight):
    manager = store.open_for_reading(epath.Path(straight[0]))
    curve = Probability.from_json(store.read_meta(manager, 40)["probability"])
    assert curve.slope > 0


def test_resuming_is_bit_equal_to_going_on(straight, resumed):
    for step in (20, 40):  # 20: saved in the background while training went on, or at the stop
        one, two = arrays(straight[0], step), arrays(resumed[0], step)
        assert len(jax.tree.leaves(one)) > 50
        jax.tree.map(np.testing.assert_array_equal, one, two)
    halves = [arrays(straight[0], step)["params"] for step in (20, 40)]
    moved = [np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, halves))]
    assert max(moved) > 1e-3
    assert straight[1] == resumed[1]


def test_a_resumed_run_logs_each_step_once(straight, resumed):
    one, two = ((run[0] / "metrics.jsonl").read_bytes() for run in (straight, resumed))
    assert one == two
    timing = lines_of(resumed[0], "timing")
    assert [line["step"] for line in timing] == steps_of(resumed[0], "train")
    seconds = [line["train_seconds"] for line in timing]
    assert seconds == sorted(seconds)


def test_a_finished_run_is_only_evaluated(base, resumed, monkeypatch):
    workdir, metrics = resumed
    (workdir / "eval" / "test-40.json").unlink()
    before = lines_of(workdir)
    monkeypatch.setattr(store, "save", None)
    assert loop.train_and_evaluate(config_of(base), workdir) == metrics
    assert json.loads((workdir / "eval" / "test-40.json").read_text())["metrics"] == metrics
    assert lines_of(workdir) == before  # and not a second line of the same step


def test_lines_without_a_terminal(base, caplog):
    """One for a tenth of the run: not one for each step."""
    config = RunConfig.of(config_of(base, total_steps=1500))
    features = types.SimpleNamespace(kinds=())
    session = types.SimpleNamespace(config=config, features=features, examples=32.0)
    reporter = loop._Reporter(session, NoLog(), loop.Stopwatch(), 0)
    with caplog.at_level("INFO"):
        for step in range(1, 1501):
            reporter.write(step, {"loss": 0.5})
    told = [line for line in caplog.messages if line.startswith("train: step")]
    assert len(told) == 10
    assert told[-1].startswith("train: step 1500 of 1500, loss 0.500, ")


@pytest.mark.slow  # `train_step_test.py` learns one batch by heart
def test_it_learns(base, monkeypatch):
    """600 scenes, 160 steps: random is R@1 0.004, the untrained model 0 (it finds the reference).

    Rounding alone, grown by the learning rate, moves R@1 between 0.14 and 0.20.
    """
    variant = shapes_builder.ShapesConfig(name="learn", description="", references=(600, 24, 8))

    def builder(data, prepared_dir):
        return shapes_builder.Shapes(
            config=variant, data_dir=prepared_dir, file_format="array_record"
        )

    info = dataclasses.replace(datasets.DATASETS["shapes"], open=builder)
    monkeypatch.setitem(datasets.DATASETS, "shapes", info)
    config = config_of(base, total_steps=160, log_every=1, eval_every=160, checkpoint_every=160)
    config.num_devices = 1
    config.optimizer.learning_rate, config.optimizer.warmup_steps = 3e-3, 10
    config.batch.references, config.batch.queries_per_reference = 16, 4
    tiny = config.model.tiny
    tiny.width, tiny.embed_dim, tiny.token_dim = 64, 64, 16
    tiny.image_depth = tiny.text_depth = 1
    loop.train_and_evaluate(config, base / "learn")
    lines = lines_of(base / "learn")
    losses = [line["loss"] for line in lines if "loss" in line]
    validation = next(line for line in lines if "validation/R@1" in line)
    assert np.mean(losses[:2]) > 2.2
    assert np.mean(losses[-10:]) < 1.5
    assert validation["validation/R@1"] > 0.1
    assert validation["validation/R@10"] > 0.9
    assert validation["validation/top1_is_reference"] < 0.6
