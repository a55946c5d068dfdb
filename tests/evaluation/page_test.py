"""The report page: its figures, and how it behaves in a real browser."""

import dataclasses
import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from etils import epath

from dqe_jax.data.examples import Queries
from dqe_jax.data.splits import Coverage
from dqe_jax.evaluation import (
    comparison,
    intervals,
    metrics,
    page,
    protocols,
    query_results,
    report,
)
from dqe_jax.utils.errors import UserError

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
KINDS = ("color", "shape")


class Gallery:
    """Images of one colour each."""

    def __init__(self, count):
        self.ids = [f"img{row}" for row in range(count)]
        self.asked = []

    def __getitem__(self, row):
        self.asked.append(row)
        rng = np.random.default_rng(row)
        return np.broadcast_to(rng.integers(0, 256, 3, np.uint8), (12, 16, 3))

    def __len__(self):
        return len(self.ids)


def found(count=60, images=40, seed=0, protocol="plain", text=lambda i: f"make it {i}"):
    """An evaluator that has run, and its result: every query ranks all images at random."""
    rng = np.random.default_rng(seed)
    rows = np.argsort(rng.random((count, images)), axis=1).astype(np.int32)[:, :50]
    target = np.arange(count, dtype=np.int32) * 7 % images
    pools = [("dress", "shirt")[i % 3 == 0] for i in range(count)]
    queries = Queries(
        ids=[f"q{i}" for i in range(count)],
        texts=[text(i) for i in range(count)],
        reference=(np.arange(count, dtype=np.int32) // 2 + 1) % images,
        target=target,
        known_positives=[np.array([t]) for t in target],
        relevant=[np.array([t, (t + 1) % images]) if i % 5 else [] for i, t in enumerate(target)],
        kinds=[(KINDS[i % 2],) for i in range(count)],
        attributes=[()] * count,
        pools=pools if protocol != "plain" else [""] * count,
        subset=[np.zeros(0, int)] * count,
    )
    split = SimpleNamespace(
        name="test",
        queries=queries,
        gallery=Gallery(images),
        coverage=Coverage(count, count, images, images),
        digest="d",
    )
    chosen = protocols.PROTOCOLS[protocol]
    split.pools = {name: np.arange(images) for name in sorted(set(queries.pools))}
    evaluator = SimpleNamespace(
        split=split, protocol=chosen, labelled=np.arange(count), pools=split.pools
    )
    result = SimpleNamespace(
        metrics=chosen.measure(queries, metrics.pad_lists(rows, 50)),
        baselines={"random": {"R@1": 0.025}, "reference_only": {"R@1": 0.1}},
        rows=rows,
        subset_rows=None,
        places=None,
        attribute_weights=rng.random((count, 2), np.float32),
        composition_gain=None,
    )
    return evaluator, result


def write(directory, evaluator, result, **options):
    options = {"run": "mine", "dataset": "made", "step": 7, "attributes": KINDS, **options}
    path = page.write_page(evaluator, result, epath.Path(directory), **options)
    text = path.read_text(encoding="utf-8")
    (data,) = re.findall(r'id="data">(.*?)</script>', text, re.S)
    (pictures,) = re.findall(r'id="pictures">(.*?)</script>', text, re.S)
    return path, json.loads(data), pictures.split("\n")


# --- Intervals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["plain", "fashioniq-original"])
def test_intervals_are_of_the_protocols_own_metrics(protocol):
    evaluator, result = found(300, 60, protocol=protocol)
    queries = evaluator.split.queries
    values = intervals.query_values(evaluator.protocol, queries, result.rows)
    strata = intervals.strata_of(evaluator.protocol, queries)
    got = intervals.intervals(values, queries.reference, strata)
    without = {"top1_is_reference"} if protocol != "plain" else set()
    assert set(got) == set(evaluator.protocol.headline) - without
    for key, one in got.items():
        assert one.value == pytest.approx(result.metrics[key])
        assert one.low <= one.value <= one.high


def test_intervals_hold_what_they_promise():
    """Means of new draws from the same source lie in 95% of the intervals, or nearly."""
    rng = np.random.default_rng(1)
    inside = []
    for seed in range(200):
        truth = 0.3
        level = rng.beta(3, 7, 80)  # of each reference, whose queries are alike
        reference = np.repeat(np.arange(80), 4)
        values = (rng.random(320) < level[reference]).astype(float)
        strata = np.zeros(320, int)
        one = intervals.intervals({"x": values}, reference, strata, seed=seed, draws=300)["x"]
        inside.append(one.low <= truth <= one.high)
    assert 0.90 <= np.mean(inside) <= 0.99


def test_queries_that_do_not_count_are_left_out():
    values = {"x": np.array([1.0, np.nan, 0.0, np.nan]), "y": np.full(4, np.nan)}
    got = intervals.intervals(values, np.arange(4), np.zeros(4, int))
    assert set(got) == {"x"}
    assert got["x"].value == 0.5


# --- The file -------------------------------------------------------------------------------------


def test_the_page_holds_every_query_and_each_image_once(tmp_path):
    texts = {3: "</script><b>@DATA@", 4: ""}
    evaluator, result = found(text=lambda i: texts.get(i, f"make it {i}"))
    path, data, pictures = write(tmp_path, evaluator, result)
    assert path.name == "report.html"
    gallery, queries = evaluator.split.gallery, evaluator.split.queries
    assert len(gallery.asked) == len(set(gallery.asked)) == len(pictures) == len(data["names"])
    for i, line in enumerate(data["queries"]):
        id_, text, kinds, reference, target, rank, shown, marks, weights, first = line
        assert (id_, text) == (queries.ids[i], queries.texts[i])
        assert [data["kinds"][k] for k in kinds] == list(queries.kinds[i])
        assert data["names"][reference] == f"img{queries.reference[i]}"
        assert data["names"][target] == f"img{queries.target[i]}"
        ranked = result.rows[i].tolist()
        assert rank == ranked.index(queries.target[i]) + 1
        assert [data["names"][x] for x in shown] == [f"img{row}" for row in ranked[:10]]
        for row, mark in zip(ranked, marks):
            if mark == "1":
                assert row == queries.target[i]
            assert (mark == "2") == (
                row in list(queries.relevant[i])
                and row not in (queries.target[i], queries.reference[i])
            )
        assert weights == [round(100 * float(x)) for x in result.attribute_weights[i]]
        hits = [at for at, row in enumerate(ranked, 1) if row in list(queries.relevant[i])]
        assert first == (hits[0] if hits else 0)
    text = path.read_text(encoding="utf-8")
    assert text.count("</script>") == 3
    assert not re.findall(r"(?:src|href)=.?https?:|//cdn|@import", text)


def test_a_split_without_labels_and_without_weights(tmp_path):
    evaluator, result = found(6)
    queries = dataclasses.replace(
        evaluator.split.queries, target=np.full(6, -1, np.int32), relevant=[[]] * 6
    )
    evaluator.split.queries, evaluator.labelled = queries, np.zeros(0, int)
    result.metrics, result.baselines = {}, None
    _, data, _ = write(tmp_path, evaluator, result, attributes=())
    assert data["metrics"] == data["groups"] == []
    assert not data["labelled"]
    assert {line[4] for line in data["queries"]} == {-1}


def results_of(directory, evaluator, result):
    """The files of an evaluation that are read again."""
    (directory / "eval").mkdir(parents=True)
    gallery, queries = evaluator.split.gallery, evaluator.split.queries
    lists = {q: [gallery.ids[row] for row in rows] for q, rows in zip(queries.ids, result.rows)}
    (directory / "eval" / "test-3.ranked.json").write_text(json.dumps(lists))
    found = report.results_of(evaluator, result, run=directory.name, dataset="made", step=3)
    path = epath.Path(directory / "eval" / f"test-3{query_results.SUFFIX}")
    query_results.write_results(found, path)
    return directory


def beside(evaluator, result):
    """Another run, without its files."""
    values = report.results_of(evaluator, result, run="other", dataset="made", step=3)
    return page.Compared(values.name, result.rows, values)


def test_a_second_run_stands_beside_the_first(tmp_path):
    evaluator, result = found()
    _, other = found(seed=5)
    place = results_of(tmp_path / "other", evaluator, other)
    against = page.read_compared(place, evaluator, "made")
    np.testing.assert_array_equal(against.rows[:, :40], other.rows)
    _, data, _ = write(tmp_path, evaluator, result, against=against)
    assert data["other"] == "other, step 3"
    by_key = {line["key"]: line for line in data["metrics"]}
    line = by_key["R@5"]
    assert line["other"][0] == pytest.approx(other.metrics["R@5"], abs=1e-5)
    difference = result.metrics["R@5"] - other.metrics["R@5"]
    assert line["difference"][0] == pytest.approx(difference, abs=1e-5)
    for i, query in enumerate(data["queries"]):
        assert query[10] == other.rows[i].tolist().index(evaluator.split.queries.target[i]) + 1
    # The page says what `dqe-jax compare` says.
    results_of(tmp_path / "mine", evaluator, result)
    named = [("", tmp_path / "other"), ("", tmp_path / "mine")]
    table = comparison.compare(comparison.read_models(named, "test"))
    for key, one in table.lines[1].differences.items():
        assert by_key[key]["difference"] == pytest.approx([one.value, one.low, one.high], abs=1e-5)
    same = page.read_compared(tmp_path / "mine", evaluator, "made")
    _, data, _ = write(tmp_path, evaluator, result, against=same)
    assert all(line["difference"] == [0, 0, 0] for line in data["metrics"])


def test_a_second_run_that_does_not_fit_is_refused(tmp_path):
    evaluator, result = found(4)

    def fails(directory, evaluator, sentence):
        with pytest.raises(UserError, match=rf"--report_against: .*{sentence}"):
            page.read_compared(directory, evaluator, "made")

    fails(tmp_path / "none", evaluator, "none is no directory and no file of results")
    (tmp_path / "empty").mkdir()
    fails(tmp_path / "empty", evaluator, "empty has no results on test: evaluate")
    place = results_of(tmp_path / "a", evaluator, result)
    fails(place, found(5)[0], "their queries or labels differ")
    fails(place, found(4, protocol="fashioniq-val")[0], "the protocol is 'plain' and 'fashioniq")
    fewer = SimpleNamespace(**vars(evaluator) | {"pools": {"": np.arange(39)}})
    fails(place, fewer, "they rank other images")
    (place / "eval" / "test-3.ranked.json").write_text("{}")
    with pytest.raises(UserError, match=r"test-3\.ranked\.json lacks query 'q0'"):
        page.read_compared(place, evaluator, "made")


# --- In a browser ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A new Chromium, with a profile of its own."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed")
    with playwright.sync_playwright() as play:
        found = play.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield found
        found.close()


def opened(browser, path, **options):
    """The page in a tab, and what went wrong there."""
    context = browser.new_context(**options)
    tab, wrong = context.new_page(), []
    tab.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.on("request", lambda r: None if r.url[:5] in ("file:", "data:") else wrong.append(r.url))
    tab.goto(f"file://{path}")
    tab.wait_for_selector("html[data-ready]")
    return tab, wrong


@pytest.mark.slow
def test_filters_pages_and_keys_work_in_a_browser(browser, tmp_path):
    evaluator, result = found(300, 60, text=lambda i: f"make it {'red' if i % 2 else 'blue'} {i}")
    _, other = found(300, 60, seed=5)
    against = beside(evaluator, other)
    path, data, _ = write(tmp_path, evaluator, result, against=against)
    tab, wrong = opened(browser, path)
    ranks = {line[1]: line[5] or 10**9 for line in data["queries"]}
    behind = {line[1] for line in data["queries"] if (line[10] or 10**9) < (line[5] or 10**9)}

    def shown():
        return tab.locator("article h3").all_inner_texts()

    def said():
        return tab.locator("#count").inner_text()

    assert said() == "300 of 300 queries"
    first = [ranks[text] for text in shown()]
    assert len(first) == 20
    assert first == sorted(first, reverse=True)  # failures first
    assert first[0] == max(ranks.values())
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.className") == "skip"
    tab.locator("#next").focus()
    tab.keyboard.press("Enter")
    assert tab.locator("#place").inner_text() == "Page 2 of 15"
    assert max(ranks[text] for text in shown()) <= min(first)
    tab.select_option("#order", "best")
    assert tab.locator("#place").inner_text() == "Page 1 of 15"
    assert [ranks[text] for text in shown()] == sorted(ranks.values())[:20]
    for value, low, high in (("1", 1, 1), ("2-5", 2, 5), ("11-50", 11, 50), ("10+", 11, 10**9)):
        tab.select_option("#rank", value)
        expected = sum(low <= rank <= high for rank in ranks.values())
        assert said() == f"{expected} of 300 queries"
        assert all(low <= ranks[text] <= high for text in shown())
    tab.select_option("#rank", "all")
    tab.select_option("#kind", label="shape (150)")
    assert said() == "150 of 300 queries"
    assert all("red" in text for text in shown())
    tab.fill("#words", "RED 29")
    assert sorted(shown()) == sorted(t for t in ranks if "red 29" in t)
    tab.fill("#words", "")
    tab.select_option("#kind", "all")
    tab.select_option("#change", "worse")
    assert said() == f"{len(behind)} of 300 queries"
    assert set(shown()) <= behind
    tab.fill("#words", "nothing of the kind")
    assert said() == "0 of 300 queries"
    assert tab.locator("#next").is_disabled()
    tab.fill("#words", "")
    # Every image has a text, and has been decoded.
    assert tab.evaluate("[...document.images].every(i => i.alt && i.complete && i.naturalWidth)")
    assert tab.evaluate(
        "[...document.querySelectorAll('select,input')].every(e => e.labels.length)"
    )
    assert wrong == []


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_it_without_scrolling_sideways(browser, tmp_path, scheme):
    evaluator, result = found(40, 60)
    path, _, _ = write(tmp_path, evaluator, result, against=beside(evaluator, result))
    size = {"width": 360, "height": 740}
    tab, wrong = opened(browser, path, viewport=size, color_scheme=scheme)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 360
    paper = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == {"light": "rgb(255, 255, 255)", "dark": "rgb(13, 17, 23)"}[scheme]
    assert wrong == []


def test_the_page_says_the_composition_gain(tmp_path):
    evaluator, result = found()
    result.composition_gain = {"metric": "R@1", "gain": 0.2, "composed": "sum", "single": "text"}
    note = write(tmp_path, evaluator, result)[1]["note"]
    assert note.endswith(
        "(sum, the best of image and text together, less text, the best of one alone)."
    )
