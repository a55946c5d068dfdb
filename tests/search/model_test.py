"""Queries and images of any kind are embedded as evaluation embeds them."""

import subprocess
import sys
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import dqe_jax
from dqe_jax.config import RunConfig
from dqe_jax.evaluation.run import make_evaluator
from dqe_jax.models import setup
from dqe_jax.models.build import build_model
from dqe_jax.search.images import Preprocessing, UnreadableError, to_rgb
from dqe_jax.search.inputs import Inputs
from dqe_jax.search.loading import load
from dqe_jax.search.texts import encode_texts
from dqe_jax.testing.pretrained import copy_weights
from dqe_jax.testing.small_models import ATTRIBUTES, LENGTH, build_small_model, small_model_config
from dqe_jax.testing.untrained import save_untrained
from dqe_jax.utils.errors import UserError

GOLDEN = Path(__file__).resolve().parents[1] / "golden"


def test_importing_imports_no_jax():
    code = "import sys, dqe_jax; assert 'jax' not in sys.modules; print(dqe_jax.__version__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == dqe_jax.__version__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        dqe_jax.nothing  # noqa: B018


def check_ranks(config, split, model, folder):
    """The gallery of a split, its queries and its protocol, asked of the model's index."""
    config = RunConfig.of(config).with_changes({"eval.batch_size": 16, "eval.top_k": 50})
    evaluator = make_evaluator(config, model_of(model), model.tokenizer, split, model.devices)
    result = evaluator.run(model._params)
    folder.mkdir()
    for row in range(len(split.gallery)):
        Image.fromarray(split.gallery[row]).save(folder / f"{row:05d}.png")
    index = model.index(folder)
    queries = split.queries
    asked = [f"{row:05d}.png" for row in queries.reference]
    exclude = evaluator.protocol.exclude_reference
    found = index.search(asked, list(queries.texts), k=50, include_reference=not exclude)
    for i, results in enumerate(found):
        rows = [int(one.id[:5]) for one in results]
        want = [row for row in result.rows[i].tolist() if row >= 0]
        if rows != want:  # copies of the reference, or scores that are almost equal
            scores = dict(zip(want, result.scores[i]))
            mine = {row: one.score for row, one in zip(rows, results)}
            for row in set(rows) & set(want):
                assert mine[row] == pytest.approx(scores[row], abs=1e-6)
            ours = [one.score for one in results]
            np.testing.assert_allclose(ours, result.scores[i][: len(ours)], atol=1e-6)
        np.testing.assert_allclose(
            list(results.attribute_weights.values()), result.attribute_weights[i], atol=1e-6
        )


def test_the_api_ranks_as_evaluation_does(run, model, tmp_path):
    config, _, split = run
    check_ranks(config, split, model, tmp_path / "gallery")


@pytest.mark.slow  # each compiles a tower
@pytest.mark.parametrize("name", ["clip", "siglip", "blip2"])
def test_pretrained_backbones_rank_as_in_evaluation(run, tmp_path, name):
    config, _, split = run
    copy_weights(GOLDEN / name, name, tmp_path / "weights")
    changes = {
        **{"model.backbone": name, "model.weights": str(tmp_path / "weights")},
        **{f"model.{name}.variant": "auto", "model.frozen": (), "data.max_length": 12},
        "model.attributes.width": 8,
    }
    config = RunConfig.of(config).with_changes(changes)
    save_untrained(config, tmp_path / "run")
    check_ranks(config, split, load(tmp_path / "run", batch_size=16), tmp_path / "gallery")


def model_of(model):
    """The Flax module of a model."""
    from dqe_jax.checkpoints.opened import open_model

    return open_model(model.origin).model


def test_images_of_any_kind_are_the_same_image(run, model, photos):
    pixels = run[2].gallery[0]
    path = photos / "000.png"
    given = [str(path), path, Image.open(path), pixels, Image.fromarray(pixels)]
    embedded = model.encode_gallery(given)
    assert embedded.shape == (5, *model.token_shape())
    np.testing.assert_allclose(embedded, embedded[:1].repeat(5, 0), atol=1e-6)
    again = model.encode_gallery(np.stack([pixels] * 2))
    np.testing.assert_allclose(again, embedded[:2], atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(embedded, axis=-1), 1, atol=1e-5)
    np.testing.assert_allclose(model.encode_gallery(path), embedded[:1], atol=1e-6)


