"""`dqe_jax.prepare` and its builders: real annotations with stand-in photos, and bad data."""

import json
import os
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs import circo, cirr, common, fiq, fiq_clip, triplets
from dqe_jax.data import datasets, preparation, preprocess, splits
from dqe_jax.data.builders import benchmarks
from dqe_jax.data.builders.benchmarks import make_builder
from dqe_jax.data.photos import load_photo, load_photos
from dqe_jax.data.prepare import prepare_benchmark
from dqe_jax.testing import standins
from dqe_jax.testing.commands import run_module
from dqe_jax.training import loop
from dqe_jax.utils.errors import UserError
from dqe_jax.utils.files import write_json
from dqe_jax.utils.progress import progress

ROOT = Path(__file__).resolve().parents[2]
REAL = ROOT.parent / "shared" / "annotations"
SIZE = 16
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="the published annotations are not here")


def run(*arguments, raw, data, status=0, size=SIZE, timeout=600):
    """The binary in a process of its own; what it printed."""
    command = ("dqe_jax.prepare", f"--raw_dir={raw}", f"--data_dir={data}")
    done = run_module(*command, f"--image_size={size}", *arguments, cwd=ROOT, timeout=timeout)
    assert done.returncode == status, done.stderr
    return done.stderr


def report_of(data, dataset, name):
    (path,) = Path(data).glob(f"{dataset}/{name}/*/preparation.json")
    return json.loads(path.read_text())


def opened(dataset, data, split, preprocess, size=SIZE):
    builder = make_builder(dataset, str(data), image_size=size, preprocess=preprocess)
    return splits.load_split(builder, split, size)


def column(report, name):
    return {split: counts[name] for split, counts in report["splits"].items()}


# ------------------------------------------------------------------- the real files, complete


# Those of CIRR and CIRCO go the same way, in a fraction of the time.
@needs_real
@pytest.mark.slow
@pytest.mark.parametrize("splits", ["val", "train,val,test"])
def test_fashioniq_complete(tmp_path, splits):
    standins.fashioniq(REAL / "fashioniq", tmp_path / "raw", splits=splits.split(","))
    data = tmp_path / "data"
    log = run("--dataset=fashioniq", f"--splits={splits}", raw=tmp_path / "raw", data=data)
    report = report_of(data, "fashioniq", f"{SIZE}px-target_pad")

    def expected(train, validation, test):
        found = {"train": loop, "validation": validation, "test": test}
        return found if "train" in splits else {"validation": validation}

    kept = expected(18000, 6016, 6118)
    assert column(report, "queries") == column(report, "official_queries") == kept
    assert column(report, "official_gallery") == expected(45429, 15415, 15417)
    assert column(report, "empty_captions") == expected(12, 3, 1)
    if "train" in splits:
        assert column(report, "duplicates")["test"] == 12
    assert set(column(report, "missing").values()) == {0}
    assert report["complaints"] == []
    assert "6,016" in log
    assert "15,415" in log

    split = opened("fashioniq", data, "validation", "target_pad")
    sizes = {name: len(rows) for name, rows in split.pools.items()}
    assert sizes == {"dress": 3817, "shirt": 6346, "toptee": 5373}
    assert split.coverage.complete
    assert len(set(split.gallery.ids)) == len(split.gallery) == 15415
    row = split.queries.ids.index("dress-val-0")
    first = json.loads((REAL / "fashioniq/captions/cap.dress.val.json").read_text())[0]
    assert split.gallery.ids[split.queries.reference[row]] == first["candidate"]
    assert split.gallery.ids[split.queries.target[row]] == first["target"]
    assert split.queries.captions[row] == tuple(first["captions"])
    assert (np.diff(split.pools["shirt"]) > 0).all()


