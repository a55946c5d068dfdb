"""The audit of negatives: its figures are what plain statements of them give, on any devices."""

import dataclasses
import functools
import io
import itertools
import json
import logging
import math
import re
import statistics as plain
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest
from PIL import Image

from dqe_jax.data import splits
from dqe_jax.data.examples import Queries
from dqe_jax.data.splits import Split, known_positive_ids
from dqe_jax.distributed import mesh
from dqe_jax.experiments.audit import candidates, draws, figure, statistics
from dqe_jax.experiments.audit.candidates import CLASSES
from dqe_jax.experiments.audit.run import audit_checkpoint
from dqe_jax.method import mining
from dqe_jax.method.settings import NegativesConfig
from dqe_jax.testing.commands import run_module
from dqe_jax.testing.small_runs import small_config
from dqe_jax.training import loop
from dqe_jax.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
SHARES = ("false", "easy", "beats", "delta", "drawn")


class Photos:
    """A gallery without images: the image id of each row."""

    def __init__(self, photo):
        self.image_ids = np.array(photo, np.int32)

    def __len__(self):
        return len(self.image_ids)


def made_split(photo, reference, target, known_positives, relevant):
    count = len(reference)
    rows = lambda lists: [np.array(each, np.int32) for each in lists]  # noqa: E731
    queries = Queries(
        ids=[str(i) for i in range(count)],
        texts=[""] * count,
        reference=np.array(reference, np.int32),
        target=np.array(target, np.int32),
        known_positives=rows(known_positives),
        relevant=rows(relevant),
        kinds=[()] * count,
        attributes=[()] * count,
        pools=[""] * count,
        subset=rows([()] * count),
    )
    return Split("train", queries, Photos(photo), {}, None)


# ---------------------------------------------------------------------------------- the candidates

# Rows 0 to 9; row 8 is a copy of row 2, row 9 one of row 0.
COPIES = [0, 1, 2, 3, 4, 5, 6, 7, 2, 0]
SMALL = made_split(
    COPIES,
    # Query 2 has a copy of the reference of queries 0 and 1; query 3 has one of its own.
    reference=[0, 0, 9, 5],
    target=[1, 2, 3, -1],
    known_positives=[[1, 4], [2], [3], []],
    relevant=[[1, 4, 7, 99], [2], [3, 2], [6]],  # row 99 is not at hand
)


def test_classes_of_candidates():
    rows = np.arange(3)
    classes, forbidden = candidates.classify(
        candidates.truth_of(SMALL, rows), np.array([*COPIES, -1])
    )
    named = [
        {CLASSES[c]: {int(r) for r in np.flatnonzero((line == c) & ~never)} for c in range(3)}
        for line, never in zip(classes, forbidden)
    ]
    # Query 0: rows 1 and 4 are known. Others' targets 2 (with its copy 8) and 3 are near misses, as
    # is the reference 0 with its copy 9.
    assert named[0] == {"relevant": {7}, "near_miss": {0, 9, 2, 8, 3}, "unrelated": {5, 6}}
    assert named[1] == {"relevant": set(), "near_miss": {0, 9, 1, 4, 3}, "unrelated": {5, 6, 7}}
    assert named[2] == {"relevant": {2, 8}, "near_miss": {0, 9, 1, 4}, "unrelated": {5, 6, 7}}
    assert [set(np.flatnonzero(line)) for line in forbidden] == [{1, 4, 10}, {2, 8, 10}, {3, 10}]


def test_has_photo_is_membership():
    rng = np.random.default_rng(0)
    ids, photo = rng.integers(-1, 30, (7, 5)), rng.integers(-1, 20, 50)
    expected = [[p >= 0 and p in line for p in photo] for line in ids.tolist()]
    assert candidates.has_image(ids, photo).tolist() == expected
    assert not candidates.has_image(ids[:, :0], photo).any()


