"""Several models in one table: intervals, what is refused, and the files."""

import csv
import dataclasses
import io
import json
import re

import numpy as np
import pytest
from etils import epath

from dqe_jax.config import RunConfig
from dqe_jax.data.examples import Queries
from dqe_jax.data.splits import Coverage
from dqe_jax.evaluation import comparison, comparison_tables, predictions, query_results, scoring
from dqe_jax.evaluation.asked import Ids, Labels
from dqe_jax.evaluation.query_results import SUFFIX, QueryResults
from dqe_jax.testing.commands import run_module
from dqe_jax.testing.small_runs import small_config
from dqe_jax.utils.errors import UserError


def made(name="one", seed=0, count=60, strata=1, better=0.0, **changes):
    """Results of a model; the queries of a reference are alike."""
    rng = np.random.default_rng(seed)
    level = np.repeat(rng.random(count // 3), 3)
    values = {"R@1": (level * 0.6 + better > rng.random(count)).astype(float)}
    values["mAP@10"] = np.where(np.arange(count) % 4 == 0, np.nan, level)
    fields = {
        "name": name, "dataset": "made", "split": "test", "protocol": "plain",
        "reference": "stays", "questions": "q", "gallery": "g", "images": 40, "cut_at": None,
        "ids": [f"q{i}" for i in range(count)],
        "references": [f"r{i // 3}" for i in range(count)],
        "strata": [f"s{i // 3 % strata}" for i in range(count)],
        "values": values,
    }  # fmt: skip
    return QueryResults(**fields | changes)


def shuffled(results, seed=7):
    """The same results with the queries that got them exchanged."""
    order = np.random.default_rng(seed).permutation(len(results.ids))
    values = {key: value[order] for key, value in results.values.items()}
    return dataclasses.replace(results, name="shuffled", values=values)


def test_a_run_against_itself_and_in_another_order():
    one = made(strata=2)
    again = dataclasses.replace(one.take(np.random.default_rng(1).permutation(60)), name="again")
    table = comparison.compare([one, again])
    assert table.lines[0].differences is None
    for key in ("R@1", "mAP@10"):
        zero = table.lines[1].differences[key]
        assert (zero.value, zero.low, zero.high) == (0, 0, 0)
        assert table.lines[0].values[key] == table.lines[1].values[key]


def by_numpy(values, references, strata, draws, seed=1):
    """A second statement of the interval: references are drawn one by one, by stratum."""
    rng = np.random.default_rng(seed)
    found = []
    groups = {}
    for value, reference, stratum in zip(values, references, strata):
        groups.setdefault(stratum, {}).setdefault(reference, []).append(value)
    for _ in range(draws):
        means = []
        for members in groups.values():
            names = list(members)
            drawn = rng.choice(len(names), len(names))
            together = np.concatenate([members[names[i]] for i in drawn])
            means.append(np.nanmean(together))
        found.append(np.mean(means))
    return np.percentile(found, [2.5, 97.5])


@pytest.mark.parametrize("strata", [1, 3])
def test_intervals_by_a_second_statement(strata):
    """Both are random: their ends agree up to a small part of the interval's length."""
    one, two = made(count=180, strata=strata), made("two", 5, 180, strata, better=0.1)
    table = comparison.compare([one, two])
    columns = (one.references, one.strata, 800)
    for key in ("R@1", "mAP@10"):
        for values, interval in (
            (one.values[key], table.lines[0].values[key]),
            (two.values[key], table.lines[1].values[key]),
            (two.values[key] - one.values[key], table.lines[1].differences[key]),
        ):
            low, high = by_numpy(values, *columns)
            assert interval.low == pytest.approx(low, abs=0.15 * (high - low))
            assert interval.high == pytest.approx(high, abs=0.15 * (high - low))
            names = np.unique(one.strata)
            own = [values[np.array(one.strata) == name] for name in names]
            assert interval.value == pytest.approx(np.mean([np.nanmean(x) for x in own]))


def test_intervals_to_the_digit_from_the_files_alone(tmp_path):
    """By the draws that docs/how-to/compare.md states, in NumPy and without this package."""
    paths = [tmp_path / f"{name}{SUFFIX}" for name in ("one", "two")]
    for path, seed in zip(paths, (0, 5)):
        query_results.write_results(made(path.name, seed, 90, 2), epath.Path(path))
    table = comparison.compare([query_results.read_results(epath.Path(path)) for path in paths])

    one, two = (json.loads(path.read_text()) for path in paths)
    for key in ("R@1", "mAP@10"):
        apart = [
            np.nan if None in (a, b) or np.isnan([a, b]).any() else b - a
            for a, b in zip(one["values"][key], two["values"][key])
        ]
        rng, means, whole = np.random.default_rng(0), [], []
        for stratum in sorted(set(one["queries"]["stratum"])):
            by_reference = {}
            for reference, own, value in zip(
                one["queries"]["reference"], one["queries"]["stratum"], apart
            ):
                if own == stratum:
                    by_reference.setdefault(reference, []).append(value)
            groups = [by_reference[reference] for reference in sorted(by_reference)]
            times = rng.multinomial(len(groups), [1 / len(groups)] * len(groups), 1000)
            drawn = [np.concatenate([g * t for g, t in zip(groups, row) if t]) for row in times]
            means.append([np.nanmean(values) for values in drawn])
            whole.append(np.nanmean(np.concatenate(groups)))
        low, high = np.percentile(np.mean(means, axis=0), [2.5, 97.5])
        found = table.lines[1].differences[key]
        assert dataclasses.astuple(found) == pytest.approx((np.mean(whole), low, high), abs=1e-12)


def test_pairs_are_told_apart_better_than_single_models():
    """A model that is a little better for each query is so, though the two intervals overlap."""
    one = made()
    more = {key: value + 0.02 for key, value in one.values.items()}
    table = comparison.compare([one, dataclasses.replace(one, name="more", values=more)])
    first, second = (line.values["R@1"] for line in table.lines)
    assert second.low < first.high
    apart = table.lines[1].differences["R@1"]
    assert (apart.low, apart.high) == (pytest.approx(0.02), pytest.approx(0.02))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"protocol": "fashioniq-val"}, "the protocol is 'fashioniq-val' and 'plain'"),
        ({"split": "validation"}, "the split is 'validation' and 'test'"),
        ({"dataset": "other"}, "the data set is 'other' and 'made'"),
        ({"reference": "left out"}, "the policy for the reference is 'left out' and 'stays'"),
        ({"questions": "x"}, r"their queries or labels differ \(60 and 60 queries\)"),
        ({"gallery": "x", "images": 20}, r"they rank other images \(20 and 40\)"),
        ({"cut_at": 50}, "from lists cut at 50 images and from whole rankings; evaluate 'two' by"),
        ({"name": "one"}, "2 models are called 'one': give NAME=PATH"),
        ({"values": {"R@7": np.zeros(60)}}, "'one' and 'two' have no metric in common"),
        ({"count": 57}, r"'two' has other queries than 'one' \(57 and 60\)"),
    ],
)
def test_what_is_not_alike_is_refused(changes, sentence):
    two = made(**{"name": "two", **changes})
    with pytest.raises(UserError, match=sentence) as error:
        comparison.compare([made(), two])
    assert "\n" not in str(error.value)


