"""Small tokenizers beside small weights: what a run from a "pretrained" backbone reads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

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


def write_gemma_tokenizer(directory: Path) -> None:
    """Gemma's byte-pair encoding, trained on a few sentences to 50 pieces, which pads with 0.

    As published for SigLIP 2, nothing in `tokenizer.json` lower-cases a text.
    """
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    letters = [*"abcdefghiklmnoprstuvwy▁"]
    trainer = trainers.BpeTrainer(
        vocab_size=50, special_tokens=special, initial_alphabet=letters, show_progress=False
    )
    tokenizer.train_from_iterator(["make the red circle blue", "the same in green"], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", pair="$A <eos> $B <eos>", special_tokens=[("<eos>", 1)]
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    names = {f"{name}_token": f"<{name}>" for name in ("pad", "eos", "bos", "unk", "mask")}
    _write_config(directory, "GemmaTokenizer", **names)


def write_xlm_roberta_tokenizer(directory: Path) -> None:
    """XLM-RoBERTa's kind, for MetaCLIP 2: pieces with a score, 0 starts, 1 pads, 2 ends a text."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    pieces = ["▁make", "▁the", "▁red", "▁blue", "▁circle", "▁", *"abcdefghiklmnoprstuvwy"]
    scores = [(piece, 0.0) for piece in special] + [(p, -1.0 - i) for i, p in enumerate(pieces)]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=3, byte_fallback=False))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    names = {"bos": "<s>", "cls": "<s>", "pad": "<pad>", "eos": "</s>", "sep": "</s>"}
    fields = {f"{name}_token": token for name, token in names.items()}
    _write_config(directory, "XLMRobertaTokenizer", unk_token="<unk>", **fields)


def _write_config(directory: Path, name: str, **fields: str) -> None:
    """The small file beside a published vocabulary, the same for every release of transformers."""
    config = {"tokenizer_class": name, **fields}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


_TOKENIZERS: Mapping[str, Callable[[Path], None]] = {
    "clip": write_clip_tokenizer,
    "siglip": write_gemma_tokenizer,
    "blip2": write_bert_tokenizer,
}


def copy_weights(source: Path, backbone: str, directory: Path) -> None:
    """Makes a Hugging Face directory of weights that have no tokenizer, and gives it one.

    Args:
      source: of the weights, with a vocabulary of at least 50 words.
      backbone: "clip", "siglip" or "blip2".
      directory: that is made.
    """
    shutil.copytree(source, directory)
    _TOKENIZERS[backbone](directory)
