"""Runs with stored features: the same as without, whatever the place; and what makes rows anew."""

import io
import json
import logging
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from dqe_jax.checkpoints import store as checkpoints
from dqe_jax.config import RunConfig
from dqe_jax.evaluation.run import evaluate_checkpoint
from dqe_jax.experiments.audit.run import audit_checkpoint
from dqe_jax.feature_store import writing
from dqe_jax.feature_store.features import Features
from dqe_jax.models.build import build_model
from dqe_jax.testing.small_runs import compiled_once, small_config
from dqe_jax.training import loop, session
from dqe_jax.utils.errors import UserError

FIELDS = {
    **{"total_steps": 8, "log_every": 1, "eval_every": 4, "checkpoint_every": 4},
    **{"batch.references": 4, "optimizer.warmup_steps": 2, "eval.sheet_queries": 1},
    **{"data.augment": "flip", "model.frozen": ("vision", "text")},
    **{"negatives.pool": "bank", "negatives.first_refresh": 2, "negatives.refresh_every": 3},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory, prepared):
    base = tmp_path_factory.mktemp("features")
    prepared(base)
    return base


def config_of(base, place, **changes):
    return small_config(base / "prepared", **FIELDS | {"features.place": place} | changes)


def lines_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def params_of(workdir, step=8):
    held = checkpoints.restore_params(checkpoints.open_for_reading(workdir), step)
    return flatten_dict(held, sep="/")


def stores_of(base, name="prepared"):
    return sorted(path for path in (base / name / "features").iterdir() if path.is_dir())


def said_of(caplog):
    """Of each store that was filled: its kind, its rows, its place and how many were computed."""
    found = re.findall(
        r"The frozen (\w+) tower .* makes of ([\d,]+) \w+ .* lies (.*); ([\d,]+) of them were",
        caplog.text,
    )
    return {
        kind: (int(rows.replace(",", "")), where, int(new.replace(",", "")))
        for kind, rows, where, new in found
    }


def assert_alike(one, other):
    first, second = lines_of(one), lines_of(other)
    assert len(first) == len(second) > 8
    for line, again in zip(first, second):
        assert line.keys() == again.keys()
        for name, value in line.items():
            assert again[name] == pytest.approx(value, rel=1e-5, abs=1e-6), (line["step"], name)
    held = params_of(other)
    for path, x in params_of(one).items():
        np.testing.assert_allclose(held[path], x, atol=1e-5, err_msg=path)


@pytest.fixture(autouse=True, scope="module")
def _steps_for_any_seed():
    """Runs of one step, of which several seeds are tried, learn nothing that is looked at."""
    with compiled_once(alike=True):
        yield


@pytest.fixture(scope="module")
def plain(base):
    """A run whose towers are computed in each step."""
    config = config_of(base, "off", **{"features.directory": str(base / "none")})
    loop.train_and_evaluate(config, base / "off")
    assert not (base / "none").exists()
    return base / "off"


@pytest.fixture(scope="module")
def stored(base):
    """A run that computes the store, with rows in the memory of the devices."""
    workdir = base / "device"
    loop.train_and_evaluate(config_of(base, "device"), workdir)
    return workdir


def test_a_run_is_the_same_with_the_store(plain, stored):
    assert_alike(plain, stored)


@pytest.mark.parametrize("place", ["host", "disk", "auto"])
def test_the_place_does_not_matter_and_nothing_is_computed_again(base, stored, place, caplog):
    with caplog.at_level(logging.INFO):
        loop.train_and_evaluate(config_of(base, place), base / place)
    assert_alike(stored, base / place)
    said = said_of(caplog)
    where = "on disk" if place == "disk" else "in the host's memory"  # CPUs have no memory to say
    held = {facts_of(s)["kind"]: files_of(s) for s in stores_of(base)}
    for kind, (rows, *rest) in said.items():
        shards = [np.load(io.BytesIO(x)) for p, x in held[kind].items() if p.name == "keys.npy"]
        assert rows == sum(map(len, shards)) > 100
        assert rest == [where, 0]


@pytest.mark.slow  # `tables_test.py` looks rows up on any number of devices
def test_devices_do_not_matter(base, stored):
    changes = {"num_devices": 4}
    loop.train_and_evaluate(config_of(base, "device", **changes), base / "four")
    assert_alike(stored, base / "four")


def test_evaluation_and_audit_use_the_store_without_being_told(base, stored, caplog):
    report = json.loads((stored / "eval" / "test-8.json").read_text())
    with caplog.at_level(logging.INFO):
        result = evaluate_checkpoint(config_of(base, "auto"), stored, output=base / "again")
    assert result.metrics == pytest.approx(report["metrics"], abs=1e-6)
    assert {new for _, _, new in said_of(caplog).values()} == {0}
    caplog.clear()
    with caplog.at_level(logging.INFO):
        audit_checkpoint(config_of(base, "auto"), stored, queries=20, output=base / "audit")
    assert {new for _, _, new in said_of(caplog).values()} == {0}


