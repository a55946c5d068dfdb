"""The hub: there and back without a bit changed, by a stand-in of its HTTP API; and its errors."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from flax.traverse_util import flatten_dict

import dqe_jax
from dqe_jax.checkpoints import hub
from dqe_jax.checkpoints.card import write_card
from dqe_jax.checkpoints.export import export_run
from dqe_jax.checkpoints.opened import open_model
from dqe_jax.checkpoints.push import push, results_of
from dqe_jax.config import RunConfig
from dqe_jax.testing.hub import READER, WRITER, Repo, serve_hub
from dqe_jax.testing.pretrained import copy_weights
from dqe_jax.testing.small_runs import small_config
from dqe_jax.testing.untrained import save_untrained
from dqe_jax.utils.errors import UserError

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
TEXTS = ("make the red circle blue", "the same in green")
RESULT = {
    "dataset": "shapes",
    "split": "test",
    "step": 1,
    "protocol": "plain",
    "data": "abc123",
    "queries": {"used": 60, "official": 64},
    "gallery": {"used": 174, "official": 174},
    "metrics": {"R@1": 0.25, "R@10": 0.5, "queries": 60},
    "baselines": {"random": {"R@1": 0.01}, "zero-shot sum": {"R@1": 0.125, "R@10": 0.4}},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The workdir of a run of CLIP, evaluated."""
    base = tmp_path_factory.mktemp("pushed")
    copy_weights(GOLDEN / "clip", "clip", base / "secret" / "weights")
    changes = {
        "data.max_length": 12,
        "data.data_dir": "/secret-data",
        "model.backbone": "clip",
        "model.weights": str(base / "secret" / "weights"),
        "model.clip.variant": "auto",
        "model.clip.composer_width": 16,
        "model.clip.composer_heads": 2,
        "model.attributes.width": 8,
        "seed": 7,
    }
    save_untrained(small_config(base / "secret-prepared", **changes), base / "run", TEXTS)
    place = base / "run" / "eval"
    place.mkdir()
    (place / "test-1.json").write_text(json.dumps(RESULT))
    (place / "test-9.json").write_text(json.dumps(RESULT | {"dataset": "another step"}))
    return base / "run"


@pytest.fixture
def there(tmp_path, monkeypatch):
    """A stand-in, which this process takes for the hub."""
    with serve_hub() as served:
        monkeypatch.setenv("HF_ENDPOINT", served.endpoint)
        monkeypatch.setenv("HF_TOKEN", WRITER)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
        yield served


def test_there_and_back_without_a_bit_changed(run, there, tmp_path):
    push(run, "me/model", license_id="apache-2.0", public=True)
    repo = there.repos["me/model"]
    files = repo.commits[repo.branches["main"]]
    assert not repo.private
    assert set(files) == {".gitattributes", hub.CARD, *hub.FILES}
    export_run(run, tmp_path / "out")
    for name in hub.FILES:
        if name != "dqe.json":
            assert files[name] == (tmp_path / "out" / name).read_bytes()
    assert not any(b"secret" in x for x in files.values())  # no path of this machine

    one, other = open_model(tmp_path / "out"), open_model("hf://me/model")
    assert one.fingerprint == other.fingerprint
    mine, theirs = (flatten_dict(x.params, sep="/") for x in (one, other))
    assert mine.keys() == theirs.keys()
    for path, x in mine.items():
        np.testing.assert_array_equal(x, theirs[path])
    assert one.tokenizer.to_str() == other.tokenizer.to_str()
    image = np.random.default_rng(0).integers(0, 255, (72, 72, 3), np.uint8)
    models = dqe_jax.load(run), dqe_jax.load("hf://me/model")
    both = [model.encode_query(image, TEXTS[0]).embedding for model in models]
    np.testing.assert_array_equal(*both)

    card = files[hub.CARD].decode()
    assert json.loads(files["dqe.json"])["config"]["model"]["weights"] == "weights"
    for words in (
        *("license: apache-2.0", "library_name: dqe_jax", 'dqe_jax.load("hf://me/model")'),
        *("seed 7", "Step 1 of", "Backbone: `clip`", "Trained on `shapes`"),
        *("Protocol `plain`", "60 of 64 queries", "174 of 174 gallery images"),
        *("| this model | 0.2500 | 0.5000 |", "| zero-shot sum | 0.1250 | 0.4000 |"),
        one.fingerprint,
    ):
        assert words in card
    assert "another step" not in card


def test_an_export_is_pushed_as_it_is_and_revisions_can_be_named(run, there, tmp_path):
    export_run(run, tmp_path / "out")
    (tmp_path / "out" / "evil.bin").write_bytes(b"pickle")
    (tmp_path / "out" / "train.py").write_text("import os")
    first = push(tmp_path / "out", "me/other")
    repo = there.repos["me/other"]
    assert repo.private
    assert set(repo.commits[first]) == {".gitattributes", hub.CARD, *hub.FILES}
    assert "No evaluation of this step" in repo.commits[first][hub.CARD].decode()
    assert "Not stated" in repo.commits[first][hub.CARD].decode()
    second = push(tmp_path / "out", "me/other", license_id="mit", revision="small")
    assert repo.branches == {"main": first, "small": second}
    for revision in ("small", second, first, "main"):
        assert open_model(f"hf://me/other@{revision}").step == 1
    with pytest.raises(UserError, match="hf://me/other has no revision 'none'"):
        open_model("hf://me/other@none")
    with pytest.raises(UserError, match="has no steps"):
        push(tmp_path / "out", "me/other", step=3)


