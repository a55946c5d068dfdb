"""A gallery on the devices is ranked as by sorting, whatever is left out."""

import jax
import numpy as np
import pytest

from dqe_jax.evaluation.placed import PlacedGallery

Q, N, M, WIDTH = 3, 50, 4, 6


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


@pytest.mark.parametrize("devices", [1, 3])
def test_equals_sorting(devices):
    rng = np.random.default_rng(0)
    # Small whole numbers: products are exact and ties are plentiful.
    gallery = rng.integers(-3, 4, (N, M, WIDTH)).astype(np.float32)
    queries = rng.integers(-3, 4, (Q, WIDTH)).astype(np.float32)
    placed = PlacedGallery(gallery, devices=jax.devices()[:devices], chunk_rows=8)
    assert len(placed) == N
    nothing, everything = np.full((Q, 1), -1), np.ones(N, bool)
    excluded = np.stack([rng.permutation(N)[:5] for _ in range(Q)])
    few = np.arange(N) % 9 == 0
    for out, allowed in ((nothing, everything), (excluded, everything), (excluded, few)):
        found = placed.rank(queries, 10, excluded=out, allowed=allowed)
        expected = by_sorting(queries, gallery, 10, out, allowed)
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
