"""An index in Milvus finds what the exact one finds, and follows the folder.

`MILVUS_URI` names a server to test with in place of Milvus Lite.
"""

import importlib.util
import os

import numpy as np
import pytest
from PIL import Image

from dqe_jax.search import milvus
from dqe_jax.search.images import Encoded
from dqe_jax.search.index import open_index
from dqe_jax.utils.errors import UserError

HAS_MILVUS = importlib.util.find_spec("pymilvus") is not None
needs_milvus = pytest.mark.skipif(not HAS_MILVUS, reason="pymilvus is not installed")
TEXTS = ["make the red circle blue", "in red", "the same but small"]


@pytest.fixture
def places(tmp_path):
    """Where an index and its store lie."""
    return tmp_path / "index", os.environ.get("MILVUS_URI") or str(tmp_path / "store.db")


def found_by(index, **options):
    ids = ["000.png", "002.png", "004.png"]
    return [[one.id for one in own] for own in index.search(ids, TEXTS, k=8, **options)]


@needs_milvus
def test_it_finds_what_exact_search_finds(model, photos, places, tmp_path, monkeypatch):
    place, store = places
    lines = [f"{path.name},{'AB'[i % 2]}'\"ä,{i}" for i, path in enumerate(photos.glob("*.png"))]
    (tmp_path / "t.csv").write_text("\n".join(["image;brand;price", *lines]).replace(",", ";"))
    index = model.index(photos, output=place, store=store, table=tmp_path / "t.csv")
    exact = model.index(photos, table=tmp_path / "t.csv")
    assert isinstance(index.known("000.png").image, Encoded)
    assert found_by(index) == found_by(exact)
    for options in (
        {"filter": {"brand": "A'\"ä"}, "include_reference": True},
        {"filter": {"price": (3, 15), "brand": ["A'\"ä", "B'\"ä"]}},
        {"filter": {"price": [2, 3.0, 4]}},
        {"exclude": list(index.ids[:9]), "weights": {"color": 0.0}},
    ):
        assert found_by(index, **options) == found_by(exact, **options)
        with monkeypatch.context() as patch:  # many are left out by the engine
            patch.setattr(milvus, "DROPPED", 1)
            patch.setattr("dqe_jax.search.index.FEW", 0)  # and what passes is found by it
            assert found_by(index, **options) == found_by(exact, **options)
    scores = [one.score for one in index.search("000.png", "in red")]
    again = [one.score for one in exact.search("000.png", "in red")]
    np.testing.assert_allclose(scores, again, atol=1e-5)


@needs_milvus
def test_it_follows_the_folder_and_survives_kills(model, photos, places, monkeypatch):
    place, store = places
    written = []
    rows = model.token_shape()[0]
    monkeypatch.setattr(milvus, "ROWS", 7 * rows)

    class Dying:
        """A client that dies in its third write."""

        def __init__(self, client):
            self._client = client

        def __getattr__(self, name):
            return getattr(self._client, name)

        def upsert(self, name, data):
            written.append(len(data))
            if len(written) == 3:
                self._client.upsert(name, data[:3])  # a part of it arrives
                self._client.close()
                raise KeyboardInterrupt
            self._client.upsert(name, data)

    make = milvus._client
    with monkeypatch.context() as patch:
        patch.setattr(milvus, "_client", lambda own: Dying(make(own)))
        with pytest.raises(KeyboardInterrupt):
            model.index(photos, output=place, store=store)
    index = model.index(photos, output=place)  # it knows its store
    assert index.report.embedded == 0
    assert found_by(index) == found_by(model.index(photos))
    index._engine.close()

    pixels = np.random.default_rng(0).integers(0, 255, (72, 72, 3), np.uint8)
    Image.fromarray(pixels).save(photos / "006.png")
    (photos / "008.png").unlink()
    Image.fromarray(pixels[::-1]).save(photos / "added.png")
    index = model.index(photos, output=place)
    assert index.report.embedded == 2
    assert found_by(index) == found_by(model.index(photos))
    index._engine.close()
    with monkeypatch.context() as patch:  # what is unchanged is not read from the store again
        patch.setattr(milvus.Engine, "_rows", None)
        (photos / "added.png").unlink()
        assert model.index(photos, output=place).report.embedded == 0
        index = model.index(photos, output=place)
    assert found_by(index) == found_by(model.index(photos))
    index._engine._client.delete(index._engine._name, filter="image > 0")  # somebody else did it
    index._engine.close()
    index = model.index(photos, output=place)
    assert found_by(index) == found_by(model.index(photos))
    index._engine.close()
    (place / milvus.WRITTEN).write_bytes(b"")  # damaged: the store is read
    model.index(photos, output=place)._engine.close()
    opened = open_index(place, model=model)
    assert found_by(opened) == found_by(model.index(photos))


def test_stores_that_cannot_be_used(model, photos, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"name a file such as index\.db"):
        model.index(photos, output=tmp_path / "index", store="index")
    with pytest.raises(UserError, match="needs a directory"):
        model.index(photos, store="index.db")
    monkeypatch.setitem(__import__("sys").modules, "pymilvus", None)
    with pytest.raises(UserError, match=r"pip install 'dqe_jax\[milvus\]'"):
        model.index(photos, output=tmp_path / "index", store=str(tmp_path / "index.db"))