def test_the_sample_has_queries_of_known_truth_alone():
    assert candidates.sample_queries(SMALL, 99, seed=0).tolist() == [0, 1, 2]
    photos = range(300)
    relevant = [[i] if i % 3 else [] for i in photos]
    split = made_split(photos, photos, photos, [[i] for i in photos], relevant)
    sample = candidates.sample_queries(split, 50, seed=1)
    assert len(set(sample.tolist())) == 50
    assert (np.diff(sample) > 0).all()
    assert (sample % 3 > 0).all()
    assert candidates.sample_queries(split, 50, seed=1).tolist() == sample.tolist()
    assert candidates.sample_queries(split, 50, seed=2).tolist() != sample.tolist()


# ------------------------------------------------------------------------------------- the figures


def test_figures_of_candidates():
    delta = np.array([[-0.1, 0.0, 0.2, 0.6], [0.3, 0.4, 0.5, 0.9]], np.float32)
    counted = np.array([[1, 1, 1, 0], [0, 1, 1, 1]], bool)
    relevant = np.array([[1, 0, 0, 1], [1, 0, 0, 0]], bool)
    found = statistics.of_candidates(delta, counted, relevant, np.array([0.15, 0.5], np.float32))
    assert found["false"] == pytest.approx([1 / 3, 0])
    assert found["easy"] == pytest.approx([1 / 3, 1 / 3])  # at the bound is not above it
    assert found["beats"] == pytest.approx([2 / 3, 0])
    assert found["delta"] == pytest.approx([0.1 / 3, 0.6])
    assert found["drawn"].tolist() == [3, 3]
    bounds = np.array([-0.1, 0.4], np.float32), np.array([0.2, 0.9], np.float32)
    zone = statistics.of_zone(delta, counted, *bounds, np.array([2, 2]))
    assert zone["fallback"] == pytest.approx([1 / 3, 1 / 3])
    assert zone["zone"].tolist() == [2, 2]
    cut = statistics.of_cut(delta, counted, relevant, np.array([0.0, 0.4], np.float32))
    assert cut["cut"].tolist() == [2, 1]
    assert cut["valid_cut"][0] == 1
    assert np.isnan(cut["valid_cut"][1])  # no relevant one is allowed


def test_means_and_standard_error_over_queries():
    values = [0.1, 0.4, 0.25, 0.0]
    columns = {"false": np.array([*values, np.nan]), "fallback": np.array([np.nan] * 5)}
    found = statistics.over_queries(columns)
    assert found["false"] == pytest.approx(plain.mean(values))
    assert found["false_se"] == pytest.approx(plain.stdev(values) / math.sqrt(4))
    assert found["fallback"] is None
    assert statistics.over_queries({"false": np.array([0.5])})["false_se"] is None


def test_lower_quantiles():
    assert statistics.lower_quantiles((0.1, 0, 0.01, 0.01, 0.6), 0.6) == [0, 0.01, 0.1]


def test_histograms_count_every_candidate_once():
    rng = np.random.default_rng(0)
    delta, classes = rng.normal(0.3, 0.2, 5000), rng.integers(0, 3, 5000)
    delta[:2] = -2.1, 2.1  # beyond the edges by rounding
    classes[classes == 1] = 2
    counts = statistics.count_deltas(delta, classes, 3)
    assert counts.sum(1).tolist() == [(classes == c).sum() for c in range(3)]
    edges, coarse = statistics.trim(counts)
    assert len(edges) == coarse.shape[1] + 1 <= statistics.BINS + 1
    for c in range(3):
        expected, _ = np.histogram(delta[classes == c], edges)
        assert np.abs(coarse[c] - expected).sum() <= 1  # one at an edge
        assert coarse[c].sum() >= 0.995 * (classes == c).sum()
    edges, coarse = statistics.trim(np.zeros_like(counts))
    assert coarse.tolist() == [[0], [0], [0]]


# ---------------------------------------------------------------------------------------- the draws

COUNT, ROWS, WIDTH = 40, 300, 8