def test_an_interrupted_run_goes_on_exactly(base, stored):
    config = config_of(base, "host")
    loop.train_and_evaluate(config, base / "parts", stop_at=3)
    loop.train_and_evaluate(config, base / "parts")
    held = params_of(base / "parts")
    if not (base / "host").exists():  # the run of a test above
        loop.train_and_evaluate(config, base / "host")
    for path, x in params_of(base / "host").items():
        np.testing.assert_array_equal(held[path], x)


# ------------------------------------------------------------------------------ what makes it anew


def one_step(base, name, **changes):
    """A run of one step over a copy of the data; its stores are its own."""
    fields = {"total_steps": 1, "eval_every": 0, "checkpoint_every": 1, "negatives.pool": "batch"}
    config = config_of(base, "host", **fields, **changes)
    config.data.prepared_dir = str(base / name)
    loop.train_and_evaluate(config, base / f"run-{name}-{len(list(base.glob('run-*')))}")


@pytest.fixture(scope="module")
def own(base, stored):
    """A copy of the data with the stores of a short run."""
    shutil.copytree(base / "prepared", base / "own")
    shutil.rmtree(base / "own" / "features")
    one_step(base, "own")
    return base / "own"


def test_other_weights_have_a_store_of_their_own(base, own, caplog):
    before = stores_of(base, "own")
    assert len(before) == 2
    with caplog.at_level(logging.INFO):
        one_step(base, "own", seed=5)
    assert len(stores_of(base, "own")) == 4
    assert all(rows == new for rows, _, new in said_of(caplog).values())
    for path in set(stores_of(base, "own")) - set(before):
        shutil.rmtree(path)


@pytest.mark.parametrize(
    "changes", [{"features.dtype": "bfloat16"}, {"model.tiny.pixel_mean": 200.0}]
)
def test_other_settings_have_a_store_of_their_own(base, own, changes, caplog):
    before = stores_of(base, "own")
    with caplog.at_level(logging.INFO):
        one_step(base, "own", **changes)
    made = set(stores_of(base, "own")) - set(before)
    assert made
    for path in made:
        shutil.rmtree(path)


def facts_of(store):
    return json.loads((store / writing.FACTS).read_text())


def files_of(store):
    return {p.relative_to(store): p.read_bytes() for p in store.rglob("*.npy")}


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr("dqe_jax.feature_store.store.SHARD_BYTES", 1)


@pytest.fixture(scope="module")
def whole(base, own):
    """The name of data with small shards that nothing interrupted."""
    shutil.copytree(own, base / "not-killed")
    shutil.rmtree(base / "not-killed" / "features")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dqe_jax.feature_store.store.SHARD_BYTES", 1)
        one_step(base, "not-killed", **{"eval.batch_size": 64})
    return "not-killed"