@pytest.mark.slow
@needs_real
def test_cirr_val_and_test1_complete(tmp_path):
    standins.cirr(REAL / "cirr", tmp_path / "raw")
    error = run("--dataset=cirr", raw=tmp_path / "raw", data=tmp_path / "data", status=2)
    assert "lacks the file cap.rc2.train.json" in error
    assert "Unknown size" not in error  # nothing is begun, and TFDS says nothing
    assert "Traceback" not in error
    run("--dataset=cirr", "--splits=val,test1", raw=tmp_path / "raw", data=tmp_path / "data")
    report = report_of(tmp_path / "data", "cirr", f"{SIZE}px-squash")
    assert column(report, "queries") == {"validation": 4181, "test": 4148}
    assert column(report, "official_gallery") == {"validation": 2297, "test": 2315}
    assert column(report, "duplicates") == {"validation": 6, "test": 4}
    assert column(report, "empty_captions") == {"validation": 0, "test": 1}
    split = opened("cirr", tmp_path / "data", "test", "squash")
    assert {len(rows) for rows in split.queries.subset} == {6}
    assert all(r in rows for r, rows in zip(split.queries.reference, split.queries.subset))
    assert (split.queries.target == -1).all()


@pytest.mark.slow
@needs_real
def test_circo_complete(tmp_path):
    images = standins.circo(REAL / "circo", tmp_path / "raw")
    run("--dataset=circo", raw=tmp_path / "raw", data=tmp_path / "data")
    report = report_of(tmp_path / "data", "circo", f"{SIZE}px-squash")
    assert column(report, "queries") == {"validation": 220, "test": 800}
    assert column(report, "official_gallery") == {"validation": images, "test": images}
    builder = make_builder("circo", str(tmp_path / "data"), image_size=SIZE, preprocess="squash")
    assert set(builder.info.splits) == {"gallery", "validation", "test"}  # images stored once
    split = splits.load_split(builder, "validation", SIZE)
    assert sum(len(rows) for rows in split.queries.relevant) == 916
    assert all(rows[0] == t for rows, t in zip(split.queries.relevant, split.queries.target))
    photo = load_photo(
        f"COCO2017_unlabeled/unlabeled2017/{int(split.gallery.ids[5]):012d}.jpg",
        str(tmp_path / "raw"),
        SIZE,
        "squash",
    )
    stored = Image.fromarray(split.gallery[5])
    again = tmp_path / "photo.png"
    again.write_bytes(photo.image)
    np.testing.assert_array_equal(np.asarray(Image.open(again)), np.asarray(stored))


def test_cirr_train_of_the_published_format(tmp_path):
    names = [f"train-{i}-{j}-img{j % 2}" for i in range(4) for j in range(3)]
    paths = {name: f"./train/{i % 3}/{name}.png" for i, name in enumerate(names)}
    records = [
        {
            "pairid": 10 + i,
            "reference": names[i],
            "target_hard": names[i + 1],
            "target_soft": {names[i + 1]: 1.0, names[i + 2]: 0.5, names[i + 3]: -1.0},
            "caption": f"make it {i}",
            "img_set": {
                "id": i,
                "members": names[i : i + 6],
                "reference_rank": 0,
                "target_rank": 1,
            },
        }
        for i in range(5)
    ]
    write_json(tmp_path / "raw/cirr/captions/cap.rc2.train.json", records)
    write_json(tmp_path / "raw/cirr/image_splits/split.rc2.train.json", paths)
    for path in paths.values():
        standins.write_photo(tmp_path / "raw/img_raw" / path)
    run("--dataset=cirr", "--splits=train", raw=tmp_path / "raw", data=tmp_path / "data")
    split = opened("cirr", tmp_path / "data", "train", "squash")
    ids = [[split.gallery.ids[row] for row in rows] for rows in split.queries.known_positives]
    assert ids[0] == [names[1], names[2]]
    assert split.queries.ids == ["10", "11", "12", "13", "14"]


# ----------------------------------------------------------------------------------- bad photos


def bomb(path):
    """A PNG whose header promises 20,000 x 20,000 pixels."""
    Image.new("1", (20000, 20000)).save(path)


