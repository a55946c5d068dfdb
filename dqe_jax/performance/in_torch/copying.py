"""Parameters of our model as the tensors of the PyTorch model."""

from __future__ import annotations

import re

import numpy as np
import torch
from flax.traverse_util import flatten_dict
from torch import Tensor

from dqe_jax.method.arrays import Array, Params
from dqe_jax.models.weights.rules import layouts_of
from dqe_jax.models.weights.sizes import PretrainedSizes
from dqe_jax.models.weights.stacking import unstack_layers
from dqe_jax.models.weights.transfer import to_tensors

BACKBONE, TOWERS = "backbone/", "backbone.towers."
_LAST = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
_NUMBER = re.compile(r"_(\d+)(?=/)")


def to_torch(
    params: Params, sizes: PretrainedSizes | None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state of the PyTorch model, and the path of our parameter by the name of a tensor.

    Args:
      params: of the whole model, arrays.
      sizes: of a pretrained backbone, whose towers are named as in `transformers`; or None.
    """
    flat = flatten_dict(unstack_layers(params), sep="/")
    tensors: dict[str, Tensor] = {}
    paths: dict[str, str] = {}
    if sizes is not None:
        for rule in layouts_of(sizes)[0].rules:
            path = BACKBONE + rule.path
            x = np.asarray(flat.pop(path), np.float32)
            for name, array in to_tensors(rule, x, sizes.vision.patch_size).items():
                tensors[TOWERS + name], paths[TOWERS + name] = torch.from_numpy(array), path
    for path, array in flat.items():
        name = _name_of(path)
        tensors[name], paths[name] = _own(path, array), path
    return tensors, paths


def _name_of(path: str) -> str:
    """`backbone/composer_blocks_0/norm_mlp/scale` as `backbone.composer_blocks.0.norm_mlp.weight`.

    A norm without a name of its own is called `norm` in PyTorch.
    """
    path = path.replace("/LayerNorm_0/", "/norm/")
    parts = _NUMBER.sub(r"/\1", path).split("/")
    return ".".join([*parts[:-1], _LAST.get(parts[-1], parts[-1])])


def _own(path: str, array: Array) -> Tensor:
    x = np.asarray(array, np.float32)
    # A copy: the state of a step is donated to the next one.
    return torch.from_numpy(np.array(x.T if path.endswith("/kernel") else x, order="C"))