def test_models_of_equally_cut_lists_are_marked():
    table = comparison.compare([made(cut_at=50), made("two", cut_at=50)])
    assert "lists that are cut (the shortest holds 50 images)" in comparison_tables.as_text(table)
    assert "cut" not in comparison_tables.as_text(comparison.compare([made(), made("two")]))
    with pytest.raises(UserError, match="from lists cut at 10 images and from lists cut at 50"):
        comparison.compare([made(cut_at=50), made("two", cut_at=10)])


def test_an_unknown_gallery_is_told(caplog):
    with caplog.at_level("WARNING"):
        comparison.compare([made(), made("two", gallery=None, images=None)])
    assert "'two' and 'one' are taken to rank the same gallery" in caplog.text


# --- Files ----------------------------------------------------------------------------------------


def test_results_come_back_and_damaged_ones_are_told(tmp_path):
    one = made(strata=2)
    path = epath.Path(tmp_path / f"a{SUFFIX}")
    query_results.write_results(one, path)
    again = query_results.read_results(path)
    for key, value in one.values.items():
        np.testing.assert_array_equal(again.values[key], value)
    plain = {"values": {}}
    assert dataclasses.replace(again, **plain) == dataclasses.replace(one, **plain)
    held = json.loads(path.read_text())
    for change, sentence in (
        ({"protocol": None}, "'protocol' must be a string"),
        ({"images": "many"}, "'images' is 'many'"),
        ({"cut_at": "fifty"}, "'cut_at' is 'fifty'"),
        ({"queries": {}}, "'queries' must hold a list 'id' of strings"),
        ({"queries": held["queries"] | {"id": ["q"] * 60}}, "'queries' holds an id twice"),
        ({"queries": held["queries"] | {"id": ["q"]}}, "its lists are not alike"),
        ({"values": {"R@1": [1.0]}}, "'R@1' of 'values' must be a list of 60 numbers"),
        ({"values": {"R@1": ["x"] * 60}}, "'R@1' of 'values' must be a list of 60 numbers"),
    ):
        path.write_text(json.dumps(held | change))
        with pytest.raises(UserError, match=sentence):
            query_results.read_results(path)