def spoil(path, how):
    if how == "gone":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:-40])
    elif how == "text":
        path.write_text("<html>not found</html>")
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "bomb":
        bomb(path.with_suffix(".png"))
        path.unlink()
    elif how == "gif":
        Image.new("RGB", (4, 4)).save(path, "GIF")


SPOILED = ("gone", "truncated", "text", "empty", "bomb", "gif")


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory):
    """A made FashionIQ whose dresses of val lack a photo in each way: (raw, data, log)."""
    base = tmp_path_factory.mktemp("spoiled")
    standins.small_fashioniq(base / "raw")
    for i, how in enumerate(SPOILED):
        spoil(base / "raw" / "images" / f"DVAL{30 + i:04d}.jpg", how)
    spoil(base / "raw" / "images" / "DVAL0003.jpg", "gone")  # a reference
    spoil(base / "raw" / "images" / "DVAL0008.jpg", "truncated")  # a reference and a target
    log = run("--dataset=fashioniq", raw=base / "raw", data=base / "data", status=2)
    return base / "raw", base / "data", log


@pytest.mark.core
def test_what_is_missing_is_counted_named_and_refused(spoiled):
    _, data, log = spoiled
    report = report_of(data, "fashioniq", f"{SIZE}px-target_pad")
    counts = report["splits"]["validation"]
    assert counts["missing"] == 8
    assert counts["queries"] == 36 - 5
    assert counts["dropped"] == {"reference missing": 2, "target missing": 3}
    missing = report["missing"]["validation_gallery"]
    assert missing["DVAL0030"] == missing["DVAL0003"] == "is missing"
    assert "truncated" in missing["DVAL0031"]
    for row in (32, 33, 35):
        assert missing[f"DVAL00{row}"] == "is no JPEG, PNG or WebP"
    assert "400000000 pixels" in missing["DVAL0034"]
    assert report["dropped"]["validation"]["target missing"] == [
        *("dress-val-1", "dress-val-6", "dress-val-10")
    ]
    assert "validation lacks 13.89% of its queries or images, 0.00% are allowed" in log
    assert "--max_missing" in log.splitlines()[-1]
    assert "DVAL0003" in log
    config = fiq.get_config()
    config.data.image_size, config.data.data_dir = SIZE, str(data)
    with pytest.raises(UserError, match=r"fashioniq in .* is not complete \(val.* lacks 13\.89"):
        datasets.find_dataset(config.data)


def test_accepting_what_is_missing_prepares_nothing_again(spoiled):
    raw, data, _ = spoiled
    log = run("--dataset=fashioniq", "--max_missing=0.2", raw=raw, data=data)
    assert "is prepared already" in log
    assert "Preparing" not in log
    split = opened("fashioniq", data, "validation", "target_pad")
    assert str(split.coverage) == "31 of 36 queries, 112 of 120 gallery images"
    assert "DVAL0030" not in split.gallery.ids
    assert split.pools["dress"].max() < len(split.gallery)
    run("--dataset=fashioniq", raw=raw, data=data, status=2)  # the default is strict again


def test_overwriting_after_the_photos_are_back(tmp_path):
    standins.small_fashioniq(tmp_path / "raw", count=3, images=6)
    photo = tmp_path / "raw" / "images" / "DVAL0005.jpg"
    photo.rename(tmp_path / "aside.jpg")
    run("--dataset=fashioniq", raw=tmp_path / "raw", data=tmp_path / "data", status=2)
    photo.parent.joinpath("deep").mkdir()
    (tmp_path / "aside.jpg").rename(photo.parent / "deep" / photo.name)
    config = fiq.get_config()
    config.data.data_dir, config.data.image_size = str(tmp_path / "data"), SIZE
    caption = tmp_path / "raw" / "captions" / "cap.dress.val.json"
    caption.rename(tmp_path / "cap.json")
    over = ("--dataset=fashioniq", "--overwrite")
    error = run(*over, raw=tmp_path / "raw", data=tmp_path / "data", status=2)
    assert "lacks the file cap.dress.val.json" in error
    (tmp_path / "cap.json").rename(caption)
    with pytest.raises(UserError, match="is not complete"):  # what was there still is
        datasets.find_dataset(config.data)
    log = run(*over, "--splits=val", raw=tmp_path / "raw", data=tmp_path / "data")
    assert "Use it with --data_dir=" in log
    error = run(
        *("--dataset=fashioniq", "--splits=train,val"),
        raw=tmp_path / "raw",
        data=tmp_path / "data",
        status=2,
    )
    assert "was prepared without train: run again with --overwrite" in error


