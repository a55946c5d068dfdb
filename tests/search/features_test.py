"""An index that keeps features: its images are references that are not encoded again."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image

from dqe_jax.embedding.references import reference_encoders
from dqe_jax.feature_store.shards import RowSpec
from dqe_jax.models import setup
from dqe_jax.models.features import StoredText, given_spec
from dqe_jax.search import store
from dqe_jax.search.images import Encoded
from dqe_jax.search.index import open_index
from dqe_jax.search.store import Writer
from dqe_jax.testing.small_models import LENGTH, build_small_model, small_model_config
from dqe_jax.utils.errors import UserError

COUNT = 40
TEXTS = ["make the red circle blue", "", "in red"]
IDS = ["000.png", "002.png", "more/003.png"]


@pytest.mark.parametrize(
    ("backbone", "changes", "read"),
    [
        ("tiny", {"model.attributes.form": "sum"}, {"gallery", "tokens"}),
        ("features", {"model.attributes.form": "gate"}, {"gallery"}),
        ("features", {"model.attributes.form": "sum"}, {"gallery", "tokens"}),
        pytest.param("clip", {}, {"gallery", "tokens"}, marks=pytest.mark.slow),
        pytest.param("blip2", {}, {"gallery", "tokens"}, marks=pytest.mark.slow),
    ],
)
def test_two_steps_give_what_one_gives(backbone, changes, read):
    if backbone == "features" or changes:
        changes = {"model.attributes.parts": 4, **changes}
    config = small_model_config(backbone, **changes)
    model = build_small_model(config)
    rng = np.random.default_rng(0)
    ids = rng.integers(1, 19, (2, LENGTH)).astype(np.int32)

    def of(kind, plain):
        spec = given_spec(model.backbone, kind, 2)
        return {n: rng.normal(size=x.shape).astype(x.dtype) for n, x in spec.items()} or plain

    image = of("image", rng.integers(0, 255, (2, 32, 32, 3), np.uint8))
    states = of("text", None)
    text = ids if states is None else StoredText(ids, states)
    params = setup.init_params(model, config.model, config.data)
    params = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(x.dtype), params)
    factors = np.ones((2, len(model.attribute_names)), np.float32)
    steps = reference_encoders(model, params, image, text, factors.shape[1])
    assert set(steps.specs) == read
    features = jax.jit(steps.features)(params, image)
    assert {n: (x.shape[1:], x.dtype) for n, x in features.items()} == {
        n: (x.shape, x.dtype) for n, x in steps.specs.items()
    }
    embedding, weights = jax.jit(steps.query)(params, features, text, factors)
    whole = jax.jit(lambda p: model.apply({"params": p}, image, text, method="encode_query"))(
        params
    )
    np.testing.assert_allclose(embedding, whole.embedding, atol=1e-5)
    np.testing.assert_allclose(weights, whole.attribute_weights, atol=1e-5)
    gallery = jax.jit(lambda p: model.apply({"params": p}, image, method="encode_gallery"))(params)
    np.testing.assert_allclose(jax.jit(steps.gallery)(params, features), gallery, atol=1e-5)


def assert_same(one, other):
    for ours, theirs in zip(one.search(IDS, TEXTS, k=12), other.search(IDS, TEXTS, k=12)):
        assert [x.id for x in ours] == [x.id for x in theirs]
        np.testing.assert_allclose([x.score for x in ours], [x.score for x in theirs], atol=1e-5)
        assert ours.attribute_weights == pytest.approx(dict(theirs.attribute_weights), abs=1e-5)


def keeps(index):
    return [isinstance(index.known(id_).image, Encoded) for id_ in index.ids]


def arrays_in(place):
    return len(list(place.glob("shard-*/feature_*.npy")))


def test_references_of_the_index_are_not_read_again(model, photos, tmp_path, monkeypatch):
    index = model.index(photos, output=tmp_path / "index")
    anew = model.index(photos, output=tmp_path / "anew", keep_features=False)
    assert all(keeps(index))
    assert not any(keeps(anew))
    assert arrays_in(tmp_path / "anew") == 0
    assert_same(index, anew)
    opened = open_index(tmp_path / "index", model=model)
    assert_same(opened, anew)
    # One that is known and one that is given make one query.
    mixed = [["000.png", np.array(Image.open(photos / "more" / "005.png"))]]
    one, other = (x.search(mixed, ["in red"], k=9)[0] for x in (index, anew))
    assert [x.id for x in one] == [x.id for x in other]
    # Its file may be gone.
    before = index.search("000.png", "in red", k=5)
    (photos / "000.png").unlink()
    assert [x.id for x in opened.search("000.png", "in red", k=5)] == [x.id for x in before]
    assert all(opened.search("000.png", "in red", k=5).thumbnails()[0])
    with pytest.raises(UserError, match="is not there"):
        anew.search("000.png", "in red")
    # What is too large is not kept, unless that is asked for.
    monkeypatch.setattr("dqe_jax.search.index.FEATURE_BYTES", 16)
    assert not any(keeps(model.index(photos)))
    assert all(keeps(model.index(photos, keep_features=True)))


def test_features_follow_the_folder(model, photos, tmp_path):
    place = tmp_path / "index"
    model.index(photos, output=place)
    rng = np.random.default_rng(0)
    for name in ("000.png", "new.png"):
        Image.fromarray(rng.integers(0, 255, (72, 72, 3), np.uint8)).save(photos / name)
    (photos / "004.png").unlink()
    (photos / "006.png").rename(photos / "moved.png")
    index = model.index(photos, output=place)
    assert index.report.embedded == 2
    assert all(keeps(index))
    fresh = model.index(photos)
    for id_ in ("000.png", "new.png", "moved.png", "002.png"):
        ours, theirs = (x.known(id_).image.features for x in (index, fresh))
        for name, array in ours.items():
            np.testing.assert_allclose(array, theirs[name], atol=1e-5)
    assert_same(index, model.index(photos, keep_features=False))


class KilledError(BaseException):
    pass


def test_an_index_without_features_gets_them(model, photos, tmp_path, monkeypatch):
    place = tmp_path / "index"
    model.index(photos, output=place, keep_features=False)
    # An older version did not know of them.
    facts = json.loads((place / store.FACTS).read_text())
    del facts["features"]
    (place / store.FACTS).write_text(json.dumps(facts))
    old = open_index(place, model=model)
    assert not any(keeps(old))
    index = model.index(photos, output=place)
    assert index.report.embedded == 0
    assert not any(keeps(index))

    # A killed update leaves an index of which some images have features.
    monkeypatch.setattr(store, "SHARD_ROWS", 16)
    flush = Writer.flush

    def flush_and_die(writer):
        flush(writer)
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "flush", flush_and_die)
        with pytest.raises(KilledError):
            model.index(photos, output=place, keep_features=True)
    half = open_index(place, model=model)
    assert sum(keeps(half)) == 16
    assert_same(half, old)
    index = model.index(photos, output=place)
    assert index.report.embedded == COUNT - 16
    assert all(keeps(index))
    assert_same(index, old)
    held = store.Vectors(place, store.read_facts(place))
    assert len(held) == sum(len(shard.keys) for shard in held.shards) == COUNT
    # They take no room when they are not wanted any more.
    assert arrays_in(place) > 0
    index = model.index(photos, output=place, keep_features=False)
    assert index.report.embedded == 0
    assert arrays_in(place) == 0
    assert_same(index, old)


def test_features_of_another_version_are_not_used(model, photos, tmp_path):
    place = tmp_path / "index"
    model.index(photos, output=place)
    facts = store.read_facts(place)
    assert facts.features == model.reference_specs
    other = {"gallery": RowSpec((1, 3), np.dtype(np.float32))}
    store.write_facts(place, dataclasses.replace(facts, features=other))
    assert not any(keeps(open_index(place, model=model)))
    index = model.index(photos, output=place)  # which makes them anew
    assert index.report.embedded == 0
    assert all(keeps(index))
    held = json.loads((place / store.FACTS).read_text())
    for wrong in ({"features": ["gallery"]}, {"tokens": float("inf")}):
        (place / store.FACTS).write_text(json.dumps(held | wrong))
        with pytest.raises(UserError, match=r"index\.json is damaged"):
            open_index(place, model=model)
