"""What a machine or bad data can do to a run: one sentence each, and nothing saved is lost."""

import contextlib
import dataclasses
import errno
import json
import os
import re
import signal
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath

from dqe_jax.checkpoints import store
from dqe_jax.config import RunConfig
from dqe_jax.data import splits
from dqe_jax.distributed import interrupts
from dqe_jax.testing.commands import run_module
from dqe_jax.testing.small_runs import small_config
from dqe_jax.training import loop, session
from dqe_jax.training import workdir as workdirs
from dqe_jax.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def base(tmp_path_factory, prepared):
    directory = tmp_path_factory.mktemp("guards")
    prepared(directory)
    return directory


def config_of(base, **changes):
    changes = {
        "total_steps": 6,
        "log_every": 1,
        "eval_every": 0,
        "checkpoint_every": 2,
        "num_devices": 1,
        **changes,
    }
    return small_config(base / "prepared", **changes)


LONG = 24  # steps of runs that need more; few lengths, because each has a program of its own


def lines_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def steps_of(workdir):
    return store.steps_of(epath.Path(workdir))


def spoil(monkeypatch, bad):
    """Gives the steps that are `bad` weights of intent that are no numbers."""
    take, count = loop.take_step, iter(range(1, 100))

    def spoilt(session, state, step, stop, data_wait):
        class Batches:
            wait = session.batches.wait

            def __next__(self):
                batch = next(session.batches)
                if bad(next(count)):
                    batch = batch.replace(mentions=np.full_like(batch.mentions, np.nan))
                return batch

        return take(dataclasses.replace(session, batches=Batches()), state, step, stop, data_wait)

    monkeypatch.setattr(loop, "take_step", spoilt)


def test_losses_that_are_not_finite_end_the_run(base, monkeypatch):
    spoil(monkeypatch, lambda step: True)
    with pytest.raises(
        UserError,
        match=r"not finite in 3 steps in a row, up to step 3: lower config\.optimizer\.learning_"
        r"rate.*max_bad_steps is 3\); (no checkpoint|step 2) is saved",
    ):
        loop.train_and_evaluate(config_of(base, max_bad_steps=3), base / "diverged")


def test_parameters_that_are_not_finite_are_never_kept(base, monkeypatch):
    """Finite gradients give them, at a learning rate that float32 cannot hold."""
    config = RunConfig.of(config_of(base, max_bad_steps=3, **{"optimizer.warmup_steps": 0}))
    fast = dataclasses.replace(config.optimizer, learning_rate=1e300)
    config = dataclasses.replace(config, optimizer=fast)
    monkeypatch.setattr(RunConfig, "of", lambda config: config)  # which would refuse it
    workdir = base / "infinite"
    with pytest.raises(UserError, match=r"a parameter was not finite in 3 steps in a row, up to"):
        loop.train_and_evaluate(config, workdir)
    manager = store.open_for_reading(workdir)
    assert steps_of(workdir) == [2]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(store.restore_params(manager, 2)))


def test_parameters_that_start_as_no_numbers(base, monkeypatch):
    init = session.setup.init_params

    def spoilt(*arguments):
        params = init(*arguments)
        return params | {"log_scale": params["log_scale"] * np.nan}

    monkeypatch.setattr(session.setup, "init_params", spoilt)
    with pytest.raises(UserError, match=r"not finite at step 1, as they were at the start"):
        loop.train_and_evaluate(config_of(base), base / "nan")
    assert steps_of(base / "nan") == []


def test_a_step_that_is_not_finite_is_skipped_and_counted(base, monkeypatch, caplog):
    """Step 3 has weights of intent that are no numbers: nothing moves but the counts."""
    config, workdir = config_of(base, keep_checkpoints=9, checkpoint_every=1), base / "skipped"
    spoil(monkeypatch, lambda step: step == 3)
    with caplog.at_level("WARNING"):
        loop.train_and_evaluate(config, workdir)
    assert (
        "Step 3: the loss, a gradient or a parameter is not finite; it is skipped." in caplog.text
    )
    found = {line["step"]: line["bad_steps"] for line in lines_of(workdir) if "loss" in line}
    assert found == {1: 0, 2: 0, 3: 1, 4: 1, 5: 1, 6: 1}
    manager = store.open_for_reading(workdir)
    params = {step: store.restore_params(manager, step) for step in (2, 3, 4)}
    jax.tree.map(np.testing.assert_array_equal, params[2], params[3])
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), params[3], params[4])
    assert max(jax.tree.leaves(moved)) > 1e-4


