"""Tuned variants as curves, and sweeps of one field: their arithmetic, and small runs."""

import dataclasses
import json
import re

import numpy as np
import pytest
from PIL import Image

from dqe_jax.config import RunConfig
from dqe_jax.evaluation.curve import Point, read_point, steps_of
from dqe_jax.evaluation.intervals import over_seeds
from dqe_jax.experiments.ablation import curves, sharing, sweep, tuned, tuning
from dqe_jax.experiments.ablation.curves import Curve
from dqe_jax.experiments.ablation.record import Run
from dqe_jax.experiments.ablation.tuning import Choice, Grid
from dqe_jax.testing.small_runs import compiled_once, small_config
from dqe_jax.training import loop, workdir
from dqe_jax.training.lease import BusyError
from dqe_jax.utils.errors import UserError

# ---------------------------------------------------------------------------------- the arithmetic


def test_an_interval_over_seeds_and_references():
    rng = np.random.default_rng(0)
    seeds, references = np.array([0.0, 0.1, 0.2]), np.repeat(np.arange(200), 2)
    values = seeds[:, None] + np.repeat(rng.normal(0, 0.5, 200), 2)[None]
    found = over_seeds(values, references, np.zeros(400, int))
    assert found.value == pytest.approx(values.mean())
    # Standard errors: of the mean of three seeds drawn anew, and of 200 references.
    expected = np.hypot(seeds.std() / np.sqrt(3), values[0, ::2].std() / np.sqrt(200))
    assert (found.high - found.low) / 2 / 1.96 == pytest.approx(expected, rel=0.1)
    single = over_seeds(values[:1], references, np.zeros(400, int))
    queries = values[0, ::2].std() / np.sqrt(200)
    assert (single.high - single.low) / 2 / 1.96 == pytest.approx(queries, rel=0.1)
    assert over_seeds(values, references, np.zeros(400, int)) == found  # the same draws


def test_queries_that_do_not_count_and_strata():
    values = np.array([[1.0, np.nan, 3.0, 5.0], [1.0, np.nan, 5.0, 7.0]])
    found = over_seeds(values, np.arange(4), np.zeros(4, int))
    assert found.value == pytest.approx(np.nanmean(values))
    # The mean of the means of two categories: (1 + (3 + 5 + 5 + 7) / 4) / 2.
    by_category = over_seeds(values, np.arange(4), np.array([0, 0, 1, 1]))
    assert by_category.value == pytest.approx(3.0)
    assert by_category.low <= by_category.value <= by_category.high


def made_point(step, values, metric="mAP@10"):
    count = len(values)
    return Point(step, step / 10, {metric: np.array(values)}, np.arange(count), np.zeros(count))


def made_curve(variant, seed, points, seconds):
    run = Run(variant, "tuned", seed, max(points), 1.0, {"mAP@10": 0.5}, {}, "there")
    found = {step: made_point(step, values) for step, values in points.items()}
    return Curve(run, found, dict(zip(points, seconds)))


def test_differences_are_paired_by_seed_step_and_time():
    base = [
        made_curve("infonce", seed, {10: [0.1 * seed] * 4, 20: [0.2] * 4}, (5.0, 10.0))
        for seed in (0, 1)
    ]
    own = [
        made_curve("full", seed, {10: [0.3] * 4, 20: [0.5] * 4, 30: [0.6] * 4}, (9.0, 12.0, 20.0))
        for seed in (1, 0)
    ]
    found = {(d.at, d.value): d for d in curves.differences(own, base)}
    assert found["end", 0].mean == pytest.approx(0.4)  # each at its own end
    assert found["steps", 10].by_seed == pytest.approx([0.2, 0.3])  # seeds 1 and 0
    assert found["steps", 20].mean == pytest.approx(0.3)
    assert ("steps", 30) not in found
    # After 5 s `full` has no point yet; after 10 s it has that of step 10.
    assert set(found) - {("end", 0), ("steps", 10), ("steps", 20)} == {("time", 10.0)}
    assert found["time", 10.0].mean == pytest.approx(0.1)
    assert found["time", 10.0].epochs == 1.0
    assert curves.differences(own, []) == []


def test_the_point_nearest_to_some_epochs():
    own = [made_curve("full", 0, {s: [0.5] * 4 for s in (8, 19, 60)}, (1, 2, 3))]
    base = [made_curve("infonce", 0, {s: [0.5] * 4 for s in (8, 19, 60)}, (1, 2, 3))]
    steps = [d for d in curves.differences(own, base) if d.at == "steps"]
    near = [curves.nearest(steps, epochs) for epochs in (1, 2, 4, 8)]
    assert [d and d.value for d in near] == [8, 19, None, 60]


