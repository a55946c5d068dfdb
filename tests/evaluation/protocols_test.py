"""The protocols of the benchmarks against independent statements of the official definitions.

Those are written here on image names and whole rankings, as the published scripts state them:
CLIP4Cir's validation for FashionIQ and CIRR, CIRCO's evaluation script, HP-FashionIQ's script.
"""

import collections
import dataclasses
import json
import pathlib
import random
import subprocess
import sys
import zlib

import numpy as np
import pytest

from dqe_jax.data.datasets import DATASETS
from dqe_jax.data.examples import Queries
from dqe_jax.evaluation import metrics, predictions, protocols, submissions
from dqe_jax.evaluation.judgements import preference_metrics, score_preferences
from dqe_jax.testing.commands import run_module
from dqe_jax.utils.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[2]
REAL = ROOT.parent / "shared" / "annotations"
real = pytest.mark.skipif(not REAL.is_dir(), reason=f"the annotations are not at {REAL}")
CATEGORIES = ("dress", "shirt", "toptee")
ASPECTS = ("addition", "cardinality", "negation", "viewpoint")


# --- The official definitions ---------------------------------------------------------------------


def official_recalls(sorted_names, targets, ks):
    """Recall of whole rankings, one array of names for each query."""
    labels = [names == target for names, target in zip(sorted_names, targets)]
    return {k: float(np.mean([row[:k].sum() for row in labels])) for k in ks}


def official_fashioniq(rankings, targets):
    """By category: whole rankings of names and targets."""
    result = {"queries": 0, "categories": len(rankings)}
    for category, sorted_names in rankings.items():
        for k, value in official_recalls(sorted_names, targets[category], (1, 5, 10, 50)).items():
            result[f"R@{k}/{category}"] = value
        result[f"mean/{category}"] = (result[f"R@10/{category}"] + result[f"R@50/{category}"]) / 2
        result[f"queries/{category}"] = len(sorted_names)
        result["queries"] += len(sorted_names)
    for k in (1, 5, 10, 50):
        result[f"R@{k}"] = sum(result[f"R@{k}/{category}"] for category in rankings) / len(rankings)
    result["mean"] = result["R@10"] / 2 + result["R@50"] / 2
    return result


def official_cirr(sorted_names, references, targets, groups):
    """Whole rankings with the reference in them, and the six members of each query's set."""
    without = [names[names != r] for names, r in zip(sorted_names, references)]
    result = {f"R@{k}": v for k, v in official_recalls(without, targets, (1, 5, 10, 50)).items()}
    in_group = [names[np.isin(names, list(group))] for names, group in zip(without, groups)]
    for k, value in official_recalls(in_group, targets, (1, 2, 3)).items():
        result[f"R_subset@{k}"] = value
    result["mean"] = result["R@5"] / 2 + result["R_subset@1"] / 2
    result["queries"] = len(targets)
    return result, without, in_group


def official_circo(predicted, annotations):
    """Lists of integers by query id, as in a submission; records of the annotation file."""
    precisions, recalls = collections.defaultdict(list), collections.defaultdict(list)
    aspects, gains = collections.defaultdict(list), []
    for query, images in predicted.items():
        record = annotations[int(query)]
        truths = record["gt_img_ids"]
        hit = np.isin(np.array(images, int), truths)
        ideal = sum(1 / np.log2(i + 2) for i in range(min(len(truths), 10)))
        gains.append(sum(h / np.log2(i + 2) for i, h in enumerate(hit[:10])) / ideal)
        precision = np.cumsum(hit) * hit / np.arange(1, len(images) + 1)
        for k in (5, 10, 25, 50):
            precisions[k].append(precision[:k].sum() / min(len(truths), k))
            recalls[k].append(record["target_img_id"] in images[:k])
        for aspect in record["semantic_aspects"]:
            aspects[aspect].append(precision[:10].sum() / min(len(truths), 10))
    result = {f"mAP@{k}": np.mean(values) for k, values in precisions.items()}
    result |= {f"R@{k}": np.mean(values) for k, values in recalls.items()}
    result["nDCG@10"] = np.mean(gains)
    result |= {f"mAP@10/{aspect}": np.mean(values) for aspect, values in aspects.items()}
    result |= {f"queries/{aspect}": len(values) for aspect, values in aspects.items()}
    return result | {"queries": len(predicted)}


def official_preference(first, second, preferred):
    total, agreed = 0, 0
    for a, b, answer in zip(first, second, preferred):
        if np.mean(a) > np.mean(b):
            total += 1
            agreed += answer == 1
    return agreed / total if total else 0.0


def same(got, expected, *, besides=()):
    assert got.keys() == {*expected, *besides}
    for key, value in expected.items():
        assert got[key] == pytest.approx(value, abs=1e-9, rel=0), key
    assert all(type(value) in (float, int) for value in got.values())


# --- Made queries and rankings --------------------------------------------------------------------


def made_queries(reference, target, **columns):
    n = len(reference)
    empty = [np.zeros(0, np.int32)] * n
    defaults = {
        "ids": [f"q{i}" for i in range(n)],
        "texts": ["in red"] * n,
        "known_positives": [np.array([t]) for t in target],
        "relevant": empty,
        "kinds": [()] * n,
        "attributes": [()] * n,
        "pools": [""] * n,
        "subset": empty,
    }
    reference, target = np.asarray(reference, np.int32), np.asarray(target, np.int32)
    return Queries(reference=reference, target=target, **defaults | columns)


def orders(rng, shape, favoured=()):
    """Whole rankings `[Q, N]` from scores with many ties, equal scores by row."""
    scores = rng.integers(0, 12, shape).astype(float)
    for i, columns in enumerate(favoured):
        scores[i, columns] += rng.integers(0, 12)
    return np.argsort(-scores, axis=1, kind="stable")


def lists_of(sorted_rows, k=50):
    return metrics.pad_lists(np.asarray(sorted_rows)[:, :k], k)


def made_fashioniq(seed, sizes):
    """Queries of three categories, names of a gallery where two categories share images."""
    rng = np.random.default_rng(seed)
    names = np.array([f"B{i:04}" for i in range(400)])
    pools = {c: np.sort(rng.permutation(300)[:n]) for c, n in zip(CATEGORIES, sizes)}
    counts = dict(zip(CATEGORIES, (40, 25, 60)))
    reference = np.concatenate([rng.choice(pools[c], counts[c]) for c in CATEGORIES])
    target = np.concatenate([rng.choice(pools[c], counts[c]) for c in CATEGORIES])
    of = [c for c in CATEGORIES for _ in range(counts[c])]
    order = rng.permutation(len(of))  # categories need not follow each other
    queries = made_queries(reference[order], target[order], pools=[of[i] for i in order])
    return queries, names, pools


