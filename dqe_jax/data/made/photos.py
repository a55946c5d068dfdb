"""Photos of products, decoded in threads and kept in a file until they are stored."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import hashlib
import tempfile
from collections.abc import Iterable, Iterator
from typing import Protocol

import numpy as np
from PIL import UnidentifiedImageError

from dqe_jax.data.photos import decode_photo

_DECODE_THREADS = 4


class PhotoSource(Protocol):
    """Where photos come from."""

    def read(self, photo_id: str, /) -> bytes:
        """Bytes of a photo; a ValueError or an OSError says why there are none."""

    def close(self) -> None:
        """Closes what is open."""


@dataclasses.dataclass(frozen=True)
class Decoded:
    """A decoded photo, or the reason why there is none."""

    image: np.ndarray | None = None
    pixels: str = ""  # Digest of the pixels: equal for identical photos.
    content: str = ""  # Digest of the bytes: the same with any version of the decoder.
    reason: str = ""


def _decode(data: bytes, image_size: int, preprocess: str, decode_side: int | None) -> Decoded:
    try:
        image, pixels = decode_photo(data, image_size, preprocess, decode_side)
    except UnidentifiedImageError:  # Its text holds an address in memory.
        return Decoded(reason="is no JPEG, PNG or WebP")
    except Exception as e:  # Decoders of damaged files raise nearly anything.
        return Decoded(reason=f"does not decode ({' '.join(str(e).split())[:80]})")
    return Decoded(image, pixels, hashlib.sha256(data).hexdigest())


def decode_all(
    photos: PhotoSource,
    names: Iterable[str],
    image_size: int,
    preprocess: str,
    decode_side: int | None = None,
) -> Iterator[Decoded]:
    """Decodes photos in order, in threads (decoders release the interpreter lock).

    Args:
        photos: Gives their bytes.
        names: Of the photos.
        image_size: Pixels a side.
        preprocess: A name of `preprocess.PREPROCESS`.
        decode_side: As for `photos.decode_photo`.
    """
    how = (image_size, preprocess, decode_side)
    pending: collections.deque[concurrent.futures.Future[Decoded]] = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(_DECODE_THREADS) as pool:
        for name in names:
            try:
                pending.append(pool.submit(_decode, photos.read(name), *how))
            except (ValueError, OSError) as e:
                failed: concurrent.futures.Future[Decoded] = concurrent.futures.Future()
                failed.set_result(Decoded(reason=str(e)))
                pending.append(failed)
            # Only so many photos are in progress at a time: all of a large set would not fit in
            # memory.
            if len(pending) >= 8 * _DECODE_THREADS:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    photos.close()


class ImageFile:
    """Images of one shape in a temporary file: those of a large set do not fit in memory."""

    def __init__(self, image_size: int):
        """Makes the file, for images uint8 `[image_size, image_size, 3]`."""
        self._shape = (image_size, image_size, 3)
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 (as long-lived as the object)
        self._count = 0

    def append(self, image: np.ndarray) -> int:
        """Adds an image, and returns its index."""
        self._file.seek(self._count * int(np.prod(self._shape)))
        self._file.write(image.tobytes())
        self._count += 1
        return self._count - 1

    def __getitem__(self, index: int) -> np.ndarray:
        size = int(np.prod(self._shape))
        self._file.seek(index * size)
        return np.frombuffer(self._file.read(size), np.uint8).reshape(self._shape)