@pytest.mark.parametrize("layout", ["{id}.png", "{category}/{id}.jpg", "image_data/x/{id}.JPEG"])
def test_layouts(tmp_path, layout):
    made = tmp_path / "made"
    standins.small_fashioniq(made, count=2, images=3)
    standins.fashioniq(made, tmp_path / "raw", layout)
    builder = make_builder(
        "fashioniq",
        str(tmp_path / "data"),
        image_size=SIZE,
        preprocess="pad",
        raw_dir=str(tmp_path / "raw"),
        splits=("validation",),
        num_workers=1,
    )
    preparation.prepare(builder)
    assert preparation.write_report(builder, preparation.report(builder), None) == []


def test_two_processes_that_prepare_the_same(tmp_path, monkeypatch):
    standins.small_fashioniq(tmp_path / "raw", count=2, images=3)

    def make():
        return make_builder(
            "fashioniq",
            str(tmp_path / "data"),
            image_size=SIZE,
            preprocess="pad",
            raw_dir=str(tmp_path / "raw"),
            splits=("train", "validation"),
            num_workers=1,
        )

    late, early = make(), make()
    load, calls = benchmarks.load_photos, []

    def overtaken(*arguments, **keywords):
        calls.append(arguments)
        if len(calls) == 1:  # the other one starts now, and ends before this one
            preparation.prepare(early)
        return load(*arguments, **keywords)

    monkeypatch.setattr(benchmarks, "load_photos", overtaken)
    preparation.prepare(late)
    assert len(calls) > 1
    assert late.info.splits["train"].num_examples == early.info.splits["train"].num_examples > 0
    assert not preparation.leftovers(late)
    assert preparation.write_report(late, preparation.report(late), None) == []


def test_an_interrupted_run_leaves_nothing_that_counts(tmp_path, monkeypatch):
    standins.small_fashioniq(tmp_path / "raw", count=2, images=3)

    def make():
        return make_builder(
            "fashioniq",
            str(tmp_path / "data"),
            image_size=SIZE,
            preprocess="pad",
            raw_dir=str(tmp_path / "raw"),
            splits=("train", "validation"),
            num_workers=1,
        )

    builder = make()
    left = builder.data_path.parent / f"incomplete.ABC123_{builder.data_path.name}"
    left.mkdir(parents=True)  # what a killed process leaves
    assert preparation.leftovers(make()) == [str(left)]

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("dqe_jax.data.builders.benchmarks.load_photos", stop)
        with pytest.raises(KeyboardInterrupt):
            preparation.prepare(make())
    assert not preparation.is_prepared(make())
    with monkeypatch.context() as patched:
        patched.setattr(preparation.index, "write_index", stop)
        with pytest.raises(KeyboardInterrupt):
            preparation.prepare(make())  # records are there, the index is not
    preparation.prepare(make())
    builder = make()
    assert preparation.report(builder).splits["train"].queries == 6
    assert len(splits.load_split(builder, "train", SIZE).gallery) == 9


def test_processes_give_what_one_process_gives(tmp_path):
    for i in range(70):
        standins.write_photo(tmp_path / f"{i}.png")
    (tmp_path / "40.png").write_bytes(b"")
    paths = [*(f"{i}.png" for i in range(70)), None, "nowhere.png"]
    how = (str(tmp_path), SIZE, "crop")
    parts = [(path, None) for path in paths]
    one = list(load_photos(parts, *how, num_workers=1))
    assert list(load_photos(parts, *how, num_workers=2)) == one
    assert [i for i, photo in enumerate(one) if photo.image is None] == [40, 70, 71]
    assert len({photo.number for photo in one}) == 72


