"""Parameters that a run starts from, of another run: `config.init.run`."""

from __future__ import annotations

import numpy as np
from absl import logging
from flax.traverse_util import flatten_dict, unflatten_dict
from tokenizers import Tokenizer

from dqe_jax.checkpoints.opened import open_model
from dqe_jax.config import RunConfig
from dqe_jax.method.arrays import Params
from dqe_jax.utils.errors import UserError

# Tables with a row for each word: of no use with another vocabulary.
WORDS = ("words", "words_table")


def start_from(config: RunConfig, params: Params, tokenizer: Tokenizer) -> Params:
    """Parameters of which those that another run has too are taken from there.

    A parameter is the same if its path and its shape are. Tables of words are taken only if both
    runs have the same words.

    Args:
      config: of the run; without `config.init.run` the parameters stay as they are.
      params: of the model, as it would start without.
      tokenizer: of the run.

    Raises:
      UserError: there is no such run, or the two models have no parameter in common.
    """
    if not config.init.run:
        return params
    opened = open_model(config.init.run, num_devices=config.num_devices)
    same_words = opened.tokenizer.to_str() == tokenizer.to_str()
    held, own = (flatten_dict(x, sep="/") for x in (opened.params, params))
    taken = [
        path
        for path, x in own.items()
        if path in held
        and held[path].shape == x.shape
        and (same_words or not set(WORDS) & set(path.split("/")))
    ]
    if not taken:
        raise UserError(
            f"config.init.run: the model in {opened.origin} has no parameter of the same path and "
            "shape as this one; name a run of the same backbone and sizes."
        )
    logging.info(
        "%d of %d arrays of parameters start as those of step %d of %s; first %s.",
        *(len(taken), len(own), opened.step, opened.origin, taken[0]),
    )
    for path in taken:
        own[path] = np.asarray(held[path], own[path].dtype)
    return unflatten_dict(own, sep="/")
