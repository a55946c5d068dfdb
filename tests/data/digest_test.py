"""The digest of prepared data: runs and their results know on which data they were made."""

import json
import shutil

import pytest
from etils import epath

from configs import triplets
from dqe_jax.checkpoints import store
from dqe_jax.data import digest, prepare, splits
from dqe_jax.data.builders.benchmarks import make_builder
from dqe_jax.evaluation.run import evaluate_checkpoint
from dqe_jax.evaluation.watch import watch
from dqe_jax.testing import standins
from dqe_jax.testing.small_runs import small_config
from dqe_jax.training import loop
from dqe_jax.utils.errors import UserError

SIZE = 16
SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def base(tmp_path_factory, prepared):
    directory = tmp_path_factory.mktemp("digest")
    prepared(directory)
    return directory


@pytest.fixture(scope="module")
def raw(base):
    standins.small_triplets(base / "raw")
    return base / "raw"


def prepared(raw, data, **fields):
    """Prepares triplets; gives the digests of their splits."""
    prepare.prepare_benchmark("triplets", raw, data, image_size=SIZE, num_workers=1, **fields)
    return digests_of(data)


def digests_of(data):
    builder = make_builder("triplets", str(data), image_size=SIZE, preprocess="pad")
    return {name: digest.digest_of(builder, name) for name in builder.info.splits if name in SPLITS}


@pytest.fixture(scope="module")
def data(base, raw):
    """Prepared triplets: (directory, digests)."""
    return base / "data", prepared(raw, base / "data")


# ------------------------------------------------------------------------------------ the digest


def test_it_is_of_the_content_not_of_the_place(data, tmp_path, raw):
    place, found = data
    assert set(found) == set(SPLITS)
    assert len(set(found.values())) == 3
    assert all(len(value) == 32 for value in found.values())
    shutil.copytree(place, tmp_path / "moved")
    for file in (tmp_path / "moved").rglob("*.digest"):
        file.unlink()
    assert digests_of(tmp_path / "moved") == found  # computed anew
    assert prepared(raw, tmp_path / "again") == found  # prepared anew


def change_caption(raw):
    file = raw / "triplets.csv"
    file.write_text(file.read_text().replace("more 1,", "more one,", 1))  # row 1 is of val


def change_target(raw):
    file = raw / "triplets.csv"
    lines = file.read_text().splitlines()
    lines[2] = lines[2].replace("a/006.jpg", "a/020.jpg")
    assert lines != file.read_text().splitlines()
    file.write_text("\n".join(lines) + "\n")


def drop_row(raw):
    file = raw / "triplets.csv"
    lines = file.read_text().splitlines()
    del lines[2]
    file.write_text("\n".join(lines) + "\n")


def change_image(raw):
    """One picture gets other pixels, a little."""
    standins.write_photo(raw / "images" / "a" / "006.jpg", key="other", size=(20, 20))


@pytest.mark.parametrize("change", [change_caption, change_target, drop_row, change_image])
def test_any_change_gives_another_one(data, raw, tmp_path, change):
    shutil.copytree(raw, tmp_path / "raw")
    change(tmp_path / "raw")
    found = prepared(tmp_path / "raw", tmp_path / "data")
    assert found["validation"] != data[1]["validation"]


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"abc\n", b"x" * 64])
def test_a_damaged_file_of_it_is_made_anew(data, tmp_path, content):
    shutil.copytree(data[0], tmp_path / "data")
    files = list((tmp_path / "data").rglob("validation.digest"))
    whole = files[0].read_bytes()
    files[0].write_bytes(content)
    assert digests_of(tmp_path / "data") == data[1]
    assert files[0].read_bytes() == whole


def test_data_that_cannot_be_written_are_digested_all_the_same(data, tmp_path, monkeypatch, caplog):
    shutil.copytree(data[0], tmp_path / "data")
    for file in (tmp_path / "data").rglob("*.digest"):
        file.unlink()

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(epath.Path(tmp_path)), "write_bytes", refuse)
    assert digests_of(tmp_path / "data") == data[1]
    assert "cannot be written (Permission denied)" in caplog.text


# ----------------------------------------------------------------------------------------- a run


def config_of(base, where, **changes):
    fields = {"total_steps": 4, "log_every": 2, "eval_every": 2, "checkpoint_every": 2}
    fields |= {"num_devices": 1, "eval.sheet_queries": 1, "model.attributes.names": ("color",)}
    fields |= {"data.image_size": SIZE, "data.dataset": "triplets", "data.preprocess": "pad"}
    fields |= {"data.data_dir": str(where), "model.tiny.patch_size": 8, "batch.references": 2}
    return small_config(base / "prepared", **{**fields, **changes})


@pytest.fixture(scope="module")
def other(base, raw):
    """The same triplets with one caption of validation and one of test changed."""
    shutil.copytree(raw, base / "other-raw")
    file = base / "other-raw" / "triplets.csv"
    text = file.read_text().replace("more 1,", "more one,", 1).replace("more 2,", "more two,", 1)
    file.write_text(text)
    return base / "other", prepared(base / "other-raw", base / "other")


