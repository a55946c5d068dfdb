"""Rejections and earlier turns move a query."""

import numpy as np
import pytest

from dqe_jax.search.asks import Ask, Known, Turn
from dqe_jax.search.relevance import STILL, Moves, moved
from dqe_jax.search.store import content_of
from dqe_jax.utils.errors import UserError


def unit(*shape, seed=0):
    x = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_the_query_moves_as_the_formula_says():
    query, earlier, rejected = unit(8), unit(2, 8, seed=1), unit(3, 4, 8, seed=2)
    moves = Moves(earlier=0.3, decay=0.5, rejected=0.4)
    got = moved(query, earlier, rejected, moves)
    best = np.stack([own[np.argmax(own @ query)] for own in rejected])
    want = query + 0.3 * earlier[1] + 0.15 * earlier[0] - 0.4 * best.mean(0)
    np.testing.assert_allclose(got, want / np.linalg.norm(want), atol=1e-6)
    assert got @ query < 1
    none = np.zeros((0, 4, 8), np.float32)
    np.testing.assert_array_equal(moved(query, earlier[:0], none, moves), query)
    np.testing.assert_allclose(moved(query, earlier, rejected, STILL), query, atol=1e-6)
    # A query that would vanish stays.
    away = np.tile(query, (1, 1, 1))
    np.testing.assert_array_equal(moved(query, earlier[:0], away, Moves(rejected=1.0)), query)


def test_a_batch_answers_each_as_alone(model, photos, tmp_path):
    (tmp_path / "t.csv").write_text("image,price\n" + "\n".join(f"{i:03d},{i}" for i in range(40)))
    index = model.index(photos, table=tmp_path / "t.csv", keep_features=False)
    data = (photos / "004.png").read_bytes()
    known = index.known("004.png")
    np.testing.assert_array_equal(known.image, model.preprocessing.square(opened(data)))
    other = Known("given", known.image, content_of(data))
    asks = [
        Ask(("000.png",), "in red", 3),
        Ask(("000.png",), "in red", 7, weights={"color": 3.0}),
        Ask(("002.png", "004.png"), "make it blue", 5, exclude=("006.png",)),
        Ask((other,), "", 40),
        Ask((known,), "in red", 5, filter={"price": (None, 20)}),
        Ask((known,), "in red", 5, filter={"price": (None, 20)}, include_reference=True),
        Ask(("000.png",), "in red", 5, rejected=("008.png", "010.png")),
        Ask(("000.png",), "in red", 5, earlier=(Turn(("002.png",), "make it green"),)),
        Ask(("000.png",), "in red", 5, filter={"price": (99, None)}),
    ]
    together = index.answer(asks)
    for ask, got in zip(asks, together):
        (alone,) = index.answer([ask])
        assert [one.id for one in got] == [one.id for one in alone]
        np.testing.assert_allclose(
            [one.score for one in got], [one.score for one in alone], atol=1e-5
        )
        assert len(got) <= ask.k
    assert "004.png" not in [one.id for one in together[3]]
    assert "no image passes the filter" in together[8].warnings
    assert not {"008.png", "010.png"} & {one.id for one in together[6]}
    first, moved_ = together[0], index.answer([asks[6]], STILL)[0]
    assert first[0].score == pytest.approx(moved_[0].score, abs=1e-5) or first[0].id in (
        *("008.png", "010.png"),
    )
    with pytest.raises(UserError, match=r"rejected: there is no image 'no\.png'"):
        index.answer([Ask(("000.png",), "", rejected=("no.png",))])
    got = index.search("000.png", "in red", k=5, rejected=["008.png", "010.png"])
    assert [one.id for one in got] == [one.id for one in together[6]]


def opened(data):
    import io

    from PIL import Image

    return Image.open(io.BytesIO(data)).convert("RGB")
