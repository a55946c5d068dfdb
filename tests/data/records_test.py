"""Records are read as TFDS reads them, with their images still encoded."""

import io
import os

import numpy as np
import pytest
from PIL import Image

from dqe_jax.data import datasets
from dqe_jax.data.records import CHUNK, read_records
from dqe_jax.testing.small_runs import run_config
from dqe_jax.utils.errors import UserError


@pytest.fixture(scope="module")
def builder(tmp_path_factory, prepared):
    base = tmp_path_factory.mktemp("records")
    prepared(base)
    return datasets.open_dataset(run_config(base / "prepared").data)


@pytest.mark.parametrize("split", ["train", "train_gallery", "validation_gallery"])
def test_records_are_those_that_tfds_reads(builder, split):
    found, expected = list(read_records(builder, split)), builder.as_data_source(split=split)
    assert len(found) == len(expected) > (CHUNK if split == "train_gallery" else 0)
    for record, whole in zip(found, expected):
        images = [np.asarray(Image.open(io.BytesIO(image))) for image in record["image"]]
        np.testing.assert_array_equal(images, whole["image"])
        assert {**record, "image": None} == {**whole, "image": None}
        assert all(type(record[name]) is type(whole[name]) for name in whole)


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff\xfe{}", b"{} {}", b"{}", b'{"version": ""}', b'{"splits": [{"numBytes": ""}]}'],
)
def test_a_damaged_description_is_told(tmp_path, prepared, content):
    prepared(tmp_path)
    data = run_config(tmp_path / "prepared").data
    (place,) = (tmp_path / "prepared").glob("**/dataset_info.json")
    place.unlink()
    place.write_bytes(content)
    with pytest.raises(UserError, match=r"prepared data of shapes in .* are damaged: .* prepare"):
        datasets.open_dataset(data)


@pytest.mark.parametrize("content", [b"", b"no records", None])
def test_damaged_records_are_told(tmp_path, prepared, content):
    prepared(tmp_path)
    builder = datasets.open_dataset(run_config(tmp_path / "prepared").data)
    (place,) = (tmp_path / "prepared").glob("**/*-train.array_record*")
    place.unlink()
    if content is not None:
        place.write_bytes(content)
    with pytest.raises(UserError, match=r"prepared data in .* cannot be read \(.*remove this"):
        list(read_records(builder, "train"))


@pytest.mark.parametrize("name", ["dataset_info.json", "*-train.array_record*"])
def test_a_pipe_among_prepared_data_is_told(tmp_path, prepared, name):
    """It would be read for ever."""
    prepared(tmp_path)
    data = run_config(tmp_path / "prepared").data
    (place,) = (tmp_path / "prepared").glob(f"**/{name}")
    place.unlink()
    os.mkfifo(place)
    with pytest.raises(UserError, match=rf"{place.name} cannot be read: it is no regular file"):
        datasets.open_dataset(data)
