"""The loss terms against the formulas of the method, written here with Python's floats."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dqe_jax.distributed import mesh
from dqe_jax.method import losses

TAU = jnp.float32(0.07)


def plain_info_nce(target: float, negatives: list[float], tau: float) -> float:
    logits = [target / tau, *(s / tau for s in negatives)]
    top = max(logits)
    return math.log(sum(math.exp(x - top) for x in logits)) + top - logits[0]


def plain_preference(target: float, negatives: list[float], tau: float) -> float:
    """Mean over negatives of KL(onehot || softmax([s_t, s_n] / tau)): -log of its first entry."""
    return sum(plain_info_nce(target, [s], tau) for s in negatives) / max(len(negatives), 1)


def plain_sigmoid(target: float, negatives: list[float], tau: float, bias: float = -3.0) -> float:
    def minus_log_sigmoid(x: float) -> float:
        return math.log(1 + math.exp(-x)) if x > -30 else -x

    terms = [minus_log_sigmoid(-(s / tau + bias)) for s in negatives]
    return minus_log_sigmoid(target / tau + bias) + sum(terms)


def plain_margin(target: float, negatives: list[float], margin: float) -> float:
    terms = [max(0.0, margin - (target - s)) for s in negatives]
    return sum(terms) / max(len(terms), 1)


def plain_intent(weights: list[float], mentions: list[int]) -> float:
    if not any(mentions):
        return 0.0
    terms = [-math.log(w) if m else -math.log(1 - w) for w, m in zip(weights, mentions)]
    return sum(terms) / len(terms)


def plain_alignment(weights, ours, other) -> float:
    total = 0.0
    for w, a, b in zip(weights, ours, other):
        cosine = float(np.dot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b)))
        total += w * (1 - cosine)
    return total / sum(weights)


@pytest.fixture
def scores():
    """Target scores `[5]`, scores `[5, 7]` and which count: all, none, one, some."""
    rng = np.random.default_rng(0)
    valid = rng.random((5, 7)) < 0.5
    valid[0], valid[1], valid[2] = True, False, False
    valid[2, 3] = True
    target = rng.uniform(-1, 1, size=5).astype(np.float32)
    return target, rng.uniform(-1, 1, size=(5, 7)).astype(np.float32), valid


PAIRED = {
    "info_nce": (losses.info_nce, plain_info_nce, 0.07),
    "preference": (losses.preference, plain_preference, 0.07),
    "margin_ranking": (losses.margin_ranking, plain_margin, 0.3),
}


@pytest.fixture(params=PAIRED)
def paired(request):
    """A loss of target and negatives, its plain statement, and its scale."""
    return PAIRED[request.param]


def finite(tree) -> bool:
    return all(np.isfinite(np.asarray(x)).all() for x in jax.tree.leaves(tree))


def test_formula_over_unmasked_negatives(paired, scores):
    loss, plain, scale = paired
    target, negatives, valid = scores
    values = loss(target, negatives, valid, scale)
    assert values.shape == (5,)
    assert values.dtype == jnp.float32
    expected = [
        plain(float(t), [float(s) for s, v in zip(*row) if v], scale)
        for t, *row in zip(target, negatives, valid)
    ]
    np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-5)
    assert float(values[1]) == 0  # no negative at all


def test_masked_negatives_change_nothing_and_get_no_gradient(paired, scores):
    loss, _, scale = paired
    target, negatives, valid = scores
    wild = np.where(valid, negatives, np.float32(1e6))
    np.testing.assert_array_equal(
        loss(target, negatives, valid, scale), loss(target, wild, valid, scale)
    )
    gradient = jax.grad(lambda *a: loss(*a, valid, scale).sum(), argnums=(0, 1))(target, wild)
    assert finite(gradient)
    assert not np.asarray(gradient[1])[~valid].any()
    assert float(gradient[0][1]) == 0


def test_nothing_valid_is_zero_with_zero_gradient(paired, scores):
    loss, _, scale = paired
    target, negatives, _ = scores
    nothing = np.zeros_like(negatives, bool)
    value, gradient = jax.value_and_grad(
        lambda *a: loss(*a[:2], nothing, a[2]).sum(), argnums=(0, 1, 2)
    )(target, negatives, jnp.float32(scale))
    assert float(value) == 0
    for part in gradient:
        assert not np.asarray(part).any()


def test_gradient_is_that_of_the_plain_statement(paired):
    """Central differences of the plain statement, in float64."""
    loss, plain, scale = paired
    target, negatives, valid = 0.4, [0.35, -0.2, 0.6], [True, False, True]

    def value(x: list[float]) -> float:
        return plain(x[0], [s for s, v in zip(x[1:4], valid) if v], x[4])

    point, step = [target, *negatives, scale], 1e-5
    numeric = []
    for i in range(5):
        high, low = list(point), list(point)
        high[i] += step
        low[i] -= step
        numeric.append((value(high) - value(low)) / (2 * step))
    of_target, of_negatives, of_scale = jax.grad(
        lambda t, s, scale: loss(t, s, np.array([valid]), scale).sum(), argnums=(0, 1, 2)
    )(jnp.array([target]), jnp.array([negatives]), jnp.float32(scale))
    ours = [of_target[0], *of_negatives[0], of_scale]
    np.testing.assert_allclose(ours, numeric, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("tau", [1e-3, 1.0])
@pytest.mark.parametrize(
    ("target", "negative"), [(1, -1), (-1, 1), (1, 1), (1e4, -1e4), (-1e4, 1e4)]
)
def test_finite_at_extreme_scores(paired, target, negative, tau):
    loss, plain, _ = paired
    args = jnp.float32([target]), jnp.full((1, 3), negative, jnp.float32)
    valid = np.array([[True, True, False]])
    value, gradient = jax.value_and_grad(
        lambda t, s, tau: loss(t, s, valid, tau).sum(), argnums=(0, 1, 2)
    )(*args, jnp.float32(tau))
    assert finite((value, gradient))
    np.testing.assert_allclose(value, plain(target, [negative] * 2, tau), rtol=1e-4, atol=1e-6)


def test_sigmoid_pairs_are_their_plain_statement(scores):
    target, negatives, valid = scores
    loss = jax.jit(losses.sigmoid_pairs)
    values = loss(target, negatives, valid, TAU, jnp.float32(-3))
    assert values.shape == (5,)
    assert values.dtype == jnp.float32
    expected = [
        plain_sigmoid(float(t), [float(s) for s, v in zip(*row) if v], 0.07)
        for t, *row in zip(target, negatives, valid)
    ]
    np.testing.assert_allclose(values, expected, rtol=1e-5)
    # What does not count changes nothing and gets no gradient.
    wild = np.where(valid, negatives, np.float32(1e6))
    np.testing.assert_array_equal(loss(target, wild, valid, TAU, -3.0), values)
    gradient = jax.grad(lambda s, b: loss(target, s, valid, TAU, b).sum(), argnums=(0, 1))
    of_scores, of_bias = gradient(wild, jnp.float32(-3))
    assert finite(of_scores)
    assert not np.asarray(of_scores)[~valid].any()
    high, low = (float(loss(target, wild, valid, TAU, b).sum()) for b in (-2.99, -3.01))
    np.testing.assert_allclose(of_bias, (high - low) / 0.02, rtol=1e-2)


def test_sigmoid_pairs_of_a_batch_are_those_of_siglip():
    """The diagonal matches and nothing else does: the sum over all pairs of each row."""
    rng = np.random.default_rng(1)
    square = rng.uniform(-1, 1, size=(6, 6)).astype(np.float32)
    logits = square / 0.1 - 10
    signs = 2 * np.eye(6) - 1
    usual = np.log1p(np.exp(-signs * logits)).sum(1)
    ours = losses.sigmoid_pairs(np.diag(square), square, ~np.eye(6, dtype=bool), 0.1, -10.0)
    np.testing.assert_allclose(ours, usual, rtol=1e-4)
    extreme = losses.sigmoid_pairs(
        np.float32([1e4, -1e4]), np.float32([[-1e4], [1e4]]), np.ones((2, 1), bool), 1e-3, -10.0
    )
    np.testing.assert_allclose(extreme, [0, 2e7], rtol=1e-4, atol=1e-6)


def test_info_nce_is_cross_entropy_of_the_batch():
    """With the diagonal as targets and everything else as negatives it is the usual loss."""
    rng = np.random.default_rng(1)
    square = rng.uniform(-1, 1, size=(6, 6)).astype(np.float32)
    usual = -jax.nn.log_softmax(square / TAU, axis=1)[np.arange(6), np.arange(6)]
    ours = losses.info_nce(np.diag(square), square, ~np.eye(6, dtype=bool), TAU)
    np.testing.assert_allclose(ours, usual, rtol=1e-5, atol=1e-5)


def test_info_nce_leaves_other_positives_out():
    """Candidates 0 and 2 are positives: neither enters the denominator twice nor as a negative."""
    row = np.float32([[0.5, 0.4, 0.9, -0.3]])
    negative = np.array([[False, True, False, True]])
    value = losses.info_nce(row[:, 0], row, negative, TAU)
    np.testing.assert_allclose(value, [plain_info_nce(0.5, [0.4, -0.3], 0.07)], rtol=1e-5)
    gradient = jax.grad(lambda s: losses.info_nce(row[:, 0], s, negative, TAU).sum())(row)
    assert np.asarray(gradient)[0, [0, 2]].tolist() == [0, 0]
    assert (np.asarray(gradient)[0, [1, 3]] > 0).all()


def test_preference_is_softplus_of_the_negative_gap():
    target, negative = np.float32([0.2]), np.float32([[0.25]])
    expected = math.log1p(math.exp((0.25 - 0.2) / 0.07))
    value = losses.preference(target, negative, np.array([[True]]), TAU)
    np.testing.assert_allclose(value, [expected], rtol=1e-5)


def test_margin_is_zero_from_the_margin_on():
    target, negatives = np.float32([0.5]), np.float32([[0.25, 0.0, 0.75]])
    single = [
        losses.margin_ranking(target, negatives[:, i : i + 1], np.array([[True]]), 0.25).item()
        for i in range(3)
    ]
    assert single == [0, 0, 0.5]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_values_are_float32_for_narrower_scores(paired, scores, dtype):
    loss, plain, scale = paired
    target, negatives, valid = scores
    target, negatives = jnp.asarray(target, dtype), jnp.asarray(negatives, dtype)
    values = loss(target, negatives, valid, scale)
    assert values.dtype == jnp.float32
    expected = [
        plain(float(t), [float(s) for s, v in zip(*row) if v], scale)
        for t, *row in zip(target, negatives, valid)
    ]
    np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-4)


# -------------------------------------------------------------------------------------- attributes


@pytest.mark.parametrize("dtype", [bool, np.int32, np.float32])
def test_intent(dtype):
    rng = np.random.default_rng(2)
    weights = rng.uniform(0.05, 0.95, size=(8, 3)).astype(np.float32)
    mentions = np.array([[i >> k & 1 for k in range(3)] for i in range(8)])
    values = losses.attribute_intent(weights, mentions.astype(dtype))
    assert values.dtype == jnp.float32
    expected = [plain_intent(map(float, w), list(m)) for w, m in zip(weights, mentions)]
    np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-6)


def test_intent_without_a_mention_gives_no_signal():
    weights, mentions = np.float32([[0.9, 0.8], [0.9, 0.8]]), np.float32([[0, 0], [0, 1]])
    values = losses.attribute_intent(weights, mentions)
    gradient = np.asarray(jax.grad(lambda w: losses.attribute_intent(w, mentions).sum())(weights))
    assert float(values[0]) == 0
    assert not gradient[0].any()
    assert gradient[1, 0] > 0 > gradient[1, 1]  # less of what is not mentioned, more of what is


@pytest.mark.parametrize("weight", [0.0, 1e-12, 1 - 1e-7, 1.0])
@pytest.mark.parametrize("mention", [0.0, 1.0])
def test_intent_is_finite_at_saturated_weights(weight, mention):
    value, gradient = jax.value_and_grad(
        lambda w: losses.attribute_intent(w, jnp.float32([[mention, 1.0]])).sum()
    )(jnp.float32([[weight, 0.5]]))
    assert finite((value, gradient))
    assert float(value) >= 0


def test_alignment():
    rng = np.random.default_rng(3)
    weights = rng.uniform(0.1, 1, size=(4, 3)).astype(np.float32)
    ours = rng.normal(size=(4, 3, 6)).astype(np.float32)
    other = rng.normal(size=(4, 3, 6)).astype(np.float32)
    other[1] = 3 * ours[1]  # the same direction
    other[2] = -ours[2]  # the opposite one
    values = losses.attribute_alignment(weights, ours, other)
    assert values.dtype == jnp.float32
    np.testing.assert_allclose(
        values, [plain_alignment(*row) for row in zip(weights, ours, other)], atol=1e-5
    )
    np.testing.assert_allclose(values[1:3], [0, 2], atol=1e-5)


def test_alignment_does_not_depend_on_scale():
    """Features just after a start at zero, and large ones, have the same cosine."""
    rng = np.random.default_rng(4)
    weights = np.ones((1, 2), np.float32)
    ours, other = rng.normal(size=(2, 1, 2, 6)).astype(np.float32)
    expected = [plain_alignment(weights[0], ours[0], other[0])]
    for scale in (1e-3, 1e3):
        np.testing.assert_allclose(
            losses.attribute_alignment(weights, scale * ours, scale * other), expected, atol=1e-5
        )


@pytest.mark.parametrize("zero", ["ours", "other", "both", "weights", "all"])
def test_alignment_with_zero_vectors_is_finite(zero: str):
    rng = np.random.default_rng(5)
    weights = rng.uniform(0.1, 1, size=(2, 3)).astype(np.float32)
    ours, other = rng.normal(size=(2, 2, 3, 6)).astype(np.float32)
    ours[:, 1] *= zero not in ("ours", "both", "all")
    other[:, 1] *= zero not in ("other", "both", "all")
    weights *= zero not in ("weights", "all")
    value, gradient = jax.value_and_grad(
        lambda *a: losses.attribute_alignment(*a).sum(), argnums=(0, 1, 2)
    )(weights, ours, other)
    assert finite((value, gradient))
    assert 0 <= float(value) <= 4


def test_alignment_leaves_attributes_of_weight_zero_out():
    rng = np.random.default_rng(6)
    ours, other = rng.normal(size=(2, 1, 3, 6)).astype(np.float32)
    weights = np.float32([[0.7, 0.0, 0.2]])
    kept = [0, 2]
    np.testing.assert_allclose(
        losses.attribute_alignment(weights, ours, other),
        losses.attribute_alignment(weights[:, kept], ours[:, kept], other[:, kept]),
        rtol=1e-6,
    )
    gradient = jax.grad(lambda a: losses.attribute_alignment(weights, a, other).sum())(ours)
    assert not np.asarray(gradient)[0, 1].any()


def test_losses_are_jittable_with_one_trace(scores):
    target, negatives, valid = scores
    traces = 0

    @jax.jit
    def total(target, negatives, valid, tau):
        nonlocal traces
        traces += 1
        return (
            losses.info_nce(target, negatives, valid, tau)
            + losses.preference(target, negatives, valid, tau)
            + losses.margin_ranking(target, negatives, valid, 0.2)
        )

    first = total(target, negatives, valid, TAU)
    total(target, negatives, ~valid, TAU * 2)
    assert traces == 1
    parts = (
        losses.info_nce(target, negatives, valid, TAU),
        losses.preference(target, negatives, valid, TAU),
        losses.margin_ranking(target, negatives, valid, 0.2),
    )
    np.testing.assert_allclose(first, sum(parts), rtol=1e-5)


def test_columns_are_finite_at_the_least_temperature():
    """Of two devices: exp(100) is infinite in float32."""
    rng = np.random.default_rng(0)
    own, tau = np.arange(4, dtype=np.int32), 0.01
    scores = rng.uniform(0.9, 1.0, (4, 4)).astype(np.float32) / tau
    negative = (rng.random((4, 4)) < 0.6) & ~np.eye(4, dtype=bool)
    columns = mesh.pmap(
        lambda s, t, o, n: losses.column_info_nce(s, t, o, n, mesh.AXIS),
        in_axes=(0, 0, 0, 0),
        out_axes=0,
        devices=jax.devices()[:2],
    )
    target = np.diag(scores)
    found = mesh.unshard(columns(*mesh.shard((scores, target, own, negative), 2)))
    for t in range(4):
        wide = scores[:, t].astype(np.float64)
        total = np.exp(wide[negative[:, t] | (own == t)] - wide[t]).sum()
        np.testing.assert_allclose(found[t], np.log(total), rtol=1e-4, atol=2e-5)
