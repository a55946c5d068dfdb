"""Training on features from outside: computed by an encoder, or imported."""

import functools
import json
import logging
import re

import jax
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from safetensors.numpy import save_file

from dqe_jax.config import RunConfig
from dqe_jax.data import datasets, splits
from dqe_jax.data.text import Wordings
from dqe_jax.evaluation.run import evaluate_checkpoint
from dqe_jax.experiments.audit.run import audit_checkpoint
from dqe_jax.feature_store import manage
from dqe_jax.feature_store.features import directory_of, sizes_of
from dqe_jax.feature_store.given import GivenStore
from dqe_jax.feature_store.imports import import_features
from dqe_jax.feature_store.needs import Need, text_digests
from dqe_jax.models import setup
from dqe_jax.performance.describe import describe_model
from dqe_jax.performance.step_benchmark import benchmark_step
from dqe_jax.testing import encoders
from dqe_jax.testing.small_runs import small_config
from dqe_jax.training import loop, session
from dqe_jax.utils.errors import UserError

IMAGES, TEXTS = "dqe_jax.testing.encoders:images", "dqe_jax.testing.encoders:texts"
FIELDS = {
    **{"total_steps": 6, "log_every": 1, "eval_every": 3, "checkpoint_every": 3},
    **{"batch.references": 4, "optimizer.warmup_steps": 2, "eval.sheet_queries": 1},
    **{"negatives.pool": "bank", "negatives.first_refresh": 2, "negatives.refresh_every": 3},
    **{"model.backbone": "features", "model.features.width": 16, "model.features.heads": 2},
    **{"model.features.images": (IMAGES,), "model.features.texts": (TEXTS,)},
    **{"model.features.composer_width": 16, "model.features.token_dim": 8},
    **{"model.features.embed_dim": 32},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory, prepared):
    base = tmp_path_factory.mktemp("given")
    prepared(base)
    return base


def config_of(base, **changes):
    return small_config(base / "prepared", **FIELDS | changes)


def lines_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def losses_of(workdir):
    return [line["loss"] for line in lines_of(workdir) if "loss" in line]


@pytest.fixture(scope="module")
def computed(base):
    """A run that computes its features, and their logged lines."""
    loop.train_and_evaluate(config_of(base, **{"data.augment": "flip"}), base / "computed")
    return base / "computed"


def test_features_are_computed_once_and_used_by_all_jobs(base, computed, caplog, monkeypatch):
    assert np.isfinite(losses_of(computed)).all()
    assert len(losses_of(computed)) == 6

    def never(inputs):
        raise AssertionError("everything is stored")

    monkeypatch.setattr(encoders, "images", never)
    monkeypatch.setattr(encoders, "texts", never)
    config = config_of(base, **{"data.augment": "flip"})
    evaluated = evaluate_checkpoint(config, computed, output=base / "again").metrics
    reported = json.loads((computed / "eval" / "test-6.json").read_text())["metrics"]
    assert evaluated == pytest.approx(reported)
    audit_checkpoint(config, computed, rules=["trns"], queries=8)
    with caplog.at_level(logging.INFO):
        manage.show_stores(config)
    assert len(re.findall("dqe_jax.testing.encoders:", caplog.text)) >= 2


@pytest.mark.parametrize("place", ["device", pytest.param("disk", marks=pytest.mark.slow)])
def test_the_place_changes_nothing(base, computed, place):
    config = config_of(base, **{"data.augment": "flip", "features.place": place})
    workdir = base / place
    loop.train_and_evaluate(config, workdir)
    np.testing.assert_allclose(losses_of(workdir), losses_of(computed), rtol=1e-6)


@pytest.mark.slow
def test_eight_devices_compute_the_same(base, computed):
    changes = {"data.augment": "flip", "num_devices": 8, "batch.references": 8}
    changes |= {"model.features.dropout": 0.0}  # each device draws its own
    changes |= {"total_steps": 3, "checkpoint_every": 3}
    one = base / "devices-1"
    loop.train_and_evaluate(config_of(base, **changes | {"num_devices": 1}), one)
    loop.train_and_evaluate(config_of(base, **changes | {"features.place": "device"}), base / "d8")
    eight, alone = losses_of(base / "d8"), losses_of(one)
    np.testing.assert_allclose(eight[:2], alone[:2], rtol=1e-5)
    # AdamW divides by the size of gradients: tiny differences of these grow.
    np.testing.assert_allclose(eight, alone, rtol=1e-3)


