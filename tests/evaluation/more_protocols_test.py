"""Benchmarks with a gallery of each query's own or several valid targets, from scores to metrics.

Made queries go through the evaluator, on the devices, and through `scored.py`, in NumPy. What they
give is compared with statements of the official definitions on whole rankings, in plain Python.
"""

import collections
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dqe_jax.data.examples import Queries, all_references
from dqe_jax.data.splits import Coverage, Split
from dqe_jax.distributed import mesh
from dqe_jax.embedding.sources import Column
from dqe_jax.evaluation import intervals, protocols, scored
from dqe_jax.evaluation.evaluator import RetrievalEvaluator

N, D = 90, 6


class Output(NamedTuple):
    embedding: jax.Array
    attribute_weights: jax.Array


def encode_query(params, image, text):
    return Output(image + params["text"] * text, text[:, :2])


def encode_gallery(params, image):
    return image[:, None] + 0 * params["text"]


def whole(seed, *shape):
    """Small whole numbers: scores are exact and ties are plentiful."""
    return np.random.default_rng(seed).integers(-2, 3, shape).astype(np.float32)


def made(seed=0, count=30, **columns):
    """Queries over N images; `columns` replace those that matter to a protocol."""
    rng = np.random.default_rng(seed)
    empty = [np.zeros(0, np.int32)] * count
    defaults = {
        "ids": [f"q{i}" for i in range(count)],
        "texts": ["in red"] * count,
        "reference": rng.integers(0, N, count).astype(np.int32),
        "target": np.full(count, -1, np.int32),
        "known_positives": empty,
        "relevant": empty,
        "kinds": [()] * count,
        "attributes": [()] * count,
        "pools": [""] * count,
        "subset": empty,
    }
    return Queries(**defaults | columns)


def several(rng, count, least=0, most=12, first=0, last=N):
    """Ragged rows; some of them beyond the gallery, as a photo that is missing."""
    drawn = [
        rng.permutation(np.arange(first, last))[: rng.integers(least, most)] for _ in range(count)
    ]
    return [np.append(x, N + i).astype(np.int32) if i % 9 == 8 else x for i, x in enumerate(drawn)]


def split_of(queries, pools=None):
    ids = [f"i{row}" for row in range(N)]
    gallery = type("Listed", (), {"__len__": lambda _: N, "ids": ids})()
    size = len(queries)
    return Split("test", queries, gallery, pools or {}, Coverage(size, size, N, N))


def evaluated(name, queries, pools=None, num_devices=2):
    """What the evaluator gives, what `scored` gives, and the scores `[Q, N]` as they are."""
    protocol, split = protocols.PROTOCOLS[name], split_of(queries, pools)
    images, texts = whole(1, N, D), whole(2, len(queries), D)
    devices = mesh.all_devices()[:num_devices]
    evaluator = RetrievalEvaluator(
        split=split,
        images=Column(images),
        texts=Column(texts),
        encode_query=encode_query,
        encode_gallery=encode_gallery,
        batch_size=8,
        top_k=50,
        devices=devices,
        protocol=protocol,
    )
    params = mesh.replicate({"text": np.float32(1)}, devices)
    result = evaluator.run(params, baselines=True)
    owner, reference = all_references(queries)
    composed = images[reference] + texts[owner]
    if len(owner) > len(queries):
        composed = np.stack([composed[owner == i].mean(0) for i in range(len(queries))])
        composed /= np.maximum(np.linalg.norm(composed, axis=1, keepdims=True), 1e-9)
    scores = composed @ images.T
    alone = scored.measure_scores(split, protocol, 50, lambda mine, rows: scores[mine][:, rows])
    assert result.metrics == pytest.approx(alone, abs=1e-6)
    assert set(evaluator.metric_names()) == set(result.metrics)
    assert "reference_only" in result.baselines
    values = intervals.query_values(
        protocol, queries, result.rows, result.subset_rows, result.places
    )
    strata = intervals.strata_of(protocol, queries)
    found = intervals.intervals(values, queries.reference, strata, draws=20)
    for key, interval in found.items():
        assert interval.value == pytest.approx(result.metrics[key], abs=1e-9), key
    assert {k for k in protocol.columns(result.metrics) if "range" not in k} - set(found) <= {
        *("mAP_instances", "worst_instances", "top1_is_reference")
    }
    return result, scores


