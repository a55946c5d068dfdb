"""The ablation: what variants change, the arithmetic of tables, runs that are interrupted."""

import collections
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath
from PIL import Image

from configs import shapes
from dqe_jax.checkpoints import store
from dqe_jax.config import RunConfig, flatten
from dqe_jax.experiments.ablation import figure, record, scores
from dqe_jax.experiments.ablation.record import EQUAL, Run
from dqe_jax.experiments.ablation.runs import run_ablation, steps_within
from dqe_jax.experiments.ablation.variants import NAMED, VARIANTS, choose_variants, variant_config
from dqe_jax.testing.commands import run_module
from dqe_jax.testing.small_runs import compiled_once, small_config
from dqe_jax.training import loop
from dqe_jax.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def made_run(variant="infonce", equal="steps", seed=0, *, metrics=None, validation=None, **changes):
    """A result that nobody trained."""
    values = {"steps": 100, "seconds": 50.0, "directory": f"{variant}-{equal}-{seed}", **changes}
    return Run(
        variant=variant,
        equal=equal,
        seed=seed,
        metrics={"R@1": 0.5, "R@5": 0.8, **(metrics or {})},
        validation=validation or {50: {"R@1": 0.3}, 100: {"R@1": 0.4}},
        **values,
    )


# ------------------------------------------------------------------------------------ the variants

CHANGES = {
    "infonce": {"negatives.rule": "in_batch", "model.attributes.enabled": False},
    "attributes": {"negatives.rule": "in_batch"},
    "trns": {"model.attributes.enabled": False},
    "full": {},
    "qure": {"negatives.rule": "qure"},
    "hardest": {"negatives.rule": "hardest"},
    "random": {"negatives.rule": "random"},
    "in_batch-oracle": {"negatives.rule": "in_batch", "negatives.oracle": "all"},
    "trns-oracle": {"negatives.oracle": "mined"},
    "hardest-oracle": {"negatives.rule": "hardest", "negatives.oracle": "mined"},
    "attributes-sum": {"negatives.rule": "in_batch"},
    "attributes-gate": {"negatives.rule": "in_batch", "model.attributes.form": "gate"},
    **{
        name: {
            "negatives.rule": "in_batch",
            "model.attributes.enabled": False,
            "model.query": query,
        }
        for name, query in (
            *(("text-only", "text"), ("image-only", "image")),
            *(("sum-of-both", "sum"), ("product-of-both", "product")),
        )
    },
}
UNNAMED = tuple(v for v in VARIANTS if v not in NAMED)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_changes_its_fields_and_no_other(variant):
    config = RunConfig.of(shapes.get_config())
    before = flatten(config.to_dict())
    changed = variant_config(config, variant, seed=3, steps=70)
    after = flatten(changed.to_dict())
    found = {name: after[name] for name in before if before[name] != after[name]}
    assert found == {"seed": 3, "total_steps": 70, **CHANGES[variant]}
    assert flatten(config.to_dict()) == before


def test_rules_without_a_word_on_attributes_leave_them_as_they_are():
    changes = {"model.attributes.enabled": False, "negatives.rule": "random"}
    config = RunConfig.of(shapes.get_config()).with_changes(changes)
    enabled = {
        variant: variant_config(config, variant, 0, 1).model.attributes.enabled
        for variant in VARIANTS
    }
    weighing = {"attributes", "attributes-sum", "attributes-gate", "full"}
    assert {name for name, value in enabled.items() if value} == weighing
    assert variant_config(config, "full", 0, 1).negatives.rule == "trns"


@pytest.mark.parametrize(
    ("names", "dataset", "chosen"),
    [
        ([], "shapes", UNNAMED),
        ([], "fashion_products", UNNAMED),
        ([], "fashioniq", tuple(v for v in UNNAMED if "oracle" not in v)),
        (["text-only"], "fashioniq", ("infonce", "text-only")),
        (["full", "trns", "full"], "shapes", ("infonce", "trns", "full")),
        (["trns-oracle"], "triplets", ("infonce", "trns-oracle")),
        (["infonce"], "shapes", ("infonce",)),
    ],
)
def test_infonce_is_always_among_the_chosen(names, dataset, chosen):
    assert choose_variants(names, dataset) == chosen


# ---------------------------------------------------------------------------------- the arithmetic


