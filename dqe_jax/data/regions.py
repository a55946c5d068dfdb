"""The part of a photo that a box stands for, as GeneCIS (Vaze et al., CVPR 2023) takes it.

The rule is that of its published loader: the crop is 1.7 times as wide and high as the box and
grows to the left and up only, unless the photo's border is in the way; then what is missing is
added on the other side. It comes in the middle of a black square.
"""

from __future__ import annotations

from PIL import Image

# A box: x and y of its upper left corner, its width and height, in pixels.
Region = tuple[float, float, float, float]
GROWN = 0.7


def crop_edges(box: Region, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Left, upper, right and lower edge of the crop for a box.

    Args:
      box: of the photo.
      size: width and height of the photo.
    """
    x, y, width, height = box
    left, upper = max(0.0, x - GROWN * width), max(0.0, y - GROWN * height)
    right = min(float(size[0]), left + (1 + GROWN) * width)
    lower = min(float(size[1]), upper + (1 + GROWN) * height)
    return left, upper, right, lower


def crop_of(photo: Image.Image, box: Region) -> Image.Image:
    """The crop for a box, in the middle of a black square.

    Raises:
      ValueError: no pixel of the photo is in it.
    """
    left, upper, right, lower = map(round, crop_edges(box, photo.size))
    if left >= right or upper >= lower:
        raise ValueError(f"the box {list(box)} is outside of the photo")
    part = photo.crop((left, upper, right, lower))
    side = max(part.size)
    square = Image.new("RGB", (side, side))
    square.paste(part, ((side - part.width) // 2, (side - part.height) // 2))
    return square
