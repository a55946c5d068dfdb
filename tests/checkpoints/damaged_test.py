"""Damaged checkpoints: an older whole one is taken, and nothing is lost."""

import contextlib
import functools
import json
import os
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

from dqe_jax.checkpoints import store
from dqe_jax.checkpoints.export import export_run
from dqe_jax.evaluation.run import evaluate_checkpoint
from dqe_jax.testing.small_runs import small_config
from dqe_jax.training import loop
from dqe_jax.utils.errors import UserError


@pytest.fixture(scope="module")
def base(tmp_path_factory, prepared):
    directory = tmp_path_factory.mktemp("damaged")
    prepared(directory)
    return directory


def config_of(base, **changes):
    fields = {"total_steps": 6, "log_every": 1, "eval_every": 2, "checkpoint_every": 2}
    fields |= {"num_devices": 1, "keep_checkpoints": 9, "eval.sheet_queries": 1}
    return small_config(base / "prepared", **{**fields, **changes})


@pytest.fixture(scope="module")
def run(base):
    """A finished run with checkpoints of steps 2, 4 and 6."""
    loop.train_and_evaluate(config_of(base, keep_best="R@1"), base / "run")
    return base / "run"


@pytest.fixture
def copy(run, tmp_path):
    """A copy of the run, without its results."""
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "eval")
    return tmp_path / "run"


def step_of(workdir, step):
    return workdir / "checkpoints" / str(step)


def truncate_params(path):
    files = [p for p in (path / "params").rglob("*") if p.is_file() and p.parent.name == "d"]
    assert files
    for file in files:
        os.truncate(file, file.stat().st_size // 2)


def lose_params(path):
    shutil.rmtree(path / "params")


def empty_directory(path):
    shutil.rmtree(path)
    path.mkdir()


def empty_meta(path):
    (path / "meta" / "metadata").write_text("")


def lose_meta(path):
    shutil.rmtree(path / "meta")


def binary_meta(path):
    (path / "meta" / "metadata").write_bytes(b"\xff\xfe\x00")


def nested_meta(path):
    (path / "meta" / "metadata").write_text("[" * 100_000)


def listed_meta(path):
    (path / "meta" / "metadata").write_text("[1, 2]")


def change_meta(path, **changes):
    file = path / "meta" / "metadata"
    content = json.loads(file.read_text())
    assert changes.keys() <= content.keys()
    file.write_text(json.dumps(content | changes))


def no_tokenizer(path):
    change_meta(path, tokenizer="{}")


def wrong_types(path):
    change_meta(path, train_seconds="long", config=3)


def wrong_data(path):
    change_meta(path, data=["test"])


DAMAGES = (
    *(truncate_params, lose_params, empty_directory, empty_meta, lose_meta, binary_meta),
    *(nested_meta, listed_meta, no_tokenizer, wrong_types, wrong_data),
)


@pytest.mark.parametrize("damage", DAMAGES)
def test_evaluation_takes_the_newest_that_is_whole(base, copy, damage, caplog):
    damage(step_of(copy, 6))
    with caplog.at_level("WARNING"):
        result = evaluate_checkpoint(config_of(base), copy, split="validation")
    assert "Step 6 is passed over: the checkpoint of step 6 in " in caplog.text
    (report,) = (copy / "eval").glob("validation-?.json")
    found = json.loads(report.read_text())
    assert found["step"] == 4
    lines = map(json.loads, (copy / "metrics.jsonl").read_text().splitlines())
    trained = next(x for x in lines if x["step"] == 4 and "validation/R@1" in x)
    assert result.metrics["R@1"] == pytest.approx(trained["validation/R@1"], abs=1e-6)
    assert step_of(copy, 6).is_dir()  # evaluation changes nothing
    with pytest.raises(
        UserError, match=r"the checkpoint of step 6 in .* is damaged \(.*\): copy it"
    ):
        evaluate_checkpoint(config_of(base), copy, step=6)


@pytest.mark.parametrize("damage", [truncate_params, empty_meta, listed_meta])
def test_export_takes_the_newest_that_is_whole(copy, tmp_path, damage):
    damage(step_of(copy, 6))
    export_run(copy, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "dqe.json").read_text())["step"] == 4
    with pytest.raises(UserError, match=r"step 6 in .* is damaged"):
        export_run(copy, tmp_path / "out", step=6)


@pytest.mark.parametrize("place", ["metadata", "below/array"])
def test_what_is_no_file_is_found_before_it_is_read(tmp_path, place):
    """A pipe or a device would be read for ever."""
    (tmp_path / "below").mkdir()
    (tmp_path / "other").write_text("")
    store._check_files(tmp_path)
    (tmp_path / place).symlink_to("/dev/null")
    with pytest.raises(OSError, match=f"{place} is no regular file"):
        store._check_files(tmp_path)


def test_none_is_whole(base, copy):
    for step in (2, 4, 6):
        truncate_params(step_of(copy, step))
    for job in (evaluate_checkpoint, loop.train_and_evaluate):
        with pytest.raises(
            UserError, match=r"none of the 3 checkpoints in .* is whole; the newest one: .*step 6"
        ):
            job(config_of(base), copy)
    assert {path.name for path in (copy / "checkpoints").glob("?")} == {"2", "4", "6"}