@pytest.mark.parametrize("sizes", [(200, 120, 90), (60, 30, 12), (3, 2, 5)])
@pytest.mark.parametrize("variant", ["original", "val"])
def test_fashioniq(variant, sizes):
    queries, names, pools = made_fashioniq(sum(sizes), sizes)
    protocol = protocols.protocol_of("fashioniq", variant)
    ranked = protocols.pool_rows(protocol, queries, pools)
    rng = np.random.default_rng(1)
    rows = np.full((len(queries), 50), -1)
    whole = collections.defaultdict(list)
    targets = collections.defaultdict(list)
    for i, pool in enumerate(queries.pools):
        favoured = [np.flatnonzero(ranked[pool] == queries.target[i])]
        found = ranked[pool][orders(rng, (1, len(ranked[pool])), favoured)[0]]
        rows[i, : len(found)] = found[:50]
        whole[pool].append(names[found])
        targets[pool].append(names[queries.target[i]])
    got = protocol.measure(queries, rows)
    same(got, official_fashioniq(whole, targets), besides=["top1_is_reference"])
    assert got["top1_is_reference"] == np.mean(rows[:, 0] == queries.reference)
    assert set(protocol.headline) <= got.keys()
    assert not protocol.exclude_reference
    # Longer lists than any cut-off change nothing.
    assert protocol.measure(queries, metrics.pad_lists(rows, 70)) == got


def test_galleries_of_the_two_fashioniq_protocols():
    queries, _, pools = made_fashioniq(0, (200, 120, 90))
    pools["bags"] = np.array([7, 9])  # no query
    original = protocols.pool_rows(protocols.protocol_of("fashioniq"), queries, pools)
    assert original.keys() == pools.keys()
    assert all(original[name] is pools[name] for name in pools)
    val = protocols.protocol_of("fashioniq", "val")
    for name, rows in protocols.pool_rows(val, queries, pools).items():
        mine = [i for i, pool in enumerate(queries.pools) if pool == name]
        expected = {int(row) for i in mine for row in (queries.reference[i], queries.target[i])}
        assert rows.tolist() == sorted(expected)
    unlabelled = dataclasses.replace(queries, target=np.where(queries.target > 9, -1, 5))
    with pytest.raises(UserError, match="fashioniq-val needs the targets"):
        protocols.pool_rows(val, unlabelled, pools)


def made_cirr(seed, num_gallery, num_queries=80):
    rng = np.random.default_rng(seed)
    names = np.array([f"dev-{i}-0-img{i % 2}" for i in range(num_gallery)])
    members = np.stack([rng.permutation(num_gallery)[:6] for _ in range(num_queries)])
    reference, target = members[:, 2], members[:, 4]
    shuffled = [rng.permutation(row) for row in members]
    ids = [str(12060 + 3 * i) for i in range(num_queries)]
    queries = made_queries(reference, target, subset=shuffled, ids=ids)
    whole = orders(rng, (num_queries, num_gallery), members[:, 2:5])
    return queries, names, whole


def cirr_lists(queries, whole):
    without = np.stack([row[row != r] for row, r in zip(whole, queries.reference)])
    inside = np.stack([row[np.isin(row, m)] for row, m in zip(without, queries.subset)])
    return lists_of(without), inside


@pytest.mark.parametrize("num_gallery", [300, 51, 50, 7])
def test_cirr(num_gallery):
    queries, names, whole = made_cirr(num_gallery, num_gallery)
    rows, subset_rows = cirr_lists(queries, whole)
    protocol = protocols.protocol_of("cirr")
    got = protocol.measure(queries, rows, subset_rows)
    expected, _, _ = official_cirr(
        [names[row] for row in whole],
        names[queries.reference],
        names[queries.target],
        [names[m] for m in queries.subset],
    )
    same(got, expected)
    assert 0 < got["R_subset@1"] < got["R_subset@2"] < got["R_subset@3"] < 1
    assert set(protocol.headline) <= got.keys()
    assert protocol.exclude_reference
    # Padding, and the reference among the subset's images, change nothing.
    with_reference = np.stack([row[np.isin(row, m)] for row, m in zip(whole, queries.subset)])
    assert protocol.measure(queries, rows, with_reference) == got
    assert protocol.measure(queries, rows, metrics.pad_lists(subset_rows, 9)) == got
    without = protocol.measure(queries, rows, None)
    assert without == {k: v for k, v in got.items() if k.startswith("R@") or k == "queries"}


def test_cirr_refuses_lists_with_the_reference():
    queries, _, whole = made_cirr(0, 60)
    with pytest.raises(ValueError, match="own reference"):
        protocols.protocol_of("cirr").measure(queries, lists_of(whole), None)
    # Padding is no reference, even where that is not in the gallery.
    assert protocols.cirr_metrics(made_queries([-1], [2]), lists_of([[2]]))["R@1"] == 1


def test_small_cirr_subsets():
    queries = made_queries([0, 0, 0], [1, 2, 3], subset=[[0, 1], [2, 0], [0, 4]])
    rows = lists_of([[1, 2], [1, 2], [1, 2]])
    got = protocols.protocol_of("cirr").measure(queries, rows, np.array([[1], [2], [4]]))
    assert got["R_subset@1"] == got["R_subset@3"] == pytest.approx(2 / 3)


def made_circo(seed, num_gallery=120, num_queries=70):
    """Records as annotated; some ground truths are of images that are never ranked."""
    rng = np.random.default_rng(seed)
    ids = np.sort(rng.permutation(500_000)[: num_gallery + 30])
    records = []
    for i in range(num_queries):
        reference, *truths = rng.permutation(ids)[: 2 + min(i, 22)].tolist()
        aspects = random.Random(i).sample(ASPECTS, 1 + i % 3)
        records.append(
            {
                "id": i,
                "reference_img_id": reference,
                "target_img_id": truths[0],
                "gt_img_ids": truths,
                "relative_caption": "is red",
                "shared_concept": "a dog",
                "semantic_aspects": aspects,
            }
        )
    return records, ids


def test_precision_is_a_column_only_where_queries_have_several_targets():
    plain = protocols.PROTOCOLS["plain"]
    found = {"R@1": 0.5, "P@10": 0.1, "P@10_ceiling": 0.1 + 1e-12, "mAP@10": 0.6}
    assert plain.columns(found) == ("R@1", "mAP@10")
    assert plain.columns({**found, "P@10_ceiling": 0.2}) == ("R@1", "P@10", "mAP@10")
    assert plain.columns({"R@1": 0.5}) == ("R@1",)


