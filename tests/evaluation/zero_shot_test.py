"""Rows without training, against a plain statement of each; BASIC step by step, by hand."""

from pathlib import Path

import numpy as np
import pytest

from dqe_jax.config import RunConfig
from dqe_jax.data import datasets, splits
from dqe_jax.data.examples import Queries
from dqe_jax.distributed import mesh
from dqe_jax.evaluation import basic, protocols, scored, zero_shot
from dqe_jax.evaluation.gain import composition_gain, gain_line
from dqe_jax.evaluation.run import evaluate_rows
from dqe_jax.testing.pretrained import copy_weights
from dqe_jax.testing.small_runs import small_config
from dqe_jax.utils.errors import UserError
from dqe_jax.utils.files import read_json

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
ENCODERS = "dqe_jax.testing.encoders"


@pytest.fixture(scope="module")
def base(tmp_path_factory, prepared):
    directory = tmp_path_factory.mktemp("zero_shot")
    prepared(directory)
    copy_weights(GOLDEN / "clip", "clip", directory / "clip")
    (directory / "subjects.txt").write_text("circle\n\nred square\ntriangle\nblue\n")
    (directory / "styles.txt").write_text("the a\nmake\n of the\n")
    return directory


def clip_config(base, **changes):
    fields = {
        "data.max_length": 12,
        "model.backbone": "clip",
        "model.weights": str(base / "clip"),
        "model.clip.variant": "auto",
        "model.clip.composer_width": 16,
        "model.clip.composer_heads": 2,
        "model.attributes.width": 8,
    }
    return small_config(base / "prepared", **fields | changes)


def features_config(base):
    return small_config(
        base / "prepared",
        **{
            "model.backbone": "features",
            "model.features.images": (f"{ENCODERS}:images",),
            "model.features.texts": (f"{ENCODERS}:texts",),
            "features.directory": str(base / "features"),
            "model.features.width": 16,
            "model.features.heads": 2,
        },
    )


def opened(config):
    config = RunConfig.of(config)
    split = splits.open_split(config.data, datasets.open_dataset(config.data), "test")
    return config, split, protocols.protocol_of(config.data.dataset)


def ranks_of_targets(scores, targets):
    """The plain statement: how many images come before each target; equal ones by their number."""
    ranks = []
    for own, target in zip(scores, targets):
        order = sorted(range(len(own)), key=lambda row: (-own[row], row))
        ranks.append(order.index(target))
    return np.array(ranks)


def test_rows_agree_with_a_plain_statement(base, tmp_path):
    config, split, protocol = opened(clip_config(base))
    corpora = zero_shot.read_corpora(str(base / "subjects.txt"), str(base / "styles.txt"))
    assert corpora.subjects == ("circle", "red square", "triangle", "blue")
    names = zero_shot.ROWS
    found = evaluate_rows(config, names, tmp_path, split="test", corpora=corpora)
    assert tuple(found) == names

    devices = mesh.devices_of(2)
    space = zero_shot.embed(config, split, protocol, names, devices, corpora)
    X, texts, own = space.images[space.place], space.texts, space.basic
    assert len(X) == len(split.gallery)
    for x in (X, texts):
        np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1, rtol=1e-5)
    expected = {name: [] for name in names}
    for i, reference in enumerate(split.queries.reference):
        image, text = X @ X[reference], X @ texts[i]
        expected["text"].append(text)
        expected["image"].append(image)
        expected["sum"].append(image + text)
        expected["product"].append(
            [max(a, 0) * max(b, 0) for a, b in zip(image.tolist(), text.tolist())]
        )
    for name in zero_shot.BASIC:
        expected[name] = plain_basic(
            X, X[split.queries.reference], own, expand=name == "basic_expanded"
        )
    for name in names:
        # Products of one query and of many are rounded differently: near ties may swap.
        ranks = ranks_of_targets(np.asarray(expected[name]), split.queries.target)
        for k in (1, 5, 10, 50):
            if f"R@{k}" in found[name]:
                assert found[name][f"R@{k}"] == pytest.approx((ranks < k).mean(), abs=0.02)
    facts = read_json(tmp_path / "test-zero_shot.json", dict)
    assert facts["rows"] == found
    assert facts["data"] == split.digest
    assert facts["composition_gain"] == composition_gain(found, protocol.columns(found["text"]))
    assert len({round(x["R@10"], 6) for x in found.values()}) > 2  # they are not one row


