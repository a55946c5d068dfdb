"""The optimiser against updates computed by hand with NumPy."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dqe_jax.config import OptimizerConfig
from dqe_jax.training.optimizer import largest, make_optimizer, make_schedule, matrices

pytestmark = pytest.mark.core


def settings(**changes):
    return OptimizerConfig(**changes)


# --------------------------------------------------------------------------------------- schedule


def test_warm_up_is_linear_and_decay_is_a_cosine_to_zero():
    schedule = make_schedule(settings(learning_rate=0.1, warmup_steps=10), 110)
    for step in range(11):
        assert float(schedule(step)) == pytest.approx(0.01 * step, abs=1e-7)
    for step in (11, 35, 60, 100, 110):
        share = (step - 10) / 100
        expected = 0.1 * (1 + math.cos(math.pi * share)) / 2
        assert float(schedule(step)) == pytest.approx(expected, abs=1e-7)
    assert float(schedule(110)) == pytest.approx(0, abs=1e-8)
    assert float(schedule(500)) == pytest.approx(0, abs=1e-8)


def test_without_warm_up_it_starts_at_the_peak():
    schedule = make_schedule(settings(learning_rate=0.1, warmup_steps=0), 100)
    assert float(schedule(0)) == pytest.approx(0.1)
    assert float(schedule(50)) == pytest.approx(0.05)


@pytest.mark.parametrize("total", [1, 2, 3, 8, 199, 200, 201])
def test_warm_up_takes_at_most_half_of_the_run(total):
    rates = make_schedule(settings(learning_rate=0.1, warmup_steps=100), total)
    values = np.array([float(rates(step)) for step in range(total + 1)])
    peak = min(100, total // 2)
    assert int(values.argmax()) == peak
    assert values[peak] == pytest.approx(0.1)
    assert (np.diff(values[peak:]) <= 0).all()
    assert np.isfinite(values).all()


# ---------------------------------------------------------------------------------------- updates

PARAMS = {
    "matrix": np.array([[1.0, -2.0], [0.5, 4.0]], np.float32),
    "table": np.array([[[2.0], [-1.0]]], np.float32),  # three axes: decays too
    "bias": np.array([1.0, -2.0], np.float32),
    "scale": np.array(3.0, np.float32),
}


def gradients(seed, size=1.0):
    rng = np.random.default_rng(seed)
    return {k: (size * rng.normal(size=v.shape)).astype(np.float32) for k, v in PARAMS.items()}


def by_hand(config, total_steps, grads):
    """AdamW (decoupled decay) after clipping by the global norm, in float64."""
    params = {k: v.astype(np.float64) for k, v in PARAMS.items()}
    first = {k: np.zeros_like(v) for k, v in params.items()}
    second = {k: np.zeros_like(v) for k, v in params.items()}
    warmup = config.warmup_steps
    for step, grad in enumerate(grads):
        norm = math.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in grad.values()))
        clip = min(1.0, config.clip_norm / norm)
        share = (step - warmup) / (total_steps - warmup)
        rate = config.learning_rate * (
            step / warmup if step < warmup else (1 + math.cos(math.pi * share)) / 2
        )
        for k, g in grad.items():
            g = g.astype(np.float64) * clip
            first[k] = config.b1 * first[k] + (1 - config.b1) * g
            second[k] = config.b2 * second[k] + (1 - config.b2) * g**2
            m = first[k] / (1 - config.b1 ** (step + 1))
            v = second[k] / (1 - config.b2 ** (step + 1))
            update = m / (np.sqrt(v) + 1e-8)
            if params[k].ndim > 1:
                update = update + config.weight_decay * params[k]
            params[k] = params[k] - rate * update
    return params


def by_optax(config, total_steps, grads):
    tx = make_optimizer(config, total_steps)
    params = jax.tree.map(jnp.asarray, PARAMS)
    state = tx.init(params)
    for grad in grads:
        updates, state = tx.update(grad, state, params)
        params = jax.tree.map(jnp.add, params, updates)
    return params


@pytest.mark.parametrize("clip_norm", [0.5, 1000.0])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_five_steps_equal_those_by_hand(clip_norm, weight_decay):
    config = settings(
        learning_rate=0.1,
        b1=0.8,
        b2=0.9,
        warmup_steps=2,
        clip_norm=clip_norm,
        weight_decay=weight_decay,
    )
    # Of very different sizes: the moments depend on what was clipped.
    grads = [gradients(step, size) for step, size in enumerate((1.0, 5.0, 0.1, 20.0, 1.0))]
    actual, expected = by_optax(config, 10, grads), by_hand(config, 10, grads)
    for name in PARAMS:
        np.testing.assert_allclose(actual[name], expected[name], rtol=2e-5, err_msg=name)


def test_only_matrices_decay():
    config = settings(learning_rate=0.1, warmup_steps=0, weight_decay=0.5)
    zero = jax.tree.map(np.zeros_like, PARAMS)
    after = by_optax(config, 10, [zero])
    for name in ("bias", "scale"):
        np.testing.assert_array_equal(after[name], PARAMS[name])
    for name in ("matrix", "table"):
        np.testing.assert_allclose(after[name], PARAMS[name] * (1 - 0.1 * 0.5), rtol=1e-6)


def test_clipping_is_by_the_norm_of_all_gradients_together():
    config = settings(learning_rate=0.1, warmup_steps=0, clip_norm=1.0)
    tx = make_optimizer(config, 10)
    state = tx.init(PARAMS)
    _, state = tx.update(gradients(0, 100.0), state, PARAMS)
    moments = next(
        s for s in jax.tree.leaves(state, is_leaf=lambda s: hasattr(s, "mu")) if hasattr(s, "mu")
    )
    total = math.sqrt(sum(float((np.asarray(m) ** 2).sum()) for m in moments.mu.values()))
    assert total == pytest.approx((1 - config.b1) * 1.0, rel=1e-5)


def assert_close(one, other):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), one, other)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])  # the square of the last is infinite
def test_unsound_gradients_change_nothing_and_are_counted(bad):
    config = settings(learning_rate=0.1, warmup_steps=0, clip_norm=100.0)
    ours = make_optimizer(config, 10)
    adamw = optax.adamw(
        make_schedule(config, 10),
        b1=config.b1,
        b2=config.b2,
        weight_decay=config.weight_decay,
        mask=matrices,
    )
    theirs = optax.apply_if_finite(optax.chain(optax.identity(), adamw), 100)
    params = {"a": jnp.ones((3, 1)), "b": jnp.zeros((1, 1))}
    good = {"a": jnp.array([[1.0], [-2.0], [3.0]]), "b": jnp.array([[0.5]])}
    unsound = good | {"b": jnp.array([[bad]], jnp.float32)}
    never = jax.tree.map(lambda x: x * np.nan, good)
    states = [ours.init(params), theirs.init(params)]
    steps = [
        (good, True, good),
        (unsound, True, never),
        (unsound, True, never),
        (good, True, good),
        (good, False, never),
    ]
    for grads, sound, as_optax_needs in steps:
        found, state = ours.update(grads, states[0], params, sound=sound)
        if as_optax_needs is never:  # bit by bit
            jax.tree.map(np.testing.assert_array_equal, state.inner_state, states[0].inner_state)
        states[0] = state
        expected, states[1] = theirs.update(as_optax_needs, states[1], params)
        assert_close(found, expected)
        assert_close(*states)
    assert states[0].total_notfinite == 3
    assert states[0].notfinite_count == 1
    assert not states[0].last_finite


@pytest.mark.parametrize(
    ("params", "changes"),
    [
        (1.0, {"learning_rate": 1e35}),
        (1e30, {"learning_rate": 1000.0, "weight_decay": 1e7}),
        (np.nan, {}),
        (np.inf, {}),
    ],
)
def test_parameters_that_would_not_be_finite_are_not_updated(params, changes):
    """At rates that float32 cannot hold, or where they are not finite before."""
    params = jax.tree.map(lambda x: jnp.full_like(x, params), PARAMS)
    tx = make_optimizer(settings(warmup_steps=0, **changes), 10)
    state = tx.init(params)
    updates, after = tx.update(gradients(0), state, params)
    assert all((x == 0).all() for x in jax.tree.leaves(updates))
    jax.tree.map(np.testing.assert_array_equal, after.inner_state, state.inner_state)
    assert after.notfinite_count == 1


def test_the_largest_of_a_tree():
    assert largest({"a": jnp.array([1.0, -7.0]), "b": jnp.float32(3.0)}) == 7
    for bad in (np.nan, np.inf, -np.inf):
        for tree in ({"a": jnp.array([1.0, bad]), "b": jnp.ones(2)}, {"a": jnp.float32(bad)}):
            assert not np.isfinite(largest(tree))
