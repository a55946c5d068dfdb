"""What is installed and what is read: the lock, the pinned actions, and no file that runs code."""

from __future__ import annotations

import ast
import datetime
import importlib.util
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
LOCK = ROOT / "requirements.lock"
COVERED = ("serve", "test", "docs")  # extras that the lock serves too
PYTHONS = ("3.11", "3.12")


def requirements_of_setup() -> list[Requirement]:
    """Everything that setup.py asks for always, and of the extras in `COVERED`."""
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    given = {
        keyword.arg: keyword.value for keyword in ast.walk(tree) if isinstance(keyword, ast.keyword)
    }
    needed = ast.literal_eval(given["install_requires"])
    extras = ast.literal_eval(given["extras_require"])
    return [Requirement(text) for text in (*needed, *(x for e in COVERED for x in extras[e]))]


def locked() -> list[tuple[Requirement, list[str]]]:
    """The pinned packages of the lock, each with its hashes."""
    found: list[tuple[Requirement, list[str]]] = []
    for line in LOCK.read_text(encoding="utf-8").splitlines():
        if line.strip().startswith("#") or not line.strip():
            continue
        if line.startswith(" "):
            found[-1][1].append(line.strip(" \\"))
        else:
            found.append((Requirement(line.rstrip(" \\")), []))
    return found


def test_the_lock_covers_what_setup_asks_for():
    """On both versions of Python; a changed bound in setup.py asks for a new lock."""
    pins = [pin for pin, _ in locked()]
    assert len(pins) > 100
    for python, need in itertools.product(PYTHONS, requirements_of_setup()):
        machine = {**default_environment(), "python_version": python}
        machine["python_full_version"] = f"{python}.0"
        fitting = [
            pin
            for pin in pins
            if canonicalize_name(pin.name) == canonicalize_name(need.name)
            and (pin.marker is None or pin.marker.evaluate(machine))
        ]
        assert len(fitting) == 1, f"{need} on Python {python}: {[str(pin) for pin in fitting]}"
        (version,) = (one.version for one in fitting[0].specifier)
        assert need.specifier.contains(version, prereleases=True), f"{need}, locked: {version}"


def test_every_package_of_the_lock_has_a_version_and_hashes():
    for pin, hashes in locked():
        assert [one.operator for one in pin.specifier] == ["=="], pin
        assert hashes, pin
        assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", one) for one in hashes), pin


def test_the_lock_names_no_place():
    text = LOCK.read_text(encoding="utf-8")
    assert not re.search(r"://|(?<![\w-])/\w+/", text)
    assert not re.search(r"^\s*--(?!hash)", text, flags=re.M)


def test_the_lock_says_the_command_that_the_documentation_has():
    head = LOCK.read_text(encoding="utf-8").splitlines()[1].strip("# ")
    assert head.startswith("uv pip compile setup.py ")
    said = (ROOT / "docs/contributing.md").read_text(encoding="utf-8")
    said = re.sub(r"\s*\\\n\s*", " ", said).replace(" --upgrade", "")
    assert head in said


def test_actions_are_pinned_by_commit():
    uses = []
    for file in (ROOT / ".github/workflows").glob("*.yml"):
        uses += re.findall(r"uses:\s*(.+)", file.read_text(encoding="utf-8"))
    assert uses
    for use in uses:
        assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", use), use


# ------------------------------------------------------------------- accepted vulnerabilities

spec = importlib.util.spec_from_file_location("audit_lock", ROOT / ".ci/audit_lock.py")
audit_lock = importlib.util.module_from_spec(spec)
spec.loader.exec_module(audit_lock)
TODAY = datetime.date(2030, 1, 31)
ENTRY = """
[[allowed]]
id = "GHSA-a"
package = "b"
reason = "not reached from here"
until = {}
"""


@pytest.mark.parametrize("until", ["2030-01-31", "2030-07-01"])
def test_an_entry_holds_until_its_date(until):
    assert audit_lock.allowed(ENTRY.format(until), TODAY) == ["GHSA-a"]
    words = audit_lock.command(["GHSA-a"])
    assert words[words.index("--ignore-vuln") + 1] == "GHSA-a"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (ENTRY.format("2030-01-30"), "was allowed until 2030-01-30"),
        (ENTRY.format("2031-01-01"), "at most 180 days"),
        (ENTRY.format('"2030-03-01"'), "until is a date"),
        (ENTRY.format("2030-03-01T00:00:00"), "until is a date"),
        (ENTRY.format("2030-03-01").replace("not reached from here", ""), "are texts"),
        (ENTRY.format("2030-03-01").replace('package = "b"', ""), "has exactly"),
        (ENTRY.format("2030-03-01").replace("allowed", "alowed"), "unknown tables"),
        ("[[allowed]", "1"),  # what the TOML library says
    ],
)
def test_an_entry_that_is_refused(text, words):
    with pytest.raises(ValueError, match=words):
        audit_lock.allowed(text, TODAY)


