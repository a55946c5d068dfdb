"""Mining from a sharded bank: on 1, 2 and 8 devices, and a plain NumPy statement of the method.

Embeddings are small whole numbers, so that products are exact and ties are ties. Random numbers are
those of `jax.random`, by query and chunk; all else of the statement is NumPy.
"""

import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dqe_jax.distributed import mesh
from dqe_jax.method import mining, sharded
from dqe_jax.method.mining import MiningRule
from dqe_jax.method.settings import NegativesConfig
from dqe_jax.performance import mining_benchmark
from dqe_jax.training import bank_programs as banks

CHUNK, TOKENS, WIDTH, NUM = 16, 3, 6, 5
ROWS = 113  # no multiple of the chunk, nor of the devices
MODES = {
    "absolute": (0.5, 9.0),
    "quantile": (0.05, 0.4),
    "std": (-1.5, -0.25),
    "drops": (0.0, 1.0),
}


def negatives(rule, bounds="quantile", **changes):
    lower, upper = MODES[bounds]
    config = NegativesConfig(
        rule=rule,
        bounds=bounds,
        per_query=NUM,
        lower=lower,
        upper=upper,
        drops_depth=200,
        drops_apart=1,
    )
    return dataclasses.replace(config, **changes)


@pytest.fixture(scope="module")
def made():
    """A gallery with ties and copies, and queries with several and with all positives."""
    rng = np.random.default_rng(0)
    gallery = rng.integers(-2, 3, (ROWS, TOKENS, WIDTH)).astype(np.float32)
    photo = np.arange(ROWS, dtype=np.int32)
    photo[[40, 77, 100]] = 12  # copies of one photo, on other devices
    gallery[[40, 77, 100]] = gallery[12]
    gallery[30] = gallery[31]  # a tie of two photos
    query = rng.integers(-2, 3, (13, WIDTH)).astype(np.float32)
    target = rng.integers(0, ROWS, 13).astype(np.int32)
    target[0], target[1] = 12, 31
    known = np.full((13, ROWS), -1, np.int32)
    known[:, 0] = photo[target]
    known[2, 1:4] = [5, 60, 99]
    known[3] = photo  # nothing is left to draw
    known[4, : ROWS - 2] = photo[2:]  # two candidates are left
    # The best of all as target: the zone is wide; the worst: nothing is behind it.
    scores = (query @ gallery.reshape(-1, WIDTH).T).reshape(13, ROWS, TOKENS).max(2)
    for row, choose in ((5, np.argmax), (6, np.argmin)):
        target[row] = choose(scores[row])
        known[row, 0] = photo[target[row]]
    return gallery, photo, query, target, known


def bank_of(gallery, photo, devices):
    size = banks.rows_of_device(len(gallery), devices, CHUNK)
    tokens = np.zeros((devices * size, *gallery.shape[1:]), gallery.dtype)
    tokens[: len(gallery)] = gallery
    ids = np.full(devices * size, -1, np.int32)
    ids[: len(photo)] = photo
    return mining.Bank(
        jnp.asarray(tokens.reshape(devices, size, *gallery.shape[1:])),
        jnp.asarray(ids.reshape(devices, size)),
    )


def mined_on(devices, made, config, chunk_queries=4, dtype=jnp.float32):
    gallery, photo, query, target, known = made
    held = bank_of(gallery, photo, devices)
    held = held.replace(tokens=held.tokens.astype(dtype))

    def mine(query, target, known, held):
        row_ids = jnp.arange(len(query)) + 100
        return mining.mine_bank(
            jax.random.key(7),
            *(query, target, known, row_ids, held, MiningRule.of(config)),
            axis=mesh.AXIS,
            chunk_rows=CHUNK,
            chunk_queries=chunk_queries,
        )

    fn = mesh.pmap(
        mine, in_axes=(None, None, None, 0), out_axes=None, devices=jax.devices()[:devices]
    )
    return jax.tree.map(np.asarray, fn(query, target, known, held))


# ------------------------------------------------------------------ the method, stated in NumPy


def quantile(values, q):
    ordered = np.sort(values).astype(np.float32)
    position = np.float32(q) * np.float32(len(values) - 1)
    below = int(np.floor(position))
    above = min(below + 1, len(values) - 1)
    low, high = ordered[below], ordered[above]
    return low + (high - low) * (position - np.float32(below))


def drops(values, apart):
    behind = np.sort(values[values >= 0])
    gaps = np.diff(behind)
    steep = np.argsort(-gaps, kind="stable")
    for one, other in itertools.pairwise(steep):
        if abs(one - other) > apart:
            return behind[min(one, other)], behind[max(one, other)]
    return -np.inf, behind[-1] if len(behind) else -np.inf


