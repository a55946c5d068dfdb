"""TRNS against a plain statement of the method, written here with loops and NumPy."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis.extra.numpy import arrays

from dqe_jax.method import sharded, trns
from dqe_jax.method.similarity import (
    paired_similarity,
    similarity,
    target_relative_similarity,
)

# ----------------------------------------------------------------------------- the plain statement


def unit(rng: np.random.Generator, *shape: int) -> np.ndarray:
    x = rng.normal(size=shape)
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def plain_score(query: np.ndarray, tokens: np.ndarray) -> float:
    return max(float(np.dot(query.astype(np.float64), t.astype(np.float64))) for t in tokens)


def plain_delta(query: np.ndarray, gallery: np.ndarray, target: np.ndarray) -> np.ndarray:
    return np.array(
        [
            [plain_score(q, t) - plain_score(q, candidate) for candidate in gallery]
            for q, t in zip(query, target)
        ]
    )


def plain_bounds(deltas: list[float], mode: str, lower: float, upper: float, floor: float):
    """Bounds of one query, from its valid deltas."""
    if not deltas:
        return floor, floor
    if mode == "absolute":
        low, high = lower, upper
    elif mode == "quantile":
        low, high = (np.quantile(deltas, q, method="linear") for q in (lower, upper))
    else:
        mean = sum(deltas) / len(deltas)
        std = math.sqrt(sum((x - mean) ** 2 for x in deltas) / len(deltas))
        low, high = mean + lower * std, mean + upper * std
    return max(low, floor), high


def plain_fallback(delta, mask, forbidden, lower) -> list[int]:
    """Candidates of one query that may fill up, in order: nearest above lower, then below it."""
    rest = [c for c in range(len(delta)) if not mask[c] and not forbidden[c]]
    above = [c for c in rest if delta[c] > lower]
    below = [c for c in rest if delta[c] <= lower]
    return sorted(above, key=lambda c: (delta[c], c)) + sorted(below, key=lambda c: (-delta[c], c))


def check_row(indices, valid, delta, mask, num, forbidden=None, lower=-math.inf) -> None:
    """Everything the method says of the draw of one query."""
    zone = {c for c in range(len(delta)) if mask[c]}
    rest = [] if forbidden is None else plain_fallback(delta, mask, forbidden, lower)
    drawn = min(num, len(zone))
    total = min(num, len(zone) + len(rest))
    indices, valid = [int(i) for i in indices], [bool(v) for v in valid]
    assert len(indices) == len(valid) == num
    assert valid == [True] * total + [False] * (num - total)
    assert indices[total:] == [0] * (num - total)
    assert len(set(indices[:total])) == total, "drawn twice"
    assert set(indices[:drawn]) <= zone
    assert indices[drawn:total] == rest[: total - drawn]
    if forbidden is not None:
        assert not any(forbidden[c] for c in indices[:total])


def as_row(*values, dtype=np.float32) -> np.ndarray:
    return np.array([values], dtype)


jitted_draw = jax.jit(trns.sample_negatives, static_argnames=("num", "sample_temperature"))


def draw(delta, mask, num, *, key=0, **kwargs):
    """`sample_negatives` of NumPy arrays, to NumPy arrays."""
    indices, valid = jitted_draw(jax.random.key(key), delta, mask, num, **kwargs)
    assert indices.dtype == jnp.int32
    assert valid.dtype == jnp.bool_
    return np.asarray(indices), np.asarray(valid)


# ------------------------------------------------------------------------------------- similarity


@pytest.mark.parametrize("num_tokens", [1, 2, 4])
@pytest.mark.parametrize("num_candidates", [1, 7])
def test_similarity_and_delta(num_tokens: int, num_candidates: int):
    rng = np.random.default_rng(num_tokens)
    query = unit(rng, 3, 5)
    gallery = unit(rng, num_candidates, num_tokens, 5)
    target = unit(rng, 3, num_tokens, 5)
    scores = [[plain_score(q, t) for t in gallery] for q in query]
    paired = [plain_score(q, t) for q, t in zip(query, target)]
    np.testing.assert_allclose(similarity(query, gallery), scores, atol=1e-6)
    np.testing.assert_allclose(paired_similarity(query, target), paired, atol=1e-6)
    delta = target_relative_similarity(query, gallery, target)
    assert delta.dtype == jnp.float32
    np.testing.assert_allclose(delta, plain_delta(query, gallery, target), atol=1e-6)


@pytest.mark.parametrize("num_tokens", [1, 4])
def test_similarity_gradient_is_that_of_einsum_and_max(num_tokens: int):
    rng = np.random.default_rng(num_tokens)
    query, gallery = unit(rng, 3, 5), unit(rng, 6, num_tokens, 5)
    weight = rng.normal(size=(3, 6)).astype(np.float32)

    def direct(query, gallery):
        return jnp.einsum("bd,nmd->bnm", query, gallery, precision="highest").max(-1)

    def gradient(score):
        return jax.grad(lambda q, g: (weight * score(q, g)).sum(), argnums=(0, 1))(query, gallery)

    for ours, expected in zip(gradient(similarity), gradient(direct)):
        np.testing.assert_allclose(ours, expected, atol=1e-6)


def test_similarity_gradient_reaches_the_best_token_only():
    """The gradient of max_m <q, T_m> written out by hand."""
    rng = np.random.default_rng(3)
    query, gallery = unit(rng, 2, 5), unit(rng, 3, 4, 5)
    weight = rng.normal(size=(2, 3)).astype(np.float32)
    of_query, of_gallery = np.zeros_like(query), np.zeros_like(gallery)
    for b in range(2):
        for n in range(3):
            best = int(np.argmax([np.dot(query[b], token) for token in gallery[n]]))
            of_query[b] += weight[b, n] * gallery[n, best]
            of_gallery[n, best] += weight[b, n] * query[b]
    ours = jax.grad(lambda q, g: (weight * similarity(q, g)).sum(), argnums=(0, 1))(query, gallery)
    np.testing.assert_allclose(ours[0], of_query, atol=1e-6)
    np.testing.assert_allclose(ours[1], of_gallery, atol=1e-6)


def test_equal_tokens_share_one_gradient():
    """Where tokens tie, the query's gradient is still that of one token, not of their sum."""
    rng = np.random.default_rng(4)
    query, token = unit(rng, 2, 5), unit(rng, 3, 1, 5)
    gallery = np.repeat(token, 4, axis=1)
    of_query, of_gallery = jax.grad(lambda q, g: similarity(q, g).sum(), argnums=(0, 1))(
        query, gallery
    )
    np.testing.assert_allclose(of_query, np.tile(token.sum((0, 1)), (2, 1)), atol=1e-5)
    np.testing.assert_allclose(of_gallery.sum(1), np.tile(query.sum(0), (3, 1)), atol=1e-5)