@pytest.mark.parametrize("num_gallery", [120, 30, 3])
def test_circo(num_gallery):
    records, ids = made_circo(num_gallery, num_gallery)
    row = {image: i for i, image in enumerate(ids.tolist())}
    rng = np.random.default_rng(2)
    at_hand = rng.permutation(len(ids))[:num_gallery]  # the others' photos are missing
    truths = [[row[image] for image in r["gt_img_ids"]] for r in records]
    queries = made_queries(
        [row[r["reference_img_id"]] for r in records],
        [row[r["target_img_id"]] for r in records],
        relevant=[np.array(t, np.int32) for t in truths],
        kinds=[tuple(r["semantic_aspects"]) for r in records],
    )
    favoured = [np.flatnonzero(np.isin(at_hand, t)) for t in truths]
    rows = lists_of(at_hand[orders(rng, (len(records), num_gallery), favoured)])
    predicted = {i: ids[found[found >= 0]].tolist() for i, found in enumerate(rows)}
    protocol = protocols.protocol_of("circo")
    got = protocol.measure(queries, rows)
    same(got, official_circo(predicted, records), besides=["top1_is_reference"])
    assert set(protocol.headline) <= got.keys()
    assert not protocol.exclude_reference


def test_circo_by_hand():
    # Hits at ranks 1, 3 and 7, of 4 ground truths of which one is no gallery image.
    rows = lists_of([[4, 0, 5, 1, 2, 3, 6]])
    valid = [np.array([5, 4, 6, 99])]
    queries = made_queries([8], [5], relevant=valid, kinds=[("negation",)])
    got = protocols.circo_metrics(queries, rows)
    assert got["mAP@5"] == pytest.approx((1 + 2 / 3) / 4)
    assert got["mAP@10"] == got["mAP@10/negation"] == pytest.approx((1 + 2 / 3 + 3 / 7) / 4)
    assert got["R@5"] == 1
    with pytest.raises(ValueError, match="no ground truth"):
        protocols.circo_metrics(made_queries([8], [5]), rows)


def test_a_target_that_is_not_in_the_gallery_is_a_miss():
    rows = lists_of([[3, 1, 2], [1, 3, 2]])
    queries = made_queries([0, 0], [77, 3], pools=["dress", "dress"], relevant=[[77], [3]])
    assert protocols.plain_metrics(queries, rows)["R@50"] == 0.5
    assert protocols.fashioniq_metrics(queries, rows)["R@50"] == 0.5
    assert protocols.cirr_metrics(queries, rows)["R@50"] == 0.5
    assert protocols.circo_metrics(queries, rows)["mAP@50"] == 0.25


def test_plain():
    rng = np.random.default_rng(5)
    queries = made_queries(
        [*range(20)],
        [*range(20, 40)],
        relevant=[np.arange(20 + i, 25 + i) for i in range(20)],
        kinds=[("one",), ()] * 10,
        attributes=[("color=red", "fit=slim"), ("fit=loose",)] * 10,
    )
    rows = lists_of(orders(rng, (20, 60)))
    protocol = protocols.protocol_of("triplets")
    got = protocol.measure(queries, rows)
    columns = ("target", "relevant", "reference", "kinds", "attributes")
    assert got == metrics.summarize(rows, **{name: getattr(queries, name) for name in columns})
    assert {"P@10/attribute:color", "mAP@10/attribute:fit", "R@1/one"} <= got.keys()
    assert set(protocol.headline) <= got.keys()


def test_unlabelled_queries_are_not_measured():
    queries = made_queries([0, 1], [2, -1], relevant=[[2], [3]])
    rows = lists_of([[2, 3], [2, 3]])
    for dataset in ("fashioniq", "cirr", "circo"):
        with pytest.raises(ValueError, match="1 of 2 queries have no target"):
            protocols.protocol_of(dataset).measure(queries, rows)
    # A user's own triplets may have labels for some.
    got = protocols.protocol_of("triplets").measure(queries, rows)
    assert (got["queries"], got["queries_without_target"], got["R@1"]) == (1, 1, 1)


def test_scoring_predictions_imports_neither_jax_nor_tfds():
    code = (
        "import sys, dqe_jax.evaluation.predictions\n"
        "print({'jax', 'tensorflow_datasets', 'grain'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


def test_protocols():
    used = {
        protocols.protocol_of(dataset, variant).name
        for dataset, info in DATASETS.items()
        for variant in info.protocols
    }
    assert used == set(protocols.PROTOCOLS)
    for name, protocol in protocols.PROTOCOLS.items():
        assert name == protocol.name
        assert protocol.note
        assert "\n" not in protocol.note
    names = {protocol.name for protocol in protocols.PROTOCOLS.values()}
    assert names == {
        *("plain", "fashioniq-original", "fashioniq-val", "cirr", "circo", "genecis", "pinpoint"),
        *("shoes", "pic2word", "freedom", "lasco", "fashion200k", "icir", "edir", "circled"),
    }
    notes = {protocol.note for protocol in protocols.PROTOCOLS.values()}
    assert len(notes) == len(names)
    for dataset, variant, message in (
        ("coco", "original", "no data set 'coco'.*fashioniq"),
        ("cirr", "val", "cirr has no protocol 'val'; choose 'original'"),
        ("fashioniq", "other", "no protocol 'other'; choose 'original', 'val'"),
        ("hp_fashioniq", "original", "preferences"),
    ):
        with pytest.raises(UserError, match=message):
            protocols.protocol_of(dataset, variant)


# --- HP-FashionIQ ---------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [2, 1000])
def test_preference(levels):
    rng = np.random.default_rng(levels)
    # Few levels: many ties.
    first, second = rng.integers(0, levels, (2, 300, 5)) / 16
    preferred = rng.integers(1, 3, 300)
    got = preference_metrics(first, second, preferred)
    assert got["preference_ratio"] == official_preference(first, second, preferred)
    better = np.sign([sum(a) - sum(b) for a, b in zip(first, second)])
    answer = np.where(preferred == 1, 1, -1)
    assert got["ties"] == (better == 0).sum()
    assert got["first_higher"] == (better > 0).sum()
    agreement = np.mean([0.5 if b == 0 else float(b == a) for a, b in zip(answer, better)])
    assert got["agreement"] == pytest.approx(agreement, abs=1e-12)
    assert got["always_first"] == np.mean(preferred == 1)
    assert got["judgements"] == 300
    # Answers the other way round, sets too: the same agreement.
    other = preference_metrics(second, first, 3 - preferred)
    assert other["agreement"] == pytest.approx(got["agreement"], abs=1e-12)
    assert other["always_first"] == pytest.approx(1 - got["always_first"], abs=1e-12)


def test_preference_at_the_edges():
    low, high = np.zeros((4, 5)), np.ones((4, 5))
    never = preference_metrics(low, high, [1, 2, 2, 2])
    assert (never["preference_ratio"], never["first_higher"], never["agreement"]) == (0.0, 0, 0.75)
    tied = preference_metrics(low, low, [1, 2, 2, 2])
    assert (tied["preference_ratio"], tied["agreement"], tied["ties"]) == (0.0, 0.5, 4)
    # The same images in another order tie exactly, whatever their sum rounds to.
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(500, 5))
    shuffled = rng.permuted(scores, axis=1)
    assert preference_metrics(scores, shuffled, [1] * 500)["ties"] == 500