@functools.cache
def made():
    """A split whose relevant candidates lie near the target, its bank of two devices, queries."""
    rng = np.random.default_rng(0)

    def unit(x):
        return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)

    tokens = unit(rng.normal(size=(ROWS, 2, WIDTH)))
    photo = np.arange(ROWS)
    photo[200:210] = np.arange(10)  # copies
    target = rng.permutation(ROWS)[:COUNT]
    query = unit(tokens[target, 0] + 0.2 * rng.normal(size=(COUNT, WIDTH)))
    scores = np.einsum("bd,nmd->bnm", query, tokens).max(-1)
    near = np.argsort(-scores, axis=1)[:, :40]
    relevant = [[t, *rng.choice(line, 8, replace=False)] for t, line in zip(target, near)]
    targets = [[t, line[1]] for t, line in zip(target, relevant)]
    split = made_split(photo, rng.integers(0, 30, COUNT), target, targets, relevant)
    padded = np.zeros((2 * mining.CHUNK_ROWS, 2, WIDTH), np.float32)
    padded[:ROWS] = tokens
    ids = np.full(len(padded), -1, np.int32)
    ids[:ROWS] = photo
    return split, mining.Bank(*map(jax.numpy.asarray, (padded, ids))), query


class Keeper:
    """As `BankKeeper`, of a bank that is there."""

    def __init__(self, bank, query):
        self.query = query
        self.bank = jax.tree.map(lambda x: x.reshape(2, mining.CHUNK_ROWS, *x.shape[1:]), bank)

    def refresh(self, params, step):
        return self.bank

    def embed_queries(self, params, rows):
        return self.query[rows]


@functools.cache
def audit_made(rules=draws.RULES, lowers=draws.LOWERS, **changes):
    """The audit of the made split, with `config.negatives` changed."""
    split, bank, query = made()
    negatives = NegativesConfig(**changes)
    rows = candidates.sample_queries(split, 37, seed=0)
    with mock.patch.object(mining, "CHUNK_QUERIES", 16):  # the last chunk is padded
        facts = draws.audit(
            *(Keeper(bank, query), None, 7),
            split=split,
            rows=rows,
            negatives=negatives,
            rules=rules,
            lowers=lowers,
            seed=3,
            devices=jax.devices()[:2],
        )
    return negatives, rows, facts


def plain_figures(split, rows, mined, delta, forbidden, upper):
    """Figures of what was mined, query by query, with sets of images."""
    photo, columns = split.gallery.image_ids, {name: [] for name in SHARES}
    for i, row in enumerate(rows):
        drawn = [int(c) for c, there in zip(mined.rows[i], mined.drawn[i]) if there]
        assert len(set(drawn)) == len(drawn)
        assert not forbidden[i][drawn].any()
        relevant = {int(photo[r]) for r in split.queries.relevant[row]}
        deltas = [float(delta[i, c]) for c in drawn]
        columns["false"].append(plain.mean(float(int(photo[c]) in relevant) for c in drawn))
        columns["easy"].append(plain.mean(float(d > upper[i]) for d in deltas))
        columns["beats"].append(plain.mean(float(d <= 0) for d in deltas))
        columns["delta"].append(plain.mean(deltas))
        columns["drawn"].append(len(drawn))
    found = {name: plain.mean(values) for name, values in columns.items()}
    return found | {"false_se": plain.stdev(columns["false"]) / math.sqrt(len(rows))}


NARROW = {"rules": ("trns",), "lowers": (), "lower": 0.1, "upper": 0.14, "floor": -math.inf}