def test_target_relative_similarity_gradient():
    rng = np.random.default_rng(5)
    arrays = unit(rng, 3, 5), unit(rng, 6, 4, 5), unit(rng, 3, 4, 5)

    def direct(query, gallery, target):
        own = jnp.einsum("bd,bmd->bm", query, target, precision="highest").max(-1)
        every = jnp.einsum("bd,nmd->bnm", query, gallery, precision="highest").max(-1)
        return own[:, None] - every

    def gradient(fn):
        return jax.grad(lambda *a: jnp.sin(fn(*a)).sum(), argnums=(0, 1, 2))(*arrays)

    for ours, expected in zip(gradient(target_relative_similarity), gradient(direct)):
        np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_scores_of_bfloat16_embeddings_are_float32():
    rng = np.random.default_rng(6)
    query = jnp.asarray(unit(rng, 2, 8), jnp.bfloat16)
    gallery = jnp.asarray(unit(rng, 3, 4, 8), jnp.bfloat16)
    target = gallery[:2]
    scores = similarity(query, gallery)
    assert scores.dtype == paired_similarity(query, target).dtype == jnp.float32
    exact = [[plain_score(q, t) for t in np.float32(gallery)] for q in np.float32(query)]
    np.testing.assert_allclose(scores, exact, atol=1e-6)
    gradient = jax.grad(lambda q: similarity(q, gallery).sum())(query)
    assert gradient.dtype == jnp.bfloat16
    assert np.isfinite(np.float32(gradient)).all()