def test_the_results_of_a_directory(tmp_path):
    run = tmp_path / "run"
    for split, name in (("test", "2"), ("test", "10"), ("validation", "2")):
        path = epath.Path(run / "eval" / f"{split}-{name}{SUFFIX}")
        query_results.write_results(made(f"{split} {name}"), path)
    assert comparison.find_results(run, "test").name == f"test-10{SUFFIX}"
    assert comparison.find_results(run / "eval", "validation").name == f"validation-2{SUFFIX}"
    file = run / "eval" / f"test-2{SUFFIX}"
    (named, other) = comparison.read_models([("", file), ("mine", run)], "test")
    assert (named.name, other.name) == ("test 2", "mine")
    for path, split, sentence in (
        (run, None, "results on test, validation: choose by --split="),
        (run, "train", "no results on train: evaluate that run"),
        (tmp_path / "x", None, "is no directory and no file of results"),
    ):
        with pytest.raises(UserError, match=sentence):
            comparison.find_results(path, split)
    for name in ("clip", "blip"):
        query_results.write_results(made(), epath.Path(tmp_path / "files" / f"test-{name}{SUFFIX}"))
    with pytest.raises(UserError, match="has results of blip, clip: name one file"):
        comparison.find_results(tmp_path / "files", "test")


def test_tables(tmp_path):
    names = "a_b & 50%", "c|d"
    table = comparison.compare([made(names[0]), made(names[1], 3, better=0.7)])
    comparison_tables.write_tables(table, epath.Path(tmp_path / "out"))
    markdown = (tmp_path / "out" / "comparison.md").read_text()
    head, rule, *lines = markdown.split("\n\n")[0].split("\n")
    assert head == "| model | R@1 | mAP@10 |"
    assert rule == "| --- | ---: | ---: |"
    assert [len(re.findall(r"(?<!\\)\|", line)) for line in lines] == [4, 4, 4]
    latex = (tmp_path / "out" / "comparison.tex").read_text()
    assert r"a\_b \& 50\%" in latex
    body = [line for line in latex.split("\n") if line.endswith(r"\\")]
    assert [len(re.findall(r"(?<!\\)&", line)) for line in body] == [2] * 4
    rows = list(csv.DictReader(io.StringIO((tmp_path / "out" / "comparison.csv").read_text())))
    assert [(row["model"], row["metric"]) for row in rows] == [
        (name, key) for name in names for key in ("R@1", "mAP@10")
    ]
    apart = table.lines[1].differences["R@1"]
    assert float(rows[2]["difference_low"]) == apart.low > 0
    assert rows[0]["difference"] == ""
    cell = f"{apart.value:+.4f} [{apart.low:+.4f}, {apart.high:+.4f}]*"
    assert cell in comparison_tables.as_text(table)


# --- Cut lists ------------------------------------------------------------------------------------


def asked_of(relevant, size=80, negatives=()):
    """Queries of a data set with labels, and `size` images."""
    count, nothing = len(relevant), np.zeros(0, np.int32)
    queries = Queries(
        ids=[f"q{i}" for i in range(count)],
        texts=["toy"] * count,
        reference=np.zeros(count, np.int32),
        target=np.full(count, -1, np.int32),
        known_positives=[nothing] * count,
        relevant=[np.array(rows, np.int32) for rows in relevant],
        kinds=[("a to b",)] * count,
        attributes=[()] * count,
        pools=[""] * count,
        subset=[nothing] * count,
        negatives=[np.array(rows, np.int32) for rows in negatives],
    )
    ids = Ids([f"i{row}" for row in range(size)])
    pools = {"": np.arange(size, dtype=np.int32)}
    return Labels("test", queries, ids, pools, Coverage(count, count, size, size))


def results_of_lists(asked, tmp_path, dataset="ltll", last=None, name="lists"):
    """What predictions score that rank the images by row, and end before `last`."""
    lists = {query: asked.gallery.ids[:last] for query in asked.queries.ids}
    path = tmp_path / f"{name}.json"
    path.write_text(json.dumps(lists))
    predictions.score_asked(dataset, asked, path, output=tmp_path / name)
    facts = json.loads((tmp_path / name / "predictions-test.json").read_text())
    results = query_results.read_results(
        epath.Path(tmp_path / name / f"predictions-test{query_results.SUFFIX}")
    )
    assert facts["cut_at"] == results.cut_at
    return results