def test_preference_misuse():
    ones = np.ones((3, 5))
    for first, second, preferred, message in (
        (ones, ones[:2], [1, 1, 1], "expected scores"),
        (ones, ones, [1, 1], "expected scores"),
        (ones, ones, [0, 1, 2], "neither 1 nor 2"),
        (ones[:0], ones[:0], [], "no judgements"),
        (ones, ones * np.nan, [1, 1, 2], "not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            preference_metrics(first, second, preferred)


def made_judgements(directory):
    """`hpfiq.json` of three judgements, which prefer set 1, 2 and 1."""
    path = "/-/image_data/shirt/B{:03d}.jpg"
    lists = {
        "ref_img_paths": [path.format(0)] * 3,
        "targ_img_paths": [path.format(1)] * 3,
        "sentences": ["is red"] * 3,
        "retrieved_set1": [{"img_path": [path.format(i) for i in range(5)], "user_score": "4"}] * 3,
        "retrieved_set2": [{"img_path": [path.format(i + 9) for i in range(5)], "user_score": "3"}]
        * 3,
        "preferred set": ["1", "2", "1"],
    }
    write_json(directory / "hpfiq.json", {"user_1": {"question_set_2": lists}})
    names = [f"user_1/question_set_2/{i}" for i in range(3)]
    high, low = [1, 0.5, 0.5, 0.5, 0.5], [0.5] * 5
    return dict(zip(names, ([high, low], [high, low], [low, high])))


def test_preferences_from_a_file(tmp_path):
    scores = made_judgements(tmp_path)
    path = write_json(tmp_path / "mine.json", scores)
    got = score_preferences(path, tmp_path / "hpfiq.json", output=tmp_path / "out")
    assert (got["preference_ratio"], got["first_higher"]) == (0.5, 2)
    assert (got["agreement"], got["always_first"]) == (pytest.approx(1 / 3), pytest.approx(2 / 3))
    assert (got["judgements"], got["official"], got["ties"]) == (3, 3, 0)
    assert json.loads((tmp_path / "out" / "hp_fashioniq-mine.json").read_text()) == got


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({0: None}, "judgements that are not in the file: 1 "),
        ({"user_9": []}, r"no judgements of hpfiq\.json: 1 \(first: 'user_9'\)"),
        *(
            (
                {1: wrong},
                r"without two lists of 5 finite numbers: 1 \(first: 'user_1/question_set_2/1",
            )
            for wrong in (
                *(7, [], [[1] * 5], [[1] * 5, [1] * 4], [[1] * 5, [1, 2, 3, 4, True]]),
                *([[1] * 5, [float("nan")] * 5], [[1] * 5, ["1"] * 5], [[1] * 5, [10**400] * 5]),
            )
        ),
    ],
)
def test_files_of_preferences_that_cannot_be_scored(tmp_path, change, sentence):
    scores = made_judgements(tmp_path)
    names = list(scores)
    for key, value in change.items():
        scores[names[key] if isinstance(key, int) else key] = value
    kept = {key: value for key, value in scores.items() if value is not None}
    path = write_json(tmp_path / "mine.json", kept)
    with pytest.raises(UserError, match=sentence) as error:
        score_preferences(path, tmp_path / "hpfiq.json", output=tmp_path / "out")
    assert str(error.value).startswith(str(path))
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.slow  # two commands
def test_preferences_by_the_command(tmp_path):
    path = write_json(tmp_path / "mine.json", made_judgements(tmp_path))
    words = (f"--predictions={path}", f"--hp_fashioniq={tmp_path / 'hpfiq.json'}")
    words += (f"--output={tmp_path / 'out'}",)
    done = run_module("dqe_jax.evaluate", "--config=configs/fiq.py", *words, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "hp_fashioniq-mine.json").read_text())
    assert found == score_preferences(path, tmp_path / "hpfiq.json")
    done = run_module("dqe_jax.evaluate", "--config=configs/cirr.py", *words, cwd=ROOT)
    assert done.returncode == 2
    assert "judges images of FashionIQ, not of cirr" in done.stderr


# --- Files for servers ----------------------------------------------------------------------------


def cirr_submissions(num_gallery=90):
    queries, names, whole = made_cirr(3, num_gallery)
    made = submissions.make_submissions(
        "cirr", queries, names.tolist(), *cirr_lists(queries, whole)
    )
    return queries, names, whole, made


def circo_submission(num_gallery=120):
    records, ids = made_circo(0, num_gallery)
    names = [f"{image:012}" for image in ids]
    rng = np.random.default_rng(3)
    queries = made_queries(
        [0] * len(records), [1] * len(records), ids=[str(r["id"]) for r in records]
    )
    rows = lists_of(orders(rng, (len(records), num_gallery)))
    made = submissions.make_submissions("circo", queries, names, rows)
    return queries, names, ids[rows], made


def test_cirr_submissions():
    queries, names, whole, made = cirr_submissions()
    assert made.keys() == {"cirr_recall.json", "cirr_recall_subset.json"}
    _, without, inside = official_cirr(
        [names[row] for row in whole],
        names[queries.reference],
        names[queries.target],
        [names[m] for m in queries.subset],
    )
    recall, subset = made["cirr_recall.json"], made["cirr_recall_subset.json"]
    assert (recall["version"], recall["metric"]) == ("rc2", "recall")
    assert (subset["version"], subset["metric"]) == ("rc2", "recall_subset")
    assert recall.keys() == subset.keys() == {"version", "metric", *queries.ids}
    for i, query in enumerate(queries.ids):
        assert recall[query] == without[i][:50].tolist()
        assert subset[query] == inside[i][:3].tolist()
    for content in made.values():
        submissions.check_submission("cirr", content, queries, names, num_queries=80)
        assert json.loads(json.dumps(content)) == content
    with pytest.raises(ValueError, match="need subset_rows"):
        submissions.make_submissions("cirr", queries, names, lists_of(whole))