@pytest.mark.parametrize("moments", [(0,), (1,), (2, 1), (3,)])
def test_what_is_interrupted_goes_on_to_equal_bytes(
    base, own, whole, moments, monkeypatch, small_shards, caplog
):
    """Each attempt writes so many shards and is then killed; the last one ends."""
    name = f"killed-{'-'.join(map(str, moments))}"
    shutil.copytree(own, base / name)
    shutil.rmtree(base / name / "features")
    for moment in moments:
        written = iter([None] * moment)
        write = writing.files.write_shard

        def killed(*arguments, left=written, write=write):
            if next(left, "none") == "none":
                raise KeyboardInterrupt
            write(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(writing.files, "write_shard", killed)
            with pytest.raises(KeyboardInterrupt):
                one_step(base, name, **{"eval.batch_size": 64})
    with caplog.at_level(logging.INFO):
        one_step(base, name, **{"eval.batch_size": 64})
    rows, _, new = said_of(caplog)["image"]
    assert new == rows - 64 * sum(moments)
    one, other = (stores_of(base, n) for n in (whole, name))
    assert [path.name for path in one] == [path.name for path in other]
    for store, again in zip(one, other):
        assert len(files_of(store)) > 4
        assert files_of(store) == files_of(again)


def test_a_truncated_shard_is_computed_again(base, own, caplog):
    (images,) = [s for s in stores_of(base, "own") if facts_of(s)["kind"] == "image"]
    before = files_of(images)
    file = images / "shard-000000" / "tokens.npy"
    file.write_bytes(file.read_bytes()[:-7])
    with caplog.at_level(logging.INFO):
        one_step(base, "own")
    assert re.search(r"shard-000000 is damaged: its rows are computed again", caplog.text)
    rows, _, new = said_of(caplog)["image"]
    assert 0 < new == rows
    assert files_of(images) == before


def test_a_whole_store_need_not_be_writable(base, own, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(writing, "make", refuse)
    with caplog.at_level(logging.INFO):
        one_step(base, "own")
    assert {new for _, _, new in said_of(caplog).values()} == {0}


def test_one_image_that_changed_is_one_row(base, own, monkeypatch, caplog):
    """Its content has another digest, and it is another picture."""
    from dqe_jax.data import splits

    contents, get = splits.Gallery.contents, splits.Gallery.__getitem__

    def changed(self):
        found = contents(self).copy()
        found[3, 0] ^= 1
        return found

    monkeypatch.setattr(splits.Gallery, "contents", changed)
    monkeypatch.setattr(
        splits.Gallery,
        "__getitem__",
        lambda self, row: 255 - get(self, row) if row == 3 else get(self, row),
    )
    with caplog.at_level(logging.INFO):
        one_step(base, "own")
    assert said_of(caplog)["image"][2] == 4  # of three galleries, that of train mirrored too
    assert said_of(caplog)["text"][2] == 0


def test_a_full_disk_is_told_and_nothing_is_lost(base, own, monkeypatch):
    shutil.copytree(own, base / "full")
    shutil.rmtree(base / "full" / "features")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing.files, "write_shard", full)
    with pytest.raises(UserError, match=r"features cannot be written to .* \(No space left on"):
        one_step(base, "full")
    monkeypatch.undo()
    monkeypatch.setattr(
        "dqe_jax.feature_store.store.shutil.disk_usage", lambda _: type("U", (), {"free": 1000})
    )
    with pytest.raises(UserError, match=r"has 0\.00 GB free: the features of [\d,]+ rows take 0"):
        one_step(base, "full")


@pytest.mark.parametrize("why", ["small", "refused"])
def test_auto_computes_towers_in_each_step_where_a_disk_has_no_room(
    base, plain, why, monkeypatch, caplog
):
    """With a warning; then a run is as if it had been told so. A place that is named must do."""
    free, refuse = type("U", (), {"free": 1000}), OSError(30, "Read-only file system")
    if why == "small":
        monkeypatch.setattr("dqe_jax.feature_store.store.shutil.disk_usage", lambda _: free)
        words = r"has 0\.00 GB free: the features of [\d,]+ rows take"
    else:
        mkdir = Path.mkdir

        def make(path, *arguments, **others):
            if "features" in path.parts:
                raise refuse
            mkdir(path, *arguments, **others)

        monkeypatch.setattr(Path, "mkdir", make)
        words = r"features cannot be written to .* \(Read-only file system\)"
    changes = {"features.directory": str(base / why / "features")}
    with caplog.at_level(logging.WARNING):
        loop.train_and_evaluate(config_of(base, "auto", **changes), base / f"auto-{why}")
    for kind in ("image", "text"):
        told = rf"The frozen {kind} tower is computed in each step, which takes longer: .*{words}"
        assert re.search(told, caplog.text)
    one, other = lines_of(plain), lines_of(base / f"auto-{why}")
    assert one == other
    with pytest.raises(UserError, match=words):
        loop.train_and_evaluate(config_of(base, "disk", **changes), base / f"disk-{why}")


def test_numbers_that_are_not_finite_name_the_image(base, own, monkeypatch):
    shutil.copytree(own, base / "nan")
    shutil.rmtree(base / "nan" / "features")
    make = session.setup.init_params

    def spoilt(*arguments):
        params = make(*arguments)
        cells = {n: x * np.nan for n, x in params["backbone"]["cells"].items()}
        return {**params, "backbone": {**params["backbone"], "cells": cells}}

    monkeypatch.setattr(session.setup, "init_params", spoilt)
    with pytest.raises(UserError, match=r"the frozen tower makes numbers of \S+ that are not fin"):
        one_step(base, "nan")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data.augment": "flip_shift"}, r"config\.data\.augment is 'flip_shift': .*'none' or"),
        ({"model.frozen": ("composer",)}, r"features\.place is 'host', but nothing .* not name"),
        ({"model.tiny.dropout": 0.1}, r"its towers have dropout; take 'auto' or 'off'"),
        ({"features.directory": "gs://bucket/x"}, r"name a directory on a disk of this machine"),
    ],
)
def test_what_no_store_can_hold_is_told_before_training(base, changes, words):
    with pytest.raises(UserError, match=words):
        one_step(base, "prepared", **changes)


def test_what_is_not_frozen_is_not_stored(base):
    for frozen, kinds in (((), ()), (("text", "composer"), ("text",)), (("vision",), ("image",))):
        config = RunConfig.of(config_of(base, "auto", **{"model.frozen": frozen}))
        size, length = config.data.image_size, config.data.max_length
        model = build_model(config.model, vocab_size=9, max_length=length, image_size=size)
        assert Features(config, model, jax.devices()[:1]).kinds == kinds


@pytest.mark.slow
def test_what_follows_a_tower_may_change(base, own, caplog):
    with caplog.at_level(logging.INFO):
        one_step(base, "own", **{"model.tiny.embed_dim": 16, "model.tiny.composer_depth": 2})
    assert {new for _, _, new in said_of(caplog).values()} == {0}
