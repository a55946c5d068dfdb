"""What the README, the docs, launch files and docstrings tell readers to type is there.

A command names modules, configs, variants, fields and flags that exist; a link or a path in the
README or the docs leads somewhere. Placeholders in capitals (`DIR`) and shell variables (`$DIR`)
stand for any value. What data and hardware a command needs is said near it. Commands that need
neither run, at the size of a smoke run.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dqe_jax import __version__
from dqe_jax.cli.commands import COMMANDS
from dqe_jax.cli.config_files import known as config_names
from dqe_jax.config import fields as config_fields
from dqe_jax.testing.small_runs import compiles_quickly

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
# What people read, beside docstrings.
PAGES = (
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "dqe_jax").rglob("*.md")),
)
FIELDS = tuple(config_fields())
FOLDERS = ("configs", "docs", "dqe_jax", "launch", "tests")


def documents() -> dict[str, str]:
    """Every text that holds commands, by its path."""
    files = [*PAGES, *sorted((ROOT / "launch").rglob("*"))]
    texts = {f: f.read_text(encoding="utf-8") for f in files if f.is_file() and f.suffix != ".pyc"}
    for folder in ("configs", "dqe_jax"):
        for f in sorted((ROOT / folder).rglob("*.py")):
            texts[f] = ast.get_docstring(ast.parse(f.read_text(encoding="utf-8"))) or ""
    return {str(f.relative_to(ROOT)): text for f, text in texts.items()}


DOCUMENTS = documents()


@functools.cache
def flags_of(module: str) -> frozenset[str]:
    """The flags of the command that a door of dqe_jax opens, from its source."""
    source = (ROOT / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8")
    command = re.search(r'^    run\("([\w ]+)"', source, flags=re.M)
    if command:
        file = f"dqe_jax/cli/{COMMANDS[command[1]][0]}.py"
        source = (ROOT / file).read_text(encoding="utf-8")
    tree = ast.parse(source)
    return frozenset(
        node.args[0].value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr.startswith("DEFINE_")
        and node.args
        and isinstance(node.args[0], ast.Constant)
    )


def is_open(value: str) -> bool:
    """Whether a value stands for any: `DIR`, `<dir>`, `$DIR`, `...`."""
    return "$" in value or bool(re.match(r"[A-Z_]+$|<|\.\.\.", value))


# ------------------------------------------------------------------------------------- the rules
# Each yields one sentence for each thing in a text that is not there.


def words_of(text: str) -> Iterator[tuple[str, list[str]]]:
    """The module and the arguments of each `-m dqe_jax.X ...` and `dqe-jax X ...`."""
    joined = re.sub(r"\\\s*\n\s*", " ", text)
    longest = sorted(COMMANDS, key=len, reverse=True)
    joined = re.sub(
        rf"(?<![\w/.-])dqe-jax ({'|'.join(longest)})(?=(?: [\w:,./]+)* --)",
        lambda match: f"-m dqe_jax.cli.{COMMANDS[match[1]][0]}",
        joined,
    )
    for match in re.finditer(r"-m\s+(dqe_jax[\w.]*)([^\n`]*)", joined):
        arguments = re.split(r"\s(?:#|\|\|?|&&?|;|>)(?:\s|$)", match[2] + " ")[0]
        arguments = re.sub(r"[\[\]()]", " ", arguments)  # optional ones
        try:
            yield match[1].rstrip("."), shlex.split(arguments)
        except ValueError:  # an apostrophe: prose follows
            yield match[1].rstrip("."), arguments.split()


def commands(text: str) -> Iterator[str]:
    for module, arguments in words_of(text):
        path = ROOT / module.replace(".", "/")
        if not path.with_suffix(".py").is_file() and not (path / "__main__.py").is_file():
            yield f"there is no module {module}"
            continue
        for argument in arguments:
            if not argument.startswith("--"):
                continue
            name = argument.removeprefix("--").split("=")[0].rstrip(".,:")
            if name.startswith("config."):
                continue  # `fields` checks it
            known = flags_of(module) | {"help", "helpfull", "version"}  # which all have
            if name not in known and not (name.startswith("no") and name[2:] in known):
                yield f"{module} has no flag --{name}"


def config_files(text: str) -> Iterator[str]:
    found = re.findall(r"--config[= ]([^\s`\"'\[\])]+)", text)
    found += re.findall(r"\bconfigs/\w+\.py:[\w,]+", text)
    named = re.findall(r"dqe-jax benchmark (?:step|data|features)((?: [\w:,./]+)+) -", text)
    found += " ".join(named).split()
    for value in dict.fromkeys(found):
        path, _, variants = value.rstrip(".,;:").partition(":")
        if is_open(path):
            continue
        if path in config_names():
            path = f"configs/{path}.py"
        if not (ROOT / path).is_file() or not path.startswith("configs/"):
            yield f"there is no config {path}"
            continue
        if is_open(variants):
            continue
        try:
            importlib.import_module(f"configs.{Path(path).stem}").get_config(variants)
        except ValueError as error:
            yield f"{value}: {error}"


def fields(text: str) -> Iterator[str]:
    for name in re.findall(r"--config\.([\w.]*\w)", text):
        if name not in FIELDS and name != "field":  # `--config.field=value` explains the form
            yield f"there is no field --config.{name}"
    sections = {field.rsplit(".", n)[0] for field in FIELDS for n in (1, 2) if "." in field}
    for name in re.findall(r"`config\.([a-z_][\w.]*\w)(?:`| ?=)", text):
        if name not in FIELDS and name not in sections and name not in ("py", "json"):
            yield f"there is no field config.{name}"


def anchor_of(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    bare = re.sub(r"[^\w\- ]", "", heading.strip().lower())
    return bare.replace(" ", "-")


def anchors_of(text: str) -> set[str]:
    """The anchors of the headings of a page."""
    prose = re.sub(r"```.*?```", "", text, flags=re.S)
    return {anchor_of(heading) for heading in re.findall(r"^#+ (.*)$", prose, flags=re.M)}


def links(text: str, page: Path = README) -> Iterator[str]:
    prose = re.sub(r"```.*?```", "", text, flags=re.S)
    targets = re.findall(r"\]\(([^)\s]+)[^)]*\)", prose)
    targets += re.findall(r"(?:src|href)=\"([^\"]+)\"", prose)
    targets += re.findall(r"^\[[^\]]+\]:\s*(\S+)", prose, flags=re.M)
    for target in targets:
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = page.parent / path
        if path and not there.exists():
            yield f"there is no {path}"
        elif anchor and anchor not in anchors_of(there.read_text("utf-8") if path else text):
            yield f"there is no heading #{anchor} in {path or 'this page'}"


def paths(text: str) -> Iterator[str]:
    for path in re.findall(rf"(?<![\w/.$~-])((?:{'|'.join(FOLDERS)})/[\w./*-]*)", text):
        path = path.rstrip(".,-")
        if not any(True for _ in ROOT.glob(path.rstrip("/"))):
            yield f"there is no {path}"


Rule = Callable[[str], Iterator[str]]


@pytest.mark.parametrize("rule", [commands, config_files, fields], ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("path", DOCUMENTS)
def test_what_readers_are_told_to_type_exists(path: str, rule: Rule):
    assert list(rule(DOCUMENTS[path])) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_paths_of_the_pages_exist(page: Path):
    text = page.read_text(encoding="utf-8")
    assert [*links(text, page), *paths(text)] == []


NEEDS = (
    r"DIR|FILE|BUCKET|launch/|--coordinator|--topology|\[gpu|\[tpu|pytest|runs/(?!shapes|python)"
)
# What the reader has to bring; a README's test command needs nothing.
BROUGHT = r"DIR|FILE|BUCKET|launch/|--coordinator|--topology|\[gpu|\[tpu|tests/models/parity"


def blocks(text: str, language: str = "bash") -> list[str]:
    """The commands of a page: its blocks of bash."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.S | re.M)