def largest_array(jaxpr) -> int:
    """Elements of the largest array that any equation makes, inner programs included."""
    largest = 0
    for equation in jaxpr.eqns:
        for out in equation.outvars:
            largest = max(largest, math.prod(getattr(out.aval, "shape", ())))
        for parameter in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                largest = max(largest, largest_array(inner))
    return largest


@pytest.fixture
def eight_tokens(monkeypatch):
    query, gallery = jnp.ones((16, 4)), jnp.ones((24, 8, 4))
    monkeypatch.setattr("dqe_jax.method.similarity.AT_ONCE", 700)  # of five candidates
    # Every array that is made is a gallery, a score matrix, or smaller; B * N * M is 3072 and what
    # a scan would stack of M - 1 score matrices is 2688.
    return query, gallery, max(16 * 24, gallery.size)


def test_the_memory_check_sees_inside_inner_programs(eight_tokens):
    query, gallery, _ = eight_tokens

    def direct(query, gallery):
        return jnp.einsum("bd,nmd->bnm", query, gallery).max(-1)

    def stacked(query, gallery):
        return jax.lax.scan(lambda c, t: (c, query @ t.T), 0, gallery.swapaxes(0, 1))[1].max(0)

    for fn in (direct, jax.jit(direct), jax.checkpoint(direct), stacked):
        assert largest_array(jax.make_jaxpr(fn)(query, gallery).jaxpr) == 16 * 24 * 8


def test_similarity_makes_no_array_of_all_tokens(eight_tokens):
    query, gallery, limit = eight_tokens
    assert largest_array(jax.make_jaxpr(similarity)(query, gallery).jaxpr) <= limit


def test_similarity_backward_makes_no_array_of_all_tokens(eight_tokens):
    query, gallery, limit = eight_tokens
    backward = jax.grad(lambda q, g: jnp.square(similarity(q, g)).sum(), argnums=(0, 1))
    assert largest_array(jax.make_jaxpr(backward)(query, gallery).jaxpr) <= limit


@pytest.mark.parametrize("at_once", [1, 60, 10**6])
def test_similarity_in_parts(at_once, monkeypatch):
    """A candidate at a time, parts of which one is left over, and all; with equal tokens."""
    monkeypatch.setattr("dqe_jax.method.similarity.AT_ONCE", at_once)
    rng = np.random.default_rng(3)
    query, gallery = rng.normal(size=(5, 6)), rng.normal(size=(10, 4, 6))
    gallery[:, 3] = gallery[:, 1]  # the first of equals gets the gradient
    query, gallery = query.astype(np.float32), gallery.astype(np.float32)
    weights = rng.normal(size=(5, 10)).astype(np.float32)
    products = np.einsum("bd,nmd->bnm", query, gallery)
    np.testing.assert_allclose(similarity(query, gallery), products.max(-1), atol=1e-6)
    chosen = (products.argmax(-1)[..., None] == np.arange(4)) * weights[..., None]
    one, other = jax.grad(lambda q, g: (similarity(q, g) * weights).sum(), argnums=(0, 1))(
        query, gallery
    )
    np.testing.assert_allclose(one, np.einsum("bnm,nmd->bd", chosen, gallery), atol=1e-5)
    np.testing.assert_allclose(other, np.einsum("bnm,bd->nmd", chosen, query), atol=1e-5)


# ----------------------------------------------------------------------------------------- bounds

MODES = [
    ("absolute", 0.1, 0.5),
    ("absolute", -0.5, 0.2),
    ("quantile", 0.0, 1.0),
    ("quantile", 0.1, 0.6),
    ("quantile", 0.33, 0.34),
    ("std", -1.0, 0.5),
    ("std", 0.0, 2.0),
]


def test_all_modes_are_tested():
    # "drops" has no bounds of its own: tests/method/mining_test.py states it.
    assert {mode for mode, *_ in MODES} | {"drops"} == set(trns.BOUND_MODES)


