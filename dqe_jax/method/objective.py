"""The objective of DQE-CIR (method, sections 2 and 3): from a batch to the loss.

One pure function per device, mapped over an axis. The pool of the in-batch term is the global
batch: the targets and references of all devices, gathered over the axis. Each device scores its own
queries against the whole pool. Negatives are mined from that pool too, or from the bank of the
whole training gallery (`mining.py`). Neither changes with the number of devices.

Symbols: `R` references and `B` queries of this device, `N` candidates of the pool, `n` negatives of
a query.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Protocol

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Float, Int, Key

from dqe_jax.method import losses, mining, trns
from dqe_jax.method.arrays import Array, Params, Tree
from dqe_jax.method.batch import Batch, TrainOutput
from dqe_jax.method.mining import Bank, MiningRule
from dqe_jax.method.settings import LossConfig
from dqe_jax.method.similarity import paired_similarity, similarity, token_similarity

Metrics = dict[str, Array]


@flax.struct.dataclass
class Pool:
    """Candidates of all devices.

    Attributes:
      embeddings: `[N, M, d]`.
      ids: int `[N]` image ids.
      candidate_mask: bool `[N]`, false for padding.
      own: int `[B]`, the candidate that is the target of each local query.
      num_targets: how many of the candidates are targets; these come first.
    """

    embeddings: Array
    ids: Array
    candidate_mask: Array
    own: Array
    num_targets: int = flax.struct.field(pytree_node=False)


@flax.struct.dataclass
class Compared:
    """What the terms over mined negatives compare, for `B` queries.

    Attributes:
      target_score: `[B]`.
      negative_scores: `[B, n]`.
      negative_mask: bool `[B, n]`, which negatives are there.
      logs: what to log, `[B]` each.
    """

    target_score: Array
    negative_scores: Array
    negative_mask: Array
    logs: Metrics


def gather_pool(out: TrainOutput, batch: Batch, axis: str) -> Pool:
    """Gathers the targets, then the references, of all devices.

    Args:
      out: of this device's batch.
      batch: of this device.
      axis: the mapped axis.
    """

    def gather(x: Array) -> Array:
        return lax.all_gather(x, axis, tiled=True)

    mask = batch.query_mask
    return Pool(
        embeddings=jnp.concatenate([gather(out.target), gather(out.reference)]),
        ids=jnp.concatenate([gather(batch.target_id), gather(batch.reference_id)]),
        candidate_mask=jnp.concatenate([gather(mask), gather(batch.reference_mask)]),
        own=lax.axis_index(axis) * mask.size + jnp.arange(mask.size),
        num_targets=mask.size * lax.axis_size(axis),
    )


class TrainForward(Protocol):
    """`model.apply`: makes of a batch what the objective compares."""

    def __call__(
        self,
        variables: Mapping[str, Params],
        reference_image: Tree,
        text: Tree,
        target_image: Tree,
        reference: Array | None = None,
        *,
        rngs: dict[str, jax.Array],
    ) -> TrainOutput:
        """Arrays are those of `Batch`; `rngs` are the keys of `dropout`."""


@dataclasses.dataclass(frozen=True)
class Objective:
    """The loss of a device's batch; all that it depends on is here.

    Attributes:
      apply_fn: `model.apply`.
      rule: by which negatives are mined; None for InfoNCE alone.
      oracle: of `trns.ORACLES`, which terms leave out what is truly relevant.
      weights: of the terms, and the margin: `config.loss`.
      axis: the mapped axis.
    """

    apply_fn: TrainForward
    rule: MiningRule | None
    oracle: str
    weights: LossConfig
    axis: str

    def __call__(
        self, params: Params, batch: Batch, key: Key[Array, ""], bank: Bank | None = None
    ) -> tuple[Float[Array, ""], Metrics]:
        """This device's part of the loss, and metrics that are global means.

        The sum of the losses over the devices is the mean over the queries of the global batch that
        are no padding. Negatives are mined from the bank if there is one, else from the batch.

        Args:
          params: of the model.
          batch: of this device.
          key: random key, the same on all devices.
          bank: this device's part.
        """
        sample_key, dropout_key = jax.random.split(key)
        out = self.apply_fn(
            {"params": params},
            batch.reference_image,
            batch.text,
            batch.target_image,
            batch.reference,
            rngs={"dropout": jax.random.fold_in(dropout_key, lax.axis_index(self.axis))},
        )
        pool = gather_pool(out, batch, self.axis)
        target_score = paired_similarity(out.query.embedding, out.target)  # [B]
        scores = similarity(out.query.embedding, pool.embeddings)  # [B, N]
        forbidden = self._forbidden(batch, pool, oracle=self.oracle == "all")
        terms = {"in_batch": self._in_batch(target_score, scores, forbidden, pool, out)}
        logs: Metrics = {}
        if self.rule is not None:
            if bank is None:
                excluded = self._forbidden(batch, pool, oracle=self.oracle != "none")
                compared = from_batch(
                    sample_key, target_score, scores, excluded, pool, batch, self.rule
                )
            else:
                known = never_negatives(batch, self.oracle != "none")
                compared = from_bank(
                    sample_key, out.query.embedding, batch, known, bank, self.rule, self.axis
                )
            terms |= self._mined(compared, out.tau)
            logs |= compared.logs
        if out.query.attribute_weights.shape[-1]:
            terms |= self._attributes(out, batch)
        logs["batch_r@1"] = (jnp.where(forbidden, -jnp.inf, scores).max(1) < target_score) * 1.0
        return self._average(terms, logs, batch.query_mask, out.tau)

    def _forbidden(self, batch: Batch, pool: Pool, *, oracle: bool) -> Bool[Array, "B N"]:
        """Candidates that are no negatives of the local queries."""
        never = never_negatives(batch, oracle)
        return trns.forbidden_candidates(never, pool.ids, batch.query_mask, pool.candidate_mask)

    def _in_batch(
        self,
        target_score: Float[Array, " B"],
        scores: Float[Array, "B N"],
        forbidden: Bool[Array, "B N"],
        pool: Pool,
        out: TrainOutput,
    ) -> Float[Array, " B"]:
        """InfoNCE in both directions, or the sigmoid loss of all pairs."""
        tau = out.tau
        if self.weights.in_batch_form == "sigmoid":
            assert out.bias is not None, "RunConfig.of has seen that the model has one"
            return losses.sigmoid_pairs(target_score, scores, ~forbidden, tau, out.bias)
        forward = losses.info_nce(target_score, scores, ~forbidden, tau)
        backward = losses.column_info_nce(
            scores[:, : pool.num_targets] / tau,
            target_score / tau,
            pool.own,
            ~forbidden[:, : pool.num_targets],
            self.axis,
        )
        return 0.5 * (forward + backward)

    def _mined(self, compared: Compared, tau: Float[Array, ""]) -> dict[str, Float[Array, " B"]]:
        """Terms over the mined negatives."""
        inputs = (compared.target_score, compared.negative_scores, compared.negative_mask)
        preference = losses.info_nce if self.weights.form == "softmax" else losses.preference
        return {
            "preference": preference(*inputs, tau),
            "margin": losses.margin_ranking(*inputs, self.weights.margin_size),
        }

    def _attributes(self, out: TrainOutput, batch: Batch) -> dict[str, Float[Array, " B"]]:
        """Terms over the attribute weights."""
        w = out.query.attribute_weights
        terms = {"intent": losses.attribute_intent(w, batch.mentions)}
        if self.weights.alignment:  # without it the features of the targets are not computed
            terms["alignment"] = losses.attribute_alignment(
                w, out.query.attribute_features, out.target_attribute_features
            )
        return terms

    def _average(
        self, terms: Metrics, logs: Metrics, query_mask: Bool[Array, " B"], tau: Float[Array, ""]
    ) -> tuple[Float[Array, ""], Metrics]:
        """The weighted sum of the terms' means, and all means."""
        count = lax.psum(query_mask.sum(), self.axis)

        def mean(values: Array) -> Array:
            return jnp.where(query_mask, values, 0).sum() / count

        means = {name: mean(values) for name, values in terms.items()}
        loss = sum(getattr(self.weights, name) * value for name, value in means.items())
        metrics = {f"loss/{name}": value for name, value in means.items()}
        metrics |= {name: mean(values) for name, values in logs.items()}
        metrics["loss"] = loss
        metrics = lax.psum(lax.stop_gradient(metrics), self.axis)
        return loss, metrics | {"tau": lax.stop_gradient(tau)}