@pytest.fixture(scope="module")
def known(base):
    """Ids of all images with their features, and all texts with theirs."""
    config = RunConfig.of(config_of(base))
    builder = datasets.open_dataset(config.data)
    images, texts = {}, {}
    for name in ("train", "validation", "test"):
        split = splits.open_split(config.data, builder, name)
        for row, one in enumerate(split.gallery.ids):
            images[one] = {n: x[0] for n, x in encoders.images(split.gallery[row][None]).items()}
        for text in split.queries.texts:
            texts[text] = encoders.texts([text])[0]
    return images, texts


def stacked(rows, name):
    return np.stack([row[name] for row in rows.values()])


def write(path, images, texts):
    """Files of one format with features of images and of texts; their paths."""
    own = (path / f"images{path.suffix}", path / f"texts{path.suffix}")
    path.mkdir()
    tokens, vector = stacked(images, "tokens"), stacked(images, "vector")
    if path.suffix == ".npz":
        np.savez(own[0], id=np.array([*images]), tokens=tokens, vector=vector)
        np.savez(own[1], id=np.array([*texts]), features=np.stack([*texts.values()]))
    elif path.suffix == ".safetensors":
        ids = {"ids": json.dumps([*images])}
        save_file({"tokens": tokens, "vector": vector}, own[0], metadata=ids)
        save_file(texts, own[1])
    else:
        columns = {"id": [*images], "tokens": tokens.tolist(), "vector": vector.tolist()}
        schema = pyarrow.schema(
            [
                ("id", pyarrow.string()),
                ("tokens", pyarrow.list_(pyarrow.list_(pyarrow.float32()))),
                ("vector", pyarrow.list_(pyarrow.float32())),
            ]
        )
        pyarrow.parquet.write_table(pyarrow.table(columns, schema=schema), own[0])
        columns = {"id": [*texts], "features": [row.tolist() for row in texts.values()]}
        pyarrow.parquet.write_table(pyarrow.table(columns), own[1])
    return own


def states_of(base, **changes):
    """What a store gives of the images and the texts of the test split."""
    config = RunConfig.of(config_of(base, **{"features.place": "host"} | changes))
    split = splits.open_split(config.data, datasets.open_dataset(config.data), "test")
    sizes = sizes_of(config, None)
    wordings = Wordings(np.zeros((len(split.queries), 1, 1), np.int32), [split.queries.texts])
    found = {}
    for kind in ("image", "text"):
        store = GivenStore(kind, config, sizes, jax.devices()[:1], directory_of(config))
        if kind == "image":
            need = Need(split.gallery.contents, split.gallery.__getitem__, split.gallery.ids)
        else:
            texts = wordings.texts[0]
            need = Need(functools.partial(text_digests, texts), texts.__getitem__, texts)
        store.add([need])
        store.fill({})
        rows = store.table.rows(need.rows[None])
        found |= {name.split("/")[1]: np.asarray(x[0]) for name, x in rows.items()}
    return found


def imported(base, name, images, texts, image_encoder="", text_encoder=""):
    """Imports files; the fields of a config that names them."""
    root = directory_of(RunConfig.of(config_of(base)))
    if not (root / name).exists():
        import_features(root, name, "image", [images], encoder=image_encoder)
        import_features(root, f"{name}-texts", "text", [texts], encoder=text_encoder)
    return {"model.features.images": (name,), "model.features.texts": (f"{name}-texts",)}


