"""The forward pass of a batch in chunks: GradCache (Gao et al., 2021, "Scaling deep contrastive
learning batch size under memory limited setup").

The loss compares all embeddings of a batch, so a batch cannot be cut and its gradients added up.
But the embeddings of a chunk depend on the chunk alone: only they are kept for the loss, and the
backward pass computes the inside of one chunk after the other once more. The gradients are those of
the whole batch, the activations in memory are those of one chunk, and the price is a second forward
pass.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import lax

from dqe_jax.method.arrays import Array, Params, Tree
from dqe_jax.method.batch import TrainOutput
from dqe_jax.method.objective import TrainForward


def in_chunks(apply_fn: TrainForward, chunks: int) -> TrainForward:
    """`apply_fn`, but over equal parts of a device's share of a batch, one after the other.

    Dropout is drawn for each chunk; the model may hold nothing else that differs between batches.

    Args:
      apply_fn: `model.apply`.
      chunks: how many parts; they divide the units of a device (`data/packing.py`).
    """

    def forward(
        variables: Mapping[str, Params],
        reference_image: Tree,
        text: Tree,
        target_image: Tree,
        reference: Array | None = None,
        *,
        rngs: dict[str, jax.Array],
    ) -> TrainOutput:
        # Inside, so that the backward pass has no copy of the parameters for each chunk.
        @jax.checkpoint
        def one(inputs: tuple[Tree, ...], index: Array) -> TrainOutput:
            keys = {name: jax.random.fold_in(key, index) for name, key in rngs.items()}
            return apply_fn(variables, *inputs, rngs=keys)

        def cut(x: Array) -> Array:
            return x.reshape(chunks, -1, *x.shape[1:])

        def join(x: Array) -> Array:
            return x[0] if x.ndim == 1 else x.reshape(-1, *x.shape[2:])  # a scalar is that of all

        inputs = jax.tree.map(cut, (reference_image, text, target_image, reference))
        outputs = lax.map(lambda part: one(*part), (inputs, jnp.arange(chunks)))
        return jax.tree.map(join, outputs)

    return forward
