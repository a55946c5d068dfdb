"""Every error that a user can make is one sentence, with status 2, before training starts."""

import importlib
import shutil
import sys
import textwrap
import types
from pathlib import Path

import pytest
from absl import flags

from configs import fashion_products, shapes
from dqe_jax.cli import command_line
from dqe_jax.config import RunConfig, fields, flatten
from dqe_jax.data import splits
from dqe_jax.data.index import make_index
from dqe_jax.testing.commands import run_module
from dqe_jax.testing.small_runs import run_config, small_config
from dqe_jax.training import loop
from dqe_jax.training import workdir as workdirs
from dqe_jax.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
SMOKE = "--config=configs/shapes.py:smoke"


@pytest.fixture(scope="module")
def prepared_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("prepared")


@pytest.fixture(autouse=True)
def no_training(monkeypatch):
    monkeypatch.setattr(loop, "restore_or_init", lambda *_: pytest.fail("training starts"))


def main(*arguments):
    done = run_module("dqe_jax.main", *arguments, cwd=ROOT)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()
    assert len(last) == 1, done.stderr
    assert last[0].startswith("error: ")
    assert "\\" not in last[0]  # no repr of a repr
    assert len(last[0]) < 400
    return last[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([SMOKE, "--config.data.image_sizes=3"], ["image_sizes", "image_size"]),
        ([SMOKE, "--config.batch.references=abc"], ["config.batch.references", "abc"]),
        ([SMOKE, "--config.negatives.rule=foo"], ["in_batch, random, hardest, qure, trns"]),
        (["--config=configs/nothing.py"], ["configs/nothing.py"]),
        (["--config=configs/shapes.py:foo"], ["unknown variant foo", "hard, coarse, smoke"]),
        (["--config=configs/fashion_products.py"], ["--data_dir"]),
        ([], ["--config"]),
        ([SMOKE, "--workdirs=x"], ["workdirs", "workdir"]),
    ],
)
def test_command_line(arguments, words, tmp_path):
    if arguments:
        prepared = f"--config.data.prepared_dir={tmp_path}"
        arguments = [*arguments, f"--workdir={tmp_path / 'run'}", prepared]
    sentence = main(*arguments)
    for word in words:
        assert word in sentence


def test_a_missing_config_file(tmp_path):
    # With overrides it fails while flags are parsed, without them when the config is used.
    assert "configs/nothing.py" in main("--config=configs/nothing.py", f"--workdir={tmp_path}")


def test_a_config_file_that_fails_names_what_failed(tmp_path):
    for text, word in (("import nonsense_module", "nonsense_module"), ("def (", "syntax")):
        file = tmp_path / "broken.py"
        file.write_text(text + "\n")
        assert word in main(f"--config={file}", f"--workdir={tmp_path / 'run'}")


def changed(**changes):
    config = shapes.get_config("smoke")
    with config.ignore_type():
        config.update_from_flattened_dict(changes)
    return config


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"total_steps": 0}, r"config\.total_steps is 0: it must be an integer of at least 1"),
        ({"total_steps": 1.5}, r"config\.total_steps is 1\.5"),
        ({"total_steps": True}, r"config\.total_steps is True"),
        ({"seed": "1"}, r"config\.seed is '1'"),
        ({"negatives.rule": "best"}, r"one of in_batch, random, hardest, qure, trns"),
        ({"data.dataset": "coco"}, r"one of shapes, fashion_products"),
        ({"model.attributes.names": ()}, r"config\.model\.attributes\.names is \[\].*tuple"),
        ({"optimizer.learning_rate": float("nan")}, r"learning_rate is nan.*above 0"),
        ({"loss.margin": -1.0}, r"at least 0"),
        ({"eval.top_k": 49}, r"config\.eval\.top_k is 49: .* at least 50"),
        ({"model.tiny.heads": 3}, r"multiple of config\.model\.tiny\.heads, 3"),
        ({"data.image_size": 53}, r"multiple of config\.model\.tiny\.patch_size, \d+"),
        ({"negatives.lower": 0.7}, r"config\.negatives\.lower is 0\.7: it must be below .* 0\.6"),
        ({"negatives.lower": 0.6}, r"must be below"),
        ({"negatives.upper": 1.5}, r"must lie in 0 to 1"),
    ],
)
def test_fields(changes, sentence):
    with pytest.raises(UserError, match=sentence):
        RunConfig.of(changed(**changes))