@pytest.mark.slow
def test_beam_gives_the_same(tmp_path):
    pytest.importorskip("apache_beam", reason="Apache Beam is not installed: it would prepare")
    standins.small_fashioniq(tmp_path / "raw", count=2, images=9)
    (tmp_path / "raw" / "images" / "DTRAIN0004.jpg").write_bytes(b"")
    arguments = ("--dataset=fashioniq", "--max_missing=0.5")
    run(*arguments, raw=tmp_path / "raw", data=tmp_path / "one")
    beam = ("--beam_runner=DirectRunner", "--beam_options=direct_num_workers=1")
    run(*arguments, *beam, raw=tmp_path / "raw", data=tmp_path / "two")
    reports = [
        report_of(tmp_path / name, "fashioniq", f"{SIZE}px-target_pad") for name in ("one", "two")
    ]
    assert reports[0] == reports[1]
    one, two = (opened("fashioniq", tmp_path / n, "train", "target_pad") for n in ("one", "two"))
    assert one.gallery.ids == two.gallery.ids
    assert one.queries.ids == two.queries.ids
    for row in range(len(one.gallery)):
        np.testing.assert_array_equal(one.gallery[row], two.gallery[row])


# ---------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--raw_dir=nowhere"], ["--raw_dir: there is no directory 'nowhere'"]),
        (["--splits=dev"], ["fashioniq has no split 'dev'"]),
        (["--dataset=coco"], ["dataset"]),
        (["--max_missing=2"], ["max_missing"]),
        (["--beam_runner=NoRunner"], ["--beam_runner"]),
        (["more"], ["unexpected argument 'more'"]),
    ],
)
def test_errors(tmp_path, arguments, words):
    (tmp_path / "raw").mkdir()
    first = ["--dataset=fashioniq"]
    status = 2 if "coco" not in str(arguments) and "=2" not in str(arguments) else None
    command = ("dqe_jax.prepare", f"--raw_dir={tmp_path / 'raw'}", *first)
    done = run_module(*command, f"--data_dir={tmp_path}", *arguments, cwd=ROOT)
    assert done.returncode == 2 if status else done.returncode
    assert all(word in done.stderr for word in words), done.stderr
    assert "Traceback" not in done.stderr


def test_a_directory_that_cannot_be_written(tmp_path):
    standins.small_fashioniq(tmp_path / "raw", count=2, images=3)
    (tmp_path / "file").write_text("")
    error = run(
        "--dataset=fashioniq", raw=tmp_path / "raw", data=tmp_path / "file" / "data", status=2
    )
    assert "cannot prepare fashioniq" in error.splitlines()[-1]


@pytest.mark.parametrize("name", ["fiq", "fiq_clip", "cirr", "triplets"])
def test_training_without_the_data_says_what_to_run(name, tmp_path):
    """Before weights are looked for, before the workdir is made."""
    config = {"fiq": fiq, "fiq_clip": fiq_clip, "cirr": cirr, "triplets": triplets}[
        name
    ].get_config()
    config.data.prepared_dir = str(tmp_path / "prepared")
    config.num_devices = 1
    dataset = config.data.dataset
    command = rf"python -m dqe_jax\.prepare --dataset={dataset} --raw_dir=DIR .*--image_size=224"
    with pytest.raises(UserError, match=rf"{dataset} .* is not prepared in .*: run `{command}"):
        loop.train_and_evaluate(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_all_files_that_are_missing_are_named_before_anything_is_written(tmp_path, capsys):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "split.rc2.val.json").write_text("{}")
    with pytest.raises(UserError) as error:
        prepare_benchmark("cirr", tmp_path / "raw", tmp_path / "data", splits=("train", "val"))
    assert str(error.value) == (
        f"{tmp_path / 'raw'} lacks 3 files: split.rc2.train.json, cap.rc2.train.json, "
        "cap.rc2.val.json; put them there or in a folder below."
    )
    assert not (tmp_path / "data" / "cirr").exists()
    assert capsys.readouterr().out == ""


