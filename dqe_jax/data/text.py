"""The texts of a split as token ids."""

from __future__ import annotations

import numpy as np
from absl import logging
from tokenizers import Tokenizer

from dqe_jax.data import tokenizer as text_tokens
from dqe_jax.data.splits import Split
from dqe_jax.data.transforms import join_captions

_SHOWN = 10  # names of words in a warning


def encode_wordings(tokenizer: Tokenizer, split: Split, captions: str) -> np.ndarray:
    """Ids of the texts that training draws from, int32 `[Q, V, L]`: two orders for "random"."""
    ids = [encode_texts(tokenizer, split)]
    if captions == "random":
        other = [join_captions(texts, "reverse") for texts in split.queries.captions]
        ids.append(text_tokens.encode(tokenizer, other)[0])
    return np.stack(ids, axis=1)


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