def test_circo_submission():
    queries, names, images, made = circo_submission()
    assert made.keys() == {"circo.json"}
    content = made["circo.json"]
    assert [*content] == [str(i) for i in range(70)]
    assert [*content.values()] == images.tolist()
    assert json.loads(json.dumps(content)) == content
    submissions.check_submission("circo", content, queries, names, num_queries=70)
    submissions.check_submission("circo", content, queries, None)


def test_others_have_no_submissions():
    queries = made_queries([0], [1])
    assert submissions.make_submissions("fashioniq", queries, ["a", "b"], lists_of([[1]])) == {}
    with pytest.raises(ValueError, match="no submissions"):
        submissions.check_submission("fashioniq", {}, queries, ["a", "b"])


def test_rankings():
    queries = made_queries([0, 0], [1, 1], ids=["a", "b"])
    rows = np.array([[2, 0, 1], [1, -1, -1]], np.int32)
    names = ["x", "y", "z"]
    assert submissions.rankings(queries, names, rows) == {"a": ["z", "x", "y"], "b": ["y"]}
    assert submissions.rankings(queries, names, rows, 1) == {"a": ["z"], "b": ["y"]}


def refused(dataset, content, queries, names, *parts, **options):
    with pytest.raises(UserError) as e:
        submissions.check_submission(dataset, content, queries, names, **options)
    message = str(e.value)
    for part in (f"{dataset} submission", *parts):
        assert part in message, message
    assert "\n" not in message
    assert message.endswith(".")


# Each breaks one rule for two queries, of lists that are otherwise in order.
@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (lambda images, own: images[:-1], "exactly 50 images"),
        (lambda images, own: [*images, "new"], "exactly 50 images"),
        (lambda images, own: dict.fromkeys(images), "exactly 50 images"),
        (lambda images, own: None, "exactly 50 images"),
        (lambda images, own: [*images[:-1], 5], "must be strings"),
        (lambda images, own: [*images[:-1], None], "must be strings"),
        (lambda images, own: [*images[:-1], images[0]], "image twice"),
        (lambda images, own: [*images[:-1], "dev-9999-0-img0"], "split's gallery"),
        (lambda images, own: [own, *images[1:]], "own reference must be left out"),
    ],
)
def test_rules_of_cirr_lists(change, rule):
    queries, names, _, made = cirr_submissions()
    content = made["cirr_recall.json"]
    own = dict(zip(queries.ids, names[queries.reference].tolist()))
    broken = [queries.ids[7], queries.ids[30]]
    content |= {query: change(content[query], own[query]) for query in broken}
    refused("cirr", content, queries, names, rule, ": 2 (first", repr(broken[0]))


def test_rules_of_cirr():
    queries, names, _, made = cirr_submissions()
    recall, subset = made["cirr_recall.json"], made["cirr_recall_subset.json"]

    def cirr(content, *parts, **options):
        refused("cirr", content, queries, names, *parts, **options)

    cirr({k: v for k, v in recall.items() if k != "version"}, "'version' is None", "'rc2'")
    cirr(recall | {"version": "rc1"}, "'version' is 'rc1'")
    cirr({k: v for k, v in recall.items() if k != "metric"}, "'metric' is None", "'recall'")
    cirr(recall | {"metric": "R@1"}, "'metric' is 'R@1'", "'recall_subset'")
    cirr(recall | {"metric": "recall_subset"}, "exactly 3 images", ": 80 (first")
    cirr(subset | {"metric": "recall"}, "exactly 50 images", ": 80 (first")
    first = queries.ids[0]
    missing = {k: v for k, v in recall.items() if k != first}
    cirr(missing, "must be answered", ": 1 (first", repr(first))
    cirr(recall | {"1": recall[first]}, "must be query ids", ": 1 (first", "'1'")
    cirr(missing | {int(first): recall[first]}, "must be answered")
    cirr(recall, "all 82 queries", "2 are not", num_queries=82)
    outside = next(n for n in names.tolist() if n not in names[queries.subset[0]])
    cirr(subset | {first: [*subset[first][:2], outside]}, "query's subset", repr(first))
    own = names[queries.reference[0]].item()
    cirr(subset | {first: [*subset[first][:2], own]}, "own reference", repr(first))


def test_rules_of_circo():
    queries, names, _, made = circo_submission()
    content = made["circo.json"]

    def circo(content, *parts, **options):
        refused("circo", content, queries, names, *parts, **options)

    for images, rule in (
        (content["3"][:49], "exactly 50 images"),
        ([*content["3"], 1], "exactly 50 images"),
        ([str(image) for image in content["3"]], "must be integers"),
        ([*content["3"][:49], True], "must be integers"),
        ([*content["3"][:49], 5.0], "must be integers"),
        ([*content["3"][:49], content["3"][0]], "image twice"),
        ([*content["3"][:49], 600_000], "split's gallery"),
    ):
        circo(content | {"3": images, "9": images}, rule, ": 2 (first", "'3'")
    circo({k: v for k, v in content.items() if k != "0"}, "must be answered", "'0'")
    circo(content | {"70": content["0"]}, "must be query ids", "'70'")
    circo(content, "must be answered", ": 2 (first", "'70'", num_queries=72)


def test_galleries_that_are_too_small_for_the_servers():
    queries, names, _, made = cirr_submissions(50)
    refused(
        "cirr",
        made["cirr_recall.json"],
        queries,
        names,
        ": 80 (first",
        "gallery has only 50 images",
    )
    submissions.check_submission("cirr", made["cirr_recall_subset.json"], queries, names)
    queries, _, _, made = cirr_submissions(51)
    queries, names, _, made = circo_submission(19)  # and 30 images more
    refused("circo", made["circo.json"], queries, names, "gallery has only 49 images")


def test_a_file_that_is_too_large():
    queries, names, _, made = cirr_submissions()
    content = made["cirr_recall.json"]
    long = [f"{name}{'x' * 1500}" for name in names]
    of = dict(zip(names.tolist(), long))
    content = {
        k: [of[name] for name in v] if isinstance(v, list) else v for k, v in content.items()
    }
    refused("cirr", content, queries, long, "bytes; at most 5000000")


# --- Files of predictions -------------------------------------------------------------------------


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def raw_cirr(directory, seed=11, num_gallery=70):
    """Annotation files of made queries; returns the queries, names and whole rankings."""
    queries, names, whole = made_cirr(seed, num_gallery)
    for split, official in (("val", "val"), ("test", "test1")):
        records = [
            {
                "pairid": int(query),
                "reference": names[queries.reference[i]].item(),
                "caption": "in red",
                "img_set": {"id": i, "members": names[queries.subset[i]].tolist()},
            }
            for i, query in enumerate(queries.ids)
        ]
        if split == "val":
            for record, target in zip(records, names[queries.target].tolist()):
                record |= {"target_hard": target, "target_soft": {target: 1.0}}
        write_json(directory / "captions" / f"cap.rc2.{official}.json", records)
        paths = {name: f"./dev/{name}.png" for name in names.tolist()}
        write_json(directory / "image_splits" / f"split.rc2.{official}.json", paths)
    return queries, names, whole