def test_score_against_a_calculation_by_hand():
    found = scores.score([0.5, 0.6, 0.7], [0.4, 0.4, 0.7])
    assert found.mean == pytest.approx(0.6)
    assert found.spread == pytest.approx(0.1)  # of (-.1, 0, .1): sqrt(.02 / 2)
    assert found.gain == pytest.approx(0.1)
    # Spread of the other: sqrt((.01 + .01 + .04) / 2) = sqrt(.03).
    assert found.gain_in_spreads == pytest.approx(0.1 / np.sqrt((0.01 + 0.03) / 2))


@pytest.mark.parametrize(
    ("values", "base", "expected"),
    [
        ([0.5, 0.7], [], (0.6, True, None, None)),  # infonce itself
        ([0.5], [0.4], (0.5, False, 0.1, None)),  # one seed
        ([0.5, 0.7], [0.4], (0.6, True, 0.2, None)),  # infonce has one seed as yet
        ([0.5, 0.5], [0.4, 0.4], (0.5, True, 0.1, None)),  # no spread at all
    ],
)
def test_score_says_nothing_that_the_runs_do_not(values, base, expected):
    found = scores.score(values, base)
    mean, has_spread, gain, in_spreads = expected
    assert found.mean == pytest.approx(mean)
    assert (found.spread is not None) == has_spread
    assert found.gain == (gain and pytest.approx(gain))
    assert found.gain_in_spreads is in_spreads


def test_table():
    runs = [
        made_run("infonce", seed=0, metrics={"R@1": 0.5, "mAP@10": 0.1}),
        made_run("full", seed=0, metrics={"R@1": 0.6, "mAP@10": 0.3}, steps=1234, seconds=60.0),
        made_run("infonce", seed=1, metrics={"R@1": 0.7, "mAP@10": 0.2}),
        made_run("full", seed=1, metrics={"R@1": 1.0, "mAP@10": 0.3}, steps=1234, seconds=61.0),
        made_run("trns", seed=0, metrics={"R@1": 0.4, "mAP@10": 0.1}),
    ]
    cells = scores.table_cells(scores.summarize(runs))
    head = ("variant", "runs", "steps", "seconds")
    assert cells == [
        (*head, "R@1", "R@1 - infonce", "mAP@10", "mAP@10 - infonce"),
        ("infonce", "2", "100", "50", "0.6000 ± 0.1414", "", "0.1500 ± 0.0707", ""),
        (
            *("full", "2", "1,234", "60"),
            *("0.8000 ± 0.2828", "+0.2000 (+0.9)", "0.3000 ± 0.0000", "+0.1500 (+3.0)"),
        ),
        ("trns", "1", "100", "50", "0.4000", "-0.2000", "0.1000", "-0.0500"),
    ]
    lines = scores.markdown_table(cells).splitlines()
    assert lines[1] == "|" + " --- |" * 8
    assert len(lines) == 5
    assert {line.count("|") for line in lines} == {9}


@pytest.mark.parametrize(
    ("budget", "steps"),
    [
        (30.0, 20),  # at a line of the log
        (35.0, 30),  # between two
        (10.0, 5),  # while it compiled
        (0.1, 1),
        (60.0, 50),  # its whole time
        (90.0, 75),  # faster than infonce: at its mean speed
    ],
)
def test_steps_of_equal_time(budget, steps):
    times = [(10, 20.0), (20, 30.0), (40, 40.0), (50, 60.0)]
    assert steps_within(budget, times) == steps


def test_curve_is_over_the_steps_that_all_seeds_have():
    runs = [
        made_run(seed=0, validation={10: {"R@1": 0.2}, 15: {"R@1": 1.0}, 20: {"R@1": 0.5}}),
        made_run(seed=1, validation={10: {"R@1": 0.4}, 15: {"R@10": 1.0}, 20: {"R@1": 0.5}}),
    ]
    steps, mean, spread = figure.curve(runs, "R@1")
    np.testing.assert_array_equal(steps, [10, 20])
    np.testing.assert_allclose(mean, [0.3, 0.5])
    np.testing.assert_allclose(spread, [np.sqrt(0.02), 0])
    np.testing.assert_array_equal(figure.curve(runs[:1], "R@1")[2], [0, 0, 0])


def test_the_log_of_a_run():
    log = [
        {"step": 2, "loss": 1.0, "train_seconds": 3.0},
        {"step": 4, "loss": 1.0, "train_seconds": 5.0},
        {"step": 4, "validation/R@1": 0.2, "validation/R@10": 0.4, "validation/R@1/add": 1.0},
        {"step": 4, "test/R@1": 0.1},
    ]
    assert record.training_times(log) == [(2, 3.0), (4, 5.0)]
    assert record.validation_metrics(log) == {4: {"R@1": 0.2, "R@10": 0.4}}


