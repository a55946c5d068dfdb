"""How images are stored: as PNG, as JPEG, or as raw arrays, and back.

| format | pixels | on disk | to decode |
| --- | --- | --- | --- |
| `png` | as they are | middle | slowest |
| `jpeg` | nearly as they are | smallest | fast |
| `raw` | as they are | largest | hardly anything |

JPEG has quality 95 and keeps colour at full resolution (4:4:4). Most encoders average colour over
2 x 2 pixels, which blurs prints and small things of another colour; texts of composed retrieval ask
for just these, and an image of 224 pixels has none to spare. Without that averaging decoders have
nothing to interpolate either, so that they agree on the pixels.
"""

from __future__ import annotations

import io
import math

import numpy as np
from PIL import Image

JPEG_QUALITY = 95


def encode_image(image: np.ndarray, image_format: str) -> bytes:
    """An image as it is stored.

    Args:
      image: uint8 `[H, W, 3]`; `H = W` for raw.
      image_format: of `settings.IMAGE_FORMATS`.
    """
    if image_format == "raw":
        return image.tobytes()
    encoded = io.BytesIO()
    if image_format == "jpeg":
        Image.fromarray(image).save(encoded, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    else:
        Image.fromarray(image).save(encoded, "PNG", compress_level=1)
    return encoded.getvalue()


def decode_image(data: bytes, *, raw: bool) -> np.ndarray:
    """The image uint8 `[H, W, 3]` that was stored, not to be written to.

    Args:
      data: of `encode_image`.
      raw: whether it is an array; whether others are PNG or JPEG is seen in the data.
    """
    if raw:
        side = math.isqrt(len(data) // 3)
        return np.frombuffer(data, np.uint8).reshape(side, side, 3)
    with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as opened:
        return np.asarray(opened)