def test_the_entries_of_today_hold():
    text = audit_lock.ALLOWED.read_text(encoding="utf-8")
    assert isinstance(audit_lock.allowed(text, datetime.date.today()), list)


@pytest.mark.parametrize("status", [0, 1])
def test_the_status_is_that_of_pip_audit(status, tmp_path, monkeypatch):
    file = tmp_path / "allowed.toml"
    file.write_text(ENTRY.format(datetime.date.today()))
    monkeypatch.setattr(audit_lock, "ALLOWED", file)
    monkeypatch.setattr(
        audit_lock,
        "command",
        lambda ids: ["sh", "-c", f"test {ids[0]} = GHSA-a && exit {status}"],
    )
    assert audit_lock.main() == status


def test_an_expired_entry_ends_before_pip_audit(tmp_path, monkeypatch, capsys):
    file = tmp_path / "allowed.toml"
    file.write_text(ENTRY.format("2020-01-01"))
    monkeypatch.setattr(audit_lock, "ALLOWED", file)
    monkeypatch.setattr(audit_lock, "ROOT", tmp_path)
    monkeypatch.setattr(audit_lock, "command", lambda _: pytest.fail("it was started"))
    assert audit_lock.main() == 1
    assert "allowed until 2020-01-01" in capsys.readouterr().err


# -------------------------------------------------------------------- no file that runs code

# Of the standard library and of others: what reads a file that can run code.
MODULES = {
    *("pickle", "cPickle", "_pickle", "marshal", "shelve"),
    *("cloudpickle", "dill", "joblib", "jsonpickle"),
}
CALLS = {
    *("eval", "exec", "builtins.eval", "builtins.exec", "torch.load", "torch.hub.load"),
    *("pd.read_pickle", "pandas.read_pickle"),
}
# File of the package -> why it may. What it says must still be there.
EXCEPTIONS = {
    "encoders/efficientnet.py": (
        "torch.load",
        "the weights of a package that the user has installed, restricted to tensors",
    ),
}


def runs_code(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """What a module says that can run what a file holds: a name, and its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom):
                names = [node.module or "", *(f"{node.module}.{name}" for name in names)]
            for name in names:
                if name.split(".")[0] in MODULES or name in ("torch.load", "numpy.load"):
                    yield name, node.lineno
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        keywords = {word.arg: ast.unparse(word.value) for word in node.keywords}
        yaml = called.startswith("yaml.") and called.endswith(("load", "load_all"))
        if called in CALLS or yaml:
            yield called, node.lineno
        elif keywords.get("allow_pickle", "False") != "False":
            yield f"{called}(allow_pickle=...)", node.lineno
        elif keywords.get("trust_remote_code", "False") != "False":
            yield f"{called}(trust_remote_code=...)", node.lineno


def test_no_module_reads_a_file_that_can_run_code():
    files = [file for folder in ("dqe_jax", "configs") for file in (ROOT / folder).rglob("*.py")]
    assert len(files) > 200
    excepted = set()
    for file in files:
        name = str(file.relative_to(ROOT)).removeprefix("dqe_jax/")
        source = file.read_text(encoding="utf-8")
        for said, line in runs_code(ast.parse(source)):
            assert EXCEPTIONS.get(name, ("", ""))[0] == said, f"{name}:{line} uses {said}"
            assert said != "torch.load" or "weights_only=True" in source
            excepted.add(name)
    assert excepted == EXCEPTIONS.keys()


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "from torch import load",
        "import numpy as np\nnp.load(f, allow_pickle=True)",
        "np.load(f, None, allow_pickle=flag)",
        "torch.load(path)",
        "eval(text)",
        "exec(text)",
        "builtins.eval(text)",
        "yaml.load(f)",
        "yaml.unsafe_load(f)",
        "import marshal",
        "import shelve",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
    ],
)
def test_what_can_run_code_is_seen(source):
    assert list(runs_code(ast.parse(source)))


@pytest.mark.parametrize(
    "source",
    [
        "np.load(f, allow_pickle=False)",
        "model.eval()",
        "re.compile('a')",
        "json.load(f)",
        "AutoModel.from_pretrained(x, trust_remote_code=False)",
    ],
)
def test_what_runs_nothing_is_not(source):
    assert not list(runs_code(ast.parse(source)))
