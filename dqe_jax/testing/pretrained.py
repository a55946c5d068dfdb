"""Small tokenizers beside small weights: what a run from "pretrained" CLIP or BLIP-2 reads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

_BERT = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "make", "the", "red", "blue", "circle", "a")


def write_clip_tokenizer(directory: Path) -> None:
    """CLIP's byte-pair encoding with an alphabet and a few merges, 49 as the end of a text."""
    letters = "abcdefghiklmnoprstuvwy"
    vocabulary = {c: i for i, c in enumerate([*letters, *(f"{c}</w>" for c in letters)])}
    merges = [("r", "e"), ("re", "d</w>"), ("m", "a"), ("t", "h")]
    vocabulary |= {a + b: len(vocabulary) + i for i, (a, b) in enumerate(merges)}
    vocabulary |= {"<|startoftext|>": 48, "<|endoftext|>": 49}
    (directory / "vocab.json").write_text(json.dumps(vocabulary))
    (directory / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]))
    _write_config(directory, "CLIPTokenizer", pad_token="<|endoftext|>")


def write_bert_tokenizer(directory: Path) -> None:
    """BERT's word pieces with a handful of words, which pad with 0."""
    (directory / "vocab.txt").write_text("\n".join(_BERT))
    _write_config(directory, "BertTokenizer")


def _write_config(directory: Path, name: str, **fields: str) -> None:
    """The small file beside a published vocabulary, the same for every release of transformers."""
    config = {"tokenizer_class": name, **fields}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


_TOKENIZERS: Mapping[str, Callable[[Path], None]] = {
    "clip": write_clip_tokenizer,
    "blip2": write_bert_tokenizer,
}


def copy_weights(source: Path, backbone: str, directory: Path) -> None:
    """Makes a Hugging Face directory of weights that have no tokenizer, and gives it one.

    Args:
      source: of the weights, with a vocabulary of at least 50 words.
      backbone: "clip" or "blip2".
      directory: that is made.
    """
    shutil.copytree(source, directory)
    _TOKENIZERS[backbone](directory)