def test_scoring_cirr_files(tmp_path):
    queries, names, whole = raw_cirr(tmp_path)
    made = submissions.make_submissions(
        "cirr", queries, names.tolist(), *cirr_lists(queries, whole)
    )
    expected, _, _ = official_cirr(
        [names[row] for row in whole],
        names[queries.reference],
        names[queries.target],
        [names[m] for m in queries.subset],
    )
    facts = {"queries": 80, "lists_with_reference": 0}
    recall = {k: v for k, v in expected.items() if k.startswith("R@")} | facts
    plain = {k: v for k, v in made["cirr_recall.json"].items() if k in queries.ids}
    for content in (made["cirr_recall.json"], plain):
        path = write_json(tmp_path / "p.json", content)
        for split in ("val", "validation"):
            same(predictions.score("cirr", split, path, tmp_path), recall | {"shortest_list": 50})
    path = write_json(tmp_path / "p.json", made["cirr_recall_subset.json"])
    subset = {k: v for k, v in expected.items() if k.startswith("R_subset@")} | facts
    same(predictions.score("cirr", "val", path, tmp_path), subset | {"shortest_list": 3})


def test_lists_with_the_reference_lose_a_rank(tmp_path, caplog):
    queries, names, whole = raw_cirr(tmp_path)
    content = {q: names[row].tolist()[:50] for q, row in zip(queries.ids, whole)}
    with caplog.at_level("WARNING"):
        got = predictions.score("cirr", "val", write_json(tmp_path / "p.json", content), tmp_path)
    targets = names[queries.target]
    expected = official_recalls([names[row] for row in whole], targets, (1, 5, 10, 50))
    assert got["lists_with_reference"] == sum(
        reference in row[:50] for reference, row in zip(queries.reference, whole)
    )
    for k, value in expected.items():
        assert got[f"R@{k}"] == pytest.approx(value, abs=1e-9)
    assert "hold the query's own reference" in caplog.text


def test_short_and_long_lists(tmp_path, caplog):
    queries, names, whole = raw_cirr(tmp_path)
    rows, _ = cirr_lists(queries, whole)
    content = {
        q: names[row].tolist()[: i % 60] for i, (q, row) in enumerate(zip(queries.ids, rows))
    }
    with caplog.at_level("WARNING"):
        got = predictions.score("cirr", "val", write_json(tmp_path / "p.json", content), tmp_path)
    assert got["shortest_list"] == 0
    assert "shortest list holds 0 images" in caplog.text
    cut = [row[: i % 60] for i, row in enumerate(rows)]
    expected = np.mean([t in row[:10] for t, row in zip(queries.target, cut)])
    assert got["R@10"] == pytest.approx(expected, abs=1e-9)
    without = [row[row != r] for row, r in zip(whole, queries.reference)]
    content = {q: names[row].tolist() for q, row in zip(queries.ids, without)}
    got = predictions.score("cirr", "val", write_json(tmp_path / "p.json", content), tmp_path)
    assert got["R@50"] == np.mean([t in row[:50] for t, row in zip(queries.target, without)])
    assert got["shortest_list"] == 69


def fails(tmp_path, content, *parts, dataset="cirr", split="val", raw=None, **options):
    path = write_json(tmp_path / "p.json", content)
    with pytest.raises(UserError) as e:
        predictions.score(dataset, split, path, raw or tmp_path, **options)
    message = str(e.value)
    for part in parts:
        assert part in message, message
    assert "\n" not in message
    assert message.endswith(".")


def test_files_that_cannot_be_scored(tmp_path):
    queries, names, whole = raw_cirr(tmp_path)
    rows, _ = cirr_lists(queries, whole)
    content = {q: names[row].tolist() for q, row in zip(queries.ids, rows)}
    first, second = queries.ids[:2]
    fails(
        tmp_path, {k: content[k] for k in queries.ids[2:]}, ": 2 (first", "not in the", repr(first)
    )
    fails(
        tmp_path, content | {"7": [], "8": []}, "p.json", "queries of the file", ": 2 (first", "'7'"
    )
    for bad in ("a", None, {}, 5, [["a"]], [None], [1.5], [True]):
        fails(
            tmp_path,
            content | {first: bad},
            "without a list of image ids",
            ": 1 (first",
            repr(first),
        )
    twice = [*content[second], content[second][0]]
    fails(tmp_path, content | {second: twice}, "an image twice", repr(second))
    for foreign in ("dev-777-0-img0", 7):
        other = [foreign, *content[second]]
        fails(tmp_path, content | {second: other}, "not in their gallery", f"'{foreign}'", second)
    fails(tmp_path, content | {"version": "rc1"}, "'version' is 'rc1'")
    fails(tmp_path, content | {"metric": 5}, "'metric' is 5")
    fails(tmp_path, content | {"metric": ["recall"]}, "'metric' is ['recall']")
    fails(tmp_path, content | {"metric": "recall_subset"}, "not in their gallery")
    fails(tmp_path, [content], "must hold an object")
    fails(tmp_path, content, "no split 'dev'", split="dev")
    fails(tmp_path, content, "no protocol 'val'", variant="val")
    fails(tmp_path, content, "there is no directory", raw=tmp_path / "none")
    fails(tmp_path, content, "hp_fashioniq holds preferences", dataset="hp_fashioniq")
    fails(tmp_path, content, "shapes has no annotation files: leave", dataset="shapes")
    with pytest.raises(UserError, match="cannot be read"):
        predictions.score("cirr", "val", tmp_path / "none.json", tmp_path)
    (tmp_path / "p.json").write_text('{"a": [')
    with pytest.raises(UserError, match="not JSON"):
        predictions.score("cirr", "val", tmp_path / "p.json", tmp_path)