def test_what_an_image_may_be(tmp_path):
    assert to_rgb(np.zeros((4, 5), np.uint8)).size == (5, 4)
    assert to_rgb(np.zeros((4, 5, 4), np.uint8)).mode == "RGB"
    assert to_rgb(Image.new("P", (3, 3))).mode == "RGB"
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "cut.png").write_bytes(png()[:200])
    (tmp_path / "folder.png").mkdir()
    for given, words in (
        (np.zeros((4, 5, 3), np.float32), "is an array float32"),
        (np.zeros((0, 5, 3), np.uint8), "is an array uint8"),
        (tmp_path / "none.png", "is not there"),
        (tmp_path / "text.png", "is no JPEG, PNG or WebP"),
        (tmp_path / "cut.png", "does not decode"),
        (tmp_path / "folder.png", "is no regular file"),
        (Image.new("1", (20_000, 1)), "has 20000 x 1 pixels"),
    ):
        with pytest.raises(UnreadableError, match=words):
            to_rgb(given)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (tmp_path / "bomb.png").write_bytes(png((9_000, 9_000)))
    with pytest.raises(UnreadableError, match="has 9000 x 9000 pixels"):
        to_rgb(tmp_path / "bomb.png")


def png(size=(64, 64)):
    import io

    out = io.BytesIO()
    rng = np.random.default_rng(0)
    image = (
        Image.new("1", size)
        if size[0] > 100
        else Image.fromarray(rng.integers(0, 255, (*size, 3), np.uint8))
    )
    image.save(out, "PNG")
    return out.getvalue()


def test_unreadable_images_are_named(model, photos, tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(UserError, match=r"2 of 3 images cannot be used: .*none\.jpg is not there;"):
        model.encode_gallery([tmp_path / "none.jpg", photos / "000.png", tmp_path / "bad.jpg"])
    with pytest.raises(UserError, match="image 1 is an array"):
        model.encode_query(np.zeros((2, 2, 3)), "red")
    with pytest.raises(UserError, match="there is no image"):
        model.encode_gallery([])
    with pytest.raises(UserError, match="a query needs an image"):
        model.encode_query([], "red")
    with pytest.raises(UserError, match="2 images and 1 texts"):
        model.encode_query([photos / "000.png"] * 2, ["red"])
    with pytest.raises(UserError, match="give a string"):
        model.encode_query(photos / "000.png", [3])


def test_what_pillow_refuses_has_too_many_pixels(tmp_path, monkeypatch):
    (tmp_path / "bomb.png").write_bytes(png())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UnreadableError, match=r"^has more than 50,000,000 pixels$"):
        to_rgb(tmp_path / "bomb.png")


def test_weights_multiply_the_predicted_ones(model, photos):
    image, text = photos / "000.png", "make the red circle blue"
    plain = model.encode_query(image, text)
    assert set(plain.weights()) == set(model.attribute_names)
    name = model.attribute_names[0]
    same = model.encode_query(image, text, weights={name: 1.0})
    np.testing.assert_array_equal(plain.embedding, same.embedding)
    twice = model.encode_query(image, text, weights={name: 2})
    assert twice.weights()[name] == pytest.approx(2 * plain.weights()[name])
    assert np.abs(twice.embedding - plain.embedding).max() > 1e-4
    for bad, words in (
        ({"colour": 2.0}, "no attribute 'colour'; it has color, "),
        ({name: -1.0}, "give a number of at least 0"),
        ({name: float("nan")}, "give a number"),
        ({name: "2"}, "give a number"),
    ):
        with pytest.raises(UserError, match=words):
            model.encode_query(image, text, weights=bad)
    assert f"{name} {twice.weights()[name]:.2f}" in repr(twice)


@pytest.mark.parametrize("form", ["sum", "gate"])
def test_factors_of_both_forms(form):
    """A factor of 1 changes nothing, and one of 0 takes the attribute out."""
    config = small_model_config(
        "tiny", **{"model.attributes.form": form, "model.attributes.parts": 4}
    )
    model = build_small_model(config)
    rng = np.random.default_rng(0)
    image = rng.integers(0, 255, (2, 32, 32, 3), np.uint8)
    ids = rng.integers(1, 19, (2, LENGTH)).astype(np.int32)
    params = setup.init_params(model, config.model, config.data)
    params = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(x.dtype), params)

    @jax.jit
    def query(*factors):
        return model.apply({"params": params}, image, ids, *factors, method="encode_query")

    plain = query()
    one = query(np.ones((2, 3), np.float32))
    np.testing.assert_allclose(plain.embedding, one.embedding, atol=1e-6)
    factors = np.array([[2, 1, 0], [1, 1, 1]], np.float32)
    changed = query(factors)
    np.testing.assert_allclose(
        changed.attribute_weights, plain.attribute_weights * factors, rtol=1e-6
    )
    assert np.abs(changed.embedding[0] - plain.embedding[0]).max() > 1e-4
    np.testing.assert_array_equal(changed.embedding[1], one.embedding[1])


