"""The moving average of the parameters: against NumPy, saved, resumed, and what is evaluated."""

import functools
import json
import shutil

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from dqe_jax.checkpoints import export, opened, store, trained
from dqe_jax.evaluation.run import evaluate_checkpoint
from dqe_jax.testing.small_runs import compiled_once, run_config
from dqe_jax.training import loop, zero
from dqe_jax.training import state as states
from dqe_jax.training.average import moved

DECAY = 0.3  # above those of the first two updates, (1 + n) / (10 + n)
STEPS = 5


@pytest.fixture(scope="module", autouse=True)
def shared_steps():
    with compiled_once():
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory, prepared):
    base = tmp_path_factory.mktemp("average")
    prepared(base)
    return base


def config_of(base, **changes):
    fields = {
        **{"total_steps": STEPS, "checkpoint_every": 1, "keep_checkpoints": STEPS, "log_every": 1},
        **{"eval_every": STEPS, "optimizer.warmup_steps": 2, "optimizer.ema_decay": DECAY},
        "eval.sheet_queries": 1,
    }
    return run_config(base / "prepared", **fields | changes)


@pytest.fixture(scope="module")
def straight(base):
    """A run without interruption: its workdir, and its metrics at the end."""
    return base / "straight", loop.train_and_evaluate(config_of(base), base / "straight")


def read(workdir, step, item="average"):
    return flatten_dict(store.restore_params(store.open_for_reading(workdir), step, item), sep="/")


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def assert_close(one, other, atol):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_allclose(one[name], other[name], atol=atol, err_msg=name)


def in_numpy(average, params, number):
    decay = min(DECAY, (1 + number) / (10 + number))
    return {name: decay * average[name] + (1 - decay) * params[name] for name in params}


def test_it_is_that_of_numpy(straight):
    average = None
    for step in range(1, STEPS + 1):
        params, found = read(straight[0], step, "params"), read(straight[0], step)
        if average is not None:
            average = in_numpy(average, params, step)
            assert_close(found, average, 1e-6)
        average = average or found
    assert all(x.dtype == np.float32 for x in found.values())
    assert max(np.abs(found[name] - params[name]).max() for name in params) > 1e-4


def test_an_update_that_is_left_out_changes_nothing():
    rng = np.random.default_rng(0)
    one, two = ({"x": rng.normal(size=(3, 2)).astype(np.float32)} for _ in range(2))
    step = jax.jit(functools.partial(moved, decay=0.9))
    np.testing.assert_array_equal(step(one, two, step=np.int32(5), applied=False)["x"], one["x"])
    kept = 7 / 16
    np.testing.assert_allclose(
        step(one, two, step=np.int32(5), applied=True)["x"],
        kept * one["x"] + (1 - kept) * two["x"],
        atol=1e-6,
    )


def test_a_resumed_run_has_the_same(base, straight):
    workdir = base / "resumed"
    loop.train_and_evaluate(config_of(base), workdir, stop_at=3)
    assert loop.train_and_evaluate(config_of(base), workdir) == straight[1]
    assert_same(read(workdir, STEPS), read(straight[0], STEPS))
    assert_same(read(workdir, STEPS, "params"), read(straight[0], STEPS, "params"))


def test_it_is_what_is_evaluated_opened_and_exported(base, straight):
    workdir, metrics = straight
    average = read(workdir, STEPS)
    assert_same(
        flatten_dict(trained.open_trained(config_of(base), workdir).params, sep="/"), average
    )
    written = export.export_run(workdir, base / "exported")
    for place in (workdir, written):
        assert_same(flatten_dict(opened.open_model(place, num_devices=1).params, sep="/"), average)
    result = evaluate_checkpoint(config_of(base), workdir)
    assert result.metrics == metrics
    (report,) = (workdir / "eval").glob(f"test-{STEPS}.json")
    assert json.loads(report.read_text())["averaged"] is True
    # The parameters themselves have other metrics, or at least other scores.
    alone = base / "alone"
    shutil.copytree(workdir, alone)
    for file in (alone / "checkpoints" / str(STEPS) / "meta").rglob("*"):
        if file.is_file() and f'"ema_decay": {DECAY}' in file.read_text():
            file.write_text(file.read_text().replace(f'"ema_decay": {DECAY}', '"ema_decay": 0.0'))
    other = evaluate_checkpoint(config_of(base), alone)
    assert not np.array_equal(other.scores, result.scores)


@pytest.mark.slow
def test_a_checkpoint_without_it_starts_one(base, straight, caplog):
    """As those of an older version are; parameters are trained as with it."""
    workdir = base / "older"
    without = config_of(base, **{"optimizer.ema_decay": 0.0, "eval_every": 0})
    loop.train_and_evaluate(without, workdir, stop_at=2)
    assert not (workdir / "checkpoints" / "2" / "average").exists()
    assert_close(read(workdir, 2, "params"), read(straight[0], 2, "params"), 1e-6)
    with caplog.at_level("INFO"):
        loop.train_and_evaluate(config_of(base, eval_every=0), workdir, stop_at=3)
    assert "no moving average of the parameters: it starts from them at step 2" in caplog.text
    begun = in_numpy(read(workdir, 2, "params"), read(workdir, 3, "params"), 3)
    assert_close(read(workdir, 3), begun, 1e-6)
    # And the other way: a run that goes on without it has none.
    loop.train_and_evaluate(without, workdir, stop_at=4)
    assert not (workdir / "checkpoints" / "4" / "average").exists()


@pytest.mark.slow  # `zero_test.py` has all that is sharded
def test_it_is_sharded_as_the_moments_are(base, straight, monkeypatch):
    monkeypatch.setattr(zero, "LEAST", 1)  # the models of tests have nothing that is worth it
    config = config_of(base, **{"optimizer.shard_state": True, "checkpoint_every": STEPS})
    found = loop.train_and_evaluate(config, base / "sharded")
    assert_close(read(base / "sharded", STEPS), read(straight[0], STEPS), 1e-5)
    # A query at the edge of a list may fall on its other side.
    assert found == pytest.approx(straight[1], abs=0.05)
    params = trained.open_trained(config, base / "sharded").params
    sizes = [
        states.make_optimizer(config.with_changes({"optimizer.ema_decay": d}), params, 2)
        for d in (0.0, DECAY)
    ]
    size = sum(x.nbytes for x in jax.tree.leaves(params))
    more = sizes[1].bytes_of_device() - sizes[0].bytes_of_device()
    assert size / 2 <= more < 0.6 * size
