"""A gallery on the devices is ranked as by sorting, whatever is left out."""

import jax
import numpy as np
import pytest

from dqe_jax.evaluation import two_pass
from dqe_jax.evaluation.placed import PlacedGallery

Q, N, M, WIDTH = 3, 50, 4, 6


def one_by_one(placed, queries, k, excluded, allowed):
    found = [
        placed.rank(queries[i : i + 1], k, excluded=excluded[i : i + 1], allowed=allowed)
        for i in range(len(queries))
    ]
    return [np.concatenate(parts) for parts in zip(*found)]


def by_sorting(queries, gallery, k, excluded, allowed):
    rows, scores = np.full((len(queries), k), -1), np.full((len(queries), k), -np.inf)
    for i, query in enumerate(queries):
        found = sorted(
            (-max(float(query @ token) for token in tokens), row)
            for row, tokens in enumerate(gallery)
            if allowed[row] and row not in excluded[i]
        )
        for place, (score, row) in enumerate(found[:k]):
            rows[i, place], scores[i, place] = row, -score
    return rows, scores


@pytest.mark.parametrize("rough", [False, True])
@pytest.mark.parametrize("devices", [1, 3])
def test_equals_sorting(devices, rough):
    rng = np.random.default_rng(0)
    # Small whole numbers: products are exact and ties are plentiful.
    gallery = rng.integers(-3, 4, (N, M, WIDTH)).astype(np.float32)
    queries = rng.integers(-3, 4, (Q, WIDTH)).astype(np.float32)
    placed = PlacedGallery(
        gallery, devices=jax.devices()[:devices], chunk_rows=8, large=1 if rough else 2**26
    )
    assert len(placed) == N
    nothing, everything = np.full((Q, 1), -1), np.ones(N, bool)
    excluded = np.stack([rng.permutation(N)[:5] for _ in range(Q)])
    few = np.arange(N) % 9 == 0
    for out, allowed in ((nothing, everything), (excluded, everything), (excluded, few)):
        found = placed.rank(queries, 10, excluded=out, allowed=allowed)
        expected = by_sorting(queries, gallery, 10, out, allowed)
        np.testing.assert_array_equal(found[0], expected[0])
        np.testing.assert_array_equal(found[1], expected[1])
        found = one_by_one(placed, queries, 10, out, allowed)
        np.testing.assert_array_equal(found[0], expected[0])
        np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_array_equal(placed.rank(queries, 2)[0], placed.rank(queries, 10)[0][:, :2])


def test_errors():
    placed = PlacedGallery(np.zeros((4, 1, 3)), devices=jax.devices()[:1])
    with pytest.raises(ValueError, match="positive"):
        placed.rank(np.zeros((2, 3)), 0)
    with pytest.raises(ValueError, match=r"expected queries \[Q, 3\]"):
        placed.rank(np.zeros((2, 4)), 1)
    with pytest.raises(ValueError, match=r"expected excluded \[2, E\]"):
        placed.rank(np.zeros((2, 3)), 1, excluded=np.zeros((2, 1, 1), int))


def drawn(rng, *shape):
    x = rng.standard_normal(shape, np.float32)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize("devices", [1, 2])
def test_a_rough_pass_finds_the_exact_list(devices):
    rng = np.random.default_rng(1)
    gallery, queries = drawn(rng, 3_000, 4, 24), drawn(rng, 1, 24)
    excluded = rng.integers(0, 3_000, (1, 3))
    places = jax.devices()[:devices]
    exact = PlacedGallery(gallery, devices=places, chunk_rows=64)
    rough = PlacedGallery(gallery, devices=places, chunk_rows=64, large=1)
    for k in (10, 100):
        expected = exact.rank(queries, k, excluded=excluded)
        found = rough.rank(queries, k, excluded=excluded)
        np.testing.assert_array_equal(found[0], expected[0])
        np.testing.assert_allclose(found[1], expected[1], atol=1e-6)
    assert rough.unsure == 0
    assert exact.unsure == 0


def test_a_list_that_the_rough_pass_cannot_tell():
    """Images that the copy cannot tell apart: all are ranked, and the best are found."""
    rng = np.random.default_rng(2)
    near = drawn(rng, 8) + 1e-5 * rng.standard_normal((2_000, 1, 8)).astype(np.float32)
    query = drawn(rng, 1, 8)
    rough = PlacedGallery(near, devices=jax.devices()[:1], large=1)
    found = rough.rank(query, 10)
    expected = PlacedGallery(near, devices=jax.devices()[:1]).rank(query, 10)
    np.testing.assert_array_equal(found[0], expected[0])
    assert rough.unsure == 1
    copy = two_pass.rough_copy(near)
    assert len(np.unique((copy.tokens @ query[0])[:, 0] * copy.scale)) < 1_000


@pytest.mark.parametrize("length", [0, 1e-44, 1e-30, 1e6, 1e37])
def test_lengths_near_the_ends_of_float32(length):
    rng = np.random.default_rng(4)
    gallery = np.float32(length) * drawn(rng, 900, 2, 8)
    query = drawn(rng, 1, 8)
    rough, exact = (
        PlacedGallery(gallery, devices=jax.devices()[:1], large=large) for large in (1, 2**26)
    )
    (rows, scores), (expected, best) = rough.rank(query, 10), exact.rank(query, 10)
    np.testing.assert_array_equal(rows, expected)
    np.testing.assert_allclose(scores, best, rtol=1e-6)
    assert rough.unsure == (length < 1e-40)  # then all scores are equal


def test_images_of_different_lengths():
    """Each image has its own scale, so one long image does not spoil the others."""
    rng = np.random.default_rng(5)
    gallery, query = drawn(rng, 3_000, 2, 16), drawn(rng, 1, 16)
    gallery[0] *= 1e4
    rough, exact = (
        PlacedGallery(gallery, devices=jax.devices()[:1], large=large) for large in (1, 2**26)
    )
    np.testing.assert_array_equal(rough.rank(query, 10)[0], exact.rank(query, 10)[0])
    assert rough.unsure == 0


def test_the_error_of_the_copy_bounds_every_score():
    rng = np.random.default_rng(3)
    gallery, queries = drawn(rng, 700, 3, 40), drawn(rng, 200, 40)
    copy = two_pass.rough_copy(gallery)
    away = np.abs((gallery - copy.tokens * copy.scale[:, None, None]) @ queries.T).max((1, 2))
    assert (away <= copy.error).all()
    assert away.min() > 0
    assert copy.error.max() < 0.02


@pytest.mark.parametrize(
    ("chunk_rows", "tokens", "width", "rows"),
    [
        (512, 32, 256, 128),
        (512, 1, 256, 512),
        (96, 64, 1_024, 16),
        (7, 32, 256, 1),
        (8, 999, 9_999, 1),
    ],
)
def test_chunks_fit_the_cache(chunk_rows, tokens, width, rows):
    assert two_pass.rows_of_a_chunk(chunk_rows, tokens, width) == rows
    assert rows == 1 or rows * tokens * width * 4 <= two_pass.CHUNK
