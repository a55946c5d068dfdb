import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from dqe_jax.evaluation import metrics
from dqe_jax.utils.errors import UserError


def lists(seed=0, Q=60, K=20, N=40):
    """Random ranked lists (some end early), ragged relevant rows (some none) and single targets."""
    rng = np.random.default_rng(seed)
    rows = np.stack([rng.permutation(N)[:K] for _ in range(Q)])
    for i in range(0, Q, 7):
        rows[i, rng.integers(0, K) :] = -1
    relevant = [rng.permutation(N)[: rng.integers(0, 30)].tolist() for _ in range(Q)]
    return rows, relevant, rng.integers(0, N, Q)


# Each metric of one query, in plain Python.
def plain_recall(row, targets, k):
    return 1.0 if any(r in targets for r in row[:k] if r != -1) else 0.0


def plain_precision(row, targets, k):
    return sum(1 for r in row[:k] if r != -1 and r in targets) / k


def plain_average_precision(row, targets, k):
    total = 0.0
    for i, r in enumerate(row[:k]):
        if r != -1 and r in targets:
            total += plain_precision(row, targets, i + 1)
    return total / min(len(set(targets)), k)


def plain_ndcg(row, targets, k):
    gains = [1 / np.log2(i + 1) for i in range(1, k + 1)]
    found = sum(gain for gain, r in zip(gains, row) if r != -1 and r in targets)
    return found / sum(gains[: len(set(targets))])


def rows_of(most):
    return st.lists(st.integers(0, 11), max_size=most, unique=True)


@given(
    st.lists(st.tuples(rows_of(8), rows_of(12), st.integers(-1, 11)), min_size=1, max_size=5),
    st.integers(1, 8),
)
def test_metrics_equal_plain_statements(queries, k):
    """Ranked lists that may end early, relevant rows that may be none, one target or none."""
    lists, relevant, target = zip(*queries)
    rows = np.array([row + [-1] * (8 - len(row)) for row in lists])
    recall = metrics.recall_at_k(rows, relevant, k)
    precision = metrics.precision_at_k(rows, relevant, k)
    average = metrics.average_precision_at_k(rows, relevant, k)
    gain = metrics.ndcg_at_k(rows, relevant, k)
    assert recall.shape == precision.shape == average.shape == (len(queries),)
    for i, (row, wanted) in enumerate(zip(rows.tolist(), relevant)):
        assert recall[i] == plain_recall(row, wanted, k)
        assert precision[i] == pytest.approx(plain_precision(row, wanted, k))
        if wanted:
            assert average[i] == pytest.approx(plain_average_precision(row, wanted, k))
            assert gain[i] == pytest.approx(plain_ndcg(row, wanted, k), abs=1e-12)
        else:
            assert np.isnan(average[i])
            assert np.isnan(gain[i])
    single = metrics.recall_at_k(rows, np.array(target), k)
    assert single.tolist() == [plain_recall(r, [t], k) for r, t in zip(rows.tolist(), target)]


def test_hand_computed_average_precision():
    rows = np.array([[7, 3, 9, 4, 1]])
    # Hits at ranks 1, 3 and 5, of 4 relevant targets.
    ap = metrics.average_precision_at_k(rows, [[9, 7, 1, 30]], 5)
    assert ap[0] == pytest.approx((1 / 1 + 2 / 3 + 3 / 5) / 4)
    # AP@3 divides by min(4, 3).
    ap = metrics.average_precision_at_k(rows, [[9, 7, 1, 30]], 3)
    assert ap[0] == pytest.approx((1 / 1 + 2 / 3) / 3)
    assert metrics.average_precision_at_k(rows, [[1, 3, 4, 7, 9, 11]], 5)[0] == 1


def test_targets_may_be_padded_ragged_or_repeated():
    rows, relevant, target = lists(1)
    padded = np.full((60, 40), -1)
    for i, values in enumerate(relevant):
        padded[i, : len(values)] = values
    repeated = [np.array([*values, *values], int) for values in relevant]
    for fn in (metrics.recall_at_k, metrics.precision_at_k, metrics.average_precision_at_k):
        expected = fn(rows, relevant, 10)
        np.testing.assert_array_equal(fn(rows, padded, 10), expected)
        np.testing.assert_array_equal(fn(rows, repeated, 10), expected)
        np.testing.assert_array_equal(fn(rows, target, 10), fn(rows, target[:, None], 10))


def test_padding_is_never_a_hit():
    rows = np.array([[2, -1, -1], [-1, -1, -1]])
    for targets in (np.array([-1, -1]), np.array([[-1], [-1]]), [[-1], []]):
        assert metrics.recall_at_k(rows, targets, 3).tolist() == [0, 0]
        assert metrics.precision_at_k(rows, targets, 3).tolist() == [0, 0]
        assert np.isnan(metrics.average_precision_at_k(rows, targets, 3)).all()


