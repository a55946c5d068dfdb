"""What training and evaluation set up alike: devices, text and the model of a config."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from tokenizers import Tokenizer

from dqe_jax.data import tokenizer as text_tokens
from dqe_jax.data.pipeline import Split
from dqe_jax.evaluators import Result, RetrievalEvaluator, table, write_result
from dqe_jax.models import DQE, build_model
from dqe_jax.utils.errors import UserError


def devices_of(num_devices: int) -> list[jax.Device]:
    """The first `num_devices` local devices; all for 0.

    Raises:
      UserError: there are fewer.
    """
    devices = jax.local_devices()
    if num_devices > len(devices):
        raise UserError(
            f"config.num_devices is {num_devices}: this machine has {len(devices)} devices."
        )
    return devices[:num_devices] if num_devices else devices


def encode_texts(tokenizer: Tokenizer, split: Split) -> np.ndarray:
    """Ids of a split's texts, int32 `[Q, L]`; says how many texts were cut."""
    ids = text_tokens.encode(tokenizer, split.queries.texts)
    full = np.flatnonzero(ids[:, -1])
    cut = [row for row in full if text_tokens.is_cut(tokenizer, split.queries.texts[row])]
    if cut:
        logging.warning(
            "%d of %d texts of %s are cut to %d tokens, such as %r: raise config.data.max_length.",
            *(len(cut), len(ids), split.name, ids.shape[1], split.queries.texts[cut[0]]),
        )
    return ids


def model_of(config: Any, tokenizer: Tokenizer) -> DQE:
    """The model of a config over a tokenizer's vocabulary."""
    return build_model(
        config.model,
        vocab_size=tokenizer.get_vocab_size(),
        max_length=config.data.max_length,
        image_size=config.data.image_size,
    )


def init_params(model: DQE, config: Any, seed: int = 0) -> Any:
    """Fresh parameters; call it under `jax.eval_shape` for their shapes alone."""
    size = config.data.image_size
    image = np.zeros((1, size, size, 3), np.uint8)
    text = np.ones((1, 1, config.data.max_length), np.int32)

    def init(key: jax.Array) -> Any:
        return model.init(key, image, text, image[:, None], train=False)["params"]

    return jax.jit(init)(jax.random.key(seed))


def make_evaluator(
    config: Any, model: DQE, tokenizer: Tokenizer, split: Split, devices: list[jax.Device]
) -> RetrievalEvaluator:
    """The evaluator of a split; it takes parameters."""

    def encode_query(params, image, text):
        return model.apply({"params": params}, image, text, method="encode_query")

    def encode_gallery(params, image):
        return model.apply({"params": params}, image, method="encode_gallery")

    return RetrievalEvaluator(
        split=split,
        text=encode_texts(tokenizer, split),
        encode_query=encode_query,
        encode_gallery=encode_gallery,
        batch_size=config.eval.batch_size,
        top_k=config.eval.top_k,
        devices=devices,
    )


@dataclasses.dataclass(frozen=True)
class ParameterCount:
    """Parameters of one part of the model."""

    part: str
    count: int


def count_parameters(params: Any, depth: int = 2) -> list[ParameterCount]:
    """Parameters by part, the parts being the first `depth` names of a parameter's path."""
    counts: dict[str, int] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        part = "/".join(str(key.key) for key in path[:depth])
        counts[part] = counts.get(part, 0) + leaf.size
    return [ParameterCount(part, count) for part, count in counts.items()]


def evaluate_and_report(
    config: Any, evaluator: RetrievalEvaluator, params: Any, *, step: int, directory: epath.Path
) -> Result:
    """Evaluates, writes `<split>-<step>.json` and `.png`, and logs the table and the queries drawn.

    Args:
      config: of the run.
      evaluator: of the split.
      params: of the model.
      step: of the checkpoint.
      directory: where the files go.

    Raises:
      UserError: the directory is not writable.
    """
    split = evaluator.split.name
    result = evaluator.run(params, baselines=True)
    facts = {"step": step, "split": split, "dataset": config.data.dataset}
    try:
        report, sheet = write_result(result, directory, f"{split}-{step}", **facts)
        names = config.model.attributes.names if config.model.attributes.enabled else ()
        drawn = evaluator.draw(result, sheet, config.eval.sheet_queries, names)
    except OSError as error:
        raise UserError(
            f"cannot write to {directory} ({error.strerror}): name a writable directory."
        ) from error
    logging.info("%s, step %d:\n%s", split, step, table(result))
    logging.info("Queries on the contact sheet:\n  %s", "\n  ".join(drawn))
    logging.info("Metrics: %s\nContact sheet: %s", report, sheet)
    return result