def order_of(scores, rows):
    """Rows by score, equal ones by row."""
    return [int(r) for r in sorted(rows, key=lambda row: (-scores[row], row))]


def same(got, expected):
    for key, value in expected.items():
        assert got[key] == pytest.approx(value, abs=1e-9), key


def trapezoid(order, relevant):
    places = [place for place, row in enumerate(order) if row in relevant]
    total = 0.0
    for j, place in enumerate(places):
        before = j / place if place else 1.0
        total += (before + (j + 1) / (place + 1)) / 2 / (len(relevant) + 1e-5)
    return total


def share(order, relevant, k, extra=1e-5):
    return sum(row in relevant for row in order[:k]) / (len(relevant) + extra)


# --- A gallery of each query's own ----------------------------------------------------------------

TASKS = ("focus_attribute", "change_object")


def made_genecis(count=40):
    rng = np.random.default_rng(0)
    subset = [rng.permutation(N)[: 10 + 5 * (i % 2)].astype(np.int32) for i in range(count)]
    pools = {name: np.arange(N) for name in TASKS}
    names = [TASKS[i % 2] for i in range(count)]
    target = np.array([own[0] for own in subset], np.int32)
    kinds = [(name,) for name in names]
    return made(count=count, subset=subset, target=target, pools=names, kinds=kinds), pools


def test_genecis():
    queries, pools = made_genecis()
    result, scores = evaluated("genecis", queries, pools)
    expected = collections.defaultdict(list)
    for i, own in enumerate(queries.subset):
        target, *others = own.tolist()
        # Equal scores count against the target.
        rank = sum(scores[i, row] >= scores[i, target] for row in others)
        for k in (1, 2, 3):
            expected[f"R@{k}/{queries.pools[i]}"].append(rank < k)
        assert sorted(result.rows[i][: len(own)]) == sorted(own)
        assert (result.rows[i][len(own) :] == -1).all()
    expected = {key: np.mean(hits) for key, hits in expected.items()}
    for k in (1, 2, 3):
        expected[f"R@{k}"] = np.mean([expected[f"R@{k}/{task}"] for task in TASKS])
    same(result.metrics, expected | {"queries": 40, "tasks": 2})
    assert 0 < result.metrics["R@1"] < result.metrics["R@3"] < 1
    assert result.subset_rows is None


def test_genecis_of_equal_scores_finds_nothing():
    queries, pools = made_genecis()
    protocol, split = protocols.PROTOCOLS["genecis"], split_of(queries, pools)
    found = scored.measure_scores(
        split, protocol, 50, lambda mine, rows: np.zeros((len(mine), len(rows)))
    )
    assert found["R@1"] == found["R@3"] == 0


def test_genecis_by_chance():
    rng = np.random.default_rng(1)
    queries, pools = made_genecis(count=4000)
    split = split_of(queries, pools)
    found = scored.measure_scores(
        *(split, protocols.PROTOCOLS["genecis"], 50),
        lambda mine, rows: rng.random((len(mine), len(rows))),
    )
    for k in (1, 2, 3):
        assert found[f"R@{k}/focus_attribute"] == pytest.approx(k / 10, abs=0.03)
        assert found[f"R@{k}/change_object"] == pytest.approx(k / 15, abs=0.03)
    assert "0.075, 0.150 and 0.225" in protocols.PROTOCOLS["genecis"].note


# --- Several references, several targets, explicit negatives --------------------------------------


def official_pinpoint(orders, queries):
    """As the published code states it, on ranked lists of 50."""
    expected = collections.defaultdict(list)
    groups = collections.defaultdict(list)
    for i, order in enumerate(orders):
        good, bad = queries.relevant[i].tolist(), queries.negatives[i].tolist()
        kept = [row for row in order if row not in bad]
        for k in (1, 5, 10, 50):
            hits = [row in good for row in order[:k]]
            expected[f"P@{k}"].append(sum(hits) / k)
            expected[f"R@{k}"].append(sum(hits) / len(good))
            expected[f"negatives@{k}"].append(sum(r in bad for r in order[:k]) / min(len(bad), k))
            for name, ranked in (("", order), ("_without_negatives", kept)):
                found, total = 0, 0.0
                for place, row in enumerate(ranked[:k], 1):
                    if row in good:
                        found += 1
                        total += found / place
                expected[f"mAP@{k}{name}"].append(total / min(len(good), k))
        best = sum(1 / math.log2(j + 2) for j in range(min(len(set(good)), 10)))
        gain = sum(1 / math.log2(j + 2) for j, row in enumerate(order[:10]) if row in good)
        expected["nDCG@10"].append(gain / best)
        pair = (int(queries.reference[i]), *queries.references[i].tolist())
        groups[pair].append(expected["P@10"][-1])
    spread = [own for own in groups.values() if len(own) > 1]
    found = {key: np.mean(values) for key, values in expected.items()}
    found["range_P@10"] = np.mean([max(own) - min(own) for own in spread])
    found["deviation_P@10"] = np.mean([np.std(own) for own in spread])
    return found | {"groups": len(spread), "queries": len(orders)}