def test_trapezoid_average_precision():
    """The published checks, a plain statement of the definition, and what is never ranked."""
    one = np.array([[0], [1], [4], [-1]])
    found = metrics.trapezoid_average_precision(one, np.ones(4))
    np.testing.assert_allclose(found, np.array([1, 0.25, 0.1, 0]) / (1 + 1e-5), atol=1e-12)
    assert metrics.trapezoid_average_precision(np.array([[0]]), [1])[0] == pytest.approx(0.99999)
    rng = np.random.default_rng(0)
    places, counts, expected = np.full((40, 12), -1), [], []
    for i in range(40):
        own = np.sort(rng.permutation(50)[: i % 13])
        places[i, : len(own)] = own
        counts.append(len(own) + i % 3)
        total = 0.0
        for j, rank in enumerate(own.tolist()):
            before = 1.0 if rank == 0 else j / rank
            total += (before + (j + 1) / (rank + 1)) / 2 / (counts[-1] + 1e-5)
        expected.append(total)
    found = metrics.trapezoid_average_precision(places, counts)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
    assert found[0] == 0  # no relevant row at all


def test_r_precision():
    rows = np.array([[5, 2, 8], [5, 2, 8], [5, 2, 8], [5, 2, 8]])
    got = metrics.r_precision(rows, [[2], [5, 8], [], [1, 2, 3, 4]])
    np.testing.assert_array_equal(got, [0, 0.5, np.nan, np.nan])


def test_precision_ceiling_is_reached_by_the_best_order():
    rng = np.random.default_rng(0)
    relevant = [rng.permutation(30)[:n] for n in (0, 1, 4, 10, 25)]
    rows = np.stack([np.r_[v, np.setdiff1d(np.arange(30), v)] for v in relevant])
    ceiling = metrics.precision_ceiling([len(v) for v in relevant], 10)
    np.testing.assert_allclose(ceiling, [0, 0.1, 0.4, 1, 1])
    np.testing.assert_allclose(metrics.precision_at_k(rows, relevant, 10), ceiling)


def test_misuse_raises():
    rows = np.array([[1, 2, 3]])
    for k in (0, 4):
        with pytest.raises(UserError, match=f"k={k} does not fit ranked lists of 3 rows"):
            metrics.recall_at_k(rows, [[1]], k)
    with pytest.raises(ValueError, match="same row twice"):
        metrics.precision_at_k(np.array([[1, 2, 1]]), [[1]], 2)
    with pytest.raises(ValueError, match="targets of Q queries"):
        metrics.precision_at_k(rows, [[1], [2]], 2)
    args = {"relevant": None, "reference": [0], "kinds": [("a",)], "ks": (1,)}
    for name in ("kinds", "attributes"):
        with pytest.raises(ValueError, match=f"{name} has 2 entries for 1"):
            metrics.summarize(rows, **args | {"target": [1], name: [("a",), ("b",)]})
        with pytest.raises(ValueError, match="a sequence of strings for each"):
            metrics.summarize(rows, **args | {"target": [1], name: ["a"]})
    with pytest.raises(UserError, match="k=5 does not fit"):
        metrics.summarize(rows, **args | {"target": [1], "ks": (1, 5)})
    with pytest.raises(UserError, match="k=10 does not fit"):
        metrics.summarize(rows, **args | {"target": [1], "relevant": [[1]]})
    assert "R@1" in metrics.summarize(rows, target=[1], **args)  # nothing asks for P@10
    with pytest.raises(ValueError, match="no queries with a target"):
        metrics.summarize(rows, target=[-1], **args)
    nothing = {"target": [], "relevant": [], "reference": [], "kinds": []}
    with pytest.raises(ValueError, match="no queries with a target"):
        metrics.summarize(np.zeros((0, 50), int), **nothing)


def test_cut_offs_beyond_the_gallery():
    rows = np.array([[2, 0, 1], [0, 1, 2]])
    padded = metrics.pad_lists(rows, 50)
    assert padded.shape == (2, 50)
    np.testing.assert_array_equal(padded[:, :3], rows)
    assert (padded[:, 3:] == -1).all()
    assert metrics.pad_lists(padded, 10).shape == (2, 50)
    got = metrics.summarize(
        padded, target=[1, 0], relevant=[[1, 2], [0]], reference=[0, 1], kinds=[(), ()]
    )
    assert got["R@1"] == 0.5
    assert got["R@5"] == got["R@50"] == got["R_valid@1"] == 1
    # Three images cannot fill ten places.
    assert got["P@10"] == pytest.approx((2 + 1) / 2 / 10)
    assert got["mAP@10"] == pytest.approx(((1 + 2 / 3) / 2 + 1) / 2)


