"""Records are read as TFDS reads them, with their images still encoded."""

import io

import numpy as np
import pytest
from PIL import Image

from dqe_jax.data import datasets
from dqe_jax.data.records import CHUNK, read_records
from dqe_jax.testing.small_runs import run_config


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
