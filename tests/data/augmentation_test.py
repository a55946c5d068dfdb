"""Augmentations: drawn on the host, made on the devices, and what each can give."""

import jax
import numpy as np
import pytest

from dqe_jax.data.augmentation import AUGMENTATIONS, DrawnImage, augment_all
from dqe_jax.distributed import mesh

SIDE, DRAWS = 32, 256


def image_of(seed=0):
    return np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), np.uint8)


def moved(image, mirrored, y, x):
    """As an image editor would do it, one image after the other."""
    image = image[:, ::-1] if mirrored else image
    padded = np.pad(image, ((2, 2), (2, 2), (0, 0)), mode="edge")  # 32 / 16 = 2 pixels
    return padded[y : y + SIDE, x : x + SIDE]


def made(name, image, seeds):
    """What the draws of these seeds give, `[len(seeds), H, W, 3]`."""
    drawn = [AUGMENTATIONS[name](image, np.random.default_rng(seed)) for seed in seeds]
    return np.asarray(augment_all(jax.tree.map(lambda *each: np.stack(each), *drawn)))


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_what_is_drawn_is_what_is_made(name):
    """The draws are those of the generator, in this order: runs of older versions go on."""
    image = image_of()
    before = image.copy()
    expected = []
    for seed in range(DRAWS):
        rng = np.random.default_rng(seed)
        mirrored = name != "none" and rng.random() < 0.5
        y, x = rng.integers(0, 5, 2) if name == "flip_shift" else (2, 2)
        expected.append(moved(image, mirrored, y, x))
    out = made(name, image, range(DRAWS))
    assert out.dtype == np.uint8
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(image, before)
    distinct = len({each.tobytes() for each in out})
    assert distinct == {"none": 1, "flip": 2, "flip_shift": 50}[name]


def test_flips_come_up_about_half_of_the_time():
    rng = np.random.default_rng(0)
    mirrored = [bool(AUGMENTATIONS["flip"](image_of(), rng).mirrored) for _ in range(400)]
    assert 160 < sum(mirrored) < 240


def test_images_are_made_where_they_lie_and_nothing_else_is_touched():
    devices = jax.devices()[:4]
    rng = np.random.default_rng(0)
    drawn = [AUGMENTATIONS["flip_shift"](image_of(i), rng) for i in range(8)]
    batch = {"image": jax.tree.map(lambda *each: np.stack(each), *drawn), "ids": np.arange(8)}
    here = augment_all(batch)
    placed = mesh.place(batch, devices)
    there = augment_all(placed)
    assert there["ids"] is placed["ids"]
    assert {shard.device for shard in there["image"].addressable_shards} == set(devices)
    np.testing.assert_array_equal(mesh.unshard(there["image"]), here["image"])
    assert not any(isinstance(x, DrawnImage) for x in there.values())