@pytest.mark.parametrize(
    "changes", [pytest.param({}, marks=pytest.mark.slow), NARROW], ids=["default", "narrow"]
)
def test_figures_are_of_what_mining_draws(changes):
    split, bank, query = made()
    negatives, rows, facts = audit_made(**changes)
    known = known_positive_ids(split)[rows]
    scores = np.asarray(mining.bank_scores(query[rows], bank))
    target = split.queries.target[rows]
    delta = scores[np.arange(len(rows)), target][:, None] - scores
    forbidden = np.array([[p < 0 or p in line for p in bank.image_id] for line in known])
    upper = [np.quantile(line[~never], negatives.upper) for line, never in zip(delta, forbidden)]
    ids = rows.astype(np.int32)
    for rule in changes.get("rules", draws.RULES):
        mine = mesh.pmap(
            functools.partial(
                mining.mine_bank, rule=draws.rule_of(negatives, rule), axis=mesh.AXIS
            ),
            in_axes=(None, None, None, None, None, 0),
            out_axes=None,
            devices=jax.devices()[:1],
        )
        inputs = (jax.random.key(3), query[rows], target, known, ids)
        mined = jax.device_get(mine(*inputs, jax.tree.map(lambda x: x[None], bank)))
        expected = plain_figures(split, rows, mined, delta, forbidden, upper)
        found = facts["rules"][rule]
        assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-5), rule
        if rule == "trns":
            assert found["zone"] == pytest.approx(mined.zone.mean())
            narrow = mined.zone < negatives.per_query
            assert (found["fallback"] > 0) == narrow.any() == bool(changes)
    allowed = ~forbidden
    photo = split.gallery.image_ids
    relevant = np.array(
        [[p in photo[split.queries.relevant[r]] for p in bank.image_id] for r in rows]
    )
    lowest = np.argsort(np.where(allowed, delta, np.inf), axis=1)[:, : negatives.per_query]
    if not changes:
        hardest = np.take_along_axis(relevant, lowest, axis=1).mean()
        assert facts["rules"]["hardest"]["false"] == pytest.approx(hardest)
        assert hardest > 4 * facts["rules"]["random"]["false"] > 0
    base = (relevant & allowed).sum(1) / allowed.sum(1)
    assert facts["oracle"]["false"] == pytest.approx(base.mean())
    assert facts["candidates"] == pytest.approx(allowed.sum(1).mean())
    counts = {name: sum(facts["histogram"][name]) for name in CLASSES}
    assert counts["relevant"] == pytest.approx((relevant & allowed).sum(), rel=0.01)
    assert sum(counts.values()) == pytest.approx(allowed.sum(), rel=0.01)


def test_the_sweep_trades_size_for_truth():
    split, bank, query = made()
    negatives, rows, facts = audit_made()
    by_floor = {f: [row for row in facts["sweep"] if row["floor"] == f] for f in (0, None)}
    for lines in by_floor.values():
        assert [line["quantile"] for line in lines] == list(draws.LOWERS)
        for one, other in itertools.pairwise(lines):
            assert other["zone"] <= one["zone"]
            assert other["cut"] >= one["cut"]
            assert other["valid_cut"] >= one["valid_cut"]
        assert lines[0]["zone"] > lines[-1]["zone"]
        assert lines[0]["false"] > lines[-1]["false"]
        assert lines[0]["delta"] < lines[-1]["delta"]
    for on, off in zip(by_floor[0], by_floor[None]):
        assert on["zone"] <= off["zone"]
        assert on["beats"] == 0
    assert by_floor[None][0]["beats"] > 0
    # The config's own setting is one of them.
    same = next(line for line in by_floor[0] if line["quantile"] == negatives.lower)
    own = facts["rules"]["trns"]
    assert {name: same[name] for name in own} == pytest.approx(own)
    # The size of the zone, stated plainly.
    scores = np.asarray(mining.bank_scores(query[rows], bank))[:, :ROWS]
    delta = scores[np.arange(len(rows)), split.queries.target[rows]][:, None] - scores
    known = known_positive_ids(split)[rows]
    sizes = []
    for line, never in zip(delta, known):
        here = line[~np.isin(split.gallery.image_ids, never)]
        low, high = np.quantile(here, [0.05, negatives.upper])
        sizes.append(((here > max(low, 0)) & (here <= high)).sum())
    zone = next(line["zone"] for line in by_floor[0] if line["quantile"] == 0.05)
    assert zone == pytest.approx(plain.mean(map(int, sizes)), abs=0.5)


def test_other_bounds_are_swept_without_an_upper_one():
    _, _, facts = audit_made(("random",), (0.0,), bounds="absolute", lower=0.1, upper=0.9)
    first = facts["sweep"][1]
    assert (first["quantile"], first["floor"]) == (0, None)
    assert first["zone"] == pytest.approx(facts["candidates"] - 1)  # the lowest is its bound
    assert facts["bounds"]["lower"] == pytest.approx(0.1)
    assert facts["bounds"]["upper"] == pytest.approx(0.9)
    assert facts["rules"]["random"]["easy"] > 0


