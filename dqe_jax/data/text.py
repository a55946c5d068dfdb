"""The texts of a split as token ids."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from absl import logging
from tokenizers import Tokenizer

from dqe_jax.data import tokenizer as text_tokens
from dqe_jax.data.splits import Split
from dqe_jax.data.transforms import join_captions

_SHOWN = 10  # names of words in a warning


@dataclasses.dataclass(frozen=True)
class Wordings:
    """Texts, each in `V` wordings.

    Attributes:
      ids: int32 `[n, V, L]`.
      texts: the `V` lists of n texts.
    """

    ids: np.ndarray
    texts: Sequence[Sequence[str]]

    def first(self) -> Wordings:
        """The first wording alone."""
        return Wordings(self.ids[:, :1], self.texts[:1])


def encode_wordings(tokenizer: Tokenizer, split: Split, captions: str) -> Wordings:
    """The texts that training draws from; in two orders of their captions for "random"."""
    ids, texts = [encode_texts(tokenizer, split)], [split.queries.texts]
    if captions == "random":
        other = [join_captions(texts, "reverse") for texts in split.queries.captions]
        ids.append(text_tokens.encode(tokenizer, other)[0])
        texts.append(other)
    return Wordings(np.stack(ids, axis=1), texts)


def encode_texts(tokenizer: Tokenizer, split: Split) -> np.ndarray:
    """Ids of a split's texts, int32 `[Q, L]`; says how many were cut, and which words are lost."""
    ids, cut = text_tokens.encode(tokenizer, split.queries.texts)
    rows = np.flatnonzero(cut)
    if len(rows):
        logging.warning(
            "%d of %d texts of %s are cut to %d tokens, such as %r: raise config.data.max_length.",
            *(len(rows), len(ids), split.name, ids.shape[1], split.queries.texts[rows[0]]),
        )
    if unknown := text_tokens.unknown_words(tokenizer, split.queries.texts):
        more = f" and {len(unknown) - _SHOWN} more" if len(unknown) > _SHOWN else ""
        logging.warning(
            "%d words of %s are in no training text, so the model ignores them: %s%s.",
            *(len(unknown), split.name, ", ".join(unknown[:_SHOWN]), more),
        )
    return ids