@pytest.mark.parametrize("floor", [0.0, -math.inf, 0.15])
@pytest.mark.parametrize(("mode", "lower", "upper"), MODES)
def test_bounds(mode: str, lower: float, upper: float, floor: float):
    """Rows with 13, some, one and no valid candidate; invalid ones hold wild values."""
    rng = np.random.default_rng(7)
    delta = rng.normal(0.1, 0.4, size=(6, 13)).astype(np.float32)
    valid = rng.random((6, 13)) < 0.6
    valid[0], valid[1], valid[2] = True, False, False
    valid[2, 5] = True
    delta[~valid] = rng.choice([-1e6, 1e6, 0.0], size=(~valid).sum())
    low, high = trns.mid_zone_bounds(delta, valid, mode, lower=lower, upper=upper, floor=floor)
    assert low.shape == high.shape == (6,)
    assert low.dtype == high.dtype == jnp.float32
    expected = [
        plain_bounds([float(x) for x, v in zip(*row) if v], mode, lower, upper, floor)
        for row in zip(delta, valid)
    ]
    np.testing.assert_allclose(low, [e[0] for e in expected], atol=1e-5)
    np.testing.assert_allclose(high, [e[1] for e in expected], atol=1e-5)


ROWS, COLUMNS = 3, 12
# Of a few values, so that many are equal.
tenths = st.integers(-3, 7).map(lambda x: np.float32(x / 10))
bounds = arrays(np.float32, ROWS, elements=tenths)
deltas = arrays(
    np.float32, (ROWS, COLUMNS), elements=tenths | st.floats(-2, 2, width=32, allow_subnormal=False)
)
choices = arrays(bool, (ROWS, COLUMNS))


@given(deltas, choices, st.floats(0, 1))
def test_quantiles_are_numpys(delta: np.ndarray, valid: np.ndarray, q: float):
    low, high = trns.mid_zone_bounds(delta, valid, "quantile", lower=q, upper=q, floor=-math.inf)
    for row, own, *found in zip(delta.astype(np.float64), valid, low, high):
        expected = np.quantile(row[own], q, method="linear") if own.any() else -math.inf
        np.testing.assert_allclose(found, [expected] * 2, atol=2e-6)


@given(deltas, choices, st.floats(0, 1))
def test_counting_finds_the_same_quantiles(delta: np.ndarray, valid: np.ndarray, q: float):
    """As many candidates, and those of several devices, are not sorted. Ties are among them."""
    count = valid.sum(1)
    (found,) = counted(delta, valid, count, q)
    for row, own, one in zip(delta.astype(np.float64), valid, found):
        if own.any():
            np.testing.assert_allclose(one, np.quantile(row[own], q), atol=2e-6)


@jax.jit
def counted(delta, valid, count, q):
    return sharded._counted_quantiles(delta, valid, count, (jnp.float32(q),), None)


@pytest.mark.parametrize("apart", [0, 1, 2, 4])
def test_drops_lie_apart(apart: int):
    rng = np.random.default_rng(apart)
    delta = rng.uniform(-0.2, 1.0, (40, 12)).astype(np.float32)
    delta[0, 3:] = -1.0  # too few behind the target for a pair
    low, high = trns.drop_bounds(delta, np.ones_like(delta, bool), 12, apart, None)
    for row, *found in zip(delta, low, high):
        near = np.sort(row[row >= 0])
        steep = np.argsort(-(near[1:] - near[:-1]), kind="stable")
        ends = [sorted(x) for x in itertools.pairwise(steep) if abs(x[0] - x[1]) > apart]
        expected = near[ends[0]] if ends else (-np.inf, near[-1])
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_quantile_that_is_a_value_is_exact():
    """So that `delta <= upper` keeps the candidate which is the quantile, and lower drops it."""
    rng = np.random.default_rng(8)
    delta = rng.normal(size=(1, 9)).astype(np.float32)
    ordered = np.sort(delta[0])
    for q, at in ((0.0, 0), (0.25, 2), (0.5, 4), (1.0, 8)):
        low, high = trns.mid_zone_bounds(
            delta, np.ones((1, 9), bool), "quantile", lower=q, upper=q, floor=-math.inf
        )
        assert float(low[0]) == float(high[0]) == float(ordered[at])


def test_quantiles_of_equal_deltas():
    delta = np.full((1, 5), 0.3, np.float32)
    low, high = trns.mid_zone_bounds(delta, delta > 0, "quantile", lower=0.1, upper=0.9)
    assert float(low[0]) == float(high[0]) == float(delta[0, 0])


