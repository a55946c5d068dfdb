"""Photos to squares: as the image processors of `transformers`, and CLIP4Cir's target padding."""

import io

import numpy as np
import pytest
from PIL import Image

from dqe_jax.data.photos import decode_photo
from dqe_jax.data.preprocess import PREPROCESS, target_pad

SHAPES = [(40, 40), (60, 40), (40, 61), (33, 90), (300, 20), (23, 24)]


def photo(width, height, seed=0):
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (5, 5, 3), np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("name", sorted(PREPROCESS))
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [16, 33])
def test_all_give_squares(name, shape, size):
    image = PREPROCESS[name](photo(*shape), size)
    assert image.shape == (size, size, 3)
    assert image.dtype == np.uint8


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [16, 33])
def test_agrees_with_the_image_processors(shape, size):
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    from dqe_jax.models.encoder import PIXEL_MEAN, PIXEL_STD

    square = {"height": size, "width": size}
    theirs = {
        "crop": CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=square),
        "squash": BlipImageProcessorPil(size=square),
    }
    for name, processor in theirs.items():
        expected = np.asarray(processor(photo(*shape))["pixel_values"][0]).transpose(1, 2, 0)
        image = PREPROCESS[name](photo(*shape), size) / 255.0
        np.testing.assert_allclose((image - PIXEL_MEAN) / PIXEL_STD, expected, atol=1e-5)


def test_target_pad():
    # 100 x 60: the short side grows to 100 / 1.25 = 80, ten black rows on each side.
    white = Image.new("RGB", (100, 60), (255, 255, 255))
    image = target_pad(white, 80)
    assert image[40].min() == 255
    assert image[:9].max() < 30
    assert image[-9:].max() < 30
    assert image[12:-12].min() > 220
    # Nearly square photos are only cropped.
    nearly = photo(50, 41)
    np.testing.assert_array_equal(target_pad(nearly, 30), PREPROCESS["crop"](nearly, 30))


def test_pad_keeps_the_whole_photo():
    image = PREPROCESS["pad"](Image.new("RGB", (100, 50), (9, 9, 9)), 40)
    assert (image[:9] == 255).all()
    assert (image[11:29] == 9).all()
    assert (image[-9:] == 255).all()


def test_a_thin_strip_is_refused_before_it_is_padded():
    data = io.BytesIO()
    Image.new("RGB", (12_000, 10)).save(data, "PNG")
    with pytest.raises(ValueError, match="has 12000 x 10 pixels"):
        decode_photo(data.getvalue(), 16, "target_pad")