def test_splits_without_labels(tmp_path):
    queries, names, whole = raw_cirr(tmp_path)
    made = submissions.make_submissions(
        "cirr", queries, names.tolist(), *cirr_lists(queries, whole)
    )
    for content in made.values():
        fails(tmp_path, content, "not public", "keeps the rules", "http", split="test1")
        first = queries.ids[0]
        short = content | {first: content[first][1:]}
        fails(tmp_path, short, "cirr submission", repr(first), split="test")
    records, _ = made_circo(1)
    fields = ("id", "reference_img_id", "relative_caption", "shared_concept")
    hidden = [{name: record[name] for name in fields} for record in records]
    write_json(tmp_path / "circo" / "annotations" / "test.json", hidden)
    content = {str(i): list(range(100, 150)) for i in range(len(records))}
    circo = {"dataset": "circo", "split": "test", "raw": tmp_path / "circo"}
    fails(tmp_path, content, "not public", "circo.micc.unifi.it", **circo)
    fails(tmp_path, content | {"5": [1]}, "exactly 50", "'5'", **circo)
    fails(tmp_path, {**content, "5": ["7", *range(49)]}, "must be integers", "'5'", **circo)


def test_records_that_are_not_sound(tmp_path, caplog):
    """They are no queries, and a server wants an answer to them all the same."""
    queries, names, whole = raw_cirr(tmp_path)
    made = submissions.make_submissions(
        "cirr", queries, names.tolist(), *cirr_lists(queries, whole)
    )
    content = {k: v for k, v in made["cirr_recall.json"].items() if k != queries.ids[4]}
    for official in ("val", "test1"):
        path = tmp_path / "captions" / f"cap.rc2.{official}.json"
        records = json.loads(path.read_text())
        del records[4]["caption"]
        write_json(path, records)
    fails(tmp_path, content, "all 80 queries", "1 are not", split="test1")
    with caplog.at_level("WARNING"):
        got = predictions.score("cirr", "val", write_json(tmp_path / "p.json", content), tmp_path)
    assert got["queries"] == 79
    assert "1 records" in caplog.text


@pytest.mark.parametrize("variant", ["original", "val"])
def test_scoring_fashioniq_files(tmp_path, variant):
    queries, names, pools = made_fashioniq(4, (200, 120, 90))
    content, rankings, targets = {}, {}, {}
    rng = np.random.default_rng(1)
    for category in CATEGORIES:
        mine = [i for i, pool in enumerate(queries.pools) if pool == category]
        records = [
            {
                "candidate": names[queries.reference[i]].item(),
                "target": names[queries.target[i]].item(),
                "captions": ["is red", ""],
            }
            for i in mine
        ]
        write_json(tmp_path / f"cap.{category}.val.json", records)
        write_json(tmp_path / f"split.{category}.val.json", names[pools[category]].tolist())
        targets[category] = [record["target"] for record in records]
        smaller = {name for r in records for name in (r["candidate"], r["target"])}
        rankings[category] = []
        for i in range(len(mine)):
            whole = names[rng.permutation(pools[category])]
            content[f"{category}-val-{i}"] = whole.tolist()
            kept = whole if variant == "original" else whole[np.isin(whole, [*smaller])]
            rankings[category].append(kept)
    path = write_json(tmp_path / "p.json", content)
    got = predictions.score("fashioniq", "val", path, tmp_path, variant)
    expected = official_fashioniq(rankings, targets)
    shortest = min(len(found) for v in rankings.values() for found in v)
    same(got, expected | {"shortest_list": shortest}, besides=["top1_is_reference"])


def test_scoring_circo_files(tmp_path):
    records, ids = made_circo(1)
    write_json(tmp_path / "annotations" / "val.json", records)
    rng = np.random.default_rng(9)
    content = {}
    for record in records:
        # Images that no annotation names are in the gallery too.
        images = rng.permutation([*ids.tolist(), *range(600_000, 600_040)]).tolist()
        hits = record["gt_img_ids"][:4]
        content[str(record["id"])] = [*hits[1:], *(i for i in images if i not in hits), *hits][:50]
    expected = official_circo(content, records) | {"shortest_list": 50}
    as_text = {k: [f"{image:012}" for image in v] for k, v in content.items()}
    for form in (content, as_text):
        path = write_json(tmp_path / "p.json", form)
        got = predictions.score("circo", "val", path, tmp_path)
        same(got, expected, besides=["top1_is_reference"])
    circo = {"dataset": "circo"}
    fails(tmp_path, content | {"0": [5, "005"]}, "image twice", **circo)
    for wrong in ("x", -5, "-5", "\u0665", "\u00b2", "1" * 21, 10**20, 5.0, True, None, [5]):
        bad = content | {"0": [wrong]}
        fails(tmp_path, bad, "without a list of image ids (integers)", **circo)
    fails(tmp_path, {k: v for k, v in content.items() if k != "0"}, "'0'", **circo)


def test_scoring_triplets(tmp_path):
    images = [f"{i}.jpg" for i in range(12)]
    for image in images:
        (tmp_path / image).write_bytes(b"")
    lines = [
        {"id": "a", "reference": "0.jpg", "text": "red", "targets": ["1.jpg", "2.jpg"]},
        {"id": "b", "reference": "0.jpg", "text": "blue", "target": "3.jpg", "kind": "color"},
        {"id": "c", "reference": "0.jpg", "text": "green"},
    ]
    text = "\n".join(json.dumps(line | {"split": "test"}) for line in lines)
    (tmp_path / "triplets.jsonl").write_text(text)
    content = {"a": ["2.jpg", "5.jpg", "1.jpg"], "b": ["0.jpg", "3.jpg"], "c": ["1.jpg"]}
    path = write_json(tmp_path / "out" / "p.json", content)
    got = predictions.score("triplets", "test", path, tmp_path)
    assert (got["queries"], got["queries_without_target"], got["shortest_list"]) == (2, 1, 1)
    assert (got["R@1"], got["R@5"], got["R@1/color"], got["top1_is_reference"]) == (0, 1, 0, 0.5)
    assert got["mAP@10"] == pytest.approx((1 + 2 / 3) / 2)
    write_json(path, content | {"c": ["99.jpg"]})
    with pytest.raises(UserError, match="not in their gallery"):
        predictions.score("triplets", "test", path, tmp_path)


# --- The real annotations -------------------------------------------------------------------------


def read(*parts):
    return json.loads(REAL.joinpath(*parts).read_text())


def random_ranking(rng, names, favourite):
    """A whole ranking in which the favourite is often near the top."""
    scores = rng.random(len(names))
    if rng.random() < 0.7:
        scores[names == favourite] = 1 - 0.05 * rng.random() ** 3
    return names[np.argsort(-scores)]