def test_pinpoint():
    rng = np.random.default_rng(3)
    count = 40
    relevant = [np.append(x, x[:1]) for x in several(rng, count, 1, 20)]  # one is named twice
    negatives = [np.append(x, -1) for x in several(rng, count, 3, 30)]  # and no image
    reference = rng.integers(0, 6, count).astype(np.int32)
    second = [rng.integers(6, 8, i % 2).astype(np.int32) for i in range(count)]
    queries = made(
        count=count,
        relevant=relevant,
        negatives=negatives,
        reference=reference,
        references=second,
        kinds=[("Swap",) if i % 3 else ("Negation",) for i in range(count)],
    )
    result, scores = evaluated("pinpoint", queries)
    orders = [[int(row) for row in own] for own in result.rows]
    for own, order in zip(scores, orders):
        kept = own[order]
        assert (np.diff(kept) <= 1e-6).all()
        assert kept[-1] >= np.sort(own)[-50] - 1e-6
    expected = official_pinpoint(orders, queries)
    same(result.metrics, expected)
    assert 0 < result.metrics["mAP@10"] < result.metrics["mAP@10_without_negatives"] < 1
    assert expected["groups"] > 5
    assert {"mAP@10/Swap", "negatives@10/Negation"} <= result.metrics.keys()


def test_a_question_of_two_images_is_the_direction_of_its_mean():
    queries = made(
        count=2,
        reference=np.array([3, 4], np.int32),
        references=[np.array([5], np.int32), np.zeros(0, np.int32)],
        relevant=[np.array([1]), np.array([2])],
        negatives=[np.array([7]), np.array([8])],
    )
    both, scores = evaluated("pinpoint", queries)
    images, texts = whole(1, N, D), whole(2, 2, D)
    mean = (images[3] + images[5]) / 2 + texts[0]
    np.testing.assert_allclose(both.scores[0][0], (images @ mean).max() / np.linalg.norm(mean))
    np.testing.assert_allclose(both.attribute_weights, texts[:, :2], atol=1e-6)
    assert scores.shape == (2, N)


# --- The whole ranking ----------------------------------------------------------------------------


def test_freedom():
    rng = np.random.default_rng(5)
    count, domains = 60, ("photo", "toy", "sketch")
    pairs = [f"{a} to {b}" for a, b in itertools.permutations(domains, 2)]
    # References lie in the first rows, and are not ranked.
    pool = np.arange(20, N)
    queries = made(
        count=count,
        relevant=several(rng, count, 0, 15, first=20),
        reference=rng.integers(0, 20, count).astype(np.int32),
        kinds=[(pairs[i % 6],) for i in range(count)],
        pools=["database"] * count,
    )
    result, scores = evaluated("freedom", queries, {"database": pool})
    assert result.embedded == len(pool)
    table = collections.defaultdict(list)
    for i in range(count):
        order, good = order_of(scores[i], pool), set(queries.relevant[i].tolist())
        table["mAP", queries.kinds[i][0]].append(trapezoid(order, good))
        for k in (5, 10, 50, 100):
            table[f"R@{k}", queries.kinds[i][0]].append(share(order, good, k))
            hits = sum(row in good for row in order[:k])
            table[f"P@{k}", queries.kinds[i][0]].append(hits / (min(len(good), k) + 1e-5))
    expected = {}
    for key in ("mAP", "R@10", "P@10", "R@100", "P@50"):
        rows = []
        for source in domains:
            row = [np.mean(table[key, f"{source} to {t}"]) for t in domains if t != source]
            expected[f"{key}/from {source}"] = np.mean(row)
            rows.append(np.mean(row))
        expected[key] = np.mean(rows)
        expected |= {f"{key}/{pair}": np.mean(table[key, pair]) for pair in pairs}
    same(result.metrics, expected)
    assert any(len(own) == 0 for own in queries.relevant)  # which count 0
    assert 0.05 < result.metrics["mAP"] < 0.9


