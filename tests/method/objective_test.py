"""Negatives from a bank on 1 and 2 devices, mined in the step or at a refresh, beside NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dqe_jax.distributed import mesh
from dqe_jax.method import mining, objective
from dqe_jax.method.batch import Batch, MinedNegatives
from dqe_jax.method.mining import MiningRule
from dqe_jax.method.settings import NegativesConfig
from dqe_jax.training.bank_programs import rows_of_device

ROWS, TOKENS, WIDTH, QUERIES, NUM = 600, 3, 6, 8, 3  # two devices have rows
RULE = MiningRule.of(
    NegativesConfig(rule="trns", bounds="absolute", lower=0.0, upper=9.0, per_query=NUM)
)


def bank_on(devices, gallery):
    size = rows_of_device(ROWS, devices)
    tokens = np.zeros((devices * size, TOKENS, WIDTH), np.float32)
    tokens[:ROWS] = gallery
    ids = np.full(devices * size, -1, np.int32)
    ids[:ROWS] = np.arange(ROWS)
    tokens, ids = mesh.shard((tokens, ids), devices)
    return mining.Bank(jnp.asarray(tokens), jnp.asarray(ids))


def batch_of(**fields):
    return Batch(**{field.name: None for field in dataclasses.fields(Batch)} | fields)


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("at", ["step", "refresh"])
def test_scores_and_logs_are_of_the_rows_that_were_drawn(devices, at):
    rng = np.random.default_rng(0)
    gallery = rng.normal(size=(ROWS, TOKENS, WIDTH)).astype(np.float32)
    query = rng.normal(size=(QUERIES, WIDTH)).astype(np.float32)
    target = rng.integers(0, ROWS, QUERIES).astype(np.int32)
    known = target[:, None]
    key, rows_of = jax.random.key(1), jnp.arange(QUERIES)

    def mine(bank):
        return mining.mine_bank(key, query, target, known, rows_of, bank, RULE, axis=mesh.AXIS)

    alone = mesh.pmap(mine, in_axes=(0,), out_axes=None, devices=jax.devices()[:1])
    mined = jax.device_get(alone(bank_on(1, gallery)))
    rows, drawn = np.array(mined.rows), np.array(mined.drawn)
    held = None
    if at == "refresh":  # by older parameters: any rows
        rows = rng.integers(0, ROWS, rows.shape).astype(np.int32)
        drawn = rng.random(rows.shape) < 0.7
        held = mesh.shard(MinedNegatives(rows, drawn), devices)
    relevant = np.concatenate([rows[:, :1], rows[::-1, 1:2]], axis=1)  # some are valid
    batch = batch_of(
        query_mask=np.ones(QUERIES, bool),
        target_row=target,
        known_positives=known,
        relevant=relevant,
    )
    batch = mesh.shard(batch, devices).replace(mined=held)

    def compare(query, known, batch, bank):
        return objective.from_bank(key, query, batch, known, bank, RULE, mesh.AXIS)

    own = jax.devices()[:devices]
    found = mesh.pmap(compare, in_axes=(0, 0, 0, 0), out_axes=0, devices=own)(
        *mesh.shard((query, known), devices), batch, bank_on(devices, gallery)
    )
    found = mesh.unshard(jax.device_get(found))
    scores = (query @ gallery.reshape(-1, WIDTH).T).reshape(QUERIES, ROWS, TOKENS).max(2)
    behind = scores[np.arange(QUERIES), target]
    np.testing.assert_allclose(found.target_score, behind, atol=1e-5)
    np.testing.assert_array_equal(found.negative_mask, drawn)
    negatives = np.take_along_axis(scores, rows, axis=1)
    np.testing.assert_allclose(found.negative_scores[drawn], negatives[drawn], atol=1e-5)

    def mean(values):
        return np.where(drawn, values, 0).sum(1) / np.maximum(drawn.sum(1), 1)

    delta = mean(behind[:, None] - negatives)
    np.testing.assert_allclose(found.logs["negatives/delta"], delta, atol=1e-5)
    valid = [[row in list(own) for row in line] for line, own in zip(rows, relevant)]
    np.testing.assert_allclose(found.logs["negatives/false"], mean(np.array(valid)), atol=1e-6)
