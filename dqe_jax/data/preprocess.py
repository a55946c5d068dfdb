"""From a photo of any size to the square image that a backbone sees: one function for each way.

All give uint8 `[size, size, 3]`; mean and standard deviation are the model's business
(`models/encoder.py`, `models/tiny.py`). Resizing is bicubic.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image

_BICUBIC = Image.Resampling.BICUBIC


def pad(photo: Image.Image, size: int) -> np.ndarray:
    """Fits the whole photo and pads with white: for photos of products on white."""
    scale = size / max(photo.size)
    fitted = (max(1, round(photo.width * scale)), max(1, round(photo.height * scale)))
    if photo.size != fitted:
        photo = photo.resize(fitted, _BICUBIC, reducing_gap=3.0)
    if fitted != (size, size):
        square = Image.new("RGB", (size, size), (255, 255, 255))
        square.paste(photo, ((size - fitted[0]) // 2, (size - fitted[1]) // 2))
        photo = square
    return np.asarray(photo, np.uint8)


def squash(photo: Image.Image, size: int) -> np.ndarray:
    """Resizes to a square whatever the shape: BLIP-2's way (`BlipImageProcessor`)."""
    return np.asarray(photo.resize((size, size), _BICUBIC), np.uint8)


def crop(photo: Image.Image, size: int) -> np.ndarray:
    """Resizes the short side to `size` and takes the centre: CLIP's way (`CLIPImageProcessor`)."""
    short = min(photo.size)
    width, height = (int(size * side / short) for side in photo.size)
    left, top = (width - size) // 2, (height - size) // 2
    photo = photo.resize((width, height), _BICUBIC)
    return np.asarray(photo.crop((left, top, left + size, top + size)), np.uint8)


def target_pad(photo: Image.Image, size: int, ratio: float = 1.25) -> np.ndarray:
    """Pads with black until long side / short side is at most `ratio`, then as `crop`.

    CLIP4Cir's way (Baldrati et al., 2022), with the ratio of 1.25 that CIR papers use: tall
    garments keep their ends.
    """
    least = max(photo.size) / ratio
    across, down = (int(max(least - side, 0) / 2) for side in photo.size)
    if across or down:
        padded = Image.new("RGB", (photo.width + 2 * across, photo.height + 2 * down))
        padded.paste(photo, (across, down))
        photo = padded
    return crop(photo, size)


PREPROCESS: dict[str, Callable[[Image.Image, int], np.ndarray]] = {
    "pad": pad,
    "squash": squash,
    "crop": crop,
    "target_pad": target_pad,
}
