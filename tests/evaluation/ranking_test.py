import jax
import numpy as np
import pytest

from dqe_jax.evaluation import ranking
from dqe_jax.utils.errors import UserError


def devices(count):
    try:
        available = jax.devices("cpu")
    except RuntimeError:  # JAX_PLATFORMS leaves the CPU out
        available = jax.devices()
    if len(available) < count:
        pytest.skip(f"needs {count} devices")
    return available[:count]


def reference_ranking(queries, gallery, k, excluded=None):
    """Plain statement of what a ranking is: sort (score descending, row ascending)."""
    all_rows, all_scores = [], []
    for i, query in enumerate(queries):
        scored = []
        for row, tokens in enumerate(gallery):
            if excluded is None or row not in excluded[i]:
                scored.append((-max(float(np.dot(query, token)) for token in tokens), row))
        scored = sorted(scored)[:k]
        missing = k - len(scored)
        all_rows.append([row for _, row in scored] + [-1] * missing)
        all_scores.append([-score for score, _ in scored] + [-np.inf] * missing)
    return np.array(all_rows), np.array(all_scores)


def integers(seed, *shape, high=3):
    """Small whole numbers: products are exact in float32 and ties are plentiful."""
    return np.random.default_rng(seed).integers(-high, high + 1, shape).astype(np.float32)


def unit(seed, *shape):
    x = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize("num_devices", [1, 3, 8])
@pytest.mark.parametrize(
    ("Q", "N", "M", "k", "chunk_rows", "chunk_queries"),
    [
        (7, 50, 1, 10, 4, 3),  # nothing divides anything
        (8, 64, 4, 64, 8, 8),  # everything divides, the whole gallery is asked for
        (5, 5, 4, 5, 4, 16),  # fewer rows than devices
        (1, 1, 1, 1, 1, 1),
        (3, 40, 2, 20, 3, 2),  # k exceeds a chunk and a device's share
    ],
)
def test_equals_sorting(num_devices, Q, N, M, k, chunk_rows, chunk_queries):
    queries, gallery = integers(1, Q, 6), integers(2, N, M, 6)
    rank = ranking.make_rank_fn(
        k, chunk_rows=chunk_rows, chunk_queries=chunk_queries, devices=devices(num_devices)
    )
    rows, scores = rank(queries, gallery)
    expected_rows, expected_scores = reference_ranking(queries, gallery, k)
    assert rows.dtype == np.int32
    assert scores.dtype == np.float32
    np.testing.assert_array_equal(rows, expected_rows)
    np.testing.assert_array_equal(scores, expected_scores)


@pytest.mark.parametrize("num_devices", [1, 8])
def test_excluded_rows_never_appear(num_devices):
    queries, gallery = integers(3, 9, 5), integers(4, 21, 2, 5)
    rng = np.random.default_rng(5)
    excluded = np.full((9, 20), -1)
    for i, count in enumerate([0, 1, 2, 5, 10, 15, 18, 19, 20]):
        excluded[i, :count] = rng.permutation(21)[:count]
        rng.shuffle(excluded[i])
    rank = ranking.make_rank_fn(8, chunk_rows=4, chunk_queries=4, devices=devices(num_devices))
    rows, scores = rank(queries, gallery, excluded=excluded)
    expected_rows, expected_scores = reference_ranking(queries, gallery, 8, excluded)
    np.testing.assert_array_equal(rows, expected_rows)
    np.testing.assert_array_equal(scores, expected_scores)
    assert rows[-1].tolist()[1:] == [-1] * 7
    assert not any(np.isin(r[r >= 0], e).any() for r, e in zip(rows, excluded))


def test_excluding_everything_or_nothing():
    queries, gallery = integers(6, 2, 3), integers(7, 4, 1, 3)
    rank = ranking.make_rank_fn(2, chunk_rows=2, chunk_queries=2, devices=devices(1))
    rows, scores = rank(queries, gallery, excluded=np.tile(np.arange(4), (2, 1)))
    assert (rows == -1).all()
    assert np.isneginf(scores).all()
    expected = reference_ranking(queries, gallery, 2)[0]
    for nothing in (None, np.zeros((2, 0), int), np.full((2, 3), -1)):
        np.testing.assert_array_equal(rank(queries, gallery, excluded=nothing)[0], expected)


@pytest.mark.parametrize("num_devices", [1, 8])
def test_equal_scores_are_ordered_by_row(num_devices):
    gallery = np.zeros((37, 2, 4), np.float32)
    gallery[:, 0, 0] = -1.0  # <q, T_0> = -0.0 for the second query
    queries = np.array([[1, 0, 0, 0], [0, 1, 0, 0], [-0.0, -1, 0, 0]], np.float32)
    rank = ranking.make_rank_fn(37, chunk_rows=3, chunk_queries=2, devices=devices(num_devices))
    rows, _ = rank(queries, gallery)
    np.testing.assert_array_equal(rows, np.tile(np.arange(37), (3, 1)))


