"""The comparison of rankings: its sides rank alike, and its report says what was measured."""

import json

import numpy as np
import pytest

from dqe_jax.performance import ranking_benchmark
from dqe_jax.performance.ranking_benchmark import NUMPY, OURS, Sizes, compare_ranking, table
from dqe_jax.utils.errors import UserError

SMALL = Sizes(queries=11, gallery=45, tokens=2, width=8, k=5, chunk_queries=4, chunk_rows=16)


def test_a_small_comparison(tmp_path):
    file = tmp_path / "ranking.json"
    report = compare_ranking(SMALL, rounds=2, json_file=file)
    held = json.loads(file.read_text())
    assert held["sizes"]["gallery"] == 45
    assert {OURS, NUMPY} <= held["ranking"].keys()
    assert held["product"].keys() >= {"JAX", NUMPY}
    ceiling = report.product[report.ceiling]
    assert ceiling.share == 1
    assert all(one.seconds >= ceiling.seconds for one in report.product.values())
    for one in (*report.ranking.values(), *report.product.values()):
        assert one.fastest <= one.seconds <= one.slowest
        assert one.gflops == pytest.approx(SMALL.flop / one.seconds / 1e9)
    assert f"ranking, {OURS}" in table(report)


def test_numpy_ranks_as_sorting_does():
    queries, gallery = ranking_benchmark._embeddings(SMALL)
    scores = np.einsum("qd,nmd->qnm", queries, gallery).max(-1)
    rows, best = ranking_benchmark.rank_in_numpy(queries, gallery, SMALL)
    np.testing.assert_array_equal(rows, np.argsort(-scores, axis=1)[:, :5])
    np.testing.assert_allclose(best, -np.sort(-scores, axis=1)[:, :5], atol=1e-6)


def test_a_side_that_ranks_otherwise_is_told():
    right = (np.zeros((2, 3), int), np.ones((2, 3), np.float32))
    with pytest.raises(RuntimeError, match="ranking of dqe_jax is not that of NumPy"):
        ranking_benchmark._check_alike({NUMPY: right, OURS: (right[0], right[1] + 1e-3)})


def test_sizes_are_checked():
    with pytest.raises(UserError, match="--k at most the --gallery"):
        compare_ranking(Sizes(gallery=4, k=5))
