"""A model is exported whole, for every backbone, and opened by its path alone."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

from dqe_jax.checkpoints import store
from dqe_jax.checkpoints.export import export_run
from dqe_jax.checkpoints.exported import config_of
from dqe_jax.checkpoints.opened import open_model
from dqe_jax.config import RunConfig
from dqe_jax.models.weights import sizes as size_files
from dqe_jax.testing.pretrained import copy_weights
from dqe_jax.testing.small_runs import small_config
from dqe_jax.testing.untrained import PROBABILITY, save_untrained
from dqe_jax.utils.errors import UserError

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
TEXTS = ("make the red circle blue", "the same in green")
ENCODERS = "dqe_jax.testing.encoders"
FIELDS = {
    "tiny": {"negatives.floor": float("-inf")},
    "clip": {
        "model.clip.composer_width": 16,
        "model.clip.composer_heads": 2,
        "model.frozen": ("vision", "text"),
        "model.frozen_dtype": "bfloat16",
    },
    "siglip": {
        "model.siglip.composer_width": 16,
        "model.siglip.composer_heads": 2,
        "model.frozen": ("vision", "pooling", "text"),
        "model.scan_layers": True,
    },
    "dino": {
        "model.dino.composer_width": 16,
        "model.dino.composer_heads": 2,
        "model.dino.text": "auto",
        "model.frozen": ("vision", "text"),
        "model.frozen_dtype": "bfloat16",
    },
    "blip2": {"model.scan_layers": True},
    "features": {
        "model.features.images": (f"{ENCODERS}:images",),
        "model.features.texts": (f"{ENCODERS}:texts",),
        "model.features.width": 16,
        "model.features.heads": 2,
        "model.attributes.form": "gate",
    },
}


@pytest.fixture(scope="module", params=FIELDS)
def run(request, tmp_path_factory):
    """A backbone, the workdir of a run of it, and its export."""
    name, base = request.param, tmp_path_factory.mktemp("exported")
    changes = {"data.max_length": 12, "model.backbone": name, "model.attributes.width": 8}
    changes |= FIELDS[name]
    if name in ("clip", "siglip", "blip2"):
        copy_weights(GOLDEN / name, name, base / "weights")
        changes |= {"model.weights": str(base / "weights"), f"model.{name}.variant": "auto"}
    if name == "dino":
        shutil.copytree(GOLDEN / "dinov3_vit", base / "weights")
        copy_weights(GOLDEN / "siglip", "siglip", base / "text")
        changes |= {"model.weights": str(base / "weights"), "model.dino.variant": "auto"}
        changes |= {"model.dino.text_weights": str(base / "text")}
    save_untrained(small_config(base / "prepared", **changes), base / "run", TEXTS)
    export_run(base / "run", base / "out")
    return name, base / "run", base / "out"


def test_run_and_export_are_the_same_model(run, tmp_path):
    name, workdir, out = run
    # It needs nothing but its directory, which may lie anywhere.
    moved = shutil.copytree(out, tmp_path / "moved")
    one, other = open_model(workdir), open_model(moved)
    assert one.model == other.model
    assert one.fingerprint == other.fingerprint
    assert one.step == other.step == 1
    assert one.probability == other.probability == PROBABILITY
    assert one.tokenizer.to_str() == other.tokenizer.to_str()
    mine, theirs = flatten_dict(one.params, sep="/"), flatten_dict(other.params, sep="/")
    assert mine.keys() == theirs.keys()
    for path, x in mine.items():
        assert x.dtype == theirs[path].dtype
        np.testing.assert_array_equal(x, theirs[path])
    facts = json.loads((out / "dqe.json").read_text())
    config = one.config
    assert facts["backbone"] == name
    assert facts["attributes"] == list(config.model.attributes.names)
    assert (facts["image_size"], facts["preprocess"]) == (72, "pad")
    assert facts["max_length"] == 12
    assert RunConfig.of(config).model == config_of(facts["config"]).model
    assert config_of(facts["config"]).negatives == config.negatives
    assert (out / "model.safetensors").exists() == (name in size_files.SIZES)


@pytest.mark.parametrize("run", ["tiny"], indirect=True)  # the same for all
def test_an_export_that_is_damaged_is_refused(run, tmp_path):
    _, _, out = run

    endless = json.dumps(json.loads((out / "dqe.json").read_text()) | {"step": float("inf")})

    def broken(file, content=None):
        there = shutil.copytree(out, tmp_path / str(len(list(tmp_path.iterdir()))))
        if content is None:
            (there / file).unlink()
        else:
            (there / file).write_text(content)
        return there

    for file, content, words in (
        ("dqe.safetensors", "x", "dqe.safetensors cannot be read"),
        ("dqe.safetensors", None, "dqe.safetensors cannot be read"),
        ("tokenizer.json", "{}", "tokenizer.json is damaged"),
        ("tokenizer.json", None, "tokenizer.json cannot be read"),
        ("dqe.json", "{", "is not JSON"),
        ("dqe.json", '{"format": 9}', "has format 9"),
        ("dqe.json", '{"format": 1}', "is damaged"),
        ("dqe.json", endless, r"dqe.json is damaged \(.*infinity"),
        ("dqe.json", None, "holds no model"),
    ):
        with pytest.raises(UserError, match=words):
            open_model(broken(file, content))
    there = broken("dqe.safetensors")
    (there / "dqe.safetensors").symlink_to("/dev/null")  # a pipe would be read for ever
    with pytest.raises(
        UserError, match=r"dqe.safetensors cannot be read \(it is no regular file\)"
    ):
        open_model(there)
    there = shutil.copytree(out, tmp_path / "other")
    own = load_file(there / "dqe.safetensors")
    own["log_scale"] = np.asarray(own["log_scale"] + 1)
    save_file(own, there / "dqe.safetensors")
    with pytest.raises(UserError, match="are not those that were exported"):
        open_model(there)
    del own["log_scale"]
    save_file(own, there / "dqe.safetensors")
    with pytest.raises(UserError, match="first log_scale"):
        open_model(there)
    with pytest.raises(UserError, match="has no steps"):
        open_model(out, step=1)


def test_what_is_no_model(tmp_path):
    with pytest.raises(UserError, match="there is no directory"):
        open_model(tmp_path / "none")
    with pytest.raises(UserError, match="holds no model"):
        open_model(tmp_path)
    with pytest.raises(UserError, match="name a directory of this machine"):
        export_run(tmp_path, "gs://bucket/model")


def test_a_run_of_another_version_opens(run):
    """Fields that are gone are passed over, and those that are new have their defaults."""
    name, workdir, _ = run
    held = store.read_meta(store.open_for_reading(workdir), 1)["config"]
    del held["features"]
    held["loss"]["gone"] = 3
    assert config_of(held).model.backbone == name
