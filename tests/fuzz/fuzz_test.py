"""Bad files, fields and flags for every command: the harness itself, and all cases (slow)."""

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.fuzz import damage, rules, server, world
from tests.fuzz.cases import CORPUS, corpus_cases, flag_cases, snapshot
from tests.fuzz.places import PLACES

ROOT = Path(__file__).resolve().parents[2]


def fuzz(*arguments, timeout):
    """The table of a run of the harness, in a process of its own."""
    from dqe_jax.testing.small_runs import compiles_quickly

    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", *arguments],
        cwd=ROOT,
        env={**server.os.environ, **compiles_quickly(), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    (total,) = [line for line in done.stdout.splitlines() if line.startswith("| all ")]
    return [int(cell.replace(",", "")) for cell in total.split("|")[3:-1]]


def test_a_few():
    """Those of the corpus that need no trained run, and some generated files, fields and flags."""
    only = (
        *("corpus/predictions", "corpus/cirr", "corpus/config", "corpus/features", "circo-val 1"),
        *("scores 1", "features-npz 3", "--config.loss", "plan --", "train --", "no_such_flag"),
    )
    few = ("--light", "--seed=1", "--sample=40", f"--only={','.join(only)}")
    cases, refused, accepted, stated, wrong = fuzz(*few, timeout=600)
    assert cases >= 40
    assert refused >= 20
    assert accepted >= 4  # the good files too
    assert stated >= 20
    assert wrong == 0


@pytest.mark.slow
def test_all(tmp_path):
    table = tmp_path / "table.md"
    cases, refused, accepted, stated, wrong = fuzz(f"--table={table}", "--fresh=10", timeout=7200)
    assert table.exists()
    assert cases >= 1000
    assert refused > 700
    assert accepted > 50
    assert stated > 700
    assert wrong == 0


# --- What it found --------------------------------------------------------------------------------


def test_embeddings_that_promise_a_terabyte(tmp_path):
    """They are refused in a sentence where NumPy cannot get the memory."""
    from dqe_jax.evaluation.embedding_files import read_embeddings
    from dqe_jax.utils.errors import UserError

    path = tmp_path / "embeddings.npz"
    np.savez(path, **world.embeddings())
    (harm,) = (h for name, h in damage.of_npz(random.Random(0), 8) if name == "npz bomb array")
    harm(path)
    with pytest.raises(UserError, match=r"embeddings.npz does not fit into memory"):
        read_embeddings(path)


# --- The harness itself ---------------------------------------------------------------------------


def test_each_file_of_the_corpus_is_a_case():
    files = [file for file in CORPUS.glob("*/*") if file.is_file()]
    assert files
    assert len(list(corpus_cases())) == len(files)
    assert {file.parent.name for file in files} <= {place.name for place in PLACES}


def test_each_command_has_cases():
    from dqe_jax.cli.commands import COMMANDS

    assert {case.command for case in flag_cases()} == set(COMMANDS)


def test_the_seed_decides_the_damage(tmp_path):
    good = b'{"a": [1, 2, {"b": "text"}]}' * 3
    made = []
    for _ in range(2):
        contents = []
        for _, harm in damage.of_bytes(random.Random(3), 20):
            path = tmp_path / "file"
            path.write_bytes(good)
            harm(path)
            contents.append(path.read_bytes())
        made.append(contents)
    assert made[0] == made[1]
    assert len(set(made[0])) > 10
    assert good not in made[0][:1]


@pytest.mark.parametrize(
    ("content", "verdict"),
    [
        ('[{"a": "x", "c": 1}]', "same"),
        ('[{"a": "x"}]', "same"),  # c is not read
        ('[{"a": "x", "c": 2}]', "same"),
        ('[{"a": "y", "c": 1}]', "either"),
        ('[{"a": "", "c": 1}]', "refused"),
        ('[{"a": "\\ud800", "c": 1}]', "refused"),
        ('[{"c": 1}]', "refused"),
        ("[1]", "refused"),
        ("{}", "refused"),
        ("[", "refused"),
        ("[" * 100_000, "refused"),
        ('[{"a": "x", "c": ' + "9" * 5_000 + "}]", "refused"),
        ("[]", "either"),
    ],
)
def test_the_rule_of_json(tmp_path, content, verdict):
    good, held = tmp_path / "good", tmp_path / "held"
    good.write_text('[{"a": "x", "c": 1}]')
    held.write_text(content)
    kinds = {"": rules.many(rules.any_of), "*": rules.record, "*.a": rules.name}
    assert rules.of_json(kinds)(held, good) == verdict


def test_the_reader_of_safetensors_agrees_with_the_library(tmp_path):
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float32)}
    good = tmp_path / "good.safetensors"
    save_file(arrays, good, {"ids": "[]"})
    read = rules.safetensors(good)
    assert all(np.array_equal(read[name], array) for name, array in arrays.items())
    rule = rules.of_arrays(rules.safetensors)
    assert rule(good, good) == "same"
    bad = tmp_path / "bad.safetensors"
    for name, harm in damage.of_safetensors(random.Random(0), 9):
        bad.write_bytes(good.read_bytes())
        harm(bad)
        assert rule(bad, good) == ("either" if name == "tensors gone" else "refused"), name


def test_what_a_fork_does_is_seen(tmp_path, monkeypatch):
    """Its status, its words, a hang, and a file beyond its directories."""
    from dqe_jax.cli import commands

    deeds = {
        "writes": lambda: (tmp_path / "beyond").write_text("x"),
        "hangs": lambda: server.time.sleep(60),
        "fails": lambda: 1 / 0,
        "ends": lambda: commands.command_line.end("a sentence."),
    }
    monkeypatch.setattr(commands, "main", lambda words: deeds[words[0]]())
    found = {}
    for name in deeds:
        work = tmp_path / name / "work"
        work.mkdir(parents=True)
        found[name] = server.run([name], work, limit=5 if name != "hangs" else 0.5)
    assert found["writes"].outside == (str(tmp_path / "beyond"),)
    assert found["hangs"].status is None
    assert found["fails"].status == 1
    assert "Traceback" in found["fails"].said
    assert found["ends"].status == 2
    assert found["ends"].said == "error: a sentence.\n"
    assert not found["ends"].outside


def test_a_snapshot_tells_what_has_changed(tmp_path):
    (tmp_path / "a").write_text("x")
    before = snapshot(tmp_path)
    assert snapshot(tmp_path) == before
    (tmp_path / "a").write_text("y")
    assert snapshot(tmp_path) != before


def test_the_good_files_are_made_alike(tmp_path):
    first, second = world.embeddings(), world.embeddings()
    assert all(np.array_equal(first[name], second[name]) for name in first)