@functools.cache  # what the run holds is compared with again and again
def arrays(workdir, step):
    manager = store.open_for_reading(epath.Path(workdir))
    items = ("params", "opt_state")
    args = ocp.args.Composite(**{name: ocp.args.StandardRestore() for name in items})
    found = manager.restore(step, args=args)
    return jax.tree.map(np.asarray, {name: found[name] for name in items})


def files_of(path):
    return {file.relative_to(path): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def assert_same_run(one, other, *, taken):
    """`other`, a copy, went on from step `taken`, and ended as `one`: the same to the byte."""
    for step in (2, 4, 6):
        if step <= taken:  # nobody has touched it
            assert files_of(step_of(one, step)) == files_of(step_of(other, step))
        else:
            again = arrays.__wrapped__(other, step)
            jax.tree.map(np.testing.assert_array_equal, arrays(one, step), again)
    for name in ("metrics.jsonl", "eval/test-6.json", "eval/test-6.ranked.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


@pytest.mark.parametrize(
    ("damage", "times"), [(truncate_params, 2), (empty_directory, 1), (empty_meta, 1)]
)
def test_a_run_goes_on_from_a_whole_one_and_keeps_the_damaged_one(
    base, run, copy, damage, times, caplog
):
    """It ends as the run that nothing befell, to the byte; and again when it happens again."""
    damage(step_of(copy, 6))
    held = sorted(p.relative_to(step_of(copy, 6)) for p in step_of(copy, 6).rglob("*"))
    with caplog.at_level("INFO"):
        loop.train_and_evaluate(config_of(base), copy)
    assert "Resumed from step 4 of " in caplog.text
    assert "6 is damaged; it is kept as 6.damaged." in caplog.text
    assert_same_run(run, copy, taken=4)
    kept = copy / "checkpoints" / "6.damaged"
    assert sorted(path.relative_to(kept) for path in kept.rglob("*")) == held
    if times == 2:
        damage(step_of(copy, 6))
        loop.train_and_evaluate(config_of(base), copy)
        assert_same_run(run, copy, taken=4)
        assert (copy / "checkpoints" / "6.damaged+").is_dir()
    assert store.steps_of(epath.Path(copy)) == [2, 4, 6]


def no_metrics(path):
    (path / "metrics" / "metrics").write_text("")


@pytest.mark.parametrize(
    "damages",
    [(truncate_params, empty_meta), (empty_directory, empty_directory), (no_metrics,) * 2],
)
def test_two_damaged_ones_with_the_best_kept(base, run, copy, damages):
    """The best is chosen by what is stored beside the parameters."""
    config = config_of(base, keep_best="R@1")
    for step, damage in zip((6, 4), damages):
        damage(step_of(copy, step))
    loop.train_and_evaluate(config, copy)
    assert_same_run(run, copy, taken=2)
    names = {path.name for path in (copy / "checkpoints").iterdir() if path.is_dir()}
    kept = "metrics.damaged" if damages[0] is no_metrics else "damaged"  # the model is whole then
    assert names == {"2", "4", "6", f"4.{kept}", f"6.{kept}"}


@pytest.mark.parametrize(
    "content",
    [b"\xff\xfe", b"[1]", b"[" * 100_000, b'{"seed": ' + b'{"a": ' * 900 + b"1" + b"}" * 901],
)
def test_a_damaged_config_of_a_run(base, copy, content):
    """Of the directory: a sentence, not a traceback, and nothing is changed."""
    (copy / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=r"config\.json|holds a run of another config"):
        loop.train_and_evaluate(config_of(base), copy)
    assert (copy / "config.json").read_bytes() == content


@pytest.mark.parametrize("target", ["config.json", "nothing-here"])
def test_a_config_of_a_run_that_is_a_link_to_nothing(base, copy, target):
    """It may have been of another config, so it is not written again."""
    file = copy / "config.json"
    file.unlink()
    file.symlink_to(target)
    with pytest.raises(UserError, match=r"config\.json cannot be read \("):
        loop.train_and_evaluate(config_of(base), copy)
    assert os.readlink(file) == target


@pytest.mark.parametrize(
    ("content", "told"),
    [("[]", True), ("1", True), ('{"item_handlers": 1}', True), ("[" * 100_000, True), ("", False)],
)
def test_what_orbax_notes_of_a_checkpoint_is_damaged(base, copy, content, told):
    """Told, or of no account; without the file the model is there as before."""
    file = step_of(copy, 6) / "_CHECKPOINT_METADATA"
    file.write_text(content)
    for use in (
        lambda: evaluate_checkpoint(config_of(base), copy, split="validation"),
        lambda: loop.train_and_evaluate(config_of(base, keep_best="R@1"), copy),
    ):
        with (
            pytest.raises(UserError, match=r"6/_CHECKPOINT_METADATA is damaged \(.*remove it")
            if told
            else contextlib.nullcontext()
        ):
            use()
    file.unlink(missing_ok=True)
    shutil.rmtree(copy / "eval", ignore_errors=True)
    evaluate_checkpoint(config_of(base), copy, split="validation")
    assert (copy / "eval" / "validation-6.json").exists()
