"""The training step: one pure function per device, mapped over the axis `mesh.AXIS`.

The pool of the in-batch term is the global batch: the targets and references of all devices,
gathered over the axis. Each device scores its own queries against the whole pool. Negatives are
mined from that pool too, or from the bank of the whole training gallery (`method/mining.py`).
Neither changes with the number of devices.

Symbols: `R` references and `B = R * Q` queries of this device, `N` candidates of the pool.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax import lax

from dqe_jax.distributed.mesh import AXIS
from dqe_jax.method import losses, mining, trns
from dqe_jax.models import freeze
from dqe_jax.training import zero


@flax.struct.dataclass
class TrainState:
    """What training changes. Randomness is not in it: it is the seed folded with `step`.

    Attributes:
      step: int32 scalar, the steps taken.
      params: of the model, those that do not train included.
      opt_state: of the optimiser, for those that train; see `zero.py` for a sharded one.
    """

    step: jax.Array
    params: Any
    opt_state: Any


@flax.struct.dataclass
class Pool:
    """Candidates of all devices.

    Attributes:
      embeddings: `[N, M, d]`.
      ids: int `[N]` image ids.
      valid: bool `[N]`, false for padding.
      own: int `[B]`, the candidate that is the target of each local query.
    """

    embeddings: jax.Array
    ids: jax.Array
    valid: jax.Array
    own: jax.Array


def gather_pool(out: Any, batch: dict[str, jax.Array], axis_name: str | None) -> Pool:
    """Gathers the targets, then the references, of all devices.

    Args:
      out: the model's `TrainOutput` for this device's batch.
      batch: as in `data/pipeline.py`.
      axis_name: the mapped axis; None for one device.
    """

    def gather(x: jax.Array) -> jax.Array:
        return x if axis_name is None else lax.all_gather(x, axis_name, tiled=True)

    index = 0 if axis_name is None else lax.axis_index(axis_name)
    valid = batch["valid"]
    size = valid.size
    return Pool(
        embeddings=jnp.concatenate([gather(out.target), gather(out.reference)]),
        ids=jnp.concatenate(
            [gather(batch["target_photo"].reshape(-1)), gather(batch["reference_photo"])]
        ),
        valid=jnp.concatenate([gather(valid.reshape(-1)), gather(valid.any(-1))]),
        own=index * size + jnp.arange(size),
    )


def _column_info_nce(
    scores: jax.Array, target_score: jax.Array, own: jax.Array, negative: jax.Array, axis_name
) -> jax.Array:
    """InfoNCE of each local target against the queries of all devices: `[B]`.

    Every device holds the rows of its own queries; the columns' sums are taken over the axis, so
    that the scores need not be computed twice.

    Args:
      scores: `[B, N]`, already divided by tau; only the targets' columns are used.
      target_score: `[B]`, likewise.
      own: `[B]`, column of each query's target.
      negative: bool `[B, N]`.
      axis_name: the mapped axis, or None.
    """
    positive = jnp.arange(scores.shape[1])[None, :] == own[:, None]
    logits = jnp.where(positive, target_score[:, None], scores)
    kept = positive | negative
    highest = lax.stop_gradient(jnp.where(kept, logits, -jnp.inf).max(0))
    if axis_name is not None:
        highest = lax.pmax(highest, axis_name)
    highest = jnp.where(jnp.isfinite(highest), highest, 0.0)
    total = jnp.where(kept, jnp.exp(jnp.where(kept, logits, 0) - highest), 0.0).sum(0)
    if axis_name is not None:
        total = lax.psum(total, axis_name)
    return jnp.log(total[own]) + highest[own] - target_score


def make_loss_fn(
    *,
    apply_fn: Callable[..., Any],
    negatives: Any,
    weights: Any,
    margin: float,
    axis_name: str | None = AXIS,
) -> Callable[..., tuple[jax.Array, dict[str, jax.Array]]]:
    """Makes the loss of a device's batch (method, sections 2 and 3).

    Args:
      apply_fn: `model.apply`.
      negatives: `config.negatives`.
      weights: `config.loss`, the weight of each term.
      margin: `config.loss.margin_size`.
      axis_name: the mapped axis; None for one device without a map.

    Returns:
      `loss_fn(params, batch, key, bank=None) -> (loss, metrics)`. The loss is this device's part:
      its sum over devices is the mean over the valid queries of the global batch. Metrics are
      global means. Negatives are mined from the bank if there is one, else from the batch.
    """

    def loss_fn(params, batch, key, bank=None):
        sample_key, dropout_key = jax.random.split(key)
        if axis_name is not None:
            dropout_key = jax.random.fold_in(dropout_key, lax.axis_index(axis_name))
        out = apply_fn(
            {"params": params},
            batch["reference_image"],
            batch["text"],
            batch["target_image"],
            rngs={"dropout": dropout_key},
        )
        q = out.query.embedding  # [B, d]
        valid = batch["valid"].reshape(-1)  # [B]
        pool = gather_pool(out, batch, axis_name)

        def forbidden_by(oracle: bool) -> jax.Array:
            never = _never_negatives(batch, oracle).reshape(len(valid), -1)
            return trns.forbidden_candidates(never, pool.ids, valid, pool.valid)

        forbidden = forbidden_by(negatives.oracle == "all")

        target_score = trns.paired_similarity(q, out.target)  # [B]
        scores = trns.similarity(q, pool.embeddings)  # [B, N]
        terms = {}
        forward = losses.info_nce(target_score, scores, ~forbidden, out.tau)
        queries = batch["valid"].shape[1]  # Q; of each 1 + Q candidates Q are targets, which lead
        num_targets = pool.ids.shape[0] // (1 + queries) * queries
        backward = _column_info_nce(
            scores[:, :num_targets] / out.tau,
            target_score / out.tau,
            pool.own,
            ~forbidden[:, :num_targets],
            axis_name,
        )
        terms["in_batch"] = 0.5 * (forward + backward)

        logs = {}
        if negatives.rule != "in_batch":
            if bank is None:
                truth = batch["truth"].reshape(len(valid), -1)
                excluded = forbidden_by(negatives.oracle != "none")
                compared = _in_batch_negatives(
                    sample_key, target_score, scores, excluded, pool, truth, negatives
                )
            else:
                compared = _bank_negatives(sample_key, q, batch, bank, negatives, axis_name)
            mined_target, mined_scores, drawn, logs = compared
            terms["preference"] = losses.preference(mined_target, mined_scores, drawn, out.tau)
            terms["margin"] = losses.margin_ranking(mined_target, mined_scores, drawn, margin)
        if out.query.attribute_weights.shape[-1]:
            w = out.query.attribute_weights
            mentions = batch["mentions"].reshape(w.shape)
            terms["intent"] = losses.attribute_intent(w, mentions)
            if weights.alignment:  # without it the features of the targets are not computed
                terms["alignment"] = losses.attribute_alignment(
                    w, out.query.attribute_features, out.target_attribute_features
                )
        logs["batch_r@1"] = (jnp.where(forbidden, -jnp.inf, scores).max(1) < target_score) * 1.0

        def mean(values: jax.Array) -> jax.Array:
            return jnp.where(valid, values, 0).sum() / count

        count = valid.sum()
        if axis_name is not None:
            count = lax.psum(count, axis_name)
        means = {name: mean(values) for name, values in terms.items()}
        loss = sum(weights[name] * value for name, value in means.items())
        metrics = {f"loss/{name}": value for name, value in means.items()}
        metrics |= {name: mean(values) for name, values in logs.items()}
        metrics["loss"] = loss
        metrics = lax.stop_gradient(metrics)
        if axis_name is not None:
            metrics = lax.psum(metrics, axis_name)
        return loss, metrics | {"tau": lax.stop_gradient(out.tau)}

    return loss_fn


def _in_batch_negatives(
    key: jax.Array,
    target_score: jax.Array,
    scores: jax.Array,
    forbidden: jax.Array,
    pool: Pool,
    truth: jax.Array,
    negatives: Any,
) -> tuple[jax.Array, jax.Array, jax.Array, dict[str, jax.Array]]:
    """Mines the batch: target scores `[B]`, negative scores and drawn `[B, n]`, logs."""
    # Target and candidates are of the same parameters here: no stale snapshot.
    delta = lax.stop_gradient(target_score[:, None] - scores)
    mined = mining.draw(key, delta, forbidden, pool.own, negatives)
    false = None
    if truth.shape[1]:
        false = _among(pool.ids[mined.rows], truth)
    drawn_delta = jnp.take_along_axis(delta, mined.rows, axis=1)
    logs = mining.describe(mined, drawn_delta, false, negatives.rule)
    return target_score, jnp.take_along_axis(scores, mined.rows, axis=1), mined.drawn, logs


def _bank_negatives(
    key: jax.Array,
    query: jax.Array,
    batch: dict[str, jax.Array],
    bank: mining.Bank,
    negatives: Any,
    axis_name: str | None,
) -> tuple[jax.Array, jax.Array, jax.Array, dict[str, jax.Array]]:
    """Mines the bank, or takes what was mined at the refresh; as `_in_batch_negatives`.

    Target and negatives are of the bank, one snapshot: gradients reach the query alone.
    """
    size = batch["valid"].size

    def gather(x: jax.Array) -> jax.Array:
        x = x.reshape(size, *x.shape[2:])
        return x if axis_name is None else lax.all_gather(x, axis_name, tiled=True)

    all_queries = lax.stop_gradient(query)
    if axis_name is not None:
        all_queries = lax.all_gather(all_queries, axis_name, tiled=True)
    start = 0 if axis_name is None else lax.axis_index(axis_name) * size
    target_row = gather(batch["target_row"])
    known = gather(_never_negatives(batch, negatives.oracle != "none"))
    if "mined_rows" in batch:
        rows, drawn = gather(batch["mined_rows"]), gather(batch["mined_drawn"])
        mined = None
    else:
        row_ids = jnp.arange(len(all_queries))
        mined = mining.mine_bank(
            key,
            *(all_queries, target_row, known, row_ids, bank, negatives),
            axis_name=axis_name,
        )
        rows, drawn = mined.rows, mined.drawn
    wanted = jnp.concatenate([target_row[:, None], rows], axis=1)
    tokens = mining.best_tokens(all_queries, wanted, bank, axis_name)

    def local(x: jax.Array) -> jax.Array:
        return lax.dynamic_slice_in_dim(x, start, size)

    scores = jnp.einsum("bd,bnd->bn", query, tokens, precision=lax.Precision.HIGHEST)
    drawn, delta = local(drawn), lax.stop_gradient(scores[:, :1] - scores[:, 1:])
    truth, false = batch["truth"].reshape(size, -1), None
    if truth.shape[1]:
        photos = bank.photo
        if axis_name is not None:
            photos = lax.all_gather(photos, axis_name, tiled=True)
        false = _among(photos[local(rows)], truth)
    if mined is None:
        number = jnp.maximum(drawn.sum(1), 1)
        logs = {"negatives/delta": jnp.where(drawn, delta, 0).sum(1) / number}
        if false is not None:
            logs["negatives/false"] = (false & drawn).sum(1) / number
    else:
        logs = mining.describe(jax.tree.map(local, mined), delta, false, negatives.rule)
    return scores[:, 0], scores[:, 1:], drawn, logs


def _never_negatives(batch: dict[str, jax.Array], oracle: bool) -> jax.Array:
    """Image ids that are no negatives: the known positives, of an oracle also all valid ones."""
    known = batch["known_positives"]
    return jnp.concatenate([known, batch["truth"]], axis=-1) if oracle else known


def _among(ids: jax.Array, truth: jax.Array) -> jax.Array:
    """Which of `[B, n]` image ids are among `[B, V]`: bool `[B, n]`."""
    return (ids[:, :, None] == truth[:, None, :]).any(-1)


def make_train_step(
    *,
    loss_fn: Callable[..., Any],
    tx: optax.GradientTransformation,
    seed: int,
    split: Callable[[Any], tuple[Any, Any]] = lambda params: (params, {}),
    axis_name: str | None = AXIS,
    shard_state: bool = False,
) -> Callable[[TrainState, dict[str, jax.Array]], tuple[TrainState, dict[str, jax.Array]]]:
    """Makes the per-device step `(state, batch, bank=None) -> (state, metrics)`.

    All that it closes over is here. A step whose loss or gradients are not finite changes no
    parameter (`optimizer.skip_unsound`); `bad_steps` counts them, `bad_in_a_row` the last ones.
    `stop` in the batch, int32 `[n]`, becomes a metric, the largest of all devices: so processes
    agree to end.

    Args:
      loss_fn: from `make_loss_fn`, of the same axis.
      tx: the optimiser.
      seed: of everything random in the step.
      split: parameters to those that train and those that do not, as `freeze.split`; the
        optimiser and the backward pass see the first alone.
      axis_name: the mapped axis; None for one device without a map.
      shard_state: whether the optimiser's state is of the device's slices (`zero.py`).
    """

    tx = optax.with_extra_args_support(tx)

    def step(state: TrainState, batch: dict[str, jax.Array], bank: Any = None):
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        training, frozen = split(state.params)

        def loss_of(training):
            return loss_fn(freeze.merge(training, frozen), batch, key, bank)

        (_, metrics), grads = jax.value_and_grad(loss_of, has_aux=True)(training)
        # A sum: the losses of the devices add up to the global mean.
        if shard_state:
            grads = zero.scatter(grads)
        elif axis_name is not None:
            grads = lax.psum(grads, axis_name)
        # A loss that is not finite may have finite gradients: they are no better.
        sound = jnp.isfinite(metrics["loss"])
        norm = zero.global_norm(grads, training) if shard_state else optax.global_norm(grads)
        held = zero.own(training) if shard_state else training
        updates, opt_state = tx.update(grads, state.opt_state, held, sound=sound, norm=norm)
        if shard_state:
            updates = zero.gather(updates, training)
        params = freeze.merge(optax.apply_updates(training, updates), frozen)
        metrics["grad_norm"] = norm
        if isinstance(opt_state, optax.ApplyIfFiniteState):
            metrics["bad_steps"] = opt_state.total_notfinite
            metrics["bad_in_a_row"] = opt_state.notfinite_count
        if "stop" in batch:
            stop = batch["stop"].max()
            metrics["stop"] = stop if axis_name is None else lax.pmax(stop, axis_name)
        return TrainState(state.step + 1, params, opt_state), metrics

    return step
