"""What a training step takes: the batch of a device, and what the model makes of it.

Symbols: `B` queries over `R` references; `H`, `W` pixels; `L` tokens of a text; `K` attributes; `M`
tokens of a gallery embedding, `d` its width. Image ids are at least 0, copies of a photo share one,
and -1 stands for none.
"""

from __future__ import annotations

from typing import cast

import flax.struct
import jax

from dqe_jax.method.arrays import Array, Tree


@flax.struct.dataclass
class MinedNegatives:
    """Negatives that were mined for the queries of a batch when the bank was filled.

    Attributes:
      rows: int32 `[B, n]`, rows of the bank.
      drawn: bool `[B, n]`, false where none was left.
    """

    rows: Array
    drawn: Array


@flax.struct.dataclass
class Batch:
    """`B` queries over `R` references: those of one reference share an image.

    Attributes:
      reference_image: uint8 `[R, H, W, 3]`, or what a frozen tower makes of the images: arrays
        `[R, ...]` by name.
      reference_id: int32 `[R]`, image ids.
      reference_mask: bool `[R]`, false for padding.
      reference: int32 `[B]`, ascending: each query's reference, counted over the whole batch. In a
        part of it, of a device or a chunk, modulo the references there: the queries of a reference
        lie in one part. None where each reference has `B / R` queries, side by side.
      query: int32 `[B]`, positions among the split's queries.
      text: int32 `[B, L]`, token ids; or these with what a frozen tower makes of them.
      target_image: uint8 `[B, H, W, 3]`, or arrays `[B, ...]` as of the references.
      target_id: int32 `[B]`, image ids.
      target_row: int32 `[B]`, rows of the gallery.
      known_positives: int32 `[B, P]`, image ids that are never negatives.
      relevant: int32 `[B, V]`, image ids that are truly relevant, for the log and for oracles.
      mentions: float32 `[B, K]`, 1 where the text mentions the attribute, else 0.
      query_mask: bool `[B]`, false for padding.
      mined: what was mined at the last refresh of the bank, if negatives are mined then.
      rejected: int32 `[B, J]`, rows of the bank that users rejected for the query, padded with -1:
        negatives beside those that are mined. None without a log of users.
    """

    reference_image: Tree
    reference_id: Array
    reference_mask: Array
    reference: Array | None
    query: Array
    text: Tree
    target_image: Tree
    target_id: Array
    target_row: Array
    known_positives: Array
    relevant: Array
    mentions: Array
    query_mask: Array
    mined: MinedNegatives | None = None
    rejected: Array | None = None

    @classmethod
    def spec(
        cls,
        *,
        queries: int,
        references: int,
        even: bool = True,
        image_size: int,
        max_length: int,
        attributes: int,
        known: int = 2,
        relevant: int = 0,
    ) -> Batch:
        """Shape and dtype of every array, as `jax.ShapeDtypeStruct`.

        Args:
          queries: `B`.
          references: `R`.
          even: whether each reference has `B / R` queries, so that `reference` is None.
          image_size: `H` and `W`.
          max_length: `L`.
          attributes: `K`.
          known: `P`, which the data set decides: the target, and the most targets of a query.
          relevant: `V`, likewise.
        """
        image = (image_size, image_size, 3)

        def shaped(dtype: str, *shape: int) -> Array:
            return cast(Array, jax.ShapeDtypeStruct(shape, dtype))  # stands for an array

        return cls(
            reference_image=shaped("uint8", references, *image),
            reference_id=shaped("int32", references),
            reference_mask=shaped("bool", references),
            reference=None if even else shaped("int32", queries),
            query=shaped("int32", queries),
            text=shaped("int32", queries, max_length),
            target_image=shaped("uint8", queries, *image),
            target_id=shaped("int32", queries),
            target_row=shaped("int32", queries),
            known_positives=shaped("int32", queries, known),
            relevant=shaped("int32", queries, relevant),
            mentions=shaped("float32", queries, attributes),
            query_mask=shaped("bool", queries),
        )


@flax.struct.dataclass
class QueryOutput:
    """What a model makes of `B` queries.

    Attributes:
      embedding: `q`, float32 `[B, d]`, L2-normalised.
      attribute_weights: `w`, float32 `[B, K]`; K = 0 without attribute weighting.
      attribute_features: `a_k` of the reference, `[B, K, width]`.
    """

    embedding: Array
    attribute_weights: Array
    attribute_features: Array


@flax.struct.dataclass
class TrainOutput:
    """What a model makes of a batch, in one pass over its images.

    Attributes:
      query: of the B queries.
      reference: gallery embeddings of the references, `[R, M, d]`.
      target: gallery embeddings of the targets, `[B, M, d]`.
      target_attribute_features: `a_k` of the targets under the query's text, `[B, K, width]`.
      tau: the temperature, float32 scalar.
      bias: of the logits of the sigmoid loss, float32 scalar; None without one.
    """

    query: QueryOutput
    reference: Array
    target: Array
    target_attribute_features: Array
    tau: Array
    bias: Array | None = None
