"""From a photo's file to the square image that is stored, on all cores.

A photo is refused, with a reason, if it is no JPEG, PNG or WebP, does not decode completely, has
more than 50 million pixels or 10,000 a side (a decompression bomb, or no photo), or more than 64
MiB. Transparency is dropped and rotation tags are ignored, as the scripts of the benchmarks do.
"""

from __future__ import annotations

import collections
import concurrent.futures
import concurrent.futures.process
import dataclasses
import hashlib
import io
import itertools
import multiprocessing
import os
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from etils import epath
from PIL import Image, UnidentifiedImageError

from dqe_jax.data.image_formats import encode_image
from dqe_jax.data.preprocess import PREPROCESS
from dqe_jax.data.regions import Region, crop_of
from dqe_jax.utils.errors import UserError
from dqe_jax.utils.files import is_regular

MAX_PIXELS = 50_000_000
MAX_SIDE = 10_000  # padding to a square must not make a bomb of a thin strip
MAX_BYTES = 64 * 2**20
_CHUNK = 32
_MISSING = "is missing"
_Part = tuple[str | None, Region | None]


@dataclasses.dataclass(frozen=True)
class Photo:
    """A photo as it is stored, or the reason why there is none.

    Attributes:
      image: as `image_formats.encode_image` gives it, or None.
      number: 63 bits of a digest of the photo's pixels before they are reduced: photos with
        identical content share it. Of a photo that is not there, of its path: it shares with none.
      reason: why there is no image; "" if there is one.
    """

    image: bytes | None
    number: int
    reason: str = ""


def decode_photo(
    data: bytes,
    image_size: int,
    preprocess: str,
    decode_side: int | None = None,
    region: Region | None = None,
) -> tuple[np.ndarray, str]:
    """Decodes a photo, makes it square, and reduces it.

    Args:
      data: the encoded photo.
      image_size: pixels a side of the result.
      preprocess: how, a name of `preprocess.PREPROCESS`.
      decode_side: decode a JPEG at the smallest of its scales with at least this many pixels a
        side; None decodes it whole.
      region: the part of the photo to take, as `crop_of`, of one that is decoded whole; None for
        all of it.

    Returns:
      The photo, uint8 `[image_size, image_size, 3]`, and a digest that is equal for photos whose
      pixels are, before they are reduced.

    Raises:
      Exception: the photo does not decode; decoders raise many types.
    """
    photo, (width, height) = open_photo(data, decode_side)
    if region is not None:
        photo = crop_of(photo, region)
        width, height = photo.size
    digest = hashlib.sha256(f"{width}x{height}:".encode() + photo.tobytes()).hexdigest()
    return PREPROCESS[preprocess](photo, image_size), digest


def open_photo(data: bytes, decode_side: int | None = None) -> tuple[Image.Image, tuple[int, int]]:
    """A photo in RGB, and its width and height before a JPEG was scaled; as `decode_photo`."""
    # Only formats of photos are decoded: other decoders should not be given unknown files.
    with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as opened:
        size = opened.size
        if size[0] * size[1] > MAX_PIXELS or max(size) > MAX_SIDE:
            raise ValueError(f"has {size[0]} x {size[1]} pixels")
        if decode_side is not None:
            opened.draft("RGB", (decode_side, decode_side))
        return opened.convert("RGB"), size


def load_photo(
    path: str | None,
    root: str,
    image_size: int,
    preprocess: str,
    image_format: str = "png",
    region: Region | None = None,
) -> Photo:
    """Reads the photo at a path below `root`, or the region of it that `crop_of` gives.

    None is a photo that is not there.
    """
    try:
        if path is None:
            raise FileNotFoundError(_MISSING)
        file = epath.Path(root) / path
        if not is_regular(file):  # a pipe or a device would be read for ever
            return Photo(None, _number(f"{root}/{path}"), "is no regular file")
        if (size := file.stat().length) > MAX_BYTES:
            raise ValueError(f"has {size} bytes")
        image, digest = decode_photo(file.read_bytes(), image_size, preprocess, region=region)
    except FileNotFoundError:
        return Photo(None, _number(f"{root}/{path}"), _MISSING)
    except UnidentifiedImageError:  # its text holds an address in memory
        return Photo(None, _number(f"{root}/{path}"), "is no JPEG, PNG or WebP")
    except Exception as error:  # decoders of damaged files raise nearly anything
        reason = f"does not decode ({' '.join(str(error).split())[:80]})"
        return Photo(None, _number(f"{root}/{path}"), reason)
    return Photo(encode_image(image, image_format), int(digest[:16], 16) >> 1)


def _number(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) >> 1


def _load_some(
    parts: Sequence[_Part], root: str, image_size: int, preprocess: str, image_format: str
) -> list[Photo]:
    how = (root, image_size, preprocess, image_format)
    return [load_photo(path, *how, region=region) for path, region in parts]


def load_photos(
    parts: Iterable[_Part],
    root: str,
    image_size: int,
    preprocess: str,
    image_format: str = "png",
    num_workers: int = 0,
) -> Iterator[Photo]:
    """`load_photo` of each part, in order, by processes.

    Args:
      parts: paths relative to `root`, None for a photo that is not there; each with the region of
        the photo, None for all of it.
      root: directory of the raw data.
      image_size: pixels a side.
      preprocess: a name of `preprocess.PREPROCESS`.
      image_format: how the image is stored, of `settings.IMAGE_FORMATS`.
      num_workers: processes; 0 for one a core, 1 works in this one.

    Raises:
      UserError: a process was killed.
    """
    how = (root, image_size, preprocess, image_format)
    workers = num_workers or os.cpu_count() or 1
    if workers == 1:
        for path, region in parts:
            yield load_photo(path, *how, region=region)
        return
    # Processes are spawned: a fork of a process with threads (JAX, array_record) may hang.
    context = multiprocessing.get_context("spawn")
    pending: collections.deque[concurrent.futures.Future[list[Photo]]] = collections.deque()
    iterator = iter(parts)
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        try:
            while chunk := list(itertools.islice(iterator, _CHUNK)):
                pending.append(pool.submit(_load_some, chunk, *how))
                if len(pending) >= 4 * workers:  # a bounded number of images in memory
                    yield from pending.popleft().result()
            while pending:
                yield from pending.popleft().result()
        except concurrent.futures.process.BrokenProcessPool as error:
            raise UserError(
                f"a process that decodes photos of {root} was killed, perhaps for want of memory: "
                f"run again with --num_workers below {workers}."
            ) from error
        finally:
            for future in pending:
                future.cancel()