@pytest.mark.parametrize("change", [{}, {"sweep": []}])
def test_the_picture(change):
    negatives, rows, facts = audit_made()
    histogram = facts["histogram"]
    facts = facts | {"dataset": "made", "split": "train", "step": 7, "queries": len(rows)}
    facts |= {"negatives": dataclasses.asdict(negatives)} | change
    # What has nothing in it is no obstacle.
    facts["histogram"] = histogram | {"near_miss": [0] * len(histogram["near_miss"])}
    facts["bounds"] = dict.fromkeys(facts["bounds"])
    picture = Image.open(io.BytesIO(figure.draw(facts)))
    assert picture.size[0] == 1800
    assert (picture.size[1] > 1400) == bool(facts["sweep"])
    colors = {color for _, color in picture.convert("RGB").getcolors(1 << 24)}
    assert (0xD5, 0x5E, 0x00) in colors  # the relevant ones


# --------------------------------------------------------------------------------------- the binary


@pytest.fixture(scope="module")
def run(tmp_path_factory, prepared):
    """A trained run: (directory, workdir)."""
    base = tmp_path_factory.mktemp("audit")
    prepared(base)
    changes = {"total_steps": 4, "checkpoint_every": 2, "eval_every": 4, "eval.split": "validation"}
    loop.train_and_evaluate(small_config(base / "prepared", **changes), base / "run")
    return base, base / "run"


def test_a_run_is_audited(run, tmp_path, caplog):
    base, workdir = run
    # The plain scenes of training have no relevant image but the target; open edits have several.
    config = small_config(base / "prepared", **{"data.variant": "hard_smoke"})
    with caplog.at_level(logging.INFO):
        facts = audit_checkpoint(config, workdir, split="test", output=tmp_path, queries=50)
    assert facts == json.loads((tmp_path / "audit-test-4.json").read_text())
    assert (facts["dataset"], facts["split"], facts["step"]) == ("shapes", "test", 4)
    assert facts["queries"] == 50
    assert list(facts["rules"]) == list(draws.RULES)
    assert facts["candidates"] == pytest.approx(176, abs=1)
    assert 0 < facts["oracle"]["false"] < 0.01
    assert facts["rules"]["hardest"]["beats"] > facts["rules"]["random"]["beats"]
    assert facts["rules"]["trns"]["beats"] == 0
    assert facts["rules"]["random"].keys() == {*SHARES, "false_se"}
    assert facts["rules"]["qure"].keys() == {*SHARES, "false_se", "zone", "fallback"}
    assert len(facts["sweep"]) == 2 * len(draws.LOWERS)
    assert facts["negatives"]["lower"] == config.negatives.lower
    png = Image.open(tmp_path / "audit-test-4.png")
    assert png.size[0] == 1800
    table = next(r.getMessage() for r in caplog.records if "oracle:" in r.getMessage())
    names = [line.split()[0] for line in table.splitlines()[1:]]
    assert names == ["rule", "random", "hardest", "qure", "trns", "oracle"]
    hardest = facts["rules"]["hardest"]["false"]
    assert f"{100 * hardest:.2f} %" in table.splitlines()[3]
    swept = next(r.getMessage() for r in caplog.records if "lower bound" in r.getMessage())
    assert len(swept.splitlines()) == 2 + len(facts["sweep"])
    assert not any("beside the known positives" in r.getMessage() for r in caplog.records)