def from_batch(
    key: Key[Array, ""],
    target_score: Float[Array, " B"],
    scores: Float[Array, "B N"],
    forbidden: Bool[Array, "B N"],
    pool: Pool,
    batch: Batch,
    rule: MiningRule,
) -> Compared:
    """Mines the pool of the batch.

    Target and candidates are of the same parameters here: no stale snapshot.

    Args:
      key: random key, the same on all devices.
      target_score: `[B]`.
      scores: `[B, N]`.
      forbidden: bool `[B, N]`.
      pool: of all devices.
      batch: of this device.
      rule: of the config.
    """
    delta = lax.stop_gradient(target_score[:, None] - scores)
    mined = mining.draw(key, delta, forbidden, pool.own, rule)
    relevant, false = batch.relevant, None
    if relevant.shape[1]:
        false = _among(pool.ids[mined.rows], relevant)
    drawn_delta = jnp.take_along_axis(delta, mined.rows, axis=1)
    return Compared(
        target_score=target_score,
        negative_scores=jnp.take_along_axis(scores, mined.rows, axis=1),
        negative_mask=mined.drawn,
        logs=mining.describe(mined, drawn_delta, false, rule),
    )


def from_bank(
    key: Key[Array, ""],
    query: Float[Array, "B d"],
    batch: Batch,
    known: Int[Array, "B P"],
    bank: Bank,
    rule: MiningRule,
    axis: str,
) -> Compared:
    """Mines the bank, or takes what was mined at the refresh.

    Target and negatives are of the bank, one snapshot: gradients reach the query alone.

    Args:
      key: random key, the same on all devices.
      query: `[B, d]`.
      batch: of this device.
      known: int `[B, P]`, image ids that are no negatives.
      bank: this device's part.
      rule: of the config.
      axis: the mapped axis.
    """
    size = batch.query_mask.size

    def gather(x: Array) -> Array:
        return lax.all_gather(x, axis, tiled=True)

    def local(x: Array) -> Array:
        return lax.dynamic_slice_in_dim(x, lax.axis_index(axis) * size, size)

    all_queries = lax.all_gather(lax.stop_gradient(query), axis, tiled=True)
    target_row, known = gather(batch.target_row), gather(known)
    mined = None
    if batch.mined is not None:
        rows, drawn = gather(batch.mined.rows), gather(batch.mined.drawn)
    else:
        row_ids = jnp.arange(len(all_queries))
        mined = mining.mine_bank(
            key, all_queries, target_row, known, row_ids, bank, rule, axis=axis
        )
        rows, drawn = mined.rows, mined.drawn
    own = rows.shape[1]  # what the rule has drawn; what users rejected follows
    if batch.rejected is not None:
        rejected = gather(batch.rejected)
        rows = jnp.concatenate([rows, jnp.maximum(rejected, 0)], axis=1)
        drawn = jnp.concatenate([drawn, rejected >= 0], axis=1)
    wanted = jnp.concatenate([target_row[:, None], rows], axis=1)
    scores = token_similarity(query, mining.best_tokens(all_queries, wanted, bank, axis))
    drawn, delta = local(drawn), lax.stop_gradient(scores[:, :1] - scores[:, 1:])
    by_rule, delta = drawn[:, :own], delta[:, :own]
    relevant, false = batch.relevant, None
    if relevant.shape[1]:
        image_ids = lax.all_gather(bank.image_id, axis, tiled=True)
        false = _among(image_ids[local(rows[:, :own])], relevant)
    if mined is None:
        number = jnp.maximum(by_rule.sum(1), 1)
        logs: Metrics = {"negatives/delta": jnp.where(by_rule, delta, 0).sum(1) / number}
        if false is not None:
            logs["negatives/false"] = (false & by_rule).sum(1) / number
    else:
        logs = mining.describe(jax.tree.map(local, mined), delta, false, rule)
    if batch.rejected is not None:
        logs["negatives/rejected"] = drawn[:, own:].sum(1)
    return Compared(scores[:, 0], scores[:, 1:], drawn, logs)


def never_negatives(batch: Batch, oracle: bool) -> Int[Array, "B P"]:
    """Image ids that are no negatives: the known positives, of an oracle also all relevant ones."""
    known = batch.known_positives
    return jnp.concatenate([known, batch.relevant], axis=-1) if oracle else known


def _among(ids: Int[Array, "B n"], relevant: Int[Array, "B V"]) -> Bool[Array, "B n"]:
    """Which image ids are among the relevant ones."""
    return (ids[:, :, None] == relevant[:, None, :]).any(-1)