def test_what_an_interrupted_preparation_left_is_not_named_as_prepared(tmp_path):
    config = fiq.get_config()
    config.data.data_dir, config.data.image_size = str(tmp_path), SIZE
    records = tmp_path / "fashioniq" / f"{SIZE}px-target_pad" / "1.0.0"
    records.mkdir(parents=True)
    (records / "dataset_info.json").write_text('{"name": "fashioniq", "version": "1.0.0"}')
    # The report, which is written last, is not there.
    with pytest.raises(UserError, match=rf"is not prepared in {tmp_path}: run"):
        datasets.find_dataset(config.data)


def test_progress_is_a_line_for_a_tenth(caplog):
    with caplog.at_level("INFO"):
        items = range(9501)
        # As builders do: nobody asks for more than the last one.
        assert [item for _, item in zip(items, progress(iter(items), 9501, "Photos"))] == [*items]
        assert list(progress("few", 3, "Photos")) == ["f", "e", "w"]
    steps = (*range(951, 9501, 951), 9501)
    assert caplog.messages == [f"Photos: {n} of 9501" for n in steps]


def test_another_size_is_named(spoiled):
    _, data, _ = spoiled
    config = fiq.get_config()
    config.data.data_dir = str(data)
    with pytest.raises(UserError, match=rf"it has {SIZE}px-target_pad\): run"):
        datasets.find_dataset(config.data)


def test_a_damaged_report_is_named(tmp_path):
    builder = types.SimpleNamespace(data_path=tmp_path)
    assert preparation.read_complaints(builder) is None
    (tmp_path / preparation.REPORT).write_text("{")
    damaged = (b"{", b"", b"\xff\xfe", b"[]", b"{}", b"[" * 100_000)
    for content in (*damaged, b'{"complaints": "text"}', b'{"complaints": [3]}'):
        (tmp_path / preparation.REPORT).write_bytes(content)
        with pytest.raises(UserError, match=r"preparation\.json is damaged .*run dqe_jax.prepare"):
            preparation.read_complaints(builder)


ENDLESS = {"pipe": os.mkfifo, "device": lambda path: os.symlink("/dev/zero", path)}


@pytest.mark.parametrize("make", ENDLESS.values(), ids=ENDLESS.keys())
def test_files_without_an_end(tmp_path, make):
    """A photo of that kind counts as unreadable; a file of annotations is an error."""
    raw, data = tmp_path / "raw", tmp_path / "data"
    standins.small_fashioniq(raw, count=3, images=6)
    photo = raw / "images" / "DVAL0005.jpg"
    photo.unlink()
    make(photo)
    run("--dataset=fashioniq", "--max_missing=0.5", raw=raw, data=data, timeout=120)
    report = report_of(data, "fashioniq", f"{SIZE}px-target_pad")
    assert report["missing"]["validation_gallery"] == {"DVAL0005": "is no regular file"}
    captions = raw / "captions" / "cap.dress.val.json"
    captions.unlink()
    make(captions)
    over = ("--dataset=fashioniq", "--overwrite")
    error = run(*over, raw=raw, data=data, timeout=120, status=2).splitlines()[-1]
    assert "cap.dress.val.json cannot be read: it is no regular file" in error


def test_the_defaults_are_those_of_the_configs():
    for module in (fiq, fiq_clip, cirr, circo, triplets):
        data = module.get_config().data
        assert datasets.DATASETS[data.dataset].raw.preprocess == data.preprocess
        assert data.image_size == 224
    prepared_first = {name: info.raw for name, info in datasets.DATASETS.items() if info.raw}
    assert set(prepared_first) == set(benchmarks.BUILDERS)
    assert {raw.preprocess for raw in prepared_first.values()} <= set(preprocess.PREPROCESS)
    assert common.get_config().data.prepared_dir == "~/.cache/dqe_jax"
    assert os.path.expanduser("~") not in common.get_config().data.prepared_dir