def test_several_references_are_the_mean_of_what_is_composed(model, photos):
    one, two, text = photos / "000.png", photos / "002.png", "in red"
    each = model.encode_query([one, two], [text, text]).embedding
    both = model.encode_query([one, two], text)
    mean = each.mean(0)
    np.testing.assert_allclose(both.embedding[0], mean / np.linalg.norm(mean), atol=1e-6)
    batch = model.encode_query([[one, two], one], [text, "in blue"])
    np.testing.assert_allclose(batch.embedding[0], both.embedding[0], atol=1e-6)
    assert len(batch) == 2
    assert len(model.encode_query(one, ["a", "b", "c"])) == 3


@pytest.mark.parametrize("text", [None, 5, [], ()])
def test_a_text_that_is_none_is_refused(model, photos, text):
    with pytest.raises(UserError, match=r"the text of a query is .*: give a string"):
        model.encode_query(photos / "000.png", text)


def test_an_empty_text_asks_for_similar_images(model, photos):
    one, two = photos / "000.png", photos / "002.png"
    own = model.encode_gallery([one, two])[:, 0]
    found = model.encode_query([one, two, [one, two]], ["", "red", " "])
    np.testing.assert_allclose(found.embedding[0], own[0], atol=1e-6)
    assert set(found.weights(0).values()) == {0.0}
    assert max(found.weights(1).values()) > 0
    mean = own.mean(0)
    np.testing.assert_allclose(found.embedding[2], mean / np.linalg.norm(mean), atol=1e-6)


def test_what_the_model_does_not_understand_is_said(model, photos):
    ids, said = encode_texts(
        model.tokenizer, ["make the red circle blue", "a zorked circle", "", "red " * 40]
    )
    assert ids.shape[0] == 4
    assert said[0] == ()
    assert said[1][-1] == "the model ignores 'zorked': no training text has it"
    assert "the text is empty" in said[2][0]
    assert "is too long: the model reads" in said[3][-1]
    found = model.encode_query(photos / "000.png", "zorked")
    assert "'zorked'" in found.warnings[0][0]
    assert "warning: the model ignores" in repr(found)


def test_photos_are_preprocessed_as_for_the_run(run):
    config = RunConfig.of(run[0])
    own = Preprocessing.of(config)
    assert (own.size, own.method, own.decode_side) == (72, "pad", None)
    photo = Image.new("RGB", (10, 20), (255, 0, 0))
    assert own.square(photo).shape == (72, 72, 3)
    fashion = config.with_changes({"data.dataset": "fashion_products"})
    assert Preprocessing.of(fashion).decode_side == 512


ENCODERS = "dqe_jax.testing.encoders"


def features_model(origin):
    """A small model on features of `dqe_jax.testing.encoders`, whose sources name `origin`."""
    from dqe_jax.models.given import GivenArray, GivenSizes, GivenSource

    arrays = (GivenArray("tokens", (16, 3), "float32"), GivenArray("vector", (3,), "bfloat16"))
    sizes = GivenSizes(
        (GivenSource("mine", origin and f"{origin}:images 1", arrays),),
        (GivenSource("words", f"{ENCODERS}:texts 1", (GivenArray("features", (16,), "float32"),)),),
    )
    config = small_model_config("features")
    return build_model(config.model, vocab_size=20, max_length=LENGTH, image_size=32, sizes=sizes)


def test_features_come_from_the_encoder_that_is_named():
    pixels = np.full((3, 32, 32, 3), 200, np.uint8)
    model = features_model(ENCODERS)
    inputs = Inputs(model, {})
    states = inputs.images(pixels)
    assert {name: (x.shape, str(x.dtype)) for name, x in states.items()} == {
        "mine/tokens": ((3, 16, 3), "float32"),
        "mine/vector": ((3, 3), "bfloat16"),
    }
    texts = inputs.texts(["a b", "c"], np.ones((2, LENGTH), np.int32))
    assert texts.states["words/features"].shape == (2, 16)
    assert tuple(model.attribute_names) == ATTRIBUTES


def test_features_without_an_encoder_say_so():
    with pytest.raises(UserError, match=r"imported features 'mine', .*encoders=\{'mine': "):
        Inputs(features_model(""), {})
    named = Inputs(features_model(""), {"mine": f"{ENCODERS}:images"})
    assert named.images(np.zeros((1, 32, 32, 3), np.uint8))["mine/vector"].shape == (1, 3)
    with pytest.raises(UserError, match="has no features 'other'; it has mine, words"):
        Inputs(features_model(ENCODERS), {"other": "a:b"})
    other = Inputs(features_model(""), {"mine": f"{ENCODERS}:texts"})
    with pytest.raises(UserError, match="fails on inputs from number 1 on"):
        other.images(np.zeros((1, 32, 32, 3), np.uint8))