def test_the_configs_hold_exactly_the_known_fields():
    for config in (
        shapes.get_config(),
        shapes.get_config("hard,smoke"),
        fashion_products.get_config(),
        fashion_products.get_config("smoke"),
    ):
        RunConfig.of(config)
        assert flatten(config.to_dict()).keys() == fields().keys()


def test_unknown_and_missing_fields_of_a_config_file():
    config = shapes.get_config("smoke")
    config.data.image_sizes = 3
    with pytest.raises(UserError, match=r"config\.data\.image_sizes is not a field.*image_size\?"):
        RunConfig.of(config)
    config = shapes.get_config("smoke")
    del config.loss.margin
    with pytest.raises(UserError, match=r"config\.loss\.margin is missing"):
        RunConfig.of(config)
    with pytest.raises(ValueError, match=r"unknown variant hardest.*hard, coarse, smoke"):
        shapes.get_config("hardest")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_devices": 99}, r"num_devices is 99: this run has \d+ devices"),
        ({"batch.references": 7}, r"config\.batch\.references is 7: .*multiple of the 2 devices"),
        ({"eval.split": "dev"}, r"config\.eval\.split is 'dev': .* train, validation, test"),
        ({"model.attributes.names": ("color", "smell")}, r"'smell' has no section.*color.*shape"),
        ({"data.lexicon": "/no/such/file"}, r"config\.data\.lexicon: there is no file /no/such"),
        ({"data.image_size": 32}, r"config\.data\.image_size is 32"),
        (
            {"data.prepared_dir": "/dev/null/x"},
            r"config\.data\.prepared_dir: cannot make /dev/null/x",
        ),
    ],
)
def test_before_training(changes, sentence, prepared_dir, tmp_path):
    with pytest.raises(UserError, match=sentence):
        loop.train_and_evaluate(small_config(prepared_dir, **changes), tmp_path / "run")


def test_a_corrected_command_may_use_the_same_workdir(prepared_dir, tmp_path):
    workdir = tmp_path / "run"
    wrong = small_config(prepared_dir, **{"model.attributes.names": ("smell",)})
    with pytest.raises(UserError, match="no section"):
        loop.train_and_evaluate(wrong, workdir)
    workdirs.claim_workdir(workdir, run_config(prepared_dir))  # nothing was trained: no objection


def test_an_empty_or_unknown_split(tmp_path, monkeypatch):
    class Builder:
        name, data_dir = "shapes", "/data"
        info = types.SimpleNamespace(
            splits=("train", "train_gallery", "test", "test_gallery"), metadata={}
        )

        def as_data_source(self, split, **_):
            return []

    monkeypatch.setattr(splits, "read_index", lambda *_: make_index([]))
    with pytest.raises(UserError, match=r"split 'train' of shapes in /data has no query"):
        splits.load_split(Builder(), "train", 64)
    with pytest.raises(UserError, match=r"no split 'validation'; it has train, test"):
        splits.load_split(Builder(), "validation", 64)


def test_fashion_products_needs_its_photos(prepared_dir, tmp_path):
    config = fashion_products.get_config("smoke")
    config.data.prepared_dir, config.num_devices = str(prepared_dir), 1
    with pytest.raises(UserError, match=r"pass --data_dir=DIR"):
        loop.train_and_evaluate(config, tmp_path / "one")
    config.data.data_dir = str(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"nowhere"):
        loop.train_and_evaluate(config, tmp_path / "two")
    shutil.rmtree(tmp_path / "two", ignore_errors=True)