def test_a_run_starts_by_standardizing_its_features(base, computed):
    """Checked on a fresh session: training changes the parameters."""
    config = RunConfig.of(config_of(base))
    builder = datasets.open_dataset(config.data)
    devices = jax.devices()[:2]
    opened = session.open_session(config, base / "unused", builder, devices, None, None)
    params = setup.init_params(opened.model, config.model, config.data)
    started = opened.features.standardize(params)["backbone"]
    split = splits.open_split(config.data, builder, "train")
    rows = [split.gallery[row] for row in range(len(split.gallery))]
    tokens = encoders.images(np.stack(rows))["tokens"].reshape(-1, 3)
    np.testing.assert_allclose(started["image_norms_0"]["shift"], tokens.mean(0), rtol=1e-4)
    standard = (tokens - started["image_norms_0"]["shift"]) * started["image_norms_0"]["scale"]
    np.testing.assert_allclose(standard.std(0), 1, rtol=0.01)
    texts = np.unique(encoders.texts(split.queries.texts), axis=0)
    assert np.abs(started["text_norms_0"]["shift"] - texts.mean(0)).max() < 0.2
    assert params["backbone"]["image_norms_0"]["shift"].sum() == 0


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".parquet"])
def test_imported_features_are_those_of_the_files(base, known, suffix):
    changes = imported(base, suffix[1:], *write(base / f"files{suffix}", *known))
    found, expected = states_of(base, **changes), states_of(base)
    assert {"tokens", "vector", "features"} == set(found)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)


@pytest.mark.slow
def test_a_run_on_imported_features(base, known, caplog):
    changes = imported(base, "run", *write(base / "run.npz", *known))
    config = config_of(base, **changes)
    loop.train_and_evaluate(config, base / "run")
    assert np.isfinite(losses_of(base / "run")).all()
    evaluated = evaluate_checkpoint(config, base / "run", output=base / "eval-run").metrics
    assert evaluated["R@10"] == pytest.approx(lines_of(base / "run")[-1]["test/R@10"])
    with caplog.at_level(logging.INFO):
        manage.show_stores(config)
    assert "run-texts" in caplog.text


def test_imports_with_an_encoder_compute_what_they_lack(base, known, monkeypatch):
    images, texts = known
    some = dict([*images.items()][::2]), dict([*texts.items()][::2])
    paths = write(base / "half.npz", *some)
    changes = imported(base, "half", *paths, IMAGES, TEXTS)
    seen, plain = [], encoders.texts
    monkeypatch.setattr(encoders, "texts", lambda batch: seen.extend(batch) or plain(batch))
    monkeypatch.setattr(encoders, "version", lambda: "of half")  # nothing is stored yet
    found = states_of(base, **changes)
    assert seen
    assert not set(seen) & set(some[1])
    for name, array in states_of(base).items():
        np.testing.assert_array_equal(found[name], array)


@pytest.fixture(scope="module")
def named(base, known):
    """Imported features of all images and texts."""
    imported(base, "named", *write(base / "named.npz", *known))


@pytest.mark.slow
def test_several_sources_and_words(base, named):
    changes = {
        "model.features.images": (IMAGES, "named"),
        "model.features.texts": (),
        "model.features.composer": "attention",
        "model.features.composer_depth": 1,
        "model.dtype": "bfloat16",
    }
    loop.train_and_evaluate(config_of(base, **changes), base / "several")
    assert np.isfinite(losses_of(base / "several")).all()
    assert "inputs" in describe_model(config_of(base, **changes))


def refused(config, workdir, words):
    with pytest.raises(UserError, match=words) as error:
        loop.train_and_evaluate(config, workdir)
    assert "\n" not in str(error.value)
    assert not list(workdir.glob("checkpoints/*"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model.features.images": ()}, "images is empty"),
        ({"model.features.images": ("nothing",)}, "no imported features 'nothing'.*named"),
        ({"model.features.images": (IMAGES, IMAGES)}, "names a source twice"),
        ({"model.features.images": ("no_such_module:f",)}, "cannot be imported"),
        ({"model.features.images": (IMAGES + "s",)}, "has no function 'imagess'"),
        ({"model.features.images": ("named-texts",)}, "holds features of texts, not of images"),
        ({"model.features.images": (TEXTS,)}, "fails on a blank image|gives 'features' of shape"),
        ({"features.place": "off"}, "has no tower"),
        ({"data.augment": "flip_shift"}, "take 'none', or 'flip'"),
        (
            {"data.augment": "flip", "model.features.images": ("named",)},
            "imported and has no features of mirrored images",
        ),
        ({"model.features.width": 15}, "must be a multiple of config.model.features.heads"),
    ],
)
def test_what_cannot_be_is_refused(base, named, tmp_path, changes, words):
    refused(config_of(base, **changes), tmp_path, words)