def test_the_default_floor_lets_nothing_in_that_beats_the_target():
    delta = as_row(-0.2, 0.0, 0.1, 0.3)
    for mode, lower, upper in (("absolute", -1.0, 1.0), ("quantile", 0.0, 1.0), ("std", -5.0, 5.0)):
        valid = np.ones_like(delta, bool)
        low, high = trns.mid_zone_bounds(delta, valid, mode, lower=lower, upper=upper)
        zone = trns.mid_zone_mask(delta, low, high, ~valid)
        assert np.asarray(zone).tolist() == [[False, False, True, True]], mode


def test_no_floor_lets_them_in():
    delta = as_row(-0.2, 0.0, 0.1, 0.3)
    valid = np.ones_like(delta, bool)
    low, high = trns.mid_zone_bounds(
        delta, valid, "absolute", lower=-1.0, upper=1.0, floor=-math.inf
    )
    assert np.asarray(trns.mid_zone_mask(delta, low, high, ~valid)).all()


@pytest.mark.parametrize("floor", [0.0, -math.inf])
@pytest.mark.parametrize("mode", trns.BOUND_MODES)
def test_no_valid_candidate_has_an_empty_zone(mode: str, floor: float):
    delta = as_row(-0.5, 0.0, 0.2)
    valid = np.zeros_like(delta, bool)
    low, high = trns.mid_zone_bounds(delta, valid, mode, lower=0.1, upper=0.9, floor=floor)
    assert float(low[0]) == float(high[0]) == floor
    # Empty even if nothing is forbidden.
    assert not np.asarray(trns.mid_zone_mask(delta, low, high, valid)).any()


def test_unknown_mode():
    delta = as_row(0.0)
    with pytest.raises(ValueError, match=r"'drop'.*absolute"):
        trns.mid_zone_bounds(delta, delta == 0, "drop", lower=0, upper=1)


# ------------------------------------------------------------------------------------------- mask


def test_mask_is_open_below_and_closed_above():
    lower, upper = np.float32(0.1), np.float32(0.3)
    below, above = (np.nextafter(x, np.float32(np.inf)) for x in (lower, upper))
    delta = as_row(-1.0, lower, below, 0.2, 0.2, upper, above, 1.0)
    zone = trns.mid_zone_mask(delta, as_row(lower)[0], as_row(upper)[0], np.zeros((1, 8), bool))
    assert np.asarray(zone)[0].tolist() == [False, False, True, True, True, True, False, False]


@given(deltas, choices, bounds, bounds)
def test_mask_against_the_plain_statement(delta, forbidden, lower, upper):
    """Of bounds that occur among the values, and of empty zones."""
    zone = np.asarray(trns.mid_zone_mask(delta, lower, upper, forbidden))
    for b in range(ROWS):
        for c in range(COLUMNS):
            expected = lower[b] < delta[b, c] <= upper[b] and not forbidden[b, c]
            assert zone[b, c] == expected


# -------------------------------------------------------------------------------------- forbidden


def test_forbidden_candidates():
    # Candidates 1 and 4 are copies of one photo, candidate 6 is padding.
    candidate_ids = np.array([10, 11, 12, 13, 11, 14, 15])
    candidate_valid = np.array([True] * 6 + [False])
    known = np.array(
        [
            [11, -1, -1],  # one target, stored twice
            [10, 12, 14],  # several known positives
            [99, -1, -1],  # its target is not in the pool
            [15, 13, 13],  # the target is padding; one positive is listed twice
            [10, -1, -1],  # padding query
        ]
    )
    query_valid = np.array([True, True, True, True, False])
    forbidden = np.asarray(
        trns.forbidden_candidates(known, candidate_ids, query_valid, candidate_valid)
    )
    assert [np.flatnonzero(row).tolist() for row in forbidden] == [
        [1, 4, 6],
        [0, 2, 5, 6],
        [6],
        [3, 6],
        [0, 1, 2, 3, 4, 5, 6],
    ]


def test_forbidden_candidates_at_random():
    rng = np.random.default_rng(10)
    known = rng.integers(-1, 9, size=(6, 3))
    ids = rng.integers(0, 12, size=15)
    query_valid, candidate_valid = rng.random(6) < 0.7, rng.random(15) < 0.7
    forbidden = np.asarray(trns.forbidden_candidates(known, ids, query_valid, candidate_valid))
    for b in range(6):
        for c in range(15):
            positive = int(ids[c]) in {int(i) for i in known[b]}
            assert forbidden[b, c] == (positive or not query_valid[b] or not candidate_valid[c])