@pytest.fixture(scope="module")
def trained(base, data):
    loop.train_and_evaluate(config_of(base, data[0]), base / "run")
    return base / "run"


@pytest.fixture
def copy(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def files_of(workdir):
    paths = (path for path in workdir.rglob("*") if path.is_file())
    return {str(path.relative_to(workdir)): path.read_bytes() for path in paths}


def test_a_run_says_on_which_data(data, trained):
    manager = store.open_for_reading(epath.Path(trained))
    assert store.read_meta(manager, 4)["data"] == data[1]
    report = json.loads((trained / "eval" / "test-4.json").read_text())
    assert report["data"] == data[1]["test"]


def test_training_on_other_data_is_refused(base, copy, data, other):
    loop.train_and_evaluate(config_of(base, data[0]), copy)  # the lock names this process
    before = files_of(copy)
    with pytest.raises(UserError, match=r"was trained on other data than those in .*other.*'valid"):
        loop.train_and_evaluate(config_of(base, other[0], total_steps=4), copy)
    assert files_of(copy) == before


def test_evaluation_of_a_copy_of_the_data_is_of_the_run(base, copy, data, tmp_path):
    shutil.copytree(data[0], tmp_path / "elsewhere")
    before = (copy / "eval" / "test-4.json").read_bytes()
    evaluate_checkpoint(config_of(base, tmp_path / "elsewhere"), copy)
    assert (copy / "eval" / "test-4.json").read_bytes() == before
    assert not list(copy.glob("eval-*"))


@pytest.mark.parametrize("split", ["test", "validation"])
def test_evaluation_on_other_data_goes_to_a_place_of_its_own(base, copy, other, split):
    before = files_of(copy / "eval")
    evaluate_checkpoint(config_of(base, other[0]), copy, split=split)
    assert files_of(copy / "eval") == before
    place = copy / f"eval-data-{other[1][split][:8]}"
    report = json.loads((place / f"{split}-4.json").read_text())
    assert report["data"] == other[1][split]


def test_a_split_that_the_run_does_not_know(base, copy, data, other):
    """Prepared later, it is the run's own where it came first."""
    change_meta(copy, lambda meta: meta["data"].pop("test"))
    shutil.rmtree(copy / "eval")
    evaluate_checkpoint(config_of(base, data[0]), copy)
    first = files_of(copy / "eval")
    assert json.loads(first["test-4.json"])["data"] == data[1]["test"]
    evaluate_checkpoint(config_of(base, other[0]), copy)
    evaluate_checkpoint(config_of(base, other[0]), copy, step=2)
    assert files_of(copy / "eval") == first
    place = copy / f"eval-data-{other[1]['test'][:8]}"
    assert {path.name for path in place.glob("test-?.json")} == {"test-2.json", "test-4.json"}
    evaluate_checkpoint(config_of(base, data[0]), copy, step=2)  # the first again
    assert json.loads((copy / "eval" / "test-2.json").read_text())["data"] == data[1]["test"]


def change_meta(workdir, change):
    for file in (workdir / "checkpoints").glob("*/meta/metadata"):
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))


def test_an_old_checkpoint_opens_with_a_warning(base, copy, data, other, caplog):
    """One that does not say on which data it was trained: it evaluates, and trains on."""
    change_meta(copy, lambda meta: meta.pop("data"))
    before = json.loads((copy / "eval" / "test-4.json").read_text())
    result = evaluate_checkpoint(config_of(base, data[0]), copy)
    assert "does not say on which data it was trained" in caplog.text
    assert result.metrics == before["metrics"]
    evaluate_checkpoint(config_of(base, other[0]), copy)  # its results are of other data
    assert json.loads((copy / "eval" / "test-4.json").read_text()) == before
    assert (copy / f"eval-data-{other[1]['test'][:8]}" / "test-4.json").exists()
    caplog.clear()
    shutil.rmtree(copy / "checkpoints" / "4")
    assert loop.train_and_evaluate(config_of(base, data[0]), copy) == before["metrics"]
    assert "do not say on which data they were trained" in caplog.text


def test_watching_on_other_data_is_refused(base, copy, other):
    with pytest.raises(UserError, match=r"has other data than validation here: --watch follows"):
        watch(config_of(base, other[0]), copy, poll_s=0.01)


def test_the_last_split_may_change(base, copy, data):
    """What a run does not know of another split is no difference."""
    shutil.rmtree(copy / "checkpoints" / "4")
    change_meta(copy, lambda meta: meta["data"].pop("test"))
    loop.train_and_evaluate(config_of(base, data[0]), copy)
    manager = store.open_for_reading(epath.Path(copy))
    assert store.read_meta(manager, 4)["data"] == data[1]


def test_a_split_has_its_digest(data):
    builder = make_builder("triplets", str(data[0]), image_size=SIZE, preprocess="pad")
    assert splits.load_split(builder, "test", SIZE).digest == data[1]["test"]
    assert triplets.get_config().data.dataset == "triplets"