def test_the_grid_of_two_flags():
    config = RunConfig()
    grid = tuning.read_grid(config, ["1e-3", "0.002", "0.001"], ["40", "20"])
    assert grid == Grid((0.001, 0.002), (40, 20))
    assert grid.cells() == [(0.001, 40), (0.002, 40), (0.001, 20), (0.002, 20)]
    assert tuning.read_grid(config, [], []) == Grid((0.001,), (1000,))
    for rates, lengths, said in (
        (["x"], [], r"--rates=x: give learning rates above 0"),
        (["-1"], [], r"--rates=-1"),
        ([], ["2.5"], r"--lengths=2\.5: give whole numbers of steps"),
        ([], ["inf"], r"--lengths=inf"),
    ):
        with pytest.raises(UserError, match=said):
            tuning.read_grid(config, rates, lengths)


def test_runs_that_another_process_trains_come_last():
    busy, seen, waited = {"b": 2, "d": 1}, [], []

    def complete(item):
        seen.append(item)
        if busy.get(item, 0):
            busy[item] -= 1
            raise BusyError(f"process 1 trains in {item}")
        return item.upper()

    found = list(sharing.in_turn("abcd", complete, pause=waited.append))
    assert found == [("a", "A"), ("c", "C"), ("d", "D"), ("b", "B")]
    assert seen == ["a", "b", "c", "d", "b", "d", "b"]
    assert not waited  # there was always another one to go on with
    busy["a"] = 3
    assert list(sharing.in_turn("a", complete, pause=waited.append)) == [("a", "A")]
    assert waited == [sharing.POLL_SECONDS] * 3


def test_a_choice_at_the_edge_of_the_grid_is_told():
    tried = [(0.001, 40, 0.2), (0.002, 40, 0.3), (0.004, 40, 0.25)]
    assert not Choice("full", 0.002, 40, "mAP@10", tried).at_edge
    assert Choice("full", 0.004, 40, "mAP@10", tried).at_edge
    assert not Choice("full", 0.001, 40, "mAP@10", tried[:1]).at_edge


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("negatives.upper=0.02,0.1", ("negatives.upper", (0.02, 0.1))),
        ("config.batch.references=16,32,16", ("batch.references", (16, 32))),
        ("negatives.rule=trns,qure", ("negatives.rule", ("trns", "qure"))),
        ("data.cache_images=True,False", ("data.cache_images", (True, False))),
    ],
)
def test_what_a_sweep_says(text, found):
    assert sweep.read_sweep(text) == found


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("negatives.upper", r"give it as FIELD=VALUE,VALUE"),
        ("negatives.upper=", r"give it as FIELD=VALUE,VALUE"),
        ("negatives.uper=1", r"config\.negatives\.uper is not a field"),
        ("seed=1,2", r"seeds are not swept"),
    ],
)
def test_what_a_sweep_may_not_say(text, said):
    with pytest.raises(UserError, match=said):
        sweep.read_sweep(text)


def test_a_variant_that_does_not_read_a_field_has_one_run():
    config = RunConfig()

    def labels(variant, name):
        configs = [sweep.swept_config(config, variant, 0, name, x) for x in (0.1, 0.3)]
        return {sweep._label(each) for each in configs}

    assert len(labels("infonce", "negatives.upper")) == 1
    assert len(labels("infonce", "loss.intent")) == 1
    assert len(labels("full", "negatives.upper")) == 2
    assert len(labels("infonce", "optimizer.learning_rate")) == 2
    ruled = sweep.swept_config(config, "infonce", 0, "negatives.rule", "hardest")
    assert ruled.negatives.rule == "in_batch"


# ------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def base(tmp_path_factory, prepared):
    directory = tmp_path_factory.mktemp("curves")
    prepared(directory)
    return directory


def config_of(base, **changes):
    fields = {"total_steps": 4, "log_every": 1, "eval_every": 2, "checkpoint_every": 4}
    fields |= {"num_devices": 1, "eval.sheet_queries": 1, "batch.references": 4}
    return RunConfig.of(small_config(base / "prepared", **fields | changes))


def trained(monkeypatch, job, lock=None):
    """What a job trains, and what it gives; a lock is let go when it has trained three runs."""
    names, train = [], loop.train_and_evaluate

    def watched(config, workdir):
        found = train(config, workdir)
        names.append(workdir.name)
        if lock is not None and len(names) == 3:
            lock.close()
        return found

    with monkeypatch.context() as patch, compiled_once(alike=True):
        patch.setattr(loop, "train_and_evaluate", watched)
        return names, job()