def test_missing_images_and_texts_are_named(base, known, tmp_path):
    images, texts = known
    gone, text = [*images][3], [*texts][5]
    paths = write(
        tmp_path / "some.npz",
        {one: row for one, row in images.items() if one != gone},
        {one: row for one, row in texts.items() if one != text},
    )
    imported(base, "some", *paths)
    refused(
        config_of(base, **{"model.features.images": ("some",)}),
        tmp_path / "a",
        f"lack 1 of .* images that the data need \\('{gone}'\\)",
    )
    refused(
        config_of(base, **{"model.features.texts": ("some-texts",)}),
        tmp_path / "b",
        f"lack 1 of .* texts that the data need \\('{text}'\\)",
    )


def test_other_features_than_those_of_the_model_are_refused(base, computed, monkeypatch):
    monkeypatch.setattr(encoders, "version", lambda: "2")
    config = config_of(base, **{"data.augment": "flip"})
    with pytest.raises(UserError, match="not those that the model was trained on"):
        evaluate_checkpoint(config, computed, output=base / "other")


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda x: x.astype(np.float32), "of shape"),
        (lambda x: np.zeros((len(x), 4), np.int32), "as int32: return floats"),
        (lambda x: {}, "gives no features"),
        (lambda x: {"keys": np.zeros((len(x), 4), np.float32)}, "calls an array 'keys'"),
        (lambda x: {"../a": np.zeros((len(x), 4), np.float32)}, "calls an array '../a'"),
        (lambda x: 1 / 0, "fails on .*division"),
        (lambda x: np.full((len(x), 4), np.nan, np.float32), "not finite"),
        (lambda x: np.zeros((len(x), 1 + int(x.min())), np.float32), "gives other shapes"),
    ],
)
def test_an_encoder_that_fails_is_named(base, tmp_path, monkeypatch, made, words):
    monkeypatch.setattr(encoders, "images", made)
    monkeypatch.setattr(encoders, "version", lambda: words)
    refused(config_of(base), tmp_path, words)


def test_a_version_that_fails_and_a_damaged_store_are_sentences(base, tmp_path, monkeypatch):
    monkeypatch.setattr(encoders, "version", lambda: 1 / 0)
    refused(config_of(base), tmp_path / "a", r"version\(\) of .* fails .*division")
    damaged = tmp_path / "features" / "mine"
    damaged.mkdir(parents=True)
    facts = '{"backbone": "imported", "arrays": {"x": {"shape": [4], "dtype": "float32"}}}'
    (damaged / "store.json").write_text(facts)
    # Stores of towers lie beside it, and are none of its business.
    tower = damaged.parent / "0123456789abcdef"
    tower.mkdir()
    (tower / "store.json").write_text('{"kind": "image", "backbone": "clip", "arrays": {}}')
    other = {"features.directory": str(damaged.parent), "model.features.images": ("other",)}
    refused(config_of(base, **other), tmp_path / "c", "no imported features 'other' .* are mine:")
    changes = {"features.directory": str(damaged.parent), "model.features.images": ("mine",)}
    refused(config_of(base, **changes), tmp_path / "b", "store.json is damaged: delete")


@pytest.mark.slow
def test_a_step_on_features_is_timed(base):
    report = benchmark_step(config_of(base, num_devices=1), rounds=1, steps=1, names=["config"])
    assert list(report.times) == ["config"]
    with pytest.raises(UserError, match="--variants=towers in each step: give some of config"):
        benchmark_step(config_of(base), rounds=1, steps=1, names=["towers in each step"])


def test_what_is_to_be_encoded_is_written(base, known, tmp_path):
    manage.write_inputs(config_of(base), [], tmp_path / "inputs")
    images = (tmp_path / "inputs" / "images.csv").read_text().splitlines()
    assert images[0] == "id"
    assert set(images[1:]) == set(known[0])
    texts = (tmp_path / "inputs" / "texts.csv").read_text().splitlines()
    assert texts[0] == "text"
    assert set(texts[1:]) == set(known[1])
