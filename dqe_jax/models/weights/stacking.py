"""The layers of an encoder stacked, for a compiled loop over them, or one by one, as in files."""

from __future__ import annotations

import re

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from dqe_jax.method.arrays import Array, Params

_LAYER = re.compile(r"(.*/encoder)/layers_(\d+)/(.*)")


def stack_layers(params: Params) -> Params:
    """Children `layers_0` ... of encoders become one child `layers` with a leading axis.

    That is how a scanned stack (`models/encoder.py`) keeps its parameters; the rest is as it was.
    """
    layers: dict[str, dict[int, Array]] = {}
    out: dict[str, Array] = {}
    for path, x in flatten_dict(params, sep="/").items():
        found = _LAYER.fullmatch(path)
        if found:
            before, index, after = found.groups()
            layers.setdefault(f"{before}/layers/{after}", {})[int(index)] = x
        else:
            out[path] = x
    for path, by_index in layers.items():
        out[path] = np.stack([by_index[i] for i in range(len(by_index))])
    return unflatten_dict(out, sep="/")


def unstack_layers(params: Params) -> Params:
    """The inverse of `stack_layers`."""
    out: dict[str, Array] = {}
    for path, x in flatten_dict(params, sep="/").items():
        before, found, after = path.partition("/encoder/layers/")
        if found:
            out |= {f"{before}/encoder/layers_{i}/{after}": x[i] for i in range(x.shape[0])}
        else:
            out[path] = x
    return unflatten_dict(out, sep="/")
