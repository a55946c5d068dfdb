"""The benchmark of the input path: on prepared data, and on made images."""

import json
from pathlib import Path

from dqe_jax.cli.config_files import load_config
from dqe_jax.performance.data_benchmark import FROM_DISK, IN_MEMORY, NO_IMAGES, benchmark_data
from dqe_jax.testing.commands import run_module
from dqe_jax.testing.small_runs import small_config

ROOT = Path(__file__).resolve().parents[2]
QUICK = {"images": 8, "batches": 2, "rounds": 1}


def test_prepared_data(tmp_path, prepared, caplog):
    prepared(tmp_path)
    config = small_config(tmp_path / "prepared")
    with caplog.at_level("INFO"):
        report = benchmark_data(config, **QUICK)
    assert report.prepared
    assert report.decoding.keys() == {"png", "jpeg", "raw"}
    assert [each.difference for each in report.decoding.values()].count(0.0) == 2
    size = config.data.image_size
    assert report.decoding["raw"].bytes_per_image == 3 * size**2
    assert report.decoding["png"].bytes_per_image < report.reading.bytes_on_disk
    assert report.loading.keys() == {FROM_DISK, IN_MEMORY, NO_IMAGES}
    assert report.padding == 0  # all references of shapes have as many queries
    images = config.batch.references * (1 + config.batch.queries_per_reference)
    assert report.batch_bytes > images * 3 * size**2
    rates = [rate for load in report.loading.values() for rate in vars(load).values()]
    assert min(*rates, report.reading.images_per_second, report.reading.by_tfds) > 0
    for words in ("stored as png; 8 prepared images", "images/s a core", "0.0% of the rows"):
        assert words in caplog.text


def test_made_images_where_nothing_is_prepared(tmp_path, caplog):
    config = load_config("fiq:smoke")
    config.data.prepared_dir, config.data.image_format = str(tmp_path), "jpeg"
    config.data.image_size, config.batch.references, config.num_devices = 32, 2, 1
    with caplog.at_level("INFO"):
        report = benchmark_data(config, **QUICK)
    assert not report.prepared
    assert report.padding is report.reading is None
    assert report.loading.keys() == {FROM_DISK, NO_IMAGES}  # images of fiq are not kept
    assert "Images are made: fashioniq with 32 pixels" in caplog.text
    assert "8 made images" in caplog.text


def test_the_figures_of_a_command_are_written(tmp_path, prepared):
    prepared(tmp_path)
    words = ("dqe_jax", "benchmark", "data", "shapes:smoke", "--images=4", "--batches=1")
    place = f"--config.data.prepared_dir={tmp_path}/prepared"
    done = run_module(*words, "--rounds=1", place, f"--json={tmp_path}/found.json", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    held = json.loads((tmp_path / "found.json").read_text())
    assert (held["benchmark"], held["settings"]["images"]) == ("data", 4)
    report = held["results"]["shapes:smoke"]
    assert report["loading"].keys() == {FROM_DISK, IN_MEMORY, NO_IMAGES}
    (tmp_path / "file").write_text("")
    done = run_module(*words, place, f"--json={tmp_path}/file/found.json", cwd=ROOT)
    assert done.returncode == 2
    assert "cannot write to" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