def test_workdir(prepared_dir, tmp_path):
    (tmp_path / "file").write_text("")
    config = run_config(prepared_dir)
    for path in ("file", "file/below"):
        with pytest.raises(UserError, match=rf"--workdir: cannot write to .*{path}"):
            workdirs.claim_workdir(tmp_path / path, config)
    workdirs.claim_workdir(tmp_path / "run", config)
    (tmp_path / "run" / "checkpoints" / "1").mkdir(parents=True)  # it has trained
    same = run_config(prepared_dir, log_every=1, num_devices=1)  # fields that may differ
    workdirs.claim_workdir(tmp_path / "run", same)
    other = run_config(prepared_dir, **{"seed": 3, "loss.margin": 0.5})
    with pytest.raises(
        UserError, match=r"another config.*loss\.margin: 0\.5 \(not 0\.02\); seed: 3 \(not 0\)"
    ):
        workdirs.claim_workdir(tmp_path / "run", other)
    (tmp_path / "run" / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is not JSON"):
        workdirs.claim_workdir(tmp_path / "run", config)


CONFIGS_THAT_FAIL = {
    "raise RuntimeError('of the file')": "RuntimeError: of the file",
    "raise OSError('no such disk')": "no such disk",
    "open('/no/such/list')": "/no/such/list",
    "1 / 0": "ZeroDivisionError: division by zero",
    "raise SystemExit(3)": "SystemExit: 3",
    "import sys; sys.exit()": "SystemExit",
    "class Odd(Exception):\n  pass\nraise Odd()": "Odd",
    "def f(): f()\nf()": "RecursionError",
    "assert False": "AssertionError",
    "x = {}['colour']": "colour",
    "nothing.here": "nothing",
    "raise StopIteration": "StopIteration",
    "raise MemoryError": "MemoryError",
    "raise BaseExceptionGroup('several', [ValueError('a')])": "several",
    "raise UnicodeDecodeError('utf-8', b'a', 0, 1, 'odd')": "odd",
    "raise ValueError('one\\ntwo')": "two",
}


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize(("code", "words"), CONFIGS_THAT_FAIL.items())
def test_a_config_file_that_raises(code, words, inside, tmp_path, capsys):
    """While it is loaded, or by get_config: a sentence with the file and what it said."""
    file = tmp_path / "mine.py"
    body = "def get_config():\n" + textwrap.indent(code, "  ") if inside else code
    file.write_text(body + "\n")
    sentence = in_process(f"--config={file}", capsys=capsys)
    assert str(file) in sentence
    assert words in sentence


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("None", "gives None, not a ConfigDict"),
        ("3", "int, not a ConfigDict"),
        ("{'seed': 0}", "dict, not a"),
    ],
)
def test_a_config_file_that_gives_no_config(given, words, tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_text(f"def get_config():\n  return {given}\n")
    sentence = in_process(f"--config={file}", capsys=capsys)
    assert words in sentence


def test_a_device_in_place_of_a_config_file(tmp_path, capsys):
    """It is not read: another one may have no end."""
    (tmp_path / "mine.py").symlink_to("/dev/null")
    sentence = in_process(f"--config={tmp_path}/mine.py", capsys=capsys)
    assert (
        sentence == f"error: --config: {tmp_path}/mine.py is no regular file; name a config file."
    )


def test_a_config_file_without_get_config(tmp_path, capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "config_config", raising=False)  # that of another test
    (tmp_path / "mine.py").write_text("")
    sentence = in_process("--config", f"{tmp_path}/mine.py", capsys=capsys)
    assert f"{tmp_path}/mine.py has no get_config(), which must give a ConfigDict." in sentence


def test_a_sentence_is_of_a_length_that_can_be_read(capsys):
    """A file may hold a word of a million letters, or a million words."""
    with pytest.raises(SystemExit):
        command_line.end(f"mine.json has {'x' * 10**6}: correct it.")
    said = capsys.readouterr().err
    assert said == f"error: mine.json has {'x' * 80}...{'x' * 19}: correct it.\n"
    with pytest.raises(SystemExit):
        command_line.end(f"mine.json has {'x ' * 10**6}: correct it.")
    said = capsys.readouterr().err
    assert len(said) < 2000
    assert said.startswith("error: mine.json has x")
    assert said.endswith("correct it.\n")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("train", "--config must be given, such as --config=configs/shapes.py."),
        ("export", "--workdir must be given, such as --workdir=runs/shapes."),
        ("prepare", "--dataset must be given, such as --dataset=triplets."),
    ],
)
def test_a_required_flag_that_is_not_given(name, words, capsys):
    assert in_process(name=name, capsys=capsys) == f"error: {words}"


def test_several_processes_compute_features_and_do_nothing_else_with_them(capsys):
    flags = ("--config=configs/shapes.py", "--coordinator=a:1", "--num_processes=2")
    said = in_process(*flags, "--process_id=0", "--list", name="features", capsys=capsys)
    assert said == "error: --list is for one process: start it once, without the others."
    said = in_process(*flags, name="features", capsys=capsys)
    assert said.startswith("error: --process_id missing: ")