# --------------------------------------------------------------------------------------- sampling


def test_full_zone_draws_everything_once():
    delta = as_row(0.1, 0.2, 0.3, 0.4)
    everything = np.ones((1, 4), bool)
    for key in range(5):
        indices, valid = draw(delta, everything, 4, key=key, forbidden=~everything)
        assert sorted(indices[0].tolist()) == [0, 1, 2, 3]
        assert valid.all()


def test_empty_zone_without_fallback_draws_nothing():
    indices, valid = draw(as_row(0.1, 0.2, 0.3), np.zeros((1, 3), bool), 2)
    assert not valid.any()
    assert not indices.any()


def test_empty_zone_falls_back_nearest_above_lower_then_nearest_below():
    #             0     1    2    3    4    5    6    7
    delta = as_row(-0.4, 0.9, 0.1, 0.5, 0.0, 0.7, 0.2, 0.15)
    forbidden = as_row(0, 0, 0, 1, 0, 0, 0, 0, dtype=bool)
    nothing = np.zeros_like(forbidden)
    indices, valid = draw(delta, nothing, 8, forbidden=forbidden, lower=np.array([0.1], np.float32))
    # 0.1 is exactly lower: it is not above it, and the nearest of those below.
    assert indices[0].tolist() == [7, 6, 5, 1, 2, 4, 0, 0]
    assert valid[0].tolist() == [True] * 7 + [False]


def test_fallback_without_lower_is_by_delta_alone():
    delta = as_row(-0.4, 0.9, 0.1, 0.5)
    nothing = np.zeros((1, 4), bool)
    indices, valid = draw(delta, nothing, 4, forbidden=nothing)
    assert indices[0].tolist() == [0, 2, 3, 1]
    assert valid.all()


def test_drawn_come_before_fallbacks():
    delta = as_row(0.5, 0.05, 0.2, 0.3, 0.9, -0.1)
    mask = as_row(0, 0, 1, 1, 0, 0, dtype=bool)  # the zone (0.1, 0.4]
    for key in range(10):
        indices, valid = draw(
            delta,
            mask,
            6,
            key=key,
            forbidden=np.zeros_like(mask),
            lower=np.array([0.1], np.float32),
        )
        assert set(indices[0, :2].tolist()) == {2, 3}
        assert indices[0, 2:].tolist() == [0, 4, 1, 5]
        assert valid.all()


def test_ties_in_delta():
    """Equal deltas are drawn once each; fall-backs of equal delta come in order of index."""
    delta = np.full((1, 6), 0.2, np.float32)
    mask = as_row(0, 1, 0, 1, 0, 0, dtype=bool)
    forbidden = as_row(0, 0, 0, 0, 1, 0, dtype=bool)
    for lower in (0.0, np.float32(0.2), 0.5):  # the ties are above, at, and below lower
        indices, valid = draw(
            delta, mask, 6, forbidden=forbidden, lower=np.array([lower], np.float32)
        )
        assert set(indices[0, :2].tolist()) == {1, 3}
        assert indices[0, 2:].tolist() == [0, 2, 5, 0]
        assert valid[0].tolist() == [True] * 5 + [False]


@pytest.mark.parametrize("num", [1, 3])
@pytest.mark.parametrize("state", ["zone", "rest", "forbidden"])
def test_one_candidate(state: str, num: int):
    mask, forbidden = np.array([[state == "zone"]]), np.array([[state == "forbidden"]])
    indices, valid = draw(
        as_row(0.2), mask, num, forbidden=forbidden, lower=np.zeros(1, np.float32)
    )
    assert indices[0].tolist() == [0] * num
    assert valid[0].tolist() == [state != "forbidden"] + [False] * (num - 1)


def test_padding_rows_neither_sample_nor_are_sampled():
    rng = np.random.default_rng(11)
    query_valid = np.array([True, True, False])
    candidate_valid = np.array([True, True, True, False, False])
    forbidden = np.asarray(
        trns.forbidden_candidates(
            np.array([[0], [1], [2]]), np.arange(5), query_valid, candidate_valid
        )
    )
    delta = rng.normal(size=(3, 5)).astype(np.float32)
    low, high = trns.mid_zone_bounds(delta, ~forbidden, "quantile", lower=0.0, upper=1.0)
    mask = trns.mid_zone_mask(delta, low, high, forbidden)
    indices, valid = draw(delta, mask, 5, forbidden=forbidden, lower=low)
    assert {int(i) for i in indices[0][valid[0]]} == {1, 2}
    assert {int(i) for i in indices[1][valid[1]]} == {0, 2}
    assert not valid[2].any()


