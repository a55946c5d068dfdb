"""Where a run starts from: the parameters of another run, rather than fresh ones.

`--init` goes on with all of a model of the same config, its words too (`open_start`).
`config.init.run` takes what fits of a model that may be another one (`start_from`).
"""

from __future__ import annotations

import dataclasses
import os

import numpy as np
from absl import logging
from flax.traverse_util import flatten_dict, unflatten_dict
from tokenizers import Tokenizer

from dqe_jax.checkpoints.opened import open_model
from dqe_jax.config import RunConfig, differences
from dqe_jax.method.arrays import Params
from dqe_jax.utils.errors import UserError

# Tables with a row for each word: of no use with another vocabulary.
WORDS = ("words", "words_table")


@dataclasses.dataclass(frozen=True)
class Start:
    """What a run takes over from another one.

    Attributes:
      origin: the path of that run.
      params: its parameters, as NumPy arrays: their moving average if it has one.
      tokenizer: of its texts.
    """

    origin: str
    params: Params
    tokenizer: Tokenizer

    def fitted(self, shapes: Params) -> Params:
        """The parameters in the dtypes of a model.

        Args:
          shapes: of the parameters of the model.

        Raises:
          UserError: they are not those of the model.
        """
        held, wanted = flatten_dict(self.params, sep="/"), flatten_dict(shapes, sep="/")
        wrong = sorted(held.keys() ^ wanted.keys())
        wrong += [
            path for path in held if path in wanted and held[path].shape != wanted[path].shape
        ]
        if wrong:
            raise UserError(
                f"--init: the model in {self.origin} is not of this config; they differ first in "
                f"{wrong[0]}: take the config of that run."
            )
        return unflatten_dict({p: np.asarray(x, wanted[p].dtype) for p, x in held.items()}, sep="/")


def open_start(path: str | os.PathLike[str], config: RunConfig) -> Start:
    """Opens the model that a run starts from.

    Args:
      path: a workdir, or a directory that `dqe-jax export` wrote.
      config: of the run that starts.

    Raises:
      UserError: there is no model, it has other sizes than the config says, or the config names
        another run to start from.
    """
    if config.init.run:
        raise UserError(
            f"--init={os.fspath(path)} and config.init.run={config.init.run} both say where the "
            "run starts from: leave one of them out."
        )
    opened = open_model(path, num_devices=config.num_devices, keep_adapters=True)
    changed = differences(config, opened.config.to_dict(), ("model",))
    if changed:
        raise UserError(
            f"--init: the model in {opened.origin} is of another config; it differs in "
            f"{'; '.join(changed)}: take the config of that run."
        )
    logging.info("The run starts from step %d of %s.", opened.step, opened.origin)
    return Start(opened.origin, opened.params, opened.tokenizer)


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
