"""Images as they are stored: PNG and raw exactly, JPEG nearly; data sets in each format."""

import io
import json

import numpy as np
import pytest
from PIL import Image, JpegImagePlugin

from configs import shapes, triplets
from dqe_jax.config import RunConfig
from dqe_jax.data import datasets, splits
from dqe_jax.data.builders.benchmarks import make_builder
from dqe_jax.data.image_formats import decode_image, encode_image
from dqe_jax.data.prepare import prepare_benchmark
from dqe_jax.data.records import DecodedRecords
from dqe_jax.data.settings import IMAGE_FORMATS
from dqe_jax.performance.made_data import made_image
from dqe_jax.testing import standins
from dqe_jax.utils.errors import UserError

SIZE = 16


@pytest.mark.parametrize("image_format", IMAGE_FORMATS)
def test_what_is_stored_comes_back(image_format):
    image = made_image(48, 0)
    data = encode_image(image, image_format)
    again = decode_image(data, raw=image_format == "raw")
    assert (again.shape, again.dtype) == (image.shape, np.uint8)
    difference = np.abs(again.astype(int) - image)
    assert difference.mean() < (4 if image_format == "jpeg" else 1e-9)
    if image_format != "raw":
        assert Image.open(io.BytesIO(data)).format == image_format.upper()


def test_jpeg_keeps_colour_at_full_resolution():
    """Stripes of a pixel in two colours of one brightness: averaging would make them grey."""
    image = np.zeros((32, 32, 3), np.uint8)
    image[:, ::2], image[:, 1::2] = (200, 0, 0), (0, 102, 0)
    data = encode_image(image, "jpeg")
    assert JpegImagePlugin.get_sampling(Image.open(io.BytesIO(data))) == 0
    again = decode_image(data, raw=False).astype(int)
    assert again[:, ::2, 0].mean() > 180
    assert again[:, 1::2, 0].mean() < 20
    other = io.BytesIO()
    Image.fromarray(image).save(other, "JPEG", quality=95)
    grey = decode_image(other.getvalue(), raw=False).astype(int)
    assert grey[:, 1::2, 0].mean() > 60


# --------------------------------------------------------------------------- a prepared data set


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Triplets prepared in each format, in one directory."""
    directory = tmp_path_factory.mktemp("formats")
    standins.small_triplets(directory / "raw")
    for image_format in IMAGE_FORMATS:
        prepare_benchmark(
            "triplets",
            directory / "raw",
            directory / "data",
            image_size=SIZE,
            image_format=image_format,
            num_workers=1,
        )
    return directory


def builder_of(base, image_format):
    return make_builder(
        "triplets",
        str(base / "data"),
        image_size=SIZE,
        preprocess="pad",
        image_format=image_format,
    )


def test_names_tell_formats_apart_and_png_keeps_its_own(base):
    found = {path.name for path in (base / "data" / "triplets").iterdir()}
    assert found == {f"{SIZE}px-pad", f"{SIZE}px-pad-jpeg", f"{SIZE}px-pad-raw"}
    reports = {
        name: json.loads(next((base / "data" / "triplets" / name).glob("*/*.json")).read_text())
        for name in found
    }
    assert len(reports) == 3
    written = (base / "data" / "triplets").glob("*/*/preparation.json")
    formats = [json.loads(path.read_text()).get("image_format") for path in sorted(written)]
    assert formats == [None, "jpeg", "raw"]


def test_all_formats_hold_the_same_photos(base):
    png, jpeg, raw = (
        splits.load_split(builder_of(base, each), "train", SIZE) for each in IMAGE_FORMATS
    )
    for row in range(len(png.gallery)):
        np.testing.assert_array_equal(png.gallery[row], raw.gallery[row])
    apart = [
        np.abs(png.gallery[row].astype(int) - jpeg.gallery[row]).mean()
        for row in range(len(png.gallery))
    ]
    assert 0 < max(apart) < 8  # the pictures are noise of 16 pixels
    # Copies are found in the source photos, whatever JPEG makes of them.
    assert png.gallery.image_ids.tolist() == jpeg.gallery.image_ids.tolist()
    assert png.queries.texts == jpeg.queries.texts == raw.queries.texts
    assert len({png.digest, jpeg.digest, raw.digest}) == 3
    assert len({each.gallery.contents().tobytes() for each in (png, jpeg, raw)}) == 3


@pytest.mark.parametrize("image_format", ["png", "jpeg"])
def test_images_are_decoded_as_tfds_decodes_them(base, image_format):
    builder = builder_of(base, image_format)
    ours, theirs = DecodedRecords(builder, "gallery"), builder.as_data_source("gallery")
    assert len(ours) == len(theirs)
    for row, record in enumerate(ours.__getitems__(list(range(len(ours))))):
        np.testing.assert_array_equal(record["image"], theirs[row]["image"])
        np.testing.assert_array_equal(record["image"], ours[row]["image"])


def test_a_config_opens_the_format_that_it_names(base):
    config = triplets.get_config()
    config.data.data_dir, config.data.image_size = str(base / "data"), SIZE
    for image_format in IMAGE_FORMATS:
        config.data.image_format = image_format
        builder = datasets.open_dataset(RunConfig.of(config).data)
        assert builder.builder_config.image_format == image_format


def test_a_format_that_is_not_prepared_is_named(base, tmp_path):
    config = triplets.get_config()
    config.data.data_dir, config.data.image_format = str(tmp_path), "jpeg"
    with pytest.raises(UserError, match=r"stored as jpeg, is not prepared in .*--format=jpeg`\.$"):
        datasets.find_dataset(RunConfig.of(config).data)
    config = shapes.get_config()
    config.data.prepared_dir, config.data.image_format = str(tmp_path), "jpeg"
    with pytest.raises(UserError, match=r"image_format is 'jpeg': shapes are drawn.*take 'png'"):
        datasets.find_dataset(RunConfig.of(config).data)
    with pytest.raises(UserError, match=r"image_format is 'webp': it must be .*raw"):
        RunConfig().with_changes({"data.image_format": "webp"})
