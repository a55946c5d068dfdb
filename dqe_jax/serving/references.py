"""The reference images of searches: read once, kept for as long as there is room."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import threading
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from dqe_jax.search import images as photos
from dqe_jax.search.asks import Known
from dqe_jax.search.images import Preprocessing, UnreadableError
from dqe_jax.search.store import content_of
from dqe_jax.utils.errors import UserError

_Key = TypeVar("_Key", bound=Hashable)
_Value = TypeVar("_Value")


class Newest(Generic[_Key, _Value]):
    """A mapping that keeps the entries used last; threads may share it."""

    def __init__(self, most: int):
        """Keeps at most so many."""
        self._most, self._lock = most, threading.Lock()
        self._held: collections.OrderedDict[_Key, _Value] = collections.OrderedDict()

    def __len__(self) -> int:
        return len(self._held)

    def get(self, key: _Key) -> _Value | None:
        """An entry, which is now the newest."""
        with self._lock:
            if key in self._held:
                self._held.move_to_end(key)
            return self._held.get(key)

    def put(self, key: _Key, value: _Value) -> _Value:
        """Adds an entry, and drops the oldest if there are too many."""
        with self._lock:
            self._held[key] = value
            self._held.move_to_end(key)
            while len(self._held) > self._most:
                self._held.popitem(last=False)
        return value

    def get_or_make(self, key: _Key, make: Callable[[_Key], _Value]) -> _Value:
        """An entry; made if it is not there."""
        found = self.get(key)
        return self.put(key, make(key)) if found is None else found


@dataclasses.dataclass(frozen=True)
class Upload:
    """An image that a user gave.

    Attributes:
      known: as searches take it.
      data: its file, for the log.
      thumbnail: a JPEG.
      width: in pixels.
      height: in pixels.
    """

    known: Known
    data: bytes
    thumbnail: bytes
    width: int
    height: int


def key_of(data: bytes) -> str:
    """By which an upload is called: 32 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()[:32]


def read_upload(data: bytes, how: Preprocessing) -> Upload:
    """An image that a user gave.

    Raises:
      UserError: it is no image that can be used.
    """
    try:
        photo = photos.decode(data, how.decode_side)
    except UnreadableError as error:
        raise UserError(f"the image {error}: give a JPEG, PNG or WebP image.") from error
    known = Known("your image", how.square(photo), content_of(data))
    return Upload(known, data, photos.thumbnail(photo), *photo.size)