@pytest.mark.slow
def test_devices_do_not_matter_and_data_without_others_are_told(run, tmp_path, caplog):
    base, workdir = run
    found = []
    for devices in (1, 2):
        output = tmp_path / str(devices)
        config = small_config(base / "prepared", num_devices=devices)
        values = {"step": 2, "rules": ["qure"], "lowers": [0.05, 0], "queries": 40}
        with caplog.at_level(logging.INFO):
            found.append(audit_checkpoint(config, workdir / "checkpoints", output=output, **values))
    one, other = found
    assert list(one["rules"]) == ["qure"]
    assert [(row["quantile"], row["floor"]) for row in one["sweep"]] == [
        *((0, 0), (0.05, 0)),
        *((0, None), (0.05, None)),
    ]
    assert one["rules"]["qure"] == pytest.approx(other["rules"]["qure"], abs=1e-3)
    assert one["bounds"] == pytest.approx(other["bounds"], abs=1e-3)
    assert one["oracle"]["false"] == 0
    assert any("beside the known positives" in r.getMessage() for r in caplog.records)


@pytest.mark.parametrize(
    ("values", "changes", "sentence"),
    [
        ({"directory": "{base}/none"}, {}, r"there is no directory .*none"),
        ({"directory": "{base}/prepared"}, {}, r"there is no checkpoint in .*prepared"),
        ({"step": 3}, {}, r"--step=3: .* steps 2, 4"),
        ({}, {"model.tiny.width": 64}, r"another model.*tiny\.width: 64"),
        ({}, {"negatives.lower": 2.0}, r"config\.negatives\.lower is 2"),
        ({"split": "dev"}, {}, r"shapes has no split 'dev'"),
        (
            {"rules": ["random", "in_batch"]},
            {},
            r"--rules: 'in_batch' is not one of random, hardest, qure, trns",
        ),
        (
            {"lowers": [0.01, 0.7]},
            {},
            r"--sweep=0\.01,0\.7: .* below the upper one, 0\.6",
        ),
        ({}, {"num_devices": 99}, r"num_devices is 99"),
        ({"output": "{run}/config.json/x"}, {}, r"cannot write to .*config\.json"),
    ],
)
def test_errors(run, values, changes, sentence):
    base, workdir = run
    filled = {
        name: value.format(base=base, run=workdir) if isinstance(value, str) else value
        for name, value in {"directory": "{run}", **values}.items()
    }
    with pytest.raises(UserError, match=sentence):
        audit_checkpoint(small_config(base / "prepared", **changes), **filled)


def test_data_of_unknown_truth_cannot_be_audited(run, monkeypatch):
    base, workdir = run
    unknown = made_split(COPIES, [0, 1], [2, 3], [[2], [3]], [[], []])
    monkeypatch.setattr(splits, "open_split", lambda *arguments: unknown)
    with pytest.raises(UserError, match=r"no query of train says which images are truly relevant"):
        audit_checkpoint(small_config(base / "prepared"), workdir)


def binary(*arguments):
    """The binary in a process of its own."""
    return run_module("dqe_jax.audit", "--config=configs/shapes.py:smoke", *arguments, cwd=ROOT)


@pytest.mark.slow
def test_the_binary(run, tmp_path):
    base, workdir = run
    done = binary(
        *(f"--workdir={workdir}", f"--output={tmp_path}", "--step=2", "--split=val"),
        *("--rules=qure,random", "--sweep=0.05,0", "--queries=40"),
        *(f"--config.data.prepared_dir={base / 'prepared'}", "--config.num_devices=1"),
        *("--config.model.tiny.image_depth=0", "--config.model.tiny.text_depth=0"),
        "--config.model.tiny.composer_depth=1",
    )
    assert done.returncode == 0, done.stderr
    assert "trns by its lower bound:" in done.stderr
    facts = json.loads((tmp_path / "audit-validation-2.json").read_text())
    assert (facts["step"], facts["split"], facts["queries"]) == (2, "validation", 40)
    assert list(facts["rules"]) == ["qure", "random"]
    assert [row["quantile"] for row in facts["sweep"]] == [0, 0.05, 0, 0.05]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), r"name what to audit: --workdir=DIR or --checkpoint=DIR\."),
        (("--workdir=x", "--sweep=0,x"), r"--sweep=0,x: name numbers, such as 0,0\.01,0\.1\."),
    ],
)
def test_flags_that_are_of_no_use(arguments, sentence):
    done = binary(*arguments)
    assert done.returncode == 2
    assert re.fullmatch(rf"error: {sentence}\n", done.stderr)