@pytest.mark.parametrize("sample_temperature", [None, 0.1])
@pytest.mark.parametrize("num", [1, 4, COLUMNS])
@given(deltas, choices, bounds, st.sampled_from([0.0, 0.1, 0.3, 9.0]), st.integers(0, 99))
def test_what_is_drawn(num, sample_temperature, delta, forbidden, lower, width, key):
    """The whole chain, from forbidden to the draw, on values with many ties."""
    mask = np.asarray(trns.mid_zone_mask(delta, lower, lower + np.float32(width), forbidden))
    options = {"forbidden": forbidden, "lower": lower, "sample_temperature": sample_temperature}
    indices, valid = draw(delta, mask, num, key=key, **options)
    for b in range(ROWS):
        check_row(indices[b], valid[b], delta[b], mask[b], num, forbidden[b], lower[b])


def test_a_forbidden_candidate_is_not_drawn_even_if_the_mask_holds_it():
    delta = as_row(0.1, 0.2, 0.3)
    everything = np.ones((1, 3), bool)
    forbidden = as_row(0, 1, 0, dtype=bool)
    indices, valid = draw(delta, everything, 3, forbidden=forbidden, lower=np.zeros(1, np.float32))
    assert set(indices[0][valid[0]].tolist()) == {0, 2}


def frequencies(delta, mask, num: int, draws: int, sample_temperature: float | None) -> Counter:
    """How often each tuple of indices is drawn, over `draws` keys."""

    def one(key):
        return trns.sample_negatives(key, delta, mask, num, sample_temperature=sample_temperature)

    indices, valid = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(12), draws))
    assert np.asarray(valid).all()
    return Counter(tuple(int(i) for i in row) for row in np.asarray(indices)[:, 0])


@pytest.mark.parametrize("sample_temperature", [None, 0.1, 0.5])
def test_draw_frequencies(sample_temperature: float | None):
    delta = as_row(0.3, 0.1, -0.2, 0.2, 0.9, 0.2)
    mask = as_row(1, 1, 0, 1, 1, 0, dtype=bool)
    zone = [0, 1, 3, 4]
    weights = [
        1.0 if sample_temperature is None else math.exp(-float(delta[0, c]) / sample_temperature)
        for c in zone
    ]
    share = {c: w / sum(weights) for c, w in zip(zone, weights)}
    draws = 6000

    single = frequencies(delta, mask, 1, draws, sample_temperature)
    assert set(single) <= {(c,) for c in zone}
    for c, p in share.items():
        assert abs(single[(c,)] / draws - p) < 4 * math.sqrt(p * (1 - p) / draws) + 1e-3

    # Two without replacement: the second in proportion among those that are left.
    pairs = frequencies(delta, mask, 2, draws, sample_temperature)
    for first in zone:
        for second in zone:
            p = 0.0 if first == second else share[first] * share[second] / (1 - share[first])
            observed = pairs[(first, second)] / draws
            assert abs(observed - p) < 4 * math.sqrt(p * (1 - p) / draws) + 1e-3


def test_rows_and_keys_draw_differently():
    delta, mask = np.zeros((8, 30), np.float32), np.ones((8, 30), bool)
    first, _ = draw(delta, mask, 5, key=0)
    again, _ = draw(delta, mask, 5, key=0)
    other, _ = draw(delta, mask, 5, key=1)
    np.testing.assert_array_equal(first, again)
    assert len({tuple(row) for row in first}) == 8
    assert not (first == other).all(axis=1).any()