# ---------------------------------------------------------------------------------------- the plot


@pytest.mark.parametrize("kinds", [("steps",), ("steps", "time")])
def test_the_plot_shows_every_variant_in_its_colour(tmp_path, kinds):
    runs = []
    for i, variant in enumerate(VARIANTS):
        for kind in kinds:
            for seed in (0, 1):
                validation = {
                    step: {"R@1": 0.1 * i + 0.02 * seed + step / 500, "mAP@10": 0.3}
                    for step in (50, 100)
                }
                runs.append(made_run(variant, kind, seed, validation=validation))
    figure.draw(runs, tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
        assert image.format == "PNG"
        assert image.width == round(150 * 9.2)
        assert image.height == round(150 * (3.2 * len(kinds) + 0.6))
    counts = collections.Counter(map(tuple, pixels.tolist()))
    for color, _ in figure.STYLES.values():
        assert counts[tuple(bytes.fromhex(color[1:]))] > 100, color


def test_variants_have_styles_of_their_own():
    assert figure.STYLES.keys() == VARIANTS.keys()
    for part in zip(*figure.STYLES.values()):
        assert len(set(part)) == len(VARIANTS)


# ------------------------------------------------------------------------------------- whole runs


class Watched:
    """Records what is trained, and ends one run half way as a kill would.

    Compiled programs are dropped before each run; here that is recorded in place of doing it.
    """

    def __init__(self, monkeypatch):
        self.calls, self.saved, self.killed, self.dropped = [], [], None, 0
        self._train, self._save = loop.train_and_evaluate, store.save
        monkeypatch.setattr(loop, "train_and_evaluate", self.train)
        monkeypatch.setattr(store, "save", self.save)
        monkeypatch.setattr(jax, "clear_caches", self.drop)

    def drop(self):
        self.dropped += 1

    def train(self, config, workdir):
        assert self.dropped == 1
        self.dropped = 0
        self.calls.append(workdir.name)
        if workdir.name == self.killed:
            self._train(config, workdir, stop_at=2)
            raise KeyboardInterrupt
        return self._train(config, workdir)

    def save(self, manager, step, *rest, **more):
        self.saved.append((Path(manager.directory).parent.name, step))
        self._save(manager, step, *rest, **more)


@pytest.fixture(scope="module")
def base(tmp_path_factory, prepared):
    directory = tmp_path_factory.mktemp("ablate")
    prepared(directory)
    return directory


def config_of(base, **changes):
    changes = {
        "total_steps": 4,
        "log_every": 1,
        "eval_every": 2,
        "checkpoint_every": 2,
        "num_devices": 1,
        "eval.sheet_queries": 1,
        **changes,
    }
    return small_config(base / "prepared", **changes)


def ablate(base, **changes):
    config = config_of(base, **changes)
    return run_ablation(config, base / "runs", variants=["attributes"], seeds=2)


@pytest.fixture(scope="module")
def finished(base):
    """An ablation that was killed and continued: what each attempt trained, and its runs."""
    with pytest.MonkeyPatch.context() as patch, compiled_once(alike=True):
        watched, calls = Watched(patch), []
        watched.killed = "attributes-steps-0"
        with pytest.raises(KeyboardInterrupt):
            ablate(base)
        calls.append(list(watched.calls))
        # Else the steps of equal time would be those of a busy machine.
        patch.setattr(
            "dqe_jax.experiments.ablation.runs.steps_within",
            lambda budget, times: 4 if budget == times[-1][1] else 3,
        )
        watched.calls.clear()
        watched.killed = None
        runs = ablate(base)
        calls.append(list(watched.calls))
    return base / "runs", calls, watched.saved, runs


@pytest.mark.slow
def test_an_interrupted_ablation_goes_on_where_it_was(finished):
    _, calls, saved, runs = finished
    assert calls == [
        ["infonce-steps-0", "attributes-steps-0"],
        [
            "attributes-steps-0",
            "infonce-steps-1",
            "attributes-steps-1",
            "attributes-time-0",
            "attributes-time-1",
        ],
    ]
    # Nothing is trained twice: no step is saved twice, and the run killed at 2 went on from there.
    assert sorted(saved) == sorted(
        [
            (f"{v}-steps-{s}", step)
            for v in ("infonce", "attributes")
            for s in (0, 1)
            for step in (2, 4)
        ]
        + [(f"attributes-time-{s}", step) for s in (0, 1) for step in (2, 3)]
    )
    found = [(run.equal, run.seed, run.variant, run.steps, run.directory) for run in runs]
    assert found == [
        ("steps", 0, "infonce", 4, "infonce-steps-0"),
        ("steps", 0, "attributes", 4, "attributes-steps-0"),
        ("steps", 1, "infonce", 4, "infonce-steps-1"),
        ("steps", 1, "attributes", 4, "attributes-steps-1"),
        ("time", 0, "infonce", 4, "infonce-steps-0"),
        ("time", 0, "attributes", 3, "attributes-time-0"),
        ("time", 1, "infonce", 4, "infonce-steps-1"),
        ("time", 1, "attributes", 3, "attributes-time-1"),
    ]


@pytest.mark.slow
def test_what_it_writes(finished):
    workdir, _, _, runs = finished
    times = json.loads((workdir / "times.json").read_text())
    assert times["infonce"]["ratio"] == 1
    assert {variant: row["steps"] for variant, row in times.items()} == {
        "infonce": 4,
        "attributes": 3,
    }
    assert times["attributes"]["seconds"] == runs[1].seconds
    facts = json.loads((workdir / "ablation.json").read_text())
    assert (facts["dataset"], facts["split"], facts["protocol"]) == ("shapes", "test", "plain")
    for run, written in zip(runs, facts["runs"]):
        report = workdir / run.directory / "eval" / f"test-{run.steps}.json"
        assert run.metrics == written["metrics"] == json.loads(report.read_text())["metrics"]
        assert sorted(run.validation) == ([2, 4] if run.steps == 4 else [2, 3])
        assert run.seconds > 0
    scores = facts["tables"]["time"][1]["scores"]
    values = [
        run.metrics["R@10"] for run in runs if (run.equal, run.variant) == ("time", "attributes")
    ]
    assert scores["R@10"]["mean"] == pytest.approx(np.mean(values))
    text = (workdir / "ablation.md").read_text()
    assert re.findall(r"^\| (\w+) \| (\d) \| (\d) ", text, re.M) == [
        *(
            ("infonce", "2", "4"),
            ("attributes", "2", "4"),
            ("infonce", "2", "4"),
            ("attributes", "2", "3"),
        ),
    ]
    assert "seeds 0, 1" in text
    with Image.open(workdir / "ablation.png") as image:
        assert len(image.convert("RGB").getcolors(1 << 20)) > 10


@pytest.mark.slow
def test_a_complete_ablation_is_only_read(finished, base, monkeypatch):
    workdir, _, _, runs = finished
    monkeypatch.setattr(loop, "train_and_evaluate", None)
    (workdir / "ablation.md").unlink()
    assert ablate(base) == runs
    assert (workdir / "ablation.md").exists()
    assert ablate(base, log_every=3) == runs  # a field that changes no result


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "equal", "sentence"),
    [
        ({"loss.margin": 0.5}, EQUAL, r"another config.*loss\.margin: 0\.5 \(not"),
        ({"total_steps": 5}, ("steps",), r"another config.*total_steps: 5 \(not 4\)"),
        ({"total_steps": 5}, ("time",), r"total_steps is 5: .*times\.json is of .* 4 steps"),
        ({"negatives.lower": 0.7, "negatives.upper": 0.6}, EQUAL, r"negatives\.lower is "),
    ],
)
def test_another_config_in_the_same_workdir(finished, base, changes, equal, sentence):
    with pytest.raises(UserError, match=sentence):
        run_ablation(
            config_of(base, **changes),
            finished[0],
            variants=("infonce", "attributes"),
            seeds=2,
            equal=equal,
        )