def test_icir():
    rng = np.random.default_rng(6)
    pools = {"lamp": np.arange(10, 40), "mug": np.arange(40, N)}
    names = ["lamp", "mug", "mug"] * 8
    relevant = [
        rng.permutation(pools[name])[: rng.integers(1, 9)].astype(np.int32) for name in names
    ]
    reference = rng.integers(0, 10, 24).astype(np.int32)
    queries = made(count=24, relevant=relevant, reference=reference, pools=names)
    result, scores = evaluated("icir", queries, pools)
    own = [
        trapezoid(order_of(scores[i], pools[name]), set(relevant[i].tolist()))
        for i, name in enumerate(names)
    ]
    by_instance = [[v for v, name in zip(own, names) if name == n] for n in pools]
    same(
        result.metrics,
        {
            "mAP": np.mean(own),
            "mAP_instances": np.mean([np.mean(values) for values in by_instance]),
            "worst_instances": np.mean([min(values) for values in by_instance]),
            "instances": 2,
        },
    )
    assert all(set(r[r >= 0]) <= set(pools[n].tolist()) for r, n in zip(result.rows, names))


def test_a_relevant_row_must_be_of_the_gallery():
    queries = made(count=1, relevant=[np.array([3])], pools=["mug"])
    with pytest.raises(ValueError, match="not in its gallery 'mug'"):
        evaluated("icir", queries, {"mug": np.arange(40, N)})


# --- Shares, hits and recalls ---------------------------------------------------------------------


def test_pic2word():
    rng = np.random.default_rng(7)
    kinds = [("cartoon",), ("origami",), ("toy",)] * 10
    queries = made(count=30, relevant=several(rng, 30, 0, 30), kinds=kinds)
    result, scores = evaluated("pic2word", queries)
    expected = collections.defaultdict(list)
    for i in range(30):
        order, good = order_of(scores[i], range(N)), set(queries.relevant[i].tolist())
        for k in (1, 5, 10, 50):
            expected[f"R@{k}/{kinds[i][0]}"].append(share(order, good, k))
            expected[f"P@{k}/{kinds[i][0]}"].append(sum(r in good for r in order[:k]) / k)
    expected = {key: np.mean(values) for key, values in expected.items()}
    for key in ("R@10", "R@50", "P@10"):
        expected[key] = np.mean([expected[f"{key}/{d}"] for d in ("cartoon", "origami", "toy")])
    same(result.metrics, expected)


@pytest.mark.parametrize("name", ["shoes", "lasco", "fashion200k"])
def test_recalls(name):
    rng = np.random.default_rng(8)
    target = rng.integers(0, N, 40).astype(np.int32)
    relevant = [np.append(rng.integers(0, N, 3), t).astype(np.int32) for t in target]
    queries = made(count=40, target=target, relevant=relevant)
    result, scores = evaluated(name, queries)
    keeps = name == "lasco"
    found = collections.defaultdict(list)
    for i in range(40):
        order = order_of(scores[i], range(N))
        order = order if keeps else [row for row in order if row != queries.reference[i]]
        good = relevant[i].tolist() if name == "fashion200k" else [target[i]]
        for k in (1, 5, 10, 50) if keeps else (1, 10, 50):
            found[f"R@{k}"].append(any(row in good for row in order[:k]))
    expected = {key: np.mean(values) for key, values in found.items()}
    if not keeps:
        expected["mean"] = np.mean([*expected.values()])
    same(result.metrics, expected)
    assert 0 < result.metrics["R@1"] < result.metrics["R@50"] < 1


def test_all_references():
    queries = made(count=3, reference=np.array([4, 5, 6], np.int32))
    owner, rows = all_references(queries)
    assert (owner.tolist(), rows.tolist()) == ([0, 1, 2], [4, 5, 6])
    more = [np.array([9, 8]), np.zeros(0, int), np.array([7])]
    owner, rows = all_references(Queries(**vars(queries) | {"references": more}))
    assert (owner.tolist(), rows.tolist()) == ([0, 0, 0, 1, 2, 2], [4, 9, 8, 5, 6, 7])
    assert jnp.asarray(rows).dtype == jnp.int32
