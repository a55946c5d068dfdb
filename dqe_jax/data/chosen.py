"""Queries other than all of a split's own: some kinds or a share of them, or captions of photos."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from dqe_jax.data.examples import Queries
from dqe_jax.data.made.grammar import NA
from dqe_jax.utils.errors import UserError


def share_of(queries: Queries, share: float) -> Queries:
    """A share of queries, chosen by a hash of their ids: a smaller share is part of a larger one.

    Args:
      queries: of a split.
      share: above 0 and at most 1; at least one query is kept.
    """
    if share >= 1:
        return queries
    places = np.array([_place(each) for each in queries.ids])
    kept = np.flatnonzero(places < share)
    return queries.take(kept if len(kept) else np.argmin(places, keepdims=True))


def without_kinds(queries: Queries, kinds: Sequence[str]) -> Queries:
    """The queries that are of none of these kinds of change.

    Args:
      queries: of a split.
      kinds: to leave out.

    Raises:
      UserError: no query is of one of them, or none is left.
    """
    if not kinds:
        return queries
    known = {kind for own in queries.kinds for kind in own}
    for kind in kinds:
        if kind not in known:
            raise UserError(
                f"config.data.leave_out: no training query is of the kind {kind!r}; there are "
                f"{', '.join(sorted(known)) or 'no kinds'}."
            )
    kept = [row for row, own in enumerate(queries.kinds) if not set(kinds) & set(own)]
    if not kept:
        raise UserError("config.data.leave_out leaves no training query: name fewer kinds.")
    return queries.take(np.array(kept))


def _place(query_id: str) -> float:
    digest = hashlib.sha256(f"train share:{query_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def captions_of(attributes: Sequence[Sequence[str]], ids: Sequence[str]) -> Queries:
    """For each image the attributes that are stated of it as a text, whose target is the image.

    Images with the same text answer it alike: they are known positives of each other, and relevant.
    An image of which nothing is stated has no query.

    Args:
      attributes: `name=value` of each image of the gallery.
      ids: of the images.
    """
    texts = [caption(pairs) for pairs in attributes]
    rows: dict[str, list[int]] = {}
    for row, text in enumerate(texts):
        rows.setdefault(text, []).append(row)
    asked = [row for row, text in enumerate(texts) if text]
    same = {text: np.array(those, np.int32) for text, those in rows.items()}
    answers = [same[texts[row]] for row in asked]
    own = np.array(asked, np.int32)
    empty = np.zeros(0, np.int32)
    return Queries(
        ids=[f"{ids[row]}-caption" for row in asked],
        texts=[texts[row] for row in asked],
        reference=own,
        target=own,
        known_positives=answers,
        relevant=answers,
        kinds=[("caption",)] * len(asked),
        attributes=[tuple(attributes[row]) for row in asked],
        pools=[""] * len(asked),
        subset=[empty] * len(asked),
        captions=[(texts[row],) for row in asked],
    )


def caption(attributes: Sequence[str]) -> str:
    """The values of `name=value`, in order and each once; what is not stated is left out."""
    values = (pair.partition("=")[2].strip() for pair in attributes)
    return ", ".join(dict.fromkeys(value.lower() for value in values if value and value != NA))
