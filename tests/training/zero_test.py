"""The sharded state of the optimiser: the same steps, the same checkpoints, less memory."""

import jax
import numpy as np
import optax
import pytest

from dqe_jax.checkpoints import store
from dqe_jax.distributed import mesh
from dqe_jax.models import setup
from dqe_jax.models.build import build_model
from dqe_jax.performance import step_benchmark
from dqe_jax.testing.small_runs import run_config
from dqe_jax.training import loop, optimizer, zero
from dqe_jax.training import state as states
from dqe_jax.training.step import make_step

SHARDED = {"optimizer.shard_state": True}
SHAPES = {"scalar": (), "vector": (5,), "empty": (0, 4), "small": (3, 7), "odd": (97, 90)}
SHAPES |= {"even": (64, 128), "long": (9000,), "deep": (3, 4, 5, 200)}


@pytest.fixture(scope="module")
def base(tmp_path_factory, prepared):
    base = tmp_path_factory.mktemp("zero")
    prepared(base)
    return base


def config_of(base, **changes):
    fields = {"total_steps": 6, "log_every": 1, "checkpoint_every": 3, "eval_every": 0}
    return run_config(base / "prepared", **fields | changes)


def params():
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def devices():
    return jax.devices("cpu")[:8]


def optimizer_config(**changes):
    return run_config("", **{"optimizer.warmup_steps": 0, **changes}).optimizer


def test_a_state_is_cut_and_joined_again():
    whole = params()
    tx = optimizer.make_optimizer(optimizer_config(), 10)
    rng = np.random.default_rng(1)
    state = jax.tree.map(
        lambda x: rng.normal(size=x.shape).astype(np.float32) if x.dtype == "float32" else x,
        jax.device_get(tx.init(whole)),
    )
    shapes, axes = zero.state_shapes(tx, whole, 8)
    held = zero.cut(state, axes, devices())
    assert jax.tree.map(lambda x: (x.shape, x.dtype), held) == jax.tree.map(
        lambda x: (x.shape, x.dtype), shapes
    )
    again = zero.join(held, axes, state, 8)
    assert jax.tree.structure(again) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, again, state)


@pytest.mark.parametrize("clip", [1e9, 0.5])
@pytest.mark.parametrize("bad", [False, True])
def test_updates_are_those_of_the_whole_optimizer(clip, bad):
    """Gradients that differ by device; a third step whose gradients are not finite on one."""
    whole, rng = params(), np.random.default_rng(2)
    plain = optimizer_config(**{"optimizer.clip_norm": clip})
    parts = [
        {name: rng.normal(size=(8, *x.shape)).astype(np.float32) for name, x in whole.items()}
        for _ in range(4)
    ]
    if bad:
        parts[2]["odd"][5, 1, 1] = np.nan

    tx = optimizer.make_optimizer(plain, 10)
    expected, state = whole, tx.init(whole)
    for part in parts:
        updates, state = tx.update(jax.tree.map(lambda g: g.sum(0), part), state, expected)
        expected = optax.apply_updates(expected, updates)

    sharded = optimizer.make_optimizer(plain, 10, decay=optimizer.matrices(whole))
    _, axes = zero.state_shapes(sharded, whole, 8)
    hash(axes)  # with several processes JAX keeps it in a cache

    def step(params, state, grads):
        grads = zero.scatter(grads)
        norm = zero.global_norm(grads, params)
        updates, state = sharded.update(grads, state, zero.own(params), norm=norm)
        return optax.apply_updates(params, zero.gather(updates, params)), state

    mapped = mesh.pmap(step, in_axes=(None, axes, 0), out_axes=(None, axes), devices=devices())
    found, held = whole, zero.init(sharded, whole, devices())
    for part in parts:
        found, held = mapped(found, held, part)
    for name in whole:
        np.testing.assert_allclose(found[name], expected[name], atol=2e-6, err_msg=name)
    joined = zero.join(held, axes, state, 8)
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(joined))  # no scalars of NumPy
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), joined, state)
    assert joined.total_notfinite == bad
    # Each device holds an eighth of the large moments, up to padding, and small ones whole.
    large = {"odd": 9, "even": 8, "long": 9, "deep": 12}
    for name, array in held.inner_state[1][0].mu.items():
        shape = (large[name], 128) if name in large else SHAPES[name]
        assert {shard.data.shape for shard in array.addressable_shards} == {(1, *shape)}, name


def params_of(workdir, step=6):
    return store.restore_params(store.open_for_reading(workdir), step)


def assert_close(one, other):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), one, other)


@pytest.fixture
def nothing_is_small(monkeypatch):
    """The models of tests have no array that is worth sharding."""
    monkeypatch.setattr(zero, "LEAST", 1)


def test_a_run_and_what_goes_on_from_its_checkpoint(base, nothing_is_small):
    """As a run that does not shard: its middle sharded over 4 devices, the rest on one, whole."""
    loop.train_and_evaluate(config_of(base, num_devices=1), base / "plain")
    whole = params_of(base / "plain")
    moved = base / "moved"
    loop.train_and_evaluate(config_of(base, num_devices=1), moved, stop_at=2)
    loop.train_and_evaluate(config_of(base, num_devices=4, **SHARDED), moved, stop_at=4)
    loop.train_and_evaluate(config_of(base, num_devices=1), moved)
    assert_close(params_of(moved), whole)


def test_one_compilation_and_a_donated_state(base, caplog, nothing_is_small):
    config = config_of(base, **SHARDED)
    model = build_model(
        config.model,
        vocab_size=step_benchmark.VOCABULARY,
        max_length=config.data.max_length,
        image_size=config.data.image_size,
    )
    params = setup.init_params(model, config.model, config.data)
    made = states.make_optimizer(config, params, 4)
    step = make_step(config, model, made, devices()[:4])
    state = states.init_state(config, made, params, devices()[:4])
    assert made.bytes_of_device() < 0.5 * sum(2 * x.nbytes for x in jax.tree.leaves(params))
    batch = mesh.shard(step_benchmark.random_batch(config, model, params), 4)
    stop = np.zeros((4, 1), np.int32)
    compilations = []
    for _ in range(3):
        caplog.clear()
        before = state
        with jax.log_compiles(), caplog.at_level("WARNING"):
            output = step(state, batch, stop)
            state = output.state
        compilations.append(sum("XLA compilation" in r.getMessage() for r in caplog.records))
        assert all(x.is_deleted() for x in jax.tree.leaves(before) if x.ndim)
    assert compilations[0] >= 1
    assert compilations[1:] == [0, 0]
    assert np.isfinite(output.metrics["grad_norm"])