def test_negative_zero_equals_zero():
    gallery = np.array([-0.0, 0.0, -0.0, 0.0, -1.0], np.float32).reshape(5, 1, 1)
    rank = ranking.make_rank_fn(5, chunk_rows=2, chunk_queries=1, devices=devices(1))
    assert rank(np.ones((1, 1)), gallery)[0].tolist() == [[0, 1, 2, 3, 4]]


@pytest.mark.parametrize("M", [1, 4])
def test_duplicated_images_stay_in_row_order(M):
    copies = unit(8, 30, M, 96)
    gallery = np.concatenate([copies] * 5)  # row r is image r % 30
    rank = ranking.make_rank_fn(150, chunk_rows=64, chunk_queries=16, devices=devices(8))
    rows, scores = rank(unit(9, 20, 96), gallery)
    groups = rows.reshape(20, 30, 5)
    assert (groups % 30 == groups[:, :, :1] % 30).all()
    assert (np.diff(groups, axis=-1) == 30).all()
    assert (scores.reshape(20, 30, 5) == scores.reshape(20, 30, 5)[:, :, :1]).all()


@pytest.mark.parametrize(("N", "M", "d"), [(700, 1, 64), (501, 4, 33)])
def test_same_on_one_and_eight_devices(N, M, d):
    queries, gallery = unit(10, 45, d), unit(11, N, M, d)
    one, eight = (
        ranking.make_rank_fn(50, chunk_rows=40, chunk_queries=32, devices=devices(n))(
            queries, gallery, excluded=np.arange(45)[:, None]
        )
        for n in (1, 8)
    )
    np.testing.assert_array_equal(one[0], eight[0])
    np.testing.assert_array_equal(one[1], eight[1])  # to the last bit
    exact = np.einsum("qd,nmd->qnm", queries.astype(float), gallery.astype(float)).max(-1)
    np.testing.assert_allclose(one[1], np.take_along_axis(exact, one[0], 1), atol=1e-6)
    exact[np.arange(45), np.arange(45)] = -np.inf
    np.testing.assert_allclose(one[1], -np.sort(-exact)[:, :50], atol=1e-6)


def test_one_compilation_serves_galleries_and_query_counts_of_a_size(caplog):
    rank = ranking.make_rank_fn(3, chunk_rows=8, chunk_queries=4, devices=devices(1))

    def compilations(Q, N):
        caplog.clear()
        with jax.log_compiles(), caplog.at_level("WARNING"):
            rows, _ = rank(integers(1, Q, 4), integers(2, N, 1, 4))
        assert rows.shape == (Q, 3)
        return sum("XLA compilation" in r.getMessage() for r in caplog.records)

    assert compilations(5, 15) > 0
    assert compilations(11, 12) == 0
    assert compilations(5, 170) == 0  # many more chunks of the gallery


def test_blocks_change_nothing(monkeypatch):
    """Products that fit a cache: the same scores to the last bit, on one and eight devices."""
    queries, gallery = unit(12, 21, 48), unit(13, 400, 4, 48)
    found = []
    for block, number in ((ranking.BLOCK, 1), (4 * 16 * 7, 1), (4 * 16 * 7, 8)):
        monkeypatch.setattr(ranking, "BLOCK", block)
        ranking._programs.cache_clear()
        rank = ranking.make_rank_fn(30, chunk_rows=40, chunk_queries=16, devices=devices(number))
        found.append(rank(queries, gallery))
    ranking._programs.cache_clear()
    for rows, scores in found[1:]:
        np.testing.assert_array_equal(rows, found[0][0])
        np.testing.assert_array_equal(scores, found[0][1])


def test_no_queries():
    rank = ranking.make_rank_fn(2, devices=devices(1))
    rows, scores = rank(np.zeros((0, 3)), np.zeros((4, 1, 3)))
    assert rows.shape == scores.shape == (0, 2)


@pytest.mark.parametrize("count", [1, 4])
def test_lists_of_a_small_gallery_end_in_minus_one(count):
    rng = np.random.default_rng(0)
    queries, gallery = rng.normal(size=(3, 4)), rng.normal(size=(6, 2, 4))
    rank = ranking.make_rank_fn(9, chunk_rows=4, devices=devices(count))
    rows, scores = rank(queries, gallery, excluded=np.array([[2], [-1], [5]]))
    np.testing.assert_array_equal((rows >= 0).sum(1), [5, 6, 5])
    np.testing.assert_array_equal(rows >= 0, np.isfinite(scores))
    assert [sorted(row[row >= 0]) for row in rows] == [[0, 1, 3, 4, 5], [*range(6)], [*range(5)]]
    assert (np.diff(rows < 0, axis=1) >= 0).all()  # what is missing is at the end


