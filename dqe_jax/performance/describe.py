"""A model in numbers: parameters by part, and the cost of a forward pass.

GFLOP are of XLA's cost analysis of the program before it is optimised; a multiplication with an
addition counts as two.
"""

from __future__ import annotations

from typing import cast

import jax
import numpy as np

from dqe_jax.config import AnyConfig, RunConfig
from dqe_jax.feature_store.features import KINDS, sizes_of
from dqe_jax.method.arrays import Array, Params, Tree
from dqe_jax.models import setup, summary
from dqe_jax.models.build import build_model
from dqe_jax.models.features import States, StoredText, given_spec

# The tiny backbone's vocabulary is made of the training texts.
TINY_VOCABULARY = 100


def describe_model(config: AnyConfig) -> str:
    """A table of the parameters, and a line on the cost.

    Args:
      config: of a run; it needs neither data nor weights (sizes that a config leaves to its weights
        are read from them).

    Raises:
      UserError: the config is not sound, or weights that decide its sizes are not found.
    """
    # A loop over layers would count as one layer, and recomputation as additional work.
    once = {"model.scan_layers": False, "model.remat": False}
    config = RunConfig.of(config).with_changes(once)
    pretrained = setup.describe_weights(config.model, config.data)
    data = config.data
    model = build_model(
        config.model,
        vocab_size=TINY_VOCABULARY,
        max_length=data.max_length,
        image_size=data.image_size,
        sizes=sizes_of(config, pretrained),
    )
    shapes = setup.param_shapes(model, config.model, data)
    pixels = jax.ShapeDtypeStruct((1, data.image_size, data.image_size, 3), np.uint8)
    ids = jax.ShapeDtypeStruct((1, data.max_length), np.int32)
    given = {kind: given_spec(model.backbone, kind, 1) for kind in KINDS}
    image = given["image"] or pixels
    text = StoredText(cast(Array, ids), cast(States, given["text"])) if given["text"] else ids

    def gflop(method: str, *inputs: Tree) -> float:
        def call(params: Params, *args: Array) -> Tree:
            return model.apply({"params": params}, *args, method=method)

        cost = jax.jit(call).lower(shapes, *inputs).cost_analysis()
        assert cost is not None, "XLA counts the FLOP of any program"
        return cost["flops"] / 1e9

    return (
        f"{summary.parameter_table(shapes, config.model)}\n"
        f"Forward: {gflop('encode_gallery', image):.3g} GFLOP a gallery image, "
        f"{gflop('encode_query', image, text):.3g} GFLOP a query "
        f"({data.image_size} pixels, {data.max_length} tokens)."
    )
