"""A model without its adapters: they are added to their kernels, and the config has none."""

from __future__ import annotations

import jax
import numpy as np

from dqe_jax.config import RunConfig
from dqe_jax.method.arrays import Params
from dqe_jax.models import lora


def merged(config: RunConfig, params: Params) -> tuple[RunConfig, Params]:
    """The config and the parameters of a model of the same embeddings without adapters.

    Kernels that had adapters are float32, and so are all frozen parameters then: rounded to
    bfloat16, a kernel would lose what its adapter learnt. A model without adapters stays as it is.

    Args:
      config: of the run.
      params: of the whole model, NumPy arrays.
    """
    if not config.model.lora.rank:
        return config, params
    changed = {"model.lora.rank": 0, "model.frozen_dtype": "float32"}
    whole = lora.merged(params, config.model.lora.scale)
    return config.with_changes(changed), jax.tree.map(lambda x: np.asarray(x, np.float32), whole)
