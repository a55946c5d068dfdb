"""What is stored of a user's own photos when one is replaced or all are prepared in another way."""

import json
import logging
import re

import pytest

from dqe_jax.data import prepare
from dqe_jax.feature_store import manage
from dqe_jax.testing import standins
from dqe_jax.testing.small_runs import small_config
from dqe_jax.training import loop

SIZE = 16
TOWER = {"model.frozen": ("vision",)}
ENCODER = {
    "model.backbone": "features",
    "model.features.images": ("dqe_jax.testing.encoders:images",),
    "model.features.width": 16,
    "model.features.heads": 2,
}


def prepared(base, **fields):
    """Prepares the photos in `base/raw`, again if need be."""
    fields = {"image_size": SIZE, "preprocess": "pad"} | fields
    data = base / "data"
    prepare.prepare_benchmark(
        "triplets", base / "raw", data, num_workers=1, overwrite=True, **fields
    )


def config_of(base, **changes):
    fields = {"total_steps": 1, "eval_every": 0, "checkpoint_every": 1, "num_devices": 1}
    fields |= {"eval.sheet_queries": 1, "model.attributes.names": ("color",)}
    fields |= {"data.image_size": SIZE, "data.dataset": "triplets", "data.preprocess": "pad"}
    fields |= {"data.data_dir": str(base / "data"), "model.tiny.patch_size": 8}
    fields |= {"batch.references": 2, "data.augment": "flip"}
    return small_config(base / "prepared", **fields | changes)


def computed(caplog, job, *arguments):
    """How many images a job computes features of."""
    caplog.clear()
    with caplog.at_level(logging.INFO):
        job(*arguments)
    encoder = r"images has computed features of (\d+) images"
    tower = r"image tower .*; (\d+) of them were computed now"
    return sum(map(int, re.findall(encoder, caplog.text) + re.findall(tower, caplog.text)))


def stores_of(base):
    """The files of each store of images, by its name."""
    found = {}
    for facts in (base / "prepared" / "features").glob("*/store.json"):
        if json.loads(facts.read_text())["kind"] == "image":
            files = (path for path in facts.parent.rglob("*") if path.is_file())
            found[facts.parent.name] = {path: path.read_bytes() for path in files}
    return found


@pytest.fixture
def base(tmp_path):
    standins.small_triplets(tmp_path / "raw")
    prepared(tmp_path)
    return tmp_path


def replace_photo(base):
    standins.write_photo(base / "raw" / "images" / "a" / "006.jpg", key="new", size=(20, 20))
    prepared(base)


def assert_rows_were_added(before, after):
    """To the one store; what it had is as it was."""
    assert len(before) == len(after) == 1
    for (name, files), (again, more) in zip(before.items(), after.items()):
        assert name == again
        assert files.items() < more.items()


def test_of_a_photo_that_is_replaced_a_run_computes_two_rows(base, caplog):
    """As it is, and mirrored."""
    config = config_of(base, **TOWER)
    assert computed(caplog, loop.train_and_evaluate, config, base / "first") > 20
    before = stores_of(base)
    replace_photo(base)
    assert computed(caplog, loop.train_and_evaluate, config, base / "second") == 2
    assert_rows_were_added(before, stores_of(base))
    assert computed(caplog, manage.compute, config) == 0


def test_of_a_photo_that_is_replaced_an_encoder_computes_two_rows(base, caplog):
    config = config_of(base, **ENCODER)
    assert computed(caplog, manage.compute, config) > 20
    before = stores_of(base)
    replace_photo(base)
    assert computed(caplog, manage.compute, config) == 2
    assert_rows_were_added(before, stores_of(base))
    assert computed(caplog, manage.compute, config) == 0


@pytest.mark.parametrize("changes", [TOWER, ENCODER], ids=["tower", "encoder"])
@pytest.mark.parametrize("way", [{"preprocess": "squash"}, {"image_size": 2 * SIZE}], ids=str)
def test_photos_prepared_in_another_way_have_a_store_of_their_own(base, changes, way, caplog):
    count = computed(caplog, manage.compute, config_of(base, **changes))
    before = stores_of(base)
    prepared(base, **way)
    fields = {f"data.{name}": value for name, value in way.items()}
    assert computed(caplog, manage.compute, config_of(base, **changes | fields)) == count > 20
    after = stores_of(base)
    assert len(after) == len(before) + 1
    assert before.items() < after.items()
    assert computed(caplog, manage.compute, config_of(base, **changes)) == 0  # it is still used
