"""One search of an index: the query, and what may be found."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np

from dqe_jax.search.images import AnyImage, Encoded
from dqe_jax.search.tables import Filter


@dataclasses.dataclass(frozen=True)
class Known:
    """A reference image that was read already.

    Attributes:
      name: what it is called.
      image: uint8 `[size, size, 3]`, as the model sees it, or what the model made of it.
      content: digest of its file, as `store.content_of`: images of the index that equal it are not
        found.
    """

    name: str
    image: np.ndarray | Encoded
    content: bytes


# A reference image; a string may also be an id of the index.
Reference: TypeAlias = "AnyImage | Known"


@dataclasses.dataclass(frozen=True)
class Turn:
    """A query of a conversation that came before.

    Attributes:
      images: the reference images.
      text: what should change.
    """

    images: tuple[Reference, ...]
    text: str


@dataclasses.dataclass(frozen=True)
class Ask:
    """One search.

    Attributes:
      images: the reference images, at least one.
      text: what should change; "" asks for similar images.
      k: how many images.
      weights: factors by attribute, by which the predicted weights are multiplied.
      exclude: ids that must not be found.
      filter: conditions by column.
      include_reference: whether the reference itself, and images whose files equal its own, may be
        found.
      rejected: ids that the user said are not what they mean: the query moves away from them, and
        they are not found.
      earlier: the conversation so far, the oldest turn first: the query moves towards these.
    """

    images: tuple[Reference, ...]
    text: str
    k: int = 10
    weights: Mapping[str, float] = dataclasses.field(default_factory=dict)
    exclude: Sequence[str] = ()
    filter: Filter | None = None
    include_reference: bool = False
    rejected: Sequence[str] = ()
    earlier: Sequence[Turn] = ()
