"""Images of a user, of any kind, as the square images that the model was trained on."""

from __future__ import annotations

import dataclasses
import io
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias

import numpy as np
from etils import epath
from PIL import Image, UnidentifiedImageError

from dqe_jax.config import RunConfig
from dqe_jax.data.builders.fashion_raw import DECODE_SIDE
from dqe_jax.data.photos import MAX_BYTES, MAX_PIXELS, MAX_SIDE, open_photo
from dqe_jax.data.preprocess import PREPROCESS
from dqe_jax.utils.errors import UserError
from dqe_jax.utils.files import is_regular
from dqe_jax.utils.paths import whole_path

# A path, an opened image of PIL, or an array uint8 [H, W], [H, W, 3] or [H, W, 4].
AnyImage: TypeAlias = "str | os.PathLike[str] | Image.Image | np.ndarray"

THUMBNAIL = 160  # pixels of the longer side
SHOWN = 5  # images named in an error


@dataclasses.dataclass(frozen=True, eq=False)
class Encoded:
    """What a model made of an image: it stands in the image's place in queries of that model.

    Attributes:
      features: arrays of the image by name, as `Model.encode_references` gives them.
    """

    features: Mapping[str, np.ndarray]


class UnreadableError(ValueError):
    """An image cannot be used; the text says why and does not name it."""


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """How photos become what the model sees, as in the data that it was trained on.

    Attributes:
      size: pixels a side.
      method: a name of `preprocess.PREPROCESS`.
      decode_side: as for `photos.open_photo`.
    """

    size: int
    method: str
    decode_side: int | None

    @classmethod
    def of(cls, config: RunConfig) -> Preprocessing:
        """That of a run."""
        data = config.data
        side = DECODE_SIDE if data.dataset == "fashion_products" else None
        return cls(data.image_size, data.preprocess, side)

    def square(self, photo: Image.Image) -> np.ndarray:
        """A photo as uint8 `[size, size, 3]`."""
        return PREPROCESS[self.method](photo, self.size)


def read_file(path: str | os.PathLike[str]) -> bytes:
    """The bytes of an image file.

    Raises:
      UnreadableError: there is none, or it is no image or too large.
    """
    file = epath.Path(path)
    try:
        if not is_regular(file):  # a pipe or a device would be read for ever
            raise UnreadableError("is no regular file")
        if (size := file.stat().length) > MAX_BYTES:
            raise UnreadableError(f"has {size} bytes, more than {MAX_BYTES}")
        return file.read_bytes()
    except FileNotFoundError as error:
        raise UnreadableError("is not there") from error
    except OSError as error:
        raise UnreadableError(f"cannot be read ({error.strerror or error})") from error


def decode(data: bytes, decode_side: int | None = None) -> Image.Image:
    """An encoded photo in RGB.

    Raises:
      UnreadableError: it does not decode, or has too many pixels.
    """
    try:
        return open_photo(data, decode_side)[0]
    except UnidentifiedImageError as error:  # its text holds an address in memory
        raise UnreadableError("is no JPEG, PNG or WebP") from error
    except Image.DecompressionBombError as error:  # more than twice what Pillow warns of
        raise UnreadableError(f"has more than {MAX_PIXELS:,} pixels") from error
    except Exception as error:  # decoders of damaged files raise nearly anything
        said = " ".join(str(error).split())[:80]
        # What `open_photo` says itself.
        reason = said if said.startswith("has ") else f"does not decode ({said})"
        raise UnreadableError(reason) from error


def to_rgb(image: AnyImage, decode_side: int | None = None) -> Image.Image:
    """An image of any kind in RGB; raises an `UnreadableError`."""
    if isinstance(image, Image.Image):
        if image.width * image.height > MAX_PIXELS or max(image.size) > MAX_SIDE:
            raise UnreadableError(f"has {image.width} x {image.height} pixels")
        try:
            return image.convert("RGB")
        except Exception as error:  # it may be opened lazily, of a damaged file
            raise UnreadableError(
                f"does not decode ({' '.join(str(error).split())[:80]})"
            ) from error
    if isinstance(image, (str, os.PathLike)):
        return decode(read_file(whole_path(image)), decode_side)
    array = np.asarray(image)
    fits = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))
    if array.dtype != np.uint8 or not fits or not array.size:
        raise UnreadableError(
            f"is an array {array.dtype} {list(array.shape)}: give uint8 [H, W, 3] of 0 to 255"
        )
    return Image.fromarray(np.ascontiguousarray(array)).convert("RGB")


def name_of(image: AnyImage, number: int) -> str:
    """What an image is called: its path, or its place among those that were given, from 1."""
    if isinstance(image, (str, os.PathLike)):
        return os.fspath(image)
    named = getattr(image, "filename", "")
    return str(named) if named else f"image {number}"


def read_images(images: Sequence[AnyImage], how: Preprocessing, threads: int = 4) -> np.ndarray:
    """Images of any kind as the model sees them.

    Args:
      images: any.
      how: the model's preprocessing.
      threads: that decode.

    Returns:
      uint8 `[n, size, size, 3]`.

    Raises:
      UserError: some cannot be used; it names them.
    """

    def read(image: AnyImage) -> np.ndarray | UnreadableError:
        try:
            return how.square(to_rgb(image, how.decode_side))
        except UnreadableError as error:
            return error

    with ThreadPoolExecutor(threads) as pool:  # decoders release the interpreter's lock
        found = list(pool.map(read, images))
    bad = [(i, x) for i, x in enumerate(found) if isinstance(x, UnreadableError)]
    if bad:
        shown = "; ".join(f"{name_of(images[i], i + 1)} {x}" for i, x in bad[:SHOWN])
        more = f"; and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        raise UserError(f"{len(bad)} of {len(images)} images cannot be used: {shown}{more}.")
    squares = [x for x in found if isinstance(x, np.ndarray)]
    return np.stack(squares) if squares else np.zeros((0, how.size, how.size, 3), np.uint8)


def thumbnail(photo: Image.Image, side: int = THUMBNAIL) -> bytes:
    """A photo as a JPEG of at most `side` pixels a side."""
    scale = side / max(photo.size)
    if scale < 1:
        size = (max(1, round(photo.width * scale)), max(1, round(photo.height * scale)))
        photo = photo.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0)
    encoded = io.BytesIO()
    photo.save(encoded, "JPEG", quality=85)
    return encoded.getvalue()