@pytest.mark.slow
def test_a_half_written_report_is_not_taken_for_a_result(finished, base):
    workdir, _, _, runs = finished
    config = variant_config(RunConfig.of(config_of(base)), "attributes", 0, 4)
    directory = workdir / "attributes-steps-0"
    assert record.held_metrics(config, directory) == runs[1].metrics
    report = directory / "eval" / "test-4.json"
    whole = report.read_text()
    try:
        report.write_text(whole[: len(whole) // 2])
        assert record.held_metrics(config, directory) is None
        for damaged in DAMAGED_REPORTS:
            report.write_bytes(damaged)
            assert record.held_metrics(config, directory) is None
    finally:
        report.write_text(whole)
    other = config.with_changes({"eval.split": "validation"})
    assert record.held_metrics(other, directory) is None


DAMAGED_REPORTS = (
    *(b"", b"\xff\xfe", b"[]", b"{}", b"3", b"[" * 100_000, b'{"protocol": "plain"}'),
    *(b'{"protocol": "plain", "metrics": [1]}', b'{"protocol": "plain", "metrics": {"R@1": "x"}}'),
    b'{"protocol": ["plain"], "metrics": {"R@1": 0.5}}',
)
DAMAGED_LINES = (b"\xff\xfe", b"[1]", b'{"loss": 1}', b'{"step": "1"}', b"[" * 100_000, b"{")


@pytest.mark.parametrize("damaged", DAMAGED_LINES)
@pytest.mark.parametrize("name", ["metrics", "timing"])
def test_a_log_that_is_damaged(tmp_path, name, damaged):
    (tmp_path / "metrics.jsonl").write_text('{"step": 2, "validation/R@1": null}\n{"step": 2}\n')
    (tmp_path / "timing.jsonl").write_text('{"step": 2, "train_seconds": 1.5}\n')
    log = record.read_log(epath.Path(tmp_path))
    assert record.training_times(log) == [(2, 1.5)]
    assert record.validation_metrics(log) == {}
    with (tmp_path / f"{name}.jsonl").open("ab") as file:
        file.write(damaged + b"\n")
    with pytest.raises(UserError, match=rf"{name}\.jsonl is not the log of a run: remove"):
        record.read_log(epath.Path(tmp_path))


def test_times_of_training_that_are_none(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    for damaged in ('{"step": 2, "train_seconds": "1"}', '{"step": 2}', ""):
        (tmp_path / "timing.jsonl").write_text(damaged + "\n")
        with pytest.raises(UserError, match=r"timing\.jsonl is not the log of a run"):
            record.read_log(epath.Path(tmp_path))


# -------------------------------------------------------------------------------------- the errors


def test_unknown_variant():
    with pytest.raises(UserError, match=r"no variant 'trms'; choose of infonce, attributes, trns"):
        choose_variants(["full", "trms"])


def test_too_few_seeds(tmp_path):
    with pytest.raises(UserError, match=r"--seeds is 0"):
        run_ablation(shapes.get_config(), tmp_path, variants=("infonce",), seeds=0)


@pytest.mark.parametrize(
    "content",
    [
        *(b'{"full": {}}', b"", b"[]", b"{}", b"\xff\xfe", b"[" * 100_000, b'{"infonce": 3}'),
        b'{"infonce": {"seconds": "1", "steps": 2}}',
        b'{"infonce": {"seconds": 1.5, "steps": [2]}}',
        b'{"infonce": {"seconds": 0, "steps": 2}}',
        b'{"infonce": {"seconds": 1.5, "steps": 2}, "full": null}',
    ],
)
def test_times_that_are_none(tmp_path, content):
    (tmp_path / "times.json").write_bytes(content)
    with pytest.raises(UserError, match=r"times\.json holds no times"):
        run_ablation(shapes.get_config(), tmp_path, variants=("infonce",), seeds=1, equal=("time",))


def test_a_split_without_labels(base, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "train_and_evaluate", lambda config, workdir: {})
    with pytest.raises(UserError, match=r"eval\.split is 'test': shapes has no labels"):
        run_ablation(config_of(base), tmp_path, variants=("infonce",), seeds=1)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--seeds=0",), r"flag --seeds=0: .*"),
        (("--equal=money",), r"flag --equal=money: .*"),
        (("--variants=full,none",), r"--variants: there is no variant 'none'; .*"),
        (("--lowers=0,low",), r"--lowers=0,low: name numbers, .*"),
        (("--lowers=0", "--variants=full"), r"--lowers trains no variants: .*"),
    ],
)
def test_errors_of_the_binary(arguments, sentence):
    config = "--config=configs/shapes.py:smoke"
    done = run_module("dqe_jax.ablate", config, *arguments, cwd=ROOT)
    assert done.returncode == 2, done.stderr
    assert re.fullmatch(rf"error: {sentence}\n", done.stderr)


def test_the_composition_gain_stands_beside_variants_of_one_modality():
    def line(variant, mean):
        return scores.Line(variant, 1, 2, 3.0, {"R@1": scores.Score(mean, None, None, None)})

    lines = [line("infonce", 0.5), line("text-only", 0.2), line("image-only", 0.1)]
    found = scores.composition_gains(lines)
    assert found == {
        "metric": "R@1",
        "gain": pytest.approx(0.3),
        "composed": "infonce",
        "single": "text-only",
    }
    assert scores.composition_gains(lines[:1]) is None
    assert scores.composition_gains([]) is None