def test_draws_do_not_depend_on_how_rows_are_split():
    rng = np.random.default_rng(13)
    delta = rng.normal(0.2, 0.2, size=(8, 12)).astype(np.float32)
    forbidden = rng.random((8, 12)) < 0.2
    lower, upper = np.zeros(8, np.float32), np.full(8, 0.3, np.float32)
    mask = np.asarray(trns.mid_zone_mask(delta, lower, upper, forbidden))

    def sample(rows, row_ids):
        return draw(
            delta[rows],
            mask[rows],
            6,
            forbidden=forbidden[rows],
            lower=lower[rows],
            row_ids=row_ids,
            sample_temperature=0.1,
        )

    whole = sample(np.arange(8), None)
    for size in (1, 4):
        parts = [sample(np.arange(i, i + size), np.arange(i, i + size)) for i in range(0, 8, size)]
        for ours, expected in zip(map(np.concatenate, zip(*parts)), whole):
            np.testing.assert_array_equal(ours, expected)
    order = rng.permutation(8)
    for ours, expected in zip(sample(order, order), whole):
        np.testing.assert_array_equal(ours, expected[order])


def mine(key, query, gallery, target, forbidden):
    delta = target_relative_similarity(query, gallery, target)
    low, high = trns.mid_zone_bounds(delta, ~forbidden, "quantile", lower=0.1, upper=0.7)
    mask = trns.mid_zone_mask(delta, low, high, forbidden)
    return delta, *trns.sample_negatives(
        key, delta, mask, 3, forbidden=forbidden, lower=low, sample_temperature=0.1
    )


def test_jit_traces_once_and_changes_nothing():
    rng = np.random.default_rng(14)
    traces = 0

    @jax.jit
    def counted(*args):
        nonlocal traces
        traces += 1
        return mine(*args)

    for step in range(4):
        args = (
            jax.random.key(step),
            unit(rng, 3, 5),
            unit(rng, 9, 4, 5),
            unit(rng, 3, 4, 5),
            rng.random((3, 9)) < 0.3 * step,
        )
        for ours, expected in zip(counted(*args), mine(*args)):
            np.testing.assert_allclose(ours, expected, atol=1e-6)
    assert traces == 1


def test_no_gradient_flows_through_the_choice():
    rng = np.random.default_rng(15)
    query, gallery, target = unit(rng, 3, 5), unit(rng, 9, 4, 5), unit(rng, 3, 4, 5)
    forbidden = np.zeros((3, 9), bool)
    constant = rng.normal(size=9).astype(np.float32)

    def chosen(query, gallery, target):
        _, indices, valid = mine(jax.random.key(0), query, gallery, target, forbidden)
        return jnp.where(valid, jnp.asarray(constant)[indices], 0).sum()

    for gradient in jax.grad(chosen, argnums=(0, 1, 2))(query, gallery, target):
        assert not np.asarray(gradient).any()

    def loss(delta):
        low, high = trns.mid_zone_bounds(delta, ~forbidden, "std", lower=-1.0, upper=1.0)
        mask = trns.mid_zone_mask(delta, low, high, forbidden)
        indices, _ = trns.sample_negatives(
            jax.random.key(0),
            delta,
            mask,
            2,
            forbidden=forbidden,
            lower=low,
            sample_temperature=1.0,
        )
        return jnp.take_along_axis(delta, indices, axis=1).sum(), indices

    gradient, indices = jax.grad(loss, has_aux=True)(
        jnp.asarray(plain_delta(query, gallery, target), jnp.float32)
    )
    expected = np.zeros((3, 9))
    for b, row in enumerate(np.asarray(indices)):
        expected[b, row] = 1
    np.testing.assert_array_equal(gradient, expected)


# ---------------------------------------------------------------------------------------- hardest


@pytest.mark.parametrize("num", [1, 4, 10])
def test_hardest_negatives(num: int):
    rng = np.random.default_rng(16)
    delta = rng.integers(-3, 5, size=(5, 8)).astype(np.float32) / 10  # with ties
    forbidden = rng.random((5, 8)) < 0.3
    forbidden[4] = True
    indices, valid = (np.asarray(x) for x in trns.hardest_negatives(delta, forbidden, num))
    assert indices.shape == valid.shape == (5, num)
    for b in range(5):
        allowed = [c for c in range(8) if not forbidden[b, c]]
        expected = sorted(allowed, key=lambda c: (delta[b, c], c))[:num]
        missing = num - len(expected)
        assert indices[b].tolist() == expected + [0] * missing
        assert valid[b].tolist() == [True] * len(expected) + [False] * missing
