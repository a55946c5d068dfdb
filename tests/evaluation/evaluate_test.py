"""The evaluation binary gives what training's own evaluation gave, on any number of devices."""

import errno
import json
import math
import re
from pathlib import Path

import pytest
from etils import epath

from dqe_jax.data import datasets
from dqe_jax.data.examples import gallery_split
from dqe_jax.evaluation import report
from dqe_jax.evaluation.evaluator import RetrievalEvaluator
from dqe_jax.evaluation.run import evaluate_checkpoint
from dqe_jax.testing.commands import run_module
from dqe_jax.testing.small_runs import run_config, small_config
from dqe_jax.training import loop
from dqe_jax.utils import files
from dqe_jax.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
# What `small_config` sets, on the command line.
FLAGS = (
    "--config=configs/shapes.py:smoke",
    "--config.model.tiny.image_depth=0",
    "--config.model.tiny.text_depth=0",
    "--config.model.tiny.composer_depth=1",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory, prepared):
    """A trained run: (directory, workdir, final metrics)."""
    base = tmp_path_factory.mktemp("evaluate")
    prepared(base)
    changes = {"total_steps": 4, "checkpoint_every": 2, "eval_every": 2}
    metrics = loop.train_and_evaluate(small_config(base / "prepared", **changes), base / "run")
    return base, base / "run", metrics


def run_binary(base, *arguments):
    """The binary in a process of its own."""
    prepared = f"--config.data.prepared_dir={base / 'prepared'}"
    return run_module("dqe_jax.evaluate", *FLAGS, *arguments, prepared, cwd=ROOT)