def plain_basic(X, queries, own, *, expand):
    """BASIC for one query after the other, in the words of the paper's steps."""
    X, queries = np.asarray(X, np.float64), np.asarray(queries, np.float64)
    mu_img, mu_txt = X.mean(axis=0), own.subjects.mean(axis=0)
    S = own.subjects - mu_txt, own.styles - mu_txt
    scatter = [sum(np.outer(x, x) for x in one) / (len(one) - 1) for one in S]
    values, vectors = np.linalg.eigh(0.8 * scatter[0] - 0.2 * scatter[1] + 1e-5)
    best = sorted((i for i in range(len(values)) if values[i] > 0), key=lambda i: -values[i])[:250]
    P = sum(np.outer(vectors[:, i], vectors[:, i]) for i in best)
    images, texts = [], []
    for v, t in zip(queries, own.contexts):
        v = P @ (v - mu_img)
        if expand:
            similar = [float((x - mu_img) @ v) for x in X]
            nearest = sorted(range(len(X)), key=lambda i: (-similar[i], i))[:25]
            weights = np.exp([0.1 * similar[i] for i in nearest] + [0.1])
            rows = [X[i] - mu_img for i in nearest] + [v]
            v = P @ sum(w * x for w, x in zip(weights / weights.sum(), rows))
        images.append([float((x - mu_img) @ v) for x in X])
        texts.append([float((x - mu_img) @ (t - mu_txt)) for x in X])
    images, texts = np.array(images), np.array(texts)
    a = np.maximum((images - images.min()) / abs(images.min()), 0)
    b = np.maximum((texts - texts.min()) / abs(images.min()), 0)
    return a * b - 0.1 * (a + b) ** 2


def test_basic_by_hand():
    """Two dimensions, three images, two subjects and two styles; each figure worked out by hand."""
    # 1. In context: before and behind each subject; the mean at length 1.
    assert basic.in_context("red", ["dress", "hat"]) == [
        *("dress red", "hat red"),
        *("red dress", "red hat"),
    ]
    np.testing.assert_allclose(
        basic.mean_direction(np.array([[1, 0], [0, 1]])), [0.70711, 0.70711], atol=1e-5
    )
    # 2. Means: of the images (1.6, 1.8) / 3, of the subjects (1.6, 0.8) / 2.
    gallery = np.array([[1, 0], [0, 1], [0.6, 0.8]])
    subjects = np.array([[1, 0], [0.6, 0.8]])
    styles = np.array([[0.8, 0.6], [0.8, -0.6]])
    centred = basic.centre(gallery, subjects, styles)
    np.testing.assert_allclose(
        centred.images, [[0.46667, -0.6], [-0.53333, 0.4], [0.06667, 0.2]], atol=1e-5
    )
    np.testing.assert_allclose(centred.text_mean, [0.8, 0.4])
    # 3. S+ = [[.08, -.16], [-.16, .32]] of (.2, -.4) and (-.2, .4); S- = [[0, 0], [0, 1.04]] of
    #    (0, .2) and (0, -1). C = .8 S+ - .2 S- + 1e-5 = [[.06401, -.12799], [-.12799, .04801]].
    #    One eigenvalue is positive, .18425, with the vector (-.72882, .68470).
    np.testing.assert_allclose(
        centred.projection, [[0.53118, -0.49902], [-0.49902, 0.46882]], atol=1e-4
    )
    # 5. v = (.6, -.8), centred (.06667, -1.4), projected (.73405, -.68961); t = (0, 1), centred
    #    (-.8, .6).
    v, t, rows = np.array([[0.6, -0.8]]), np.array([[0.0, 1.0]]), np.arange(3)
    s_img, s_txt = basic.similarities(centred, rows, v, t, expansion=False)
    np.testing.assert_allclose(s_img, [[0.75632, -0.66734, -0.08898]], atol=1e-4)
    np.testing.assert_allclose(s_txt, [[-0.73333, 0.66667, 0.06667]], atol=1e-4)
    # 6. The least are -.66734 and -.73333, both divided by .66734: (2.13334, 0, .86666) and
    #    (0, 2.09788, 1.19879). 7. The third image fits both best.
    found = basic.score(s_img, s_txt, s_img.min(), s_txt.min())
    np.testing.assert_allclose(found, [[-0.45511, -0.44011, 0.61234]], atol=2e-4)
    # 4. Expanded: weights .26241, .22758, .24113 of the images and .26888 of the query itself.
    query = np.array([[0.73405, -0.68961]])
    np.testing.assert_allclose(
        basic.expanded(centred.images, query), [[0.21453, -0.20361]], atol=1e-4
    )
    twice, _ = basic.similarities(centred, rows, v, t, expansion=True)
    by_hand = basic.expanded(centred.images, query) @ centred.projection @ centred.images.T
    np.testing.assert_allclose(twice, by_hand, atol=1e-4)