def test_nothing_but_the_files_of_an_export_is_got(run, there, tmp_path):
    push(run, "me/model")
    repo = there.repos["me/model"]
    repo.commit({"pytorch_model.bin": b"pickle", "code.py": b"raise SystemExit", "a.pkl": b"x"})
    there.asked.clear()
    directory = hub.fetch("hf://me/model")
    assert {path.name for path in directory.iterdir()} == set(hub.FILES)
    got = {line.rpartition("/")[2] for line in there.asked if "/resolve/" in line}
    assert got <= set(hub.FILES)


def test_what_goes_wrong_ends_in_one_sentence(run, there, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="hf://me/nothing is not on the hub, or is private"):
        open_model("hf://me/nothing")
    push(run, "me/model")
    monkeypatch.setenv("HF_TOKEN", READER)
    open_model("hf://me/model")
    with pytest.raises(UserError, match=r"hf://me/model: the hub refuses your token \(403\)"):
        push(run, "me/model")
    monkeypatch.delenv("HF_TOKEN")
    open_model("hf://me/model")  # what was got once stays
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    with pytest.raises(UserError, match="hf://me/model is not on the hub, or is private"):
        open_model("hf://me/model")
    with pytest.raises(UserError, match="push needs a token of the hub that may write"):
        push(run, "me/model")
    there.repos["me/gated"] = Repo(gated=True)
    there.repos["me/gated"].commit({"dqe.json": b"{}"})
    with pytest.raises(UserError, match="hf://me/gated is gated"):
        open_model("hf://me/gated")
    there.repos["me/plain"] = Repo()
    there.repos["me/plain"].commit({"config.json": b"{}"})
    with pytest.raises(UserError, match="hf://me/plain is no model of dqe_jax, for it has no dqe"):
        open_model("hf://me/plain")


def test_without_a_network_what_was_got_once_still_opens(run, there, monkeypatch):
    push(run, "me/model")
    one = open_model("hf://me/model")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("HF_ENDPOINT", nobody)
    assert open_model("hf://me/model").fingerprint == one.fingerprint
    with pytest.raises(UserError, match="hf://me/new: the hub cannot be reached, and no copy"):
        open_model("hf://me/new")
    with pytest.raises(UserError, match="hf://me/model: the exchange with the hub failed"):
        push(run, "me/model")


def test_names_are_checked_before_anything_is_asked(run, there):
    for name in ("model", "a/b/c", "a/..", "a b/c", ""):
        with pytest.raises(UserError, match="it must be OWNER/NAME"):
            push(run, name)
    for path in ("hf://model", "hf://a/b/c", "hf://"):
        with pytest.raises(UserError, match="it must be OWNER/NAME"):
            open_model(path)
    with pytest.raises(UserError, match="names no revision behind the @"):
        open_model("hf://me/model@")
    assert not there.asked
    assert hub.parse("hf://me/model@v1") == ("me/model", "v1")
    assert hub.is_on_hub(Path("hf://me/model"))
    assert hub.parse(Path("hf://me/model")) == ("me/model", None)
    assert not hub.is_on_hub("runs/hf")


def test_a_damaged_model_of_the_hub_is_told(run, there):
    push(run, "me/model")
    there.repos["me/model"].commit({"dqe.safetensors": b"no"})
    with pytest.raises(UserError, match=r"dqe.safetensors cannot be read"):
        open_model("hf://me/model")


def test_a_damaged_tokenizer_is_told_before_anything_is_sent(run, there, tmp_path):
    export_run(run, tmp_path / "out")
    (tmp_path / "out" / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer.json is damaged"):
        push(tmp_path / "out", "me/damaged")
    assert "me/damaged" not in there.repos


@pytest.mark.parametrize(
    "wrong", [{"split": None}, {"queries": 3}, {"gallery": {}}, {"metrics": {"R@1": "many"}}]
)
def test_damaged_results_are_told_before_anything_is_sent(tmp_path, wrong):
    place = tmp_path / "eval"
    place.mkdir()
    held = {key: x for key, x in (RESULT | wrong).items() if x is not None}
    (place / "test-00000001.json").write_text(json.dumps(held))
    with pytest.raises(
        UserError, match=r"test-00000001.json is damaged \(.*evaluate the run again"
    ):
        results_of(epath.Path(tmp_path), 1)


def test_a_card_without_results_and_with_an_id_of_weights():
    config = RunConfig().with_changes({"model.weights": "openai/clip-vit-base-patch32"})
    facts = {"attributes": [], "step": 3, "fingerprint": "f" * 32}
    card = write_card("me/a", config, facts, [RESULT | {"metrics": {}}], data={"train": "d1"})
    assert "started from `openai/clip-vit-base-patch32`" in card
    assert "This split has no labels." in card
    assert "Digest of train: `d1`." in card
    assert "license:" not in card
