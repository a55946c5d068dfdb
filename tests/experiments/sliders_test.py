"""Attribute weights: their calibration, and what sliders do to a ranking."""

from types import SimpleNamespace

import numpy as np
import pytest

from dqe_jax.data import lexicon
from dqe_jax.experiments import sliders


def test_calibration_by_hand():
    weights = np.array([0.9, 0.7, 0.3, 0.1, 0.1])
    changed = np.array([True, True, True, False, False])
    found = sliders.calibration(weights, changed)
    assert found["changed"] == pytest.approx(1.9 / 3)
    assert found["kept"] == pytest.approx(0.1)
    assert found["auc"] == 1.0
    assert [n for n, _, _ in found["bins"]] == [2, 1, 1, 1]
    # |0.1 - 0| twice, |0.3 - 1|, |0.7 - 1|, |0.9 - 1|, over five queries.
    assert found["error"] == pytest.approx((0.2 + 0.7 + 0.3 + 0.1) / 5)
    turned = sliders.calibration(1 - weights, changed)
    assert turned["auc"] == 0.0
    assert sliders.calibration(np.full(5, 0.5), changed)["auc"] == 0.5
    assert sliders.calibration(weights, np.ones(5, bool))["auc"] is None


def test_sliders_by_hand():
    changed = np.array([True, True, False])
    shares = {
        0.0: np.array([0.0, 0.2, 1.0]),
        1.0: np.array([0.5, 0.7, 0.9]),
        2.0: np.array([0.4, 0.6, 0.5]),
    }
    found = sliders.slider(shares, changed)
    assert found["changed"] == pytest.approx([0.1, 0.6, 0.5])
    assert found["kept"] == pytest.approx([1.0, 0.9, 0.5])
    assert found["falls"] == pytest.approx(0.1)
    assert found["errors"] == pytest.approx([0.0, 0.0])
    assert sliders.slider({0.0: shares[0.0], 1.0: shares[1.0]}, changed)["falls"] == 0.0


def test_the_column_of_an_attribute():
    values = [("Men", "Navy Blue", "Tshirts"), ("Women", "Red", "Jeans"), ("Men", "Olive", "Ties")]
    columns = ("gender", "baseColour", "articleType")
    words = lexicon.load_lexicon()
    found = sliders.columns_of(("color", "article", "gender", "season"), columns, values, words)
    assert found == {"color": 1, "article": 2, "gender": 0}


def test_a_table_and_searches_with_factors():
    asked = []

    class Found(list):
        @property
        def attribute_weights(self):
            return {"color": 0.25}

    index = SimpleNamespace(
        answer=lambda asks, moves: (
            asked.extend(asks) or [Found([SimpleNamespace(id="a")])] * len(asks)
        )
    )
    weights, ids = sliders._answers(index, [("r.png", "in red")] * 70, 10, {"color": 2.0})
    assert weights["color"].tolist() == [0.25] * 70
    assert ids == [["a"]] * 70
    assert len(asked) == 70
    assert asked[0].weights == {"color": 2.0}
    assert asked[0].k == 10
    facts = {
        "factors": [0.0, 1.0],
        "shown": 10,
        "attributes": {
            "color": {
                "calibration": {"changed": 0.9, "kept": None, "auc": 0.75, "error": 0.1},
                "sliders": {"changed": [0.2, 0.4], "kept": [0.9, 0.8]},
            }
        },
    }
    text = sliders.told(facts)
    assert "0.750" in text
    assert "x 0" in text
    assert "0.400" in text