@pytest.mark.parametrize("count", [1, 8])
def test_scores_of_given_rows(count):
    rng = np.random.default_rng(1)
    queries = rng.normal(size=(7, 5)).astype(np.float32)
    gallery = rng.normal(size=(20, 3, 5)).astype(np.float32)
    rows = rng.integers(-1, 20, (7, 4))
    scores = ranking.make_score_fn(chunk_queries=2, devices=devices(count))(queries, gallery, rows)
    expected = (gallery[rows] @ queries[:, None, :, None])[..., 0].max(-1)
    np.testing.assert_allclose(scores, np.where(rows < 0, -np.inf, expected), rtol=1e-5)
    one = ranking.make_score_fn(chunk_queries=2, devices=devices(1))(queries, gallery, rows)
    np.testing.assert_array_equal(scores, one)


def test_order_of_a_small_set():
    rows = np.array([[7, 3, -1, 5], [2, 9, 4, 1]])
    scores = np.array([[0.1, 0.9, -np.inf, 0.9], [0.0, 0.0, 1.0, 0.0]])
    expected = [[3, 5, 7, -1], [4, 1, 2, 9]]  # equal scores by row, padding last
    order = ranking.order_of_subset(rows, scores)
    np.testing.assert_array_equal(np.take_along_axis(rows, order, axis=1), expected)


def test_errors():
    rank = ranking.make_rank_fn(2, devices=devices(1))
    with pytest.raises(ValueError, match=r"\[2, 3\] and \[4, 3\]"):
        rank(np.zeros((2, 3)), np.zeros((4, 3)))
    with pytest.raises(ValueError, match="expected queries"):
        rank(np.zeros((2, 3)), np.zeros((4, 1, 5)))
    for bad in ([[4], [0]], [[-2], [0]]):
        with pytest.raises(ValueError, match=r"\[-1, 4\)"):
            rank(np.zeros((2, 3)), np.zeros((4, 1, 3)), excluded=np.array(bad))
    for bad in ([1, 2], [[[1]], [[2]]]):
        with pytest.raises(ValueError, match=r"expected excluded \[2, E\]"):
            rank(np.zeros((2, 3)), np.zeros((4, 1, 3)), excluded=np.array(bad))
    with pytest.raises(UserError, match="gallery embeddings hold values that are not finite"):
        rank(np.zeros((2, 3)), np.full((4, 1, 3), np.nan))
    with pytest.raises(ValueError, match="positive"):
        ranking.make_rank_fn(0)


@pytest.mark.parametrize("num_devices", [1, 3])
def test_places_are_those_of_the_whole_ranking(num_devices, monkeypatch):
    monkeypatch.setattr(ranking, "HELD", 3 * ranking.PLACED_ROWS)  # three queries at a time
    queries, gallery = integers(1, 10, 6), integers(2, 700, 2, 6)
    rng = np.random.default_rng(3)
    rows = np.full((10, 9), -1)
    for i in range(10):
        rows[i, : i % 4 * 3] = rng.permutation(700)[: i % 4 * 3]
        rng.shuffle(rows[i])
    place = ranking.make_place_fn(devices=devices(num_devices))
    whole, _ = reference_ranking(queries, gallery, 700)
    found = place(queries, gallery, rows)
    assert found.dtype == np.int32
    for own, order, places in zip(rows, whole, found):
        expected = np.flatnonzero(np.isin(order, own[own >= 0]))
        assert places.tolist() == [*expected, *[-1] * (9 - len(expected))]
    # Without a row of each query's own, those behind it move up.
    excluded = np.array([-1, *whole[1:, 0]])
    others = np.where(rows == excluded[:, None], -1, rows)
    without, _ = reference_ranking(queries, gallery, 700, excluded[:, None])
    found = place(queries, gallery, others, excluded=excluded)
    for own, order, places in zip(others, without, found):
        expected = np.flatnonzero(np.isin(order, own[own >= 0]))
        assert places[places >= 0].tolist() == expected.tolist()
    assert place(queries, gallery, rows[:, :0]).shape == (10, 0)
    with pytest.raises(ValueError, match="expected rows"):
        place(queries, gallery, rows[:3])


def test_a_row_may_come_last_among_equals():
    rows = np.array([[4, 2, 9, -1], [4, 2, 9, 7]])
    scores = np.array([[1.0, 1.0, 1.0, 5.0], [3.0, 1.0, 1.0, 2.0]])
    order = ranking.order_of_subset(rows, scores, last=np.array([2, 4]))
    found = np.take_along_axis(rows, order, axis=1)
    assert found.tolist() == [[4, 9, 2, -1], [4, 7, 2, 9]]
    assert rows[0][ranking.order_of_subset(rows, scores)[0]].tolist() == [2, 4, 9, -1]