def made_split(*, subset=(), exclude=False):
    """Four images, two queries of two pools."""
    queries = Queries(
        ids=("a", "b"),
        reference=np.array([0, 2]),
        target=np.array([1, 3]),
        known_positives=(np.array([1]), np.array([3])),
        texts=("x", "y"),
        captions=(("x",), ("y",)),
        kinds=((), ()),
        relevant=(np.array([1]), np.array([3])),
        attributes=((), ()),
        pools=("one", "two"),
        subset=tuple(map(np.asarray, subset)) or (np.zeros(0, int), np.zeros(0, int)),
    )

    class Split:
        gallery = range(4)
        pools = {"one": np.array([0, 1]), "two": np.array([0, 2, 3])}  # noqa: RUF012

    Split.queries = queries
    seen = {}

    def measure(queries, rows, subsets=None):
        seen.update(rows=rows, subsets=subsets)
        return {"R@1": 0.0}

    protocol = protocols.Protocol("made", measure, ("R@1",), "", exclude_reference=exclude)
    return Split(), protocol, seen


@pytest.mark.parametrize("exclude", [False, True])
def test_scores_are_ranked_in_the_pool_of_a_query(exclude):
    split, protocol, seen = made_split(subset=([0, 1], [3, 0, 2]), exclude=exclude)
    table = np.array([[0.9, 0.5, 1.0, 1.0], [0.5, 1.0, 0.7, 0.5]])
    scored.measure_scores(split, protocol, 3, lambda mine, rows: table[np.ix_(mine, rows)])
    if exclude:
        assert seen["rows"].tolist() == [[1, -1, -1], [0, 3, -1]]
    else:
        assert seen["rows"].tolist() == [[0, 1, -1], [2, 0, 3]]  # equal scores by row
    assert seen["subsets"].tolist() == [[1, -1, -1], [0, 3, -1]]  # never the reference


def test_composition_gain_is_best_composed_less_best_single():
    rows = {name: {"R@1": x} for name, x in zip(zero_shot.ROWS, (0.1, 0.3, 0.2, 0.35, 0.4, 0.1))}
    gain = composition_gain(rows | {"model": {"R@1": 0.5}}, ("R@1", "R@5"))
    assert gain == {
        "metric": "R@1",
        "gain": pytest.approx(0.2),
        "composed": "model",
        "single": "image",
    }
    assert composition_gain(rows, ("R@1",))["composed"] == "basic"
    assert "+0.2000 R@1 (model" in gain_line(gain)
    own = composition_gain({"a": {"R@1": 0.1}, "b": {"R@1": 0.3}}, ("R@1",), ("a",))
    assert (own["composed"], own["single"]) == ("b", "a")
    assert composition_gain({"text": {"R@1": 0.1}}, ("R@1",)) is None
    assert composition_gain(rows, ()) is None


def test_features_without_a_common_space_give_the_image_alone(base, tmp_path):
    config = features_config(base)
    found = evaluate_rows(config, ("image",), tmp_path, split="test")
    assert found["image"]["R@10"] > 0
    with pytest.raises(UserError, match=r"--zero_shot=text,sum,product: .*share no space"):
        evaluate_rows(config, ("image", "text", "sum", "product"), tmp_path, split="test")


def test_what_cannot_be_is_said(base, tmp_path):
    with pytest.raises(UserError, match="--zero_shot names 'txt': the rows are text, image"):
        evaluate_rows(clip_config(base), ("txt",), tmp_path)
    with pytest.raises(UserError, match="--zero_shot names no row"):
        evaluate_rows(clip_config(base), (), tmp_path)
    with pytest.raises(UserError, match=r"--zero_shot needs pretrained weights: .*'tiny'"):
        evaluate_rows(small_config(base / "prepared"), ("image",), tmp_path, split="test")
    empty = clip_config(base, **{"model.weights": "", "model.clip.variant": "vit_b_32"})
    with pytest.raises(UserError, match=r"--zero_shot needs pretrained weights: .*weights ''"):
        evaluate_rows(empty, ("image",), tmp_path, split="test")
    with pytest.raises(UserError, match="--zero_shot=basic needs --basic_subjects=FILE"):
        zero_shot.read_corpora(None, None)
    with pytest.raises(UserError, match="--basic_styles=FILE"):
        zero_shot.read_corpora(str(base / "subjects.txt"), None)
    (tmp_path / "one.txt").write_text("one\n")
    with pytest.raises(UserError, match="has 1 lines"):
        zero_shot.read_corpora(str(tmp_path / "one.txt"), None)