@pytest.mark.slow
def test_a_tuned_ablation(base, monkeypatch):
    def job():
        return tuned.run_tuned(
            config_of(base),
            base / "tuned",
            rates=["0.001", "0.003"],
            lengths=["2"],
            variants=["text-only"],
            seeds=2,
        )

    taken = base / "tuned" / "infonce-2-0.003-0"
    taken.mkdir(parents=True)  # as another process would that shares the runs, and is killed
    names, runs = trained(monkeypatch, job, workdir.lock_workdir(taken))
    first = [f"{v}-2-{r}-0" for v in ("infonce", "text-only") for r in ("0.001", "0.003")]
    assert names[:4] == [first[0], *first[2:], first[1]]
    assert len(names) == 6  # one more of each variant, with what was chosen
    assert [(run.variant, run.seed) for run in runs] == [
        *(("infonce", 0), ("text-only", 0), ("infonce", 1), ("text-only", 1)),
    ]
    facts = json.loads((base / "tuned" / "curves.json").read_text())
    for choice in facts["chosen"]:
        best = max(choice["tried"], key=lambda cell: cell[2])
        assert [choice["rate"], choice["steps"]] == best[:2]
        assert choice["at_edge"]
    (end,) = (d for d in facts["differences"] if (d["at"], d["metric"]) == ("end", "R@10"))
    means = {
        v: np.mean([run.metrics["R@10"] for run in runs if run.variant == v])
        for v in ("infonce", "text-only")
    }
    assert end["mean"] == pytest.approx(means["text-only"] - means["infonce"], abs=1e-6)
    directory = base / "tuned" / runs[0].directory
    assert steps_of(directory, "test") == [2]
    point = read_point(directory, "test", 2)
    assert point.values["R@10"].mean() == pytest.approx(runs[0].metrics["R@10"], abs=1e-6)
    log = (directory / "metrics.jsonl").read_text()
    assert '"curve/R@10"' in log
    text = (base / "tuned" / "curves.md").read_text()
    assert "learning rates 0.001, 0.003; steps 2" in text
    assert re.search(r"^\| text-only \| 2 \| 0\.00[13] \| 2 \| ", text, re.M)
    with Image.open(base / "tuned" / "curves.png") as image:
        assert len(image.convert("RGB").getcolors(1 << 20)) > 10
    again, same = trained(monkeypatch, job)
    assert again == []  # it is only read
    assert same == runs

    def of_kind(kind):
        config = config_of(base)
        return tuned.run_tuned(
            config,
            base / "tuned",
            rates=["0.001"],
            lengths=["2"],
            variants=["text-only"],
            kind=kind,
        )

    _, runs = trained(monkeypatch, lambda: of_kind("color"))
    facts = json.loads((base / "tuned" / "curves-color.json").read_text())
    assert facts["kind"] == "color"
    (end,) = (d for d in facts["differences"] if (d["at"], d["metric"]) == ("end", "R@10"))
    reports = [base / "tuned" / run.directory / "eval" / "test-2.json" for run in runs]
    held = [json.loads(path.read_text())["metrics"]["R@10/color"] for path in reports]
    assert [run.metrics["R@10"] for run in runs] == held
    means = [np.mean(held[::2]), np.mean(held[1::2])]
    assert end["mean"] == pytest.approx(means[1] - means[0], abs=1e-6)
    assert facts["table"][0]["scores"]["R@10"]["mean"] == pytest.approx(means[0], abs=1e-6)
    assert "of the kind 'color' alone" in (base / "tuned" / "curves-color.md").read_text()
    with pytest.raises(UserError, match="--kind=place: no query is of this kind; there are add"):
        of_kind("place")


@pytest.mark.slow
def test_a_sweep(base, monkeypatch):
    def job(values):
        return sweep.run_sweep(
            config_of(base), base / "sweep", sweep=f"negatives.upper={values}", seeds=1
        )

    names, runs = trained(monkeypatch, lambda: job("0.3"))
    assert len(names) == 2
    more, runs = trained(monkeypatch, lambda: job("0.3,0.6"))
    assert len(more) == 1  # InfoNCE does not read the field, and the first value is there
    assert [run.variant for run in runs] == ["infonce", "full"] * 2
    facts = json.loads((base / "sweep" / "sweep-negatives-upper.json").read_text())
    assert {d["value"] for d in facts["differences"]} == {0.3, 0.6}
    assert (base / "sweep" / "sweep-negatives-upper.png").exists()
    text = (base / "sweep" / "sweep-negatives-upper.md").read_text()
    assert "| negatives.upper | variant |" in text


def test_without_evaluations_there_are_no_curves(base):
    config = config_of(base, eval_every=0)
    for run in (tuned.run_tuned, lambda *x: sweep.run_sweep(*x, sweep="negatives.upper=0.3")):
        with pytest.raises(UserError, match=r"config\.eval_every is 0: .* curves"):
            run(config, base / "nothing")


def test_a_point_of_an_older_version_has_no_kinds():
    values = {"R@1": np.array([0.0, 1.0, 1.0])}
    point = Point(1, 0.5, values, np.arange(3), np.zeros(3, int))
    with pytest.raises(UserError, match="--kind=color: a run of an older version"):
        point.of_kind("color")
    kinds = np.array(["color", "size; color", ""])
    one = dataclasses.replace(point, kinds=kinds).of_kind("color")
    assert one.values["R@1"].tolist() == [0, 1]
    assert one.reference.tolist() == [0, 1]


def test_a_damaged_point_is_named(tmp_path):
    (tmp_path / "curve").mkdir()
    (tmp_path / "curve" / "test-5.npz").write_bytes(b"no archive")
    with pytest.raises(UserError, match=r"test-5\.npz cannot be read .*remove"):
        read_point(tmp_path, "test", 5)