def test_cut_lists_are_not_compared_with_whole_rankings(tmp_path, caplog):
    """The 50 images of `.ranked.json` are fewer than what counts where whole rankings do."""
    asked = asked_of([[3, 60], [70], [2]])
    whole = results_of_lists(asked, tmp_path, name="whole")
    assert "Lists end before" not in caplog.text
    with caplog.at_level("WARNING"):
        cut = results_of_lists(asked, tmp_path, last=50, name="cut")
    assert (whole.cut_at, cut.cut_at) == (None, 50)
    assert "Lists end before all that counts (the shortest holds 50 images)" in caplog.text
    assert np.nanmean(cut.values["mAP"]) < np.nanmean(whole.values["mAP"])
    for pair in ([whole, cut], [cut, whole]):
        with pytest.raises(UserError, match=r"lists cut at 50 images.*evaluate 'cut' by --embed"):
            comparison.compare(pair)
    again = dataclasses.replace(cut, name="again")
    assert comparison.compare([cut, again]).cut_at == 50


@pytest.mark.parametrize(
    ("dataset", "columns", "last", "cut_at"),
    [
        ("ltll", {"relevant": [[3, 49], [0]]}, 50, None),  # all that counts is in the lists
        ("ltll", {"relevant": [[3, 90], [0]]}, 50, None),  # image 90 is not at hand
        ("ltll", {"relevant": [[3, 60], [0]]}, 80, None),  # all of the gallery
        ("pinpoint", {"relevant": [[60], [0]]}, 50, None),  # only the first 50 count
        ("pinpoint", {"relevant": [[60], [0]]}, 49, 49),
        ("pinpoint", {"relevant": [[3], [0]]}, 20, None),
        ("pinpoint", {"relevant": [[3], [0]], "negatives": [[30], [1]]}, 20, 20),
    ],
)
def test_which_lists_are_cut(tmp_path, dataset, columns, last, cut_at):
    asked = asked_of(**columns)
    assert results_of_lists(asked, tmp_path, dataset, last).cut_at == cut_at


# --- From embeddings to the command ---------------------------------------------------------------


def test_shuffled_queries_are_far_from_their_own(tmp_path):
    """A model against itself with its queries exchanged, through the files and the command."""
    raw = tmp_path / "raw"
    raw.mkdir()
    images = [f"{i}.jpg" for i in range(60)]
    for image in images:
        (raw / image).write_bytes(b"")
    lines = [
        {"id": f"q{i}", "reference": images[i], "text": "x", "target": images[(i + 1) % 60]}
        for i in range(60)
    ]
    text = "\n".join(json.dumps(line | {"split": "test"}) for line in lines)
    (raw / "triplets.jsonl").write_text(text)
    config = RunConfig.of(small_config(tmp_path / "none", **{"data.dataset": "triplets"}))
    rng = np.random.default_rng(0)
    gallery = rng.normal(size=(60, 8))
    query = np.roll(gallery, -1, axis=0) + 0.5 * rng.normal(size=(60, 8))
    ids = {"query_id": [f"q{i}" for i in range(60)], "gallery_id": images}
    for name, rows in (("own", query), ("shuffled", query[rng.permutation(60)])):
        np.savez(tmp_path / f"{name}.npz", query=rows, gallery=gallery, **ids)
        scoring.score_embeddings(
            config, tmp_path / f"{name}.npz", tmp_path / "out", raw_dir=raw, similarity="cosine"
        )
    files = [str(tmp_path / "out" / f"test-{name}{SUFFIX}") for name in ("own", "shuffled")]
    done = run_module(
        "dqe_jax",
        "compare",
        files[0],
        files[1],
        f"same={files[0]}",
        f"--output={tmp_path}",
        cwd=".",
    )
    assert done.returncode == 0, done.stderr
    assert "shuffled - own" in done.stdout
    rows = list(csv.DictReader(io.StringIO((tmp_path / "comparison.csv").read_text())))
    by = {(row["model"], row["metric"]): row for row in rows}
    far, same = by["shuffled", "R@5"], by["same", "R@5"]
    assert float(far["difference_high"]) < -0.3
    assert {same[f"difference{end}"] for end in ("", "_low", "_high")} == {"0.0"}
    failed = run_module("dqe_jax", "compare", files[0], cwd=".")
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: name two models or more: dqe-jax compare")


def test_intervals_do_not_depend_on_the_order_of_queries():
    one = made(count=90)
    other = one.take(np.random.default_rng(2).permutation(90)).measured()
    for key, interval in one.measured().items():
        ends = dataclasses.astuple(interval)
        assert dataclasses.astuple(other[key]) == pytest.approx(ends, abs=1e-12)