def test_a_second_trainer_is_kept_out(base):
    workdir = epath.Path(base / "shared")
    workdir.mkdir()
    with (
        workdirs.lock_workdir(workdir),
        pytest.raises(
            UserError, match=rf"process {os.getpid()} of .* trains in .*shared: wait until"
        ),
    ):
        loop.train_and_evaluate(config_of(base), workdir)
    assert not (workdir / "config.json").exists()  # it has changed nothing
    workdirs.lock_workdir(workdir).close()  # free again
    # A storage without conditional writes.
    assert workdirs.lock_workdir(epath.Path("az://bucket/run")) is None


def test_a_disk_without_locks_keeps_nobody_out(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(workdirs.fcntl, "flock", refuse)
    with caplog.at_level("WARNING"):
        workdirs.lock_workdir(epath.Path(tmp_path)).close()
    assert "has no locks (No locks available)" in caplog.text


def test_the_config_of_a_run_is_written_at_once(tmp_path, monkeypatch):
    config = RunConfig.of(config_of(tmp_path))
    path, lock = workdirs.claim_workdir(tmp_path, config)
    lock.close()
    whole = (path / "config.json").read_text()
    monkeypatch.setattr(type(path), "write_text", None)  # the same config is not written again
    workdirs.claim_workdir(tmp_path, config)[1].close()
    monkeypatch.undo()
    monkeypatch.setattr(type(path), "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        workdirs.claim_workdir(tmp_path, config.with_changes({"total_steps": 7}))
    assert (path / "config.json").read_text() == whole


@contextlib.contextmanager
def small_disk(path):
    """A disk of 12 MB at a directory."""
    command = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(path)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def test_a_full_disk(base, tmp_path):
    """The run says so, keeps what it has, and goes on when there is space."""
    with small_disk(tmp_path):
        config = config_of(base, total_steps=LONG, keep_checkpoints=99, eval_every=0)
        workdir = tmp_path / "run"
        with pytest.raises(
            UserError,
            match=r"cannot write to .*run \(.*\): step \d+ is saved; free space .*, and run the "
            r"same command again",
        ) as error:
            loop.train_and_evaluate(config, workdir)
        kept = steps_of(workdir)
        assert f"step {kept[-1]} is saved" in str(error.value)
        manager = store.open_for_reading(workdir)
        for step in kept:
            assert len(jax.tree.leaves(store.restore_params(manager, step))) > 20
        subprocess.run(["mount", "-o", "remount,size=400m", str(tmp_path)], check=True)
        loop.train_and_evaluate(config, workdir)
        assert steps_of(workdir) == list(range(2, LONG + 1, 2))
        assert [line["step"] for line in lines_of(workdir)] == list(range(1, LONG + 1))


@pytest.mark.slow
def test_a_full_disk_is_told_in_one_sentence(base, tmp_path):
    """Orbax, asyncio and TensorStore would add a traceback for each array that is not written."""
    changes = {"total_steps": LONG, "keep_checkpoints": 99, "eval_every": 0, "checkpoint_every": 2}
    changes |= {"num_devices": 1, "model.tiny.image_depth": 0, "model.tiny.text_depth": 0}
    changes["model.tiny.composer_depth"] = 1
    changes["data.prepared_dir"] = base / "prepared"
    with small_disk(tmp_path):
        done = run_module(
            *("dqe_jax.main", "--config=configs/shapes.py:smoke"),
            f"--workdir={tmp_path / 'run'}",
            *(f"--config.{name}={value}" for name, value in changes.items()),
            cwd=ROOT,
        )
    assert done.returncode == 2
    said = done.stderr.replace("\r", "\n").partition("Ready after ")[2].splitlines()[1:]
    # On a busy machine the run also says that its devices waited for data.
    usual = re.compile(
        r"train: |The first step was done |For \d+% of the time the devices waited for data: |\s*$"
    )
    (sentence,) = [line for line in said if not usual.match(line)]
    assert sentence.startswith("error: cannot write to ")


def test_a_data_directory_that_vanishes(base, monkeypatch):
    config = config_of(base, **{"data.prepared_dir": str(base / "moving")})
    loop.train_and_evaluate(config, base / "vanished", stop_at=2)

    def gone(self, row):
        if (base / "moving").exists():
            (base / "moving").rename(base / "away")
        raise FileNotFoundError(2, "No such file or directory", "shard")

    with monkeypatch.context() as patch:
        patch.setattr(splits.Gallery, "__getitem__", gone)
        with pytest.raises(
            UserError, match=r"the data in .*moving.* is gone: step 2 is saved; put it back, and"
        ):
            loop.train_and_evaluate(config, base / "vanished")
    (base / "away").rename(base / "moving")
    loop.train_and_evaluate(config, base / "vanished")
    assert steps_of(base / "vanished")[-1] == 6


def test_an_error_of_the_code_stays_what_it_is(base, monkeypatch):
    def broken(session, state, step, stop, data_wait):
        raise ZeroDivisionError

    monkeypatch.setattr(loop, "take_step", broken)
    with pytest.raises(ZeroDivisionError):
        loop.train_and_evaluate(config_of(base), base / "broken")


def test_what_is_kept(base):
    metric = "top1_is_reference"  # highest before anything is learnt
    config = config_of(base, keep_checkpoints=1, keep_period=16, keep_best=metric)
    config.total_steps, config.checkpoint_every, config.eval_every = LONG, 4, 4
    workdir = base / "kept"
    loop.train_and_evaluate(config, workdir)
    found = {
        line["step"]: line[f"validation/{metric}"]
        for line in lines_of(workdir)
        if f"validation/{metric}" in line
    }
    best = max(found, key=lambda step: (found[step], step))
    assert best < 16
    assert steps_of(workdir) == [best, 16, LONG]
    for changes in ({"eval_every": 0}, {"eval_every": 4}):
        with pytest.raises(UserError, match=r"keep_best is 'R@1': it needs an evaluation at each"):
            RunConfig.of(config_of(base, keep_best="R@1", **changes))
    with pytest.raises(UserError, match=r"keep_best is 'recall': validation measures .*R@1, "):
        loop.train_and_evaluate(config_of(base, keep_best="recall", eval_every=2), base / "unknown")


def test_a_checkpoint_between_two_on_schedule_lives_until_the_next(base):
    config, workdir = config_of(base, keep_checkpoints=9), base / "between"
    loop.train_and_evaluate(config, workdir, stop_at=3)
    assert steps_of(workdir) == [2, 3]
    loop.train_and_evaluate(config, workdir)
    assert steps_of(workdir) == [2, 4, 6]


def test_half_written_checkpoints_are_not_read_and_are_removed(base):
    config, workdir = config_of(base), base / "half"
    loop.train_and_evaluate(config, workdir, stop_at=2)
    half = workdir / "checkpoints" / "4.orbax-checkpoint-tmp"
    (half / "params").mkdir(parents=True)
    assert steps_of(workdir) == [2]
    assert store.open_for_reading(workdir).latest_step() == 2
    loop.train_and_evaluate(config, workdir)
    assert steps_of(workdir) == [2, 4, 6]
    assert not half.exists()


def test_training_without_evaluation(base):
    config, workdir = config_of(base, eval_every=0), base / "unmeasured"
    assert loop.train_and_evaluate(config, workdir) == {}
    assert not any("R@1" in name for line in lines_of(workdir) for name in line)
    assert not (workdir / "eval").exists()


@pytest.mark.parametrize(
    ("number", "every"), [(signal.SIGTERM, 50), (signal.SIGINT, 50), (signal.SIGTERM, 1)]
)
def test_a_signal_saves_and_ends(base, number, every, monkeypatch):
    config = config_of(base, total_steps=LONG, checkpoint_every=every, eval_every=0)
    workdir = base / f"signal-{number}-{every}"
    take, handler = loop.take_step, signal.getsignal(number)

    def sends(session, state, step, stop, data_wait):
        if int(state.step) == 3:
            signal.raise_signal(number)
        return take(session, state, step, stop, data_wait)

    monkeypatch.setattr(loop, "take_step", sends)
    with pytest.raises(interrupts.Interrupted) as ended:
        loop.train_and_evaluate(config, workdir)
    assert ended.value.status == 128 + number
    *before_it, saved = steps_of(workdir)
    assert 4 <= saved <= 8
    assert before_it == ([] if every == 50 else [saved - 2, saved - 1])  # three are kept
    assert signal.getsignal(number) == handler
    assert [line["step"] for line in lines_of(workdir)] == list(range(1, saved + 1))


def test_a_second_signal_acts_at_once():
    # A shell's background job ignores SIGINT, and pytest may be one.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with interrupts.Interrupts() as noted:
            signal.raise_signal(signal.SIGINT)
            assert noted.seen == signal.SIGINT
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