def bounds_of(values, config):
    if config.rule == "qure" or config.bounds == "drops":
        return drops(values, config.drops_apart)
    if config.bounds == "absolute":
        return config.lower, config.upper
    if config.bounds == "quantile":
        return quantile(values, config.lower), quantile(values, config.upper)
    mean, std = values.mean(dtype=np.float64), values.std(dtype=np.float64)
    return mean + config.lower * std, mean + config.upper * std


def noise_of(row_id, length):
    key = jax.random.fold_in(jax.random.key(7), row_id)
    chunks = range(-(-length // CHUNK))
    parts = [jax.random.gumbel(jax.random.fold_in(key, c), (CHUNK,), jnp.float32) for c in chunks]
    return np.concatenate(parts)[:length]


def stated(made, config):
    """Rows drawn for each query, best first: lists."""
    gallery, photo, query, target, known = made
    lists, zones = [], []
    for i, q in enumerate(query):
        scores = (gallery @ q).max(1)
        delta = (scores[target[i]] - scores).astype(np.float32)
        allowed = ~np.isin(photo, known[i])
        low = high = config.floor
        if allowed.any():
            low, high = bounds_of(delta[allowed], config)
            low = max(low, 0.0 if config.rule == "qure" else config.floor)
        zone = (delta > np.float32(low)) & (delta <= np.float32(high)) & allowed
        mask = {"random": allowed, "hardest": np.zeros(ROWS, bool)}.get(config.rule, zone)
        hardness = -delta / np.float32(config.sample_temperature) if config.rule == "trns" else 0
        logits = np.where(mask, (hardness + noise_of(100 + i, ROWS)).astype(np.float32), -np.inf)
        drawn = [r for r in np.argsort(-logits, kind="stable") if mask[r]]
        rest = allowed & ~mask
        above = rest & (delta > np.float32(low)) if config.rule != "hardest" else rest
        nearest = [r for r in np.argsort(delta, kind="stable") if above[r]]
        below = [r for r in np.argsort(-delta, kind="stable") if (rest & ~above)[r]]
        lists.append([int(r) for r in [*drawn, *nearest, *below][:NUM]])
        zones.append(int(zone.sum()))
    return lists, zones


CASES = [("trns", mode) for mode in MODES] + [
    (rule, "quantile") for rule in ("qure", "random", "hardest")
]


@pytest.mark.parametrize(("rule", "mode"), CASES)
def test_sharded_mining_is_the_method(made, rule, mode):
    config = negatives(rule, mode)
    expected, zones = stated(made, config)
    for devices in (1, 2, 8):
        mined = mined_on(devices, made, config)
        lists = [rows[ok].tolist() for rows, ok in zip(mined.rows, mined.drawn)]
        assert lists == expected, devices
        assert mined.zone.tolist() == zones
    assert lists[3] == []  # every candidate is a known positive
    assert sorted(lists[4]) == [0, 1]
    photo, known = made[1], made[4]
    assert all(not np.isin(photo[rows], known[i]).any() for i, rows in enumerate(lists))


def test_cases_are_not_trivial(made):
    """Some zones are empty, some too small, some large; the floor cuts."""
    zones = [zone for mode in MODES for zone in stated(made, negatives("trns", mode))[1]]
    assert min(zones) == 0
    assert any(0 < zone < NUM for zone in zones)
    assert max(zones) > 3 * NUM
    assert stated(made, negatives("trns"))[0] != stated(made, negatives("trns", floor=-99.0))[0]


@pytest.mark.parametrize("chunk_queries", [1, 13, 64])
def test_queries_at_a_time_change_nothing(made, chunk_queries):
    config = negatives("trns")
    one, other = (mined_on(2, made, config, c) for c in (4, chunk_queries))
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_a_bfloat16_bank_of_whole_numbers_is_exact(made):
    config = negatives("trns")
    one, other = (mined_on(2, made, config, dtype=d) for d in (jnp.float32, jnp.bfloat16))
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize("slots", [1, 4, 100])
@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("devices", [1, 2, 8])
def test_best_tokens_give_the_scores(made, devices, uneven, slots, monkeypatch):
    """Each device gets those of its queries, in turns where one device holds most of them."""
    gallery, photo, query, *_ = made
    query = np.concatenate([query, query[:3]])  # 16: as many for each device
    high = ROWS // 8 if uneven else ROWS
    rows = np.random.default_rng(1).integers(0, high, (len(query), 4)).astype(np.int32)
    monkeypatch.setattr(sharded, "SLOTS", slots)
    monkeypatch.setattr(mining, "AT_ONCE", 5)
    fn = mesh.pmap(
        lambda q, r, held: mining.best_tokens(q, r, held, mesh.AXIS),
        in_axes=(None, None, 0),
        out_axes=0,
        devices=jax.devices()[:devices],
    )
    tokens = np.asarray(fn(query, rows, bank_of(gallery, photo, devices)))
    tokens = tokens.reshape(len(query), 4, -1)
    scores = np.einsum("bd,bnd->bn", query, tokens)
    np.testing.assert_array_equal(scores, (gallery[rows] @ query[:, None, :, None])[..., 0].max(2))
    assert (gallery[rows] == tokens[:, :, None]).all(3).any(2).all()


def test_rows_of_a_device():
    assert banks.rows_of_device(1000, 1, 512) == 1024
    assert banks.rows_of_device(1000, 8, 512) == 512
    assert banks.rows_of_device(8193, 8, 512) == 1536


def test_numbers_to_log():
    mined = mining.Mined(
        rows=jnp.array([[1, 2, 3], [4, 0, 0], [0, 0, 0]]),
        drawn=jnp.array([[True, True, True], [True, False, False], [False, False, False]]),
        lower=jnp.array([0.1, 0.0, 0.0]),
        upper=jnp.array([0.5, 0.2, 0.2]),
        zone=jnp.array([7, 0, 0]),
    )
    # The lower bound is not in the zone; of the last query nothing was drawn.
    delta = jnp.array([[0.2, 0.6, 0.1], [0.1, 9.0, 9.0], [9.0, 9.0, 9.0]])
    false = jnp.array([[True, False, False], [False, True, True], [True, True, True]])
    described = mining.describe(mined, delta, false, MiningRule.of(negatives("trns")))
    logs = {name: np.asarray(values).tolist() for name, values in described.items()}
    assert logs["negatives/easy"] == pytest.approx([1 / 3, 0, 0])
    assert logs["negatives/fallback"] == pytest.approx([2 / 3, 0, 0])
    assert logs["negatives/false"] == pytest.approx([1 / 3, 0, 0])
    assert logs["negatives/delta"] == pytest.approx([0.9 / 3, 0.1, 0])
    assert logs["negatives/drawn"] == [3, 1, 0]
    assert "negatives/false" not in mining.describe(
        mined, delta, None, MiningRule.of(negatives("random"))
    )


def test_the_baseline_of_the_benchmark_is_the_rule():
    """QuRe in NumPy and Python finds what the rule `qure` calls the zone."""
    rng = np.random.default_rng(3)
    gallery = rng.standard_normal((60, 2, 8)).astype(np.float32)
    query = rng.standard_normal((9, 8)).astype(np.float32)
    target = rng.integers(0, 60, 9)
    found = mining_benchmark.qure_in_numpy(query, gallery, target)
    for q, own, rows in zip(query, target, found):
        delta = (gallery @ q).max(1)[own] - (gallery @ q).max(1)
        others = np.arange(60) != own
        low, high = drops(delta[others], 1)
        expected = set(np.flatnonzero(others & (delta > low) & (delta <= high)))
        assert set(rows.tolist()) == expected


def test_no_exchange_lies_in_the_loop_that_finds_quantiles():
    """On CPUs another one may start while such a loop runs: two processes would wait for ever."""

    def quantiles(values):
        mask = jnp.ones(values.shape, bool)
        count = jnp.full(len(values), 2 * values.shape[1])
        return sharded.distributed_quantile(values, mask, count, (0.1, 0.5), "devices")

    mapped = jax.pmap(quantiles, axis_name="devices", devices=jax.devices()[:2])
    values = np.random.default_rng(0).normal(size=(2, 3, 700)).astype(np.float32)
    for one, wanted in zip(mapped(values), (0.1, 0.5)):
        whole = np.concatenate(list(values), axis=1)
        np.testing.assert_allclose(one[0], np.quantile(whole, wanted, axis=1), atol=1e-6)
    program = mapped.lower(values).compile().as_text()
    parts = dict(re.findall(r"^%?([\w.-]+) \(.*?\) -> .*?\{\n(.*?)^\}", program, re.M | re.S))
    bodies = re.findall(r"body=%?([\w.-]+)", program)
    assert bodies
    exchanges = ("all-reduce", "all-gather", "all-to-all")
    assert any(name in program for name in exchanges)
    for body in bodies:
        assert not any(name in parts[body] for name in exchanges)