def needs(text: str) -> Iterator[str]:
    """Commands that need something which neither their section nor the page's top names."""
    top, *sections = re.split(r"^##+ .*$", text, flags=re.M)
    for section in [top, *sections]:
        said = re.sub(r"```.*?```", "", top + section, flags=re.S)
        for block in blocks(section):
            if re.search(BROUGHT, block) and not re.search(r"\b[Nn]eeds?\b", said):
                yield f"say near it what this needs: {block}"


def unmade_runs(text: str) -> Iterator[str]:
    """Runs that a command reads, but that neither the page nor a config by default makes."""
    every = list(words_of(text))
    named = {word for module, words in every if module == "dqe_jax.main" for word in words}
    for module, words in every:
        configs = re.findall(r"--config=(?:configs/)?(\w+)(?:\.py)?:?([\w,]*)", " ".join(words))
        configs = configs or [(name, "") for name in config_names()]
        defaults = {
            "-".join([name, *filter(None, variants.split(","))]) for name, variants in configs
        }
        for word in words:
            run = word.removeprefix("--workdir=runs/")
            if word not in (run, *named) and run not in defaults:
                yield f"{module} reads runs/{run}, which nothing makes"


@pytest.mark.parametrize("rule", [needs, unmade_runs], ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_pages_say_what_commands_need_and_read_runs_that_are_made(page: Path, rule: Rule):
    assert list(rule(page.read_text(encoding="utf-8"))) == []


ROOMS = sorted((ROOT / "dqe_jax").glob("*/README.md"))


def test_every_room_says_what_is_there():
    rooms = {file.parent for file in (ROOT / "dqe_jax").glob("*/__init__.py")}
    assert {page.parent for page in ROOMS} == rooms


@pytest.mark.parametrize("page", ROOMS, ids=lambda page: page.parent.name)
def test_files_that_a_room_names_are_in_it(page: Path):
    for name in re.findall(r"`([\w/]+(?:\.py|/))`", page.read_text(encoding="utf-8")):
        assert (page.parent / name).exists() or (ROOT / name).exists(), name


@functools.cache
def hooks():
    """The module that fills the reference pages when the site is built."""
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_lists_every_field_with_what_it_may_be():
    tables = hooks().config_fields()
    assert re.findall(r'<span id="([\w.]+)">', tables) == sorted(
        FIELDS, key=lambda name: tables.index(f'"{name}"')
    )
    for field in config_fields().values():
        (row,) = (line for line in tables.splitlines() if f'"{field.name}"' in line)
        assert f"`{field.default!r}`" in row
        assert f"*{field.role}* |" in row


def test_the_marks_of_the_reference_pages_are_known():
    for page in sorted((ROOT / "docs").rglob("*.md")):
        marks = re.findall(r"<!-- (.*?) -->", page.read_text(encoding="utf-8"))
        assert set(marks) <= {"config fields", "commands", "python api"}, page
    assert "::: dqe_jax.method.trns\n" in hooks().on_page_markdown("<!-- python api -->")


def smoke_runs() -> list[tuple[str, str]]:
    """Commands that need nothing, with their page, in the size of a smoke run."""
    found = []
    for page in PAGES:
        for block in blocks(page.read_text(encoding="utf-8")):
            for line in re.sub(r"\\\s*\n\s*", " ", block).splitlines():
                command = re.search(r"(python -m dqe_jax|dqe-jax)\b.*", line)
                if command is None or re.search(NEEDS, command[0].replace("benchmark", "")):
                    continue
                small = re.sub(r"shapes\.py(?!:)", "shapes.py:smoke", command[0])
                small = re.sub(r"(benchmark \w+) shapes(?!:)", r"\1 shapes:smoke", small)
                small = re.sub(r"shapes\.py:(hard|coarse)(?!,)", r"shapes.py:\1,smoke", small)
                small = re.sub(r"(total_steps|eval_every)=\d+", r"\1=4", small)
                small = re.sub(r"(first_refresh|refresh_every)=\d+", r"\1=2", small)
                if "-m dqe_jax.ablate" in small:
                    small = re.sub(r" --seeds=\d+", "", small) + " --seeds=1"
                small = re.sub(r"--(queries|gallery)=[\d,]+", r"--\1=64", small)
                found.append((str(page.relative_to(ROOT)), small))
    return list(dict.fromkeys(found))


@pytest.mark.slow
@pytest.mark.parametrize(("page", "command"), smoke_runs())
def test_commands_that_need_nothing_run(page: str, command: str, smoke_place: Path):
    words = shlex.split(command)
    start = [sys.executable, "-m", "dqe_jax"] if words[0] == "dqe-jax" else [sys.executable]
    run_there([*start, *words[1:]], smoke_place, f"{page}: {command}")


@pytest.mark.slow
def test_the_python_of_the_pages_runs(smoke_place: Path):
    pages = {page: blocks(page.read_text(encoding="utf-8"), "python") for page in PAGES}
    assert any(pages.values())
    for page, parts in pages.items():
        for part in parts:  # in order: one may read the run that an earlier one made
            run_there([sys.executable, "-c", part], smoke_place, f"{page}: {part}")


@pytest.fixture(scope="module")
def smoke_place(tmp_path_factory):
    """A directory with a finished run of `shapes`, as a reader has after the first command."""
    place = tmp_path_factory.mktemp("reader")
    train = [sys.executable, "-m", "dqe_jax.main", "--config=configs/shapes.py:smoke"]
    run_there([*train, "--workdir=runs/shapes"], place, "the first command")
    return place


def run_there(command: list[str], place: Path, what: str) -> None:
    """Runs a command in a directory; it must end well."""
    env = os.environ | compiles_quickly() | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=place, env=env, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, f"{what}\n{done.stderr[-2000:]}"


def test_the_version_is_stated_once():
    """The changelog and the citation say what the package says."""
    assert f"The version in the code is {__version__}." in (ROOT / "CHANGELOG.md").read_text()
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_paths_in_launch_files_exist():
    launch = {path: text for path, text in DOCUMENTS.items() if path.startswith("launch/")}
    if not launch:
        pytest.skip("there is no file in launch/")
    assert [problem for text in launch.values() for problem in paths(text)] == []


def test_every_config_is_shown_with_its_command():
    for path, text in DOCUMENTS.items():
        name = Path(path).name
        if path.startswith("configs/") and name not in ("__init__.py", "common.py"):
            assert f"--config={path}" in text, path


def test_flags_are_read_from_the_source():
    assert {"config", "workdir", "stop_at"} <= flags_of("dqe_jax.main")
    assert {"config", "workdir", "split", "step"} <= flags_of("dqe_jax.evaluate")
    assert "stop_at" not in flags_of("dqe_jax.evaluate")


# --------------------------------------------------------------------------- the rules themselves

SHAPES = "--config=configs/shapes.py"
ACCEPTED = [
    (commands, f"python -m dqe_jax.main {SHAPES} --workdir=/tmp/x --config.seed=1"),
    (commands, f"`python -m dqe_jax.evaluate {SHAPES} --split=test`, then --anything"),
    (commands, f"python -m dqe_jax.main {SHAPES} \\\n    --workdir=/tmp/x [--data_dir=DIR]"),
    (commands, f"python -m dqe_jax.main {SHAPES}  # it's quick --really"),
    (commands, f"python -m dqe_jax.main {SHAPES} && other --flag"),
    (config_files, "--config=configs/shapes.py:hard,smoke and --config=$CONFIG or --config=FILE"),
    (config_files, "`configs/shapes.py:hard`, --config=configs/shapes.py[:hard]"),
    (config_files, "--config=shapes:smoke"),
    (commands, "dqe-jax train --config=shapes --workdir=DIR\ndqe-jax benchmark step --rounds=3"),
    (commands, "dqe-jax benchmark step shapes fiq_clip:vit_b_32 --rounds=3"),
    (config_files, "dqe-jax benchmark step shapes fiq_clip:vit_b_32 --rounds=3"),
    (fields, "--config.negatives.lower=0.1 --config.seed=3, or `config.optimizer`, `config.json`"),
    (fields, "`config.data.lexicon` names it"),
    (links, "# A b-c: d!\n[x](#a-b-c-d) [y](pyproject.toml) [z](https://a.b/c#d)"),
    (needs, "Needs it.\n\n```bash\nx --data_dir=DIR\n```\n"),
    (needs, "# A\n\nNeeds it.\n\n## B\n\n```bash\nx --data_dir=DIR\n```\n"),
    (needs, "```bash\npython -m dqe_jax.main\n```\n"),
    (unmade_runs, "-m dqe_jax.evaluate --config=configs/fiq.py:vit_l --workdir=runs/fiq-vit_l"),
    (unmade_runs, "-m dqe_jax.main --workdir=runs/x\n-m dqe_jax.audit --workdir=runs/x"),
    (paths, "`dqe_jax/data/lexicon.txt`, configs/, tests/*/*_test.py and /other/dqe_jax/none.py."),
]
REFUSED = [
    (commands, "python -m dqe_jax.training"),
    (commands, f"python -m dqe_jax.main {SHAPES} --steps=3"),
    (commands, f"python -m dqe_jax.main {SHAPES} \\\n  --split=test"),
    (commands, f"python3 -m dqe_jax.evaluate [--stop_at=3] {SHAPES}"),
    (config_files, "--config=configs/none.py"),
    (config_files, "--config=shapes:easy"),
    (commands, "dqe-jax benchmark step --queries=3"),
    (commands, "dqe-jax benchmark step shapes fiq_clip:vit_b_32 --queries=3"),
    (config_files, "dqe-jax benchmark step shapes fiq_clip:vit_b_33 --steps=3"),
    (config_files, "dqe-jax benchmark features none --rounds=3"),
    (config_files, "--config=configs/shapes.py:easy"),
    (config_files, "see `configs/shapes.py:smoke,tiny`"),
    (config_files, "--config shapes.py"),
    (fields, "--config.negatives.low=0.1"),
    (fields, "--config.negatives=0.1"),
    (fields, "`config.optimiser` or so"),
    (links, "[x](#none)"),
    (links, "[x](docs/none.md)"),
    (links, "[x](docs/results.md#none)"),
    (links, '<img src="none.png">'),
    (needs, "# A\n\n## B\n\nNeeds it.\n\n## C\n\n```bash\nx --data_dir=DIR\n```\n"),
    (needs, "```bash\npip install '.[gpu]'\n```\n"),
    (unmade_runs, "-m dqe_jax.evaluate --config=configs/fiq.py:vit_l --workdir=runs/fiq"),
    (unmade_runs, "-m dqe_jax.export --workdir=runs/x"),
    (paths, "in `dqe_jax/model.py`"),
    (paths, "see tests/none_*.py."),
]


@pytest.mark.parametrize(("rule", "text"), ACCEPTED)
def test_the_rule_accepts(rule: Rule, text: str):
    assert list(rule(text)) == []


@pytest.mark.parametrize(("rule", "text"), REFUSED)
def test_the_rule_refuses(rule: Rule, text: str):
    assert len(list(rule(text))) == 1