def test_summarize_equals_plain_statements():
    rows, relevant, target = lists(2)
    reference = np.where(np.arange(60) % 3 == 0, rows[:, 0], 39)
    # Some are of no kind, some of two.
    kinds = [(("color",), ("shape",), (), ("color", "size"))[i % 4] for i in range(60)]
    attributes = [(("fit=a", "fit=b", "age=c=d"), (), ("fit=",))[i % 3] for i in range(60)]
    relevant[1::4] = [[]] * 15  # truth unknown for all of "shape"
    target[::5] = -1  # no label
    got = metrics.summarize(
        rows,
        target=target,
        relevant=relevant,
        reference=reference,
        kinds=[*kinds[:-1], list(kinds[-1])],
        attributes=attributes,
        ks=(1, 5, 20),
        precision_ks=(3, 10),
    )
    expected = {"queries_without_target": 12}
    groups = {
        "": range(60),
        "/color": [*range(0, 60, 4), *range(3, 60, 4)],
        "/shape": range(1, 60, 4),
        "/size": range(3, 60, 4),
        "/attribute:fit": [*range(0, 60, 3), *range(2, 60, 3)],
        "/attribute:age": range(0, 60, 3),
    }
    for suffix, members in groups.items():
        members = [i for i in members if target[i] >= 0]
        known = [i for i in members if relevant[i]]
        expected["queries" + suffix] = len(members)
        expected["top1_is_reference" + suffix] = np.mean(
            [rows[i, 0] == reference[i] != -1 for i in members]
        )
        for k in (1, 5, 20):
            expected[f"R@{k}{suffix}"] = np.mean(
                [plain_recall(rows[i], [target[i]], k) for i in members]
            )
        if not known:
            continue
        expected["queries_with_valid" + suffix] = len(known)
        for k in (1, 5, 20):
            expected[f"R_valid@{k}{suffix}"] = np.mean(
                [plain_recall(rows[i], relevant[i], k) for i in known]
            )
        for k in (3, 10):
            for name, value in {
                f"P@{k}": [plain_precision(rows[i], relevant[i], k) for i in known],
                f"P@{k}_ceiling": [min(len(relevant[i]), k) / k for i in known],
                f"mAP@{k}": [plain_average_precision(rows[i], relevant[i], k) for i in known],
                f"nDCG@{k}": [plain_ndcg(rows[i], relevant[i], k) for i in known],
            }.items():
                expected[name + suffix] = np.mean(value)
    assert got == pytest.approx(expected)
    assert set(got) == set(expected)
    assert all(type(value) in (float, int) for value in got.values())


@pytest.mark.parametrize("relevant", [None, [[]] * 60, np.full((60, 2), -1)])
def test_summarize_without_truth(relevant):
    rows, _, target = lists(3)
    got = metrics.summarize(
        rows, target=target, relevant=relevant, reference=[-1] * 60, kinds=[()] * 60, ks=(1, 10)
    )
    assert set(got) == {"R@1", "R@10", "top1_is_reference", "queries"}
    assert got["top1_is_reference"] == 0


@pytest.mark.parametrize("N", [25, 8])
def test_random_baseline_equals_simulation(N):
    rng = np.random.default_rng(4)
    sizes = [1, 2, 6, 8]
    relevant = [rng.permutation(N)[:n] for n in sizes]
    runs = 5_000
    rows = np.stack([rng.permutation(N) for _ in range(runs * 4)])
    rows = np.pad(rows, ((0, 0), (0, 2)), constant_values=-1)  # as ranked lists end
    simulated = metrics.summarize(
        rows,
        target=[v[0] for v in relevant] * runs,
        relevant=relevant * runs,
        reference=[-1] * len(rows),
        kinds=[()] * len(rows),
        ks=(1, 5, 10),
        precision_ks=(5, 10),
    )
    exact = metrics.random_baseline(N, [0, *sizes], ks=(1, 5, 10), precision_ks=(5, 10))
    for name, value in exact.items():
        assert value == pytest.approx(simulated[name], abs=0.012), name
    assert set(simulated) - set(exact) == {"queries", "queries_with_valid", "top1_is_reference"}


def test_random_baseline_edge_cases():
    assert metrics.random_baseline(200, ks=(1, 50)) == {"R@1": 1 / 200, "R@50": 1 / 4}
    assert metrics.random_baseline(200, [0, 0], ks=(1,)) == {"R@1": 1 / 200}
    assert set(metrics.random_baseline(200)) == {"R@1", "R@5", "R@10", "R@50"}
    everything = metrics.random_baseline(12, [12], ks=(1, 5))
    assert everything["mAP@10"] == everything["nDCG@10"] == pytest.approx(1)
    assert everything["R_valid@1"] == everything["P@10"] == 1
    assert metrics.random_baseline(1, [1], ks=(1,))["mAP@10"] == 1
    # C(96, 10) / C(100, 10), from the definition.
    miss = np.prod([(96 - j) / (100 - j) for j in range(10)])
    assert metrics.random_baseline(100, [4], ks=(10,))["R_valid@10"] == pytest.approx(1 - miss)
    with pytest.raises(ValueError, match="9 relevant targets in a gallery of 8"):
        metrics.random_baseline(8, [9])
    with pytest.raises(ValueError, match="empty"):
        metrics.random_baseline(0)
