"""Describes the model of a config: parameters by part, and the cost of a forward pass.

python -m dqe_jax.describe --config=configs/fiq.py

Needs neither data nor weights (sizes that a config leaves to its weights are read from them).
GFLOP are of XLA's cost analysis of the program before it is optimised; a multiplication with an
addition counts as two.
"""

from __future__ import annotations

from collections.abc import Sequence

from absl import logging
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config of the run.", lock_config=True)
# The tiny backbone's vocabulary is made of the training texts.
TINY_VOCABULARY = 100
REQUIRED = ("config",)


def main(argv: Sequence[str]) -> None:
    """Prints the table."""
    del argv
    import jax
    import numpy as np

    from dqe_jax import models
    from dqe_jax.config import check_config
    from dqe_jax.models import setup, summary

    config = _CONFIG.value
    check_config(config)
    # A loop over layers would be counted as one layer, recomputation as more than the model.
    config.model.scan_layers = config.model.remat = False
    pretrained = setup.describe_weights(config)
    data = config.data
    model = models.build_model(
        config.model,
        vocab_size=TINY_VOCABULARY,
        max_length=data.max_length,
        image_size=data.image_size,
        sizes=pretrained and pretrained.sizes,
    )
    shapes = setup.param_shapes(model, config)
    logging.info("%s", summary.parameter_table(shapes, config.model))
    image = jax.ShapeDtypeStruct((1, data.image_size, data.image_size, 3), np.uint8)
    text = jax.ShapeDtypeStruct((1, data.max_length), np.int32)

    def gflop(method: str, *inputs: jax.ShapeDtypeStruct) -> float:
        def call(params, *args):
            return model.apply({"params": params}, *args, method=method)

        return jax.jit(call).lower(shapes, *inputs).cost_analysis()["flops"] / 1e9

    logging.info(
        "Forward: %.3g GFLOP a gallery image, %.3g GFLOP a query (%d pixels, %d tokens).",
        gflop("encode_gallery", image),
        gflop("encode_query", image, text),
        data.image_size,
        data.max_length,
    )