def in_process(*arguments, capsys, name="train"):
    """The sentence of a command that is called here, with its flags in place of other commands'."""
    for module, own in flags.FLAGS.flags_by_module_dict().items():
        if module.startswith("dqe_jax."):
            for flag in list(own):  # delattr takes from `own`
                if flag.name in flags.FLAGS:
                    delattr(flags.FLAGS, flag.name)
    sys.modules.pop(f"dqe_jax.cli.{name}", None)
    module = importlib.import_module(f"dqe_jax.cli.{name}")
    before = sys.argv
    sys.argv = ["dqe-jax", *arguments]
    try:
        with pytest.raises(SystemExit) as ended:
            command_line.run(module, sys.argv)
    finally:
        sys.argv = before
        flags.FLAGS.unparse_flags()
    assert ended.value.code == 2
    sentence = capsys.readouterr().err.strip().splitlines()[-1]
    assert sentence.startswith("error: ")
    assert len(sentence) < 400
    return sentence


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("prepare", ["--dataset=cirr", "--raw_dir=x", "--max_missing=nan"], "--max_missing=nan"),
        ("evaluate", [SMOKE, "--watch", "--workdir=x", "--patience_s=nan"], "--patience_s=nan"),
        ("evaluate", [SMOKE, "--watch", "--workdir=x", "--poll_s=nan"], "--poll_s=nan"),
        ("evaluate", [SMOKE, "--watch", "--workdir=x", "--poll_s=inf"], "poll_s"),
        ("plan", [SMOKE, "--topology="], "--topology=: give a chip and the shape of a slice"),
        (
            "audit",
            [SMOKE, "--workdir=x", "--sweep=0,nan"],
            "--sweep=0,nan: lower quantiles must be",
        ),
        ("ablate", [SMOKE, "--lowers=0,nan"], "--lowers=0,nan: lower quantiles must be"),
        ("ablate", [SMOKE, "--kind=color"], "--kind goes with --rates, --lengths or --sweep"),
    ],
)
def test_flags_that_no_limit_refuses(name, arguments, words, capsys):
    assert words in in_process(*arguments, capsys=capsys, name=name)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("train", [SMOKE, "--feedback=gs://bucket/file"]),
        ("evaluate", [SMOKE, "--workdir=x", "--save_embeddings=gs://bucket/file.npz"]),
        ("evaluate", [SMOKE, "--output=out", "--embeddings=gs://bucket/file.npz"]),
        ("search", ["--index=x", "--image=y", "--output=gs://bucket/file.png"]),
        ("serve", ["--index=x", "--log=gs://bucket/file"]),
        ("serve", ["--demo_dir=gs://bucket/demo"]),
        ("plan", [SMOKE, "--topology=v5e:2x4", "--output=gs://bucket/file.json"]),
        ("simulate", [SMOKE, "--workdir=x", "--photos=gs://bucket/photos"]),
        ("simulate", [SMOKE, "--workdir=x", "--photos=x", "--log=gs://bucket/file"]),
    ],
)
def test_what_no_bucket_can_hold_is_refused_first(name, arguments, capsys, tmp_path, monkeypatch):
    """As a path of a disk it would be a directory `gs:` of the one that the command runs in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT)
    flag = arguments[-1]
    said = in_process(*arguments, capsys=capsys, name=name)
    assert said == f"error: {flag}: name a path on a disk of this machine."
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing"], "--config: no config at 'nothing'; name a file, or one of circo, "),
        (["shapes:smoke", "nothing"], "--config: no config at 'nothing'; name a file, or one of"),
        (["shapes:smoke", "shapes:foo"], "unknown variant foo of the config"),
        (
            ["shapes:smoke", "fiq:smoke", "--config.batch.reference=2"],
            "the config has no field 'reference'; did you mean 'references'?",
        ),
        (["--rounds=2", "shapes"], "--config must be given, such as --config=configs/shapes.py."),
        (
            ["shapes:smoke", "--rounds=2", "fiq"],
            "unexpected argument 'fiq': flags start with --.",
        ),
        ([], "--config must be given, such as --config=configs/shapes.py."),
        (["shapes", "--vs=torch", "--variants=config"], "--variants goes without --vs"),
    ],
)
def test_configs_that_are_named_before_the_flags(arguments, words, capsys):
    assert words in in_process(*arguments, capsys=capsys, name="benchmark_step")
