"""Text to ids. `tiny` uses a word-level vocabulary built from the training texts.

Tokenizers are those of the `tokenizers` library; their JSON is stored with each checkpoint, so that
evaluation needs nothing but the checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

PADDING, UNKNOWN = "[PAD]", "[UNK]"


def train_word_tokenizer(texts: Iterable[str], max_length: int) -> Tokenizer:
    """A word-level tokenizer of the words of `texts`, lower-cased; id 0 pads, id 1 is unknown.

    Args:
      texts: the training texts.
      max_length: ids a text is cut or padded to.
    """
    tokenizer = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # spaces and punctuation
    trainer = trainers.WordLevelTrainer(special_tokens=[PADDING, UNKNOWN], show_progress=False)
    # Sorted and distinct: the vocabulary must not depend on the order of the records.
    tokenizer.train_from_iterator(sorted(set(texts)), trainer)
    tokenizer.enable_truncation(max_length)
    tokenizer.enable_padding(length=max_length, pad_id=0, pad_token=PADDING)
    return tokenizer


def tokenizer_from_json(text: str) -> Tokenizer:
    """The tokenizer that `Tokenizer.to_str` wrote."""
    return Tokenizer.from_str(text)


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> np.ndarray:
    """Ids of the texts: int32 `[len(texts), max_length]`, padded with 0.

    A text without any word gets one unknown word, so that no row is all padding.
    """
    encodings = tokenizer.encode_batch(list(texts))
    ids = np.array([e.ids for e in encodings], np.int32).reshape(
        len(texts), tokenizer.truncation["max_length"]
    )
    ids[~ids.any(axis=1), 0] = tokenizer.token_to_id(UNKNOWN)
    return ids


def is_cut(tokenizer: Tokenizer, text: str) -> bool:
    """Whether a text is longer than the tokenizer's maximum length."""
    return bool(tokenizer.encode(text).overflowing)
