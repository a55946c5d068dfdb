"""The probability that an image is valid, fitted to ranked lists."""

from __future__ import annotations

import numpy as np
import pytest

from dqe_jax.data.examples import Queries
from dqe_jax.evaluation.probability import Probability, fit


def queries_of(target, relevant=None):
    n = len(target)
    nothing = [np.zeros(0, np.int32)] * n
    return Queries(
        ids=[str(i) for i in range(n)],
        texts=["in red"] * n,
        reference=np.zeros(n, np.int32),
        target=np.asarray(target, np.int32),
        known_positives=nothing,
        relevant=relevant or nothing,
        kinds=[()] * n,
        attributes=[()] * n,
        pools=[""] * n,
        subset=nothing,
    )


def test_the_curve_that_made_the_labels_is_found():
    rng = np.random.default_rng(0)
    count, listed, truth = 800, 50, Probability(8.0, -5.0)
    scores = np.sort(rng.uniform(-0.2, 1, (count, listed)))[:, ::-1].astype(np.float32)
    rows = np.stack([rng.permutation(listed) for _ in range(count)]).astype(np.int32)
    valid = rng.random(scores.shape) < truth.of(scores)
    relevant = [row[own] for row, own in zip(rows, valid)]
    found = fit(rows, scores, queries_of(np.full(count, 999), relevant))
    assert found.slope == pytest.approx(8, rel=0.05)
    assert found.offset == pytest.approx(-5, rel=0.05)
    # The mean of the probabilities is the share of valid images: the last step of the fit.
    assert found.of(scores).mean() == pytest.approx(valid.mean(), abs=1e-3)


def test_targets_count_where_nothing_else_is_known_and_padding_does_not():
    rows = np.array([[3, 1, -1], [2, 4, 0], [5, 6, 7]], np.int32)
    scores = np.array([[0.9, 0.2, -np.inf], [0.8, 0.3, 0.1], [0.9, 0.9, 0.9]], np.float32)
    found = fit(rows, scores, queries_of([3, 2, -1]))  # the last query has no label
    assert np.isfinite([found.slope, found.offset]).all()  # though scores tell them apart
    assert found.of(np.array(0.9)) > 0.5 > found.of(np.array(0.2))
    assert fit(rows, scores, queries_of([9, 9, 9])) is None
    assert fit(rows[:1, :1], scores[:1, :1], queries_of([3])) is None


def test_it_never_falls():
    """Of a model that ranks what is valid last, all images have the share of valid ones."""
    rows, scores = np.array([[3, 1, 2, 0]] * 3, np.int32), np.array([[0.9, 0.5, 0.3, 0.2]] * 3)
    found = fit(rows, scores.astype(np.float32), queries_of([0, 0, 2]))
    assert found.slope == 0
    assert found.of(np.array([0.9, 0.2])) == pytest.approx([0.25] * 2, abs=0.05)


@pytest.mark.parametrize("held", [{}, {"slope": 1}, {"slope": "x", "offset": 0}, [1, 2]])
def test_what_is_no_curve(held):
    with pytest.raises(ValueError, match=r"probability|convert"):
        Probability.from_json(held)
    with pytest.raises(ValueError, match="not finite"):
        Probability.from_json({"slope": float("nan"), "offset": 0})
    assert Probability.from_json(None) is None
