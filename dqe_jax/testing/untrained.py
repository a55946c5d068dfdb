"""A run that has not trained: the parameters that it starts with, saved as its checkpoint."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from dqe_jax.checkpoints import store
from dqe_jax.config import AnyConfig, RunConfig
from dqe_jax.data import tokenizer as text_tokens
from dqe_jax.feature_store.features import sizes_of
from dqe_jax.models import setup
from dqe_jax.models.weights import sizes as size_files

STEP = 1
PROBABILITY = {"slope": 10.0, "offset": -6.0}  # fitted to nothing


def save_untrained(
    config: AnyConfig, workdir: str | os.PathLike[str], texts: Sequence[str] = ()
) -> None:
    """Saves a checkpoint of step `STEP` with random numbers in all parameters that start at zero.

    Args:
      config: of the run.
      workdir: of the run.
      texts: whose words the tokenizer knows; a pretrained backbone has its own.
    """
    config = RunConfig.of(config)
    sections = (config.model, config.data)
    pretrained = setup.open_weights(*sections)
    if pretrained is None:
        tokenizer = text_tokens.train_word_tokenizer(texts, config.data.max_length)
    else:
        tokenizer = setup.tokenizer_of(*sections, pretrained)
    sizes = sizes_of(config, pretrained)
    model = setup.model_of(*sections, tokenizer, sizes)
    held = setup.init_params(model, *sections, config.seed, pretrained)
    rng = np.random.default_rng(config.seed)
    flat = {path: np.asarray(x) for path, x in flatten_dict(held, sep="/").items()}
    for path, x in flat.items():
        if x.ndim > 1 and not x.any():  # such as the contribution of the attribute weights
            flat[path] = rng.normal(0, 0.2, x.shape).astype(x.dtype)
    params = unflatten_dict(flat, sep="/")
    meta = {
        "config": config.to_dict(),
        "tokenizer": tokenizer.to_str(),
        "sizes": sizes and size_files.to_json(sizes),
        "data_state": {},
        "bank_step": None,
        "train_seconds": 0.0,
        "data": None,
        "probability": PROBABILITY,
    }
    manager = store.open_for_training(epath.Path(workdir), config)
    store.save(manager, STEP, params, {"none": np.zeros(1, np.float32)}, meta)
    manager.wait_until_finished()
    manager.close()
