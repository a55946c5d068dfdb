"""Texts of queries as token ids, and what the model does not understand of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from tokenizers import Tokenizer

from dqe_jax.data import tokenizer as text_tokens
from dqe_jax.utils.errors import UserError

EMPTY = "the text is empty: what is similar to the image is found, without attribute weights"


def encode_texts(
    tokenizer: Tokenizer, texts: Sequence[str]
) -> tuple[np.ndarray, list[tuple[str, ...]]]:
    """Ids of texts, int32 `[n, L]`, and warnings of each text, as sentences.

    Raises:
      UserError: something is no text.
    """
    for text in texts:
        if not isinstance(text, str):
            raise UserError(f"the text of a query is {text!r:.40}: give a string.")
    ids, cut = text_tokens.encode(tokenizer, texts)
    warnings = []
    for text, is_cut in zip(texts, cut):
        found = []
        if not text.strip():
            found.append(EMPTY)
        if unknown := text_tokens.unknown_words(tokenizer, [text]):
            words = ", ".join(map(repr, unknown))
            found.append(f"the model ignores {words}: no training text has it")
        if is_cut:
            found.append(
                f"the text {text!r:.60} is too long: the model reads {ids.shape[1]} tokens of it"
            )
        warnings.append(tuple(found))
    return ids, warnings
