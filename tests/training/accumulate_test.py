"""A step of several batches: the mean of their gradients, steps that are updates, resumption."""

import json

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from dqe_jax.checkpoints import store
from dqe_jax.distributed import mesh
from dqe_jax.models import setup
from dqe_jax.performance.step_benchmark import random_batch
from dqe_jax.testing.small_models import VOCAB, build_small_model, small_model_config
from dqe_jax.testing.small_runs import compiled_once, run_config
from dqe_jax.training import loop, zero
from dqe_jax.training import state as states
from dqe_jax.training.accumulate import make_accumulation
from dqe_jax.training.optimizer import make_schedule
from dqe_jax.training.step import make_step

BATCHES, DEVICES = 3, 2
# No rule draws, and nothing is clipped: gradients depend on nothing but the batch.
FIELDS = {"batch.references": 4, "negatives.rule": "in_batch", "optimizer.clip_norm": 1e6}
STOP = np.zeros((DEVICES, 1), np.int32)


@pytest.fixture(scope="module")
def apart():
    """Three batches, and the first moments and the loss of a step on each of them alone."""
    config = small_model_config("tiny", **FIELDS)
    model = build_small_model(config)
    params = setup.init_params(model, config.model, config.data, 0)
    made, own = states.make_optimizer(config, params, DEVICES), mesh.devices_of(DEVICES)
    first, batches, found, losses = random_batch(config, model, params), [], [], []
    for index in range(BATCHES):
        text = (first.text + index) % (VOCAB - 1) + 1
        images = np.roll(first.target_image, index, axis=0)
        batches.append(mesh.shard(first.replace(text=text, target_image=images), DEVICES))
    step = make_step(config, model, made, own)
    for batch in batches:
        output = step(start(config, made, params), batch, STOP)
        found.append(moments(made, output.state))
        losses.append(float(output.metrics["loss"]))
    return model, params, batches, found, losses


def start(config, made, params):
    params = jax.tree.map(np.array, params)  # a step donates them
    return states.init_state(config, made, params, mesh.devices_of(DEVICES))


def moments(made, state):
    """The first moments after one step: 1 - b1 of the gradients."""
    saved = states.state_to_save(made, state.opt_state, mesh.devices_of(DEVICES))
    return jax.device_get(saved.inner_state[1][0].mu)


@pytest.mark.parametrize("sharded", [pytest.param(False, marks=pytest.mark.slow), True])
def test_gradients_are_the_mean_of_those_of_the_batches(apart, sharded, monkeypatch):
    monkeypatch.setattr(zero, "LEAST", 1)
    model, params, batches, each, losses = apart
    changes = {"batch.accumulate": BATCHES, "optimizer.shard_state": sharded}
    config = small_model_config("tiny", **FIELDS, **changes)
    made = states.make_optimizer(config, params, DEVICES)
    accumulated = make_accumulation(config, model, made, mesh.devices_of(DEVICES))
    waiting = iter(batches)
    output = accumulated.run(start(config, made, params), lambda busy: next(waiting), STOP)
    mean = jax.tree.map(lambda *xs: sum(xs) / BATCHES, *each)
    size = max(np.abs(x).max() for x in jax.tree.leaves(mean))
    assert size > 0
    found = moments(made, output.state)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * size), found, mean)
    assert float(output.metrics["loss"]) == pytest.approx(np.mean(losses), rel=1e-5)
    assert max(losses) - min(losses) > 1e-4
    assert int(output.state.step) == 1
    assert next(waiting, None) is None


def config_of(base, **changes):
    fields = {
        **{"total_steps": 4, "log_every": 1, "checkpoint_every": 2, "eval_every": 0},
        **{"batch.accumulate": BATCHES, "optimizer.warmup_steps": 2},
        **{"negatives.pool": "bank", "negatives.first_refresh": 2, "negatives.refresh_every": 1},
    }
    return run_config(base / "prepared", **fields | changes)


def lines_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow  # gradients are compared always
def test_steps_are_updates_and_a_resumed_run_is_the_same(tmp_path, prepared):
    prepared(tmp_path)
    config, straight, resumed = config_of(tmp_path), tmp_path / "straight", tmp_path / "resumed"
    with compiled_once():
        loop.train_and_evaluate(config, straight)
        loop.train_and_evaluate(config, resumed, stop_at=1)
        loop.train_and_evaluate(config, resumed, stop_at=3)
        loop.train_and_evaluate(config, resumed)
    lines, schedule = lines_of(straight), make_schedule(config.optimizer, config.total_steps)
    assert lines_of(resumed) == lines
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for step, line in enumerate(lines):
        assert line["learning_rate"] == pytest.approx(float(schedule(step)))
    managers = [store.open_for_reading(path) for path in (straight, resumed)]
    one, other = (flatten_dict(store.restore_params(m, 4), sep="/") for m in managers)
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)
    # The optimiser counts updates.
    opt_state = store.restore_params(managers[0], 4, "opt_state")
    counts = [x for x in jax.tree.leaves(opt_state) if np.ndim(x) == 0]
    assert 4 in counts
    assert BATCHES * 4 not in counts