def evaluate(base, *arguments):
    done = run_binary(base, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stderr


def gallery_size(base, split):
    builder = datasets.open_dataset(run_config(base / "prepared").data)
    return builder.info.splits[gallery_split(split)].num_examples


@pytest.mark.parametrize(("num_devices", "batch_size"), [(1, 37), (8, 60)])
def test_equals_the_final_evaluation_of_training(run, tmp_path, num_devices, batch_size):
    base, workdir, metrics = run
    log = evaluate(
        base,
        f"--workdir={workdir}",
        f"--output={tmp_path}",
        f"--config.num_devices={num_devices}",
        f"--config.eval.batch_size={batch_size}",  # divides neither the gallery nor the queries
    )
    assert "reference_only" in log  # the table
    assert "only shows that everything works" in log  # after so few steps
    assert " P@10" not in log  # one target a query: it says nothing
    assert "images ranked" not in log  # as many as are at hand
    report = json.loads((tmp_path / "test-4.json").read_text())
    trained = json.loads((workdir / "eval" / "test-4.json").read_text())
    assert report.keys() == trained.keys()
    assert (report["step"], report["split"]) == (4, "test")
    assert report["metrics"] == pytest.approx(metrics, abs=1e-6)
    assert report["ranked_images"] == gallery_size(base, "test")
    assert report["queries"]["used"] == report["queries"]["official"] == metrics["queries"]
    ranked = json.loads((tmp_path / "test-4.ranked.json").read_text())
    assert ranked == json.loads((workdir / "eval" / "test-4.ranked.json").read_text())
    assert {len(ids) for ids in ranked.values()} == {50}
    for name, values in trained["baselines"].items():
        assert report["baselines"][name] == pytest.approx(values, abs=1e-6)
    assert (tmp_path / "test-4.png").read_bytes()[1:4] == b"PNG"


def test_an_earlier_step_on_validation_from_a_directory_of_checkpoints(run):
    base, workdir, _ = run
    evaluate(base, f"--checkpoint={workdir / 'checkpoints'}", "--step=2", "--split=validation")
    report = json.loads((workdir / "eval" / "validation-2.json").read_text())
    assert (report["step"], report["split"]) == (2, "validation")
    assert report["ranked_images"] == gallery_size(base, "validation")
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    logged = next(line for line in lines if line["step"] == 2 and "validation/R@1" in line)
    expected = {f"validation/{name}": value for name, value in report["metrics"].items()}
    assert {"step": 2, **expected} == pytest.approx(logged, abs=1e-6)


def test_the_report_of_a_run_against_its_own_end(run, tmp_path):
    base, workdir, metrics = run
    config = small_config(base / "prepared", total_steps=4, checkpoint_every=2, eval_every=2)
    evaluate_checkpoint(config, workdir, step=2, output=tmp_path, against=workdir)
    page = (tmp_path / "report.html").read_text()
    data = json.loads(re.findall(r'id="data">(.*?)</script>', page)[0])
    assert len(data["queries"]) == metrics["queries"]
    assert data["other"] == "run, step 4"
    others = {line["key"]: line["other"][0] for line in data["metrics"]}
    assert others["R@10"] == pytest.approx(metrics["R@10"], abs=1e-5)
    assert data["attributes"] == list(config.model.attributes.names)


@pytest.mark.parametrize(
    ("values", "changes", "sentence"),
    [
        ({"directory": "{base}/none"}, {}, r"there is no directory .*none"),
        ({"directory": "{base}/prepared"}, {}, r"there is no checkpoint in .*prepared"),
        ({"step": 3}, {}, r"--step=3: .* steps 2, 4"),
        ({}, {"model.tiny.width": 64}, r"another model.*model\.tiny\.width: 64 \(not 32\)"),
        ({}, {"data.max_length": 9}, r"data\.max_length: 9 \(not \d+\)"),
        ({"split": "dev"}, {}, r"shapes has no split 'dev'; it has train"),
        ({"hp_fashioniq": "x"}, {}, r"FashionIQ's val split, not test of shapes"),
        ({}, {"num_devices": 99}, r"num_devices is 99"),
        ({}, {"eval.top_k": 1}, r"config\.eval\.top_k is 1"),
        ({"output": "{run}/config.json/x"}, {}, r"cannot write to .*config\.json"),
    ],
)
def test_errors(run, values, changes, sentence, monkeypatch):
    """Before anything is computed: that nothing can be written too."""
    monkeypatch.setattr(RetrievalEvaluator, "run", lambda *_, **__: pytest.fail("it evaluates"))
    base, workdir, _ = run
    filled = {
        name: value.format(base=base, run=workdir) if isinstance(value, str) else value
        for name, value in {"directory": "{run}", **values}.items()
    }
    with pytest.raises(UserError, match=sentence):
        evaluate_checkpoint(small_config(base / "prepared", **changes), **filled)


def test_a_disk_that_is_full_is_seen_first(run, monkeypatch, tmp_path):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    base, workdir, _ = run
    monkeypatch.setattr(files.tempfile, "TemporaryFile", full)
    monkeypatch.setattr(RetrievalEvaluator, "run", lambda *_, **__: pytest.fail("it evaluates"))
    with pytest.raises(UserError, match=r"cannot write to .*out \(No space left on device\)"):
        evaluate_checkpoint(small_config(base / "prepared"), workdir, output=tmp_path / "out")


def test_the_figures_are_told_though_they_cannot_be_written(run, monkeypatch, tmp_path, caplog):
    def full(path, *_, **__):
        raise files.cannot_write(path.parent, OSError(errno.ENOSPC, "No space left on device"))

    base, workdir, metrics = run
    monkeypatch.setattr(report, "write_json", full)
    with (
        caplog.at_level("INFO"),
        pytest.raises(UserError, match=r"cannot write to .*\(No space left on device\)"),
    ):
        evaluate_checkpoint(small_config(base / "prepared"), workdir, output=tmp_path)
    assert f"{metrics['R@10']:.4f}" in caplog.text
    assert "reference_only" in caplog.text


def test_results_are_json(tmp_path):
    """NaN and Infinity are none, though Python writes them."""
    content = {"a": [math.nan, (1.5, -math.inf)], "b": {"c": math.inf, "d": "NaN"}, "e": True}
    files.write_json(epath.Path(tmp_path / "x.json"), content)
    found = json.loads((tmp_path / "x.json").read_text(), parse_constant=pytest.fail)
    assert found == {"a": [None, [1.5, None]], "b": {"c": None, "d": "NaN"}, "e": True}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), r"name what to evaluate: --workdir=DIR or --checkpoint=DIR\."),
        (("--predictions=x", "--embeddings=y"), r"--predictions, --embeddings, .* name one .*"),
        (("--embeddings=x.npz",), r"--embeddings needs --output=DIR, .*"),
        (("--watch", "--checkpoint=x"), r"--watch follows --workdir=DIR, without --checkpoint .*"),
        (("--watch", "--workdir=x", "--step=2"), r"--watch follows --workdir=DIR, .*"),
    ],
)
def test_flags_that_do_not_go_together(tmp_path, arguments, sentence):
    done = run_binary(tmp_path, *arguments)
    assert done.returncode == 2
    assert re.fullmatch(rf"error: {sentence}\n", done.stderr)
