"""The evaluator that follows a run from elsewhere."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from etils import epath

from dqe_jax.checkpoints import store
from dqe_jax.evaluation.watch import watch
from dqe_jax.testing.small_runs import compiles_quickly, small_config
from dqe_jax.training import loop
from dqe_jax.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def base(tmp_path_factory, prepared):
    directory = tmp_path_factory.mktemp("watch")
    prepared(directory)
    return directory


def config_of(base, **changes):
    changes = {
        "total_steps": 6,
        "log_every": 2,
        "eval_every": 2,
        "checkpoint_every": 2,
        "num_devices": 1,
        **changes,
    }
    return small_config(base / "prepared", **changes)


def lines_of(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(base):
    loop.train_and_evaluate(config_of(base), base / "run")
    return epath.Path(base / "run")


def follow(base, workdir, **kwargs):
    output = workdir / "eval-elsewhere"
    return watch(config_of(base), workdir, output=output, poll_s=0.01, **kwargs)


def test_it_measures_what_training_measured(base, trained):
    found = follow(base, trained)
    assert list(found) == [2, 4, 6]
    own = [line for line in lines_of(trained) if "validation/R@1" in line]
    assert lines_of(trained / "watch-validation") == own
    assert list((trained / "watch-validation" / "events").iterdir())
    report = json.loads((trained / "eval-elsewhere" / "validation-6.json").read_text())
    assert report["metrics"] == found[6]
    assert not (trained / "eval-elsewhere" / "validation-4.json").exists()
    assert follow(base, trained) == {}  # once each, also when it is started again
    assert lines_of(trained / "watch-validation") == own


def test_a_checkpoint_that_is_removed_meanwhile(base, trained, tmp_path, monkeypatch, caplog):
    workdir = epath.Path(tmp_path / "copy")
    shutil.copytree(trained, workdir)
    shutil.rmtree(workdir / "watch-validation", ignore_errors=True)
    restore = store.restore

    def gone(manager, step, **like):
        if step == 2:
            shutil.rmtree(workdir / "checkpoints" / "2")
        return restore(manager, step, **like)

    monkeypatch.setattr(store, "restore", gone)
    with caplog.at_level("WARNING"):
        assert list(follow(base, workdir)) == [4, 6]
    assert "Step 2 was removed before it was evaluated" in caplog.text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        *((None, "cannot be read"), (b"\xff\xfe", "is not UTF-8"), (b"[" * 100_000, "is not JSON")),
        *((b"[]", "must hold an object"), (b"{}", "has no total_steps")),
        (b'{"total_steps": "6"}', "has no total_steps"),
    ],
)
def test_a_damaged_config_of_the_run(base, trained, tmp_path, content, words):
    shutil.copytree(trained, tmp_path / "copy")
    (tmp_path / "copy" / "config.json").unlink()
    if content is not None:
        (tmp_path / "copy" / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=rf"config\.json {words}"):
        follow(base, epath.Path(tmp_path / "copy"))


def test_patience(base, tmp_path):
    with pytest.raises(UserError, match=r"no new checkpoint in .*nothing for 0 s"):
        follow(base, epath.Path(tmp_path / "nothing"), patience_s=0.05)


def test_it_may_start_before_the_run_and_ends_with_it(base):
    """The binary, in a process of its own; training leaves evaluation to it."""
    config, workdir = config_of(base, eval_every=0, keep_checkpoints=9), base / "followed"
    command = [
        *(sys.executable, "-m", "dqe_jax.evaluate", "--config=configs/shapes.py:smoke"),
        *(f"--workdir={workdir}", "--watch", "--poll_s=0.1", "--config.num_devices=1"),
        f"--config.data.prepared_dir={base / 'prepared'}",
        *("--config.model.tiny.image_depth=0", "--config.model.tiny.text_depth=0"),
        "--config.model.tiny.composer_depth=1",
    ]
    environment = os.environ | compiles_quickly() | {"JAX_PLATFORMS": "cpu"}
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as watcher:
        try:
            loop.train_and_evaluate(config, workdir)
            said, _ = watcher.communicate(timeout=600)
        finally:
            watcher.kill()
    assert watcher.returncode == 0, said
    assert "Training is done; 3 checkpoints were evaluated here." in said
    found = lines_of(workdir / "watch-validation")
    assert [line["step"] for line in found] == store.steps_of(epath.Path(workdir)) == [2, 4, 6]
    assert all(0 <= line["validation/R@1"] <= 1 for line in found)
