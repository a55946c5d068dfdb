"""Text to ids. `tiny` uses a word-level vocabulary built from the training texts, pretrained
backbones their own tokenizers (CLIP's BPE, Gemma's, XLM-RoBERTa's, BERT's WordPiece), read through
`transformers`.

Tokenizers are those of the `tokenizers` library; their JSON is stored with each checkpoint, so that
evaluation needs nothing but the checkpoint.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from dqe_jax.utils.errors import UserError, reason_of
from dqe_jax.utils.quiet import import_transformers

# A directory with any of these files holds a tokenizer.
FILES = ("tokenizer.json", "vocab.txt", "vocab.json")
PADDING, UNKNOWN = "[PAD]", "[UNK]"
# What ends a text of SigLIP 2 (Gemma's) and of SigLIP.
SIGLIP_ENDS = ("<eos>", "</s>")


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
    return set_length(tokenizer, max_length, 0, PADDING)


def tokenizer_from_json(text: str) -> Tokenizer:
    """The tokenizer that `Tokenizer.to_str` wrote."""
    return Tokenizer.from_str(text)


def set_length(tokenizer: Tokenizer, max_length: int, pad_id: int, pad_token: str) -> Tokenizer:
    """Makes it cut and pad every text to `max_length` ids; returns the tokenizer."""
    tokenizer.enable_truncation(max_length)
    tokenizer.enable_padding(length=max_length, pad_id=pad_id, pad_token=pad_token)
    return tokenizer


def pretrained_tokenizer(origin: str | os.PathLike[str], max_length: int) -> Tokenizer:
    """The tokenizer of a model directory or of a model on the hub.

    Args:
      origin: directory with the files of a tokenizer, or an id on the Hugging Face hub.
      max_length: ids a text is cut or padded to, those for start and end included.

    Raises:
      UserError: it cannot be loaded.
    """
    try:
        # A directory may name its own code. It is never run, and the user is never asked to allow
        # it.
        loaded = import_transformers().AutoTokenizer.from_pretrained(
            os.fspath(origin), trust_remote_code=False
        )
        tokenizer = loaded.backend_tokenizer
    except Exception as error:
        raise UserError(
            f"no tokenizer could be loaded from {origin} ({reason_of(error)}); name a directory "
            "with its files in config.model.tokenizer."
        ) from error
    if loaded.pad_token_id is None:
        raise UserError(
            f"the tokenizer of {origin} has no token for padding; name that of the backbone in "
            "config.model.tokenizer."
        )
    return set_length(tokenizer, max_length, loaded.pad_token_id, loaded.pad_token)


def tokenizer_in(directory: pathlib.Path, max_length: int) -> Tokenizer | None:
    """The tokenizer whose files lie in a directory, or None if there are none."""
    if not any((directory / name).exists() for name in FILES):
        return None
    return pretrained_tokenizer(directory, max_length)


def lower_cased_to_its_end(tokenizer: Tokenizer) -> Tokenizer:
    """Makes it read texts as SigLIP was trained: in lower case, and with a token that ends them.

    The published files ask for both in fields that not every release of `transformers` reads. A
    text that is cut keeps its end.

    Args:
      tokenizer: is changed.

    Raises:
      ValueError: it has no token that ends a text.
    """
    normalizer = tokenizer.normalizer
    if normalizer is None or "A" in normalizer.normalize_str("A"):
        own = [] if normalizer is None else [normalizer]
        tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), *own])
    ends = {token: tokenizer.token_to_id(token) for token in SIGLIP_ENDS}
    known = {token: id_ for token, id_ in ends.items() if id_ is not None}
    blank = tokenizer.encode("")
    real = [id_ for id_, kept in zip(blank.ids, blank.attention_mask) if kept]
    if not real or real[-1] not in known.values():
        if not known:
            raise ValueError(f"it has none of the tokens {', '.join(SIGLIP_ENDS)}")
        token, id_ = next(iter(known.items()))
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"$A {token}", pair=None, special_tokens=[(token, id_)]
        )
    return tokenizer


def unknown_words(tokenizer: Tokenizer, texts: Iterable[str]) -> list[str]:
    """Words that a model cannot read, for they were in no training text: each once, in order.

    A tokenizer that cuts words into known pieces leaves none.

    Args:
      tokenizer: of the model.
      texts: any.
    """
    unknown = tokenizer.token_to_id(UNKNOWN)
    found: dict[str, None] = {}
    listed = list(texts)
    for text, encoding in zip(listed, tokenizer.encode_batch(listed)):
        for id_, (start, end) in zip(encoding.ids, encoding.offsets):
            word = text[start:end].lower()
            if id_ == unknown and any(map(str.isalnum, word)):  # no punctuation, no padding
                found.setdefault(word)
    return list(found)


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Ids of the texts, int32 `[len(texts), max_length]`, padded; and which texts were cut, bool.

    A text without any word gets one unknown word, so that no row is all padding.
    """
    assert tokenizer.truncation is not None, "set_length has set it"
    length = tokenizer.truncation["max_length"]
    encodings = tokenizer.encode_batch(list(texts))
    ids = np.array([e.ids for e in encodings], np.int32).reshape(len(texts), length)
    empty = ~ids.any(axis=1)
    if empty.any():
        unknown = tokenizer.token_to_id(UNKNOWN)
        assert unknown is not None, "only a tokenizer that has it leaves a text without ids"
        ids[empty, 0] = unknown
    return ids, np.array([bool(e.overflowing) for e in encodings], bool)


def lengths_of(tokenizer: Tokenizer, ids: np.ndarray) -> np.ndarray:
    """How many tokens of each text the model must see, int32 `[...]`: all but the padding.

    Args:
      tokenizer: that gave the ids.
      ids: int32 `[..., L]`.
    """
    assert tokenizer.padding is not None, "set_length has set it"
    pad, length = tokenizer.padding["pad_id"], ids.shape[-1]
    blank = tokenizer.encode("")
    # Some tokenizers pad with the token that ends a text, whose first copy counts.
    ends = pad in [i for i, real in zip(blank.ids, blank.attention_mask) if real]
    padding = np.argmax(ids[..., ::-1] != pad, axis=-1)
    padding = np.where((ids == pad).all(-1), length, padding)
    return np.clip(length - padding + int(ends), 1, length).astype(np.int32)