@real
def test_real_cirr(tmp_path):
    rng = np.random.default_rng(0)
    names = np.array([*read("cirr", "image_splits", "split.rc2.val.json")])
    records = read("cirr", "captions", "cap.rc2.val.json")
    whole = [random_ranking(rng, names, record["target_hard"]) for record in records]
    expected, without, inside = official_cirr(
        whole,
        [record["reference"] for record in records],
        [record["target_hard"] for record in records],
        [record["img_set"]["members"] for record in records],
    )
    assert 0 < expected["R@1"] < expected["R@50"] < 1
    ids = [str(record["pairid"]) for record in records]
    facts = {"queries": 4181, "lists_with_reference": 0}
    for metric, prefix, lists, length in (
        ("recall", "R@", without, 50),
        ("recall_subset", "R_subset@", inside, 3),
    ):
        content = {"version": "rc2", "metric": metric}
        content |= {query: found[:length].tolist() for query, found in zip(ids, lists)}
        path = write_json(tmp_path / "p.json", content)
        got = predictions.score("cirr", "val", path, REAL / "cirr")
        wanted = {k: v for k, v in expected.items() if k.startswith(prefix)} | facts
        same(got, wanted | {"shortest_list": length})


@real
def test_real_circo(tmp_path):
    rng = np.random.default_rng(0)
    records = read("circo", "val.json")
    content = {}
    for record in records:
        images = rng.choice(600_000, 60, replace=False).tolist()
        truths = [i for i in record["gt_img_ids"] if rng.random() < 0.6]
        found = rng.permutation([*images[:50], *truths]).tolist()
        content[str(record["id"])] = list(dict.fromkeys(found))[:50]
    expected = official_circo(content, records)
    path = write_json(tmp_path / "p.json", content)
    got = predictions.score("circo", "val", path, REAL / "circo")
    same(got, expected | {"shortest_list": 50}, besides=["top1_is_reference"])
    assert got["queries"] == 220
    aspects = {key for key in got if key.startswith("mAP@10/")}
    assert len(aspects) == 9
    assert got["queries/negation"] == 21


@real
@pytest.mark.parametrize("variant", ["original", "val"])
def test_real_fashioniq(tmp_path, variant):
    rng = np.random.default_rng(0)
    content, rankings, targets, references, shortest = {}, {}, {}, [], []
    for category in CATEGORIES:
        names = read("fashioniq", "image_splits", f"split.{category}.val.json")
        records = read("fashioniq", "captions", f"cap.{category}.val.json")
        smaller = {name for r in records for name in (r["candidate"], r["target"])}
        names = np.array(names)
        known = np.isin(names, list(smaller))
        assert known.sum() == {"dress": 2628, "shirt": 3089, "toptee": 2902}[category]
        targets[category] = [record["target"] for record in records]
        rankings[category] = []
        for i, record in enumerate(records):
            whole = random_ranking(rng, names, record["target"])
            listed = whole[: 50 if variant == "original" else 150]
            content[f"{category}-val-{i}"] = listed.tolist()
            left = listed if variant == "original" else listed[[n in smaller for n in listed]]
            rankings[category].append(left)
            references.append(left[0] == record["candidate"])
            shortest.append(len(left))
    path = write_json(tmp_path / "p.json", content)
    got = predictions.score("fashioniq", "val", path, REAL / "fashioniq", variant)
    expected = official_fashioniq(rankings, targets)
    expected |= {"shortest_list": min(shortest), "top1_is_reference": np.mean(references)}
    same(got, expected)
    assert got["queries"] == 6016
    assert 0.05 < got["R@10"] < got["R@50"] < 0.95


@real
def test_real_files_with_images_of_another_category(tmp_path):
    pools = {c: read("fashioniq", "image_splits", f"split.{c}.val.json") for c in CATEGORIES}
    counts = {"dress": 2017, "shirt": 2038, "toptee": 1961}
    content = {f"{c}-val-{i}": pools[c][:50] for c in CATEGORIES for i in range(counts[c])}
    raw = REAL / "fashioniq"
    predictions.score("fashioniq", "val", write_json(tmp_path / "p.json", content), raw)
    wrong = content | {"dress-val-3": pools["shirt"][:50]}
    fails(tmp_path, wrong, "not in their gallery", "dress-val-3", dataset="fashioniq", raw=raw)
    test = {"dataset": "fashioniq", "split": "test", "raw": raw}
    fails(tmp_path, {}, "fashioniq test has no labels", **test)


@real
@pytest.mark.parametrize(("dataset", "num_queries"), [("cirr", 4148), ("circo", 800)])
def test_real_submissions(tmp_path, dataset, num_queries):
    """Files for the test splits keep the rules, the limit of their size among them."""
    if dataset == "cirr":
        names = [*read("cirr", "image_splits", "split.rc2.test1.json")]
        names.sort(key=len, reverse=True)  # the longest names: the largest file
        records = read("cirr", "captions", "cap.rc2.test1.json")
        lists = {"recall": {}, "recall_subset": {}}
        for record in records:
            members = [m for m in record["img_set"]["members"] if m != record["reference"]]
            top = [name for name in names[:51] if name != record["reference"]]
            lists["recall"][str(record["pairid"])] = top[:50]
            lists["recall_subset"][str(record["pairid"])] = members[:3]
        contents = [{"version": "rc2", "metric": m, **found} for m, found in lists.items()]
    else:
        contents = [{str(i): list(range(50)) for i in range(800)}]
    for content in contents:
        assert len(content) - 2 * (dataset == "cirr") == num_queries
        options = {"dataset": dataset, "split": "test", "raw": REAL / dataset}
        fails(tmp_path, content, "keeps the rules", **options)


@real
def test_real_preferences(tmp_path):
    """The judgements' own facts: 1,641 of 3,050 prefer set 1, 11 pairs of sets are the same."""
    hpfiq = read("hp_fashioniq", "hpfiq.json")
    first, second, preferred, names = [], [], [], []
    for user, of_user in hpfiq.items():
        for name, questions in of_user.items():
            names += [f"{user}/{name}/{i}" for i in range(25)]
            for a, b, answer in zip(
                questions["retrieved_set1"], questions["retrieved_set2"], questions["preferred set"]
            ):
                # A score for each image by its name alone, and exact means.
                scores = [
                    [zlib.crc32(path.encode()) / 64 for path in chosen["img_path"]]
                    for chosen in (a, b)
                ]
                first.append(scores[0])
                second.append(scores[1])
                preferred.append(int(answer))
    got = preference_metrics(first, second, preferred)
    assert got["judgements"] == 3050
    assert got["always_first"] == 1641 / 3050
    assert got["ties"] == 11
    assert got["preference_ratio"] == pytest.approx(
        official_preference(first, second, preferred), abs=1e-9
    )
    path = write_json(tmp_path / "p.json", dict(zip(names, map(list, zip(first, second)))))
    facts = {"official": 3050}
    assert score_preferences(path, REAL / "hp_fashioniq" / "hpfiq.json") == got | facts
