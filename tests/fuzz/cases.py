"""All cases, of the corpus, generated files, bad fields and flags: what each must lead to."""

from __future__ import annotations

import dataclasses
import random
import shutil
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.fuzz import damage, rules
from tests.fuzz.damage import Damage
from tests.fuzz.place import Place
from tests.fuzz.places import PLACES
from tests.fuzz.server import Ended, fresh, run

CORPUS = Path(__file__).parent / "corpus"
SECONDS = 120.0  # of a case, on a machine that others use too
LONGEST = 1600  # characters of a sentence
MEMORY = 3 * 2**30  # bytes that a process may hold


@dataclasses.dataclass(frozen=True)
class Case:
    """A command with something bad.

    Attributes:
      name: of the case.
      command: its name.
      kind: of input.
      arguments: of the command.
      place: whose file is damaged; None for bad flags and fields.
      damage: of the file.
      verdict: what it must lead to; None asks the place's rule.
      named: what the sentence must hold.
    """

    name: str
    command: str
    kind: str
    arguments: tuple[str, ...]
    place: Place | None = None
    damage: Damage | None = None
    verdict: str | None = None
    named: str = ""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a case: the verdict that is due, its end, and what is wrong; "" if nothing."""

    case: Case
    wanted: str
    ended: Ended
    wrong: str

    @property
    def refused(self) -> bool:
        """Whether the command has refused what it was given."""
        return self.ended.status == 2 and not _at_the_end(self.case, self.ended)


# --- Files ----------------------------------------------------------------------------------------


def file_cases(world: Path, seed: int, places: Sequence[Place] = PLACES) -> Iterator[Case]:
    """Damages of each place: what stands in place of a file, and generated content."""
    for place in places:
        rng = random.Random(f"{seed} {place.name}")
        made: list[tuple[str, Damage, str | None]] = []
        if place.form == "photo":
            for name, (_, harm) in damage.photos().items():
                made.append((name, harm, None))
            made += [(n, d, None) for n, d in damage.places().items() if n != "endless"]
        else:
            verdict = None if place.spares else rules.REFUSED
            made += [(n, d, verdict) for n, d in damage.places().items()]
        count = 8 if place.trained else 20
        made += [(n, d, None) for n, d in damage.of_bytes(rng, count)]
        text = _good(world, place)
        if place.form == "json":
            made += [(n, d, None) for n, d in damage.of_json(rng, text.read_text(), 2 * count)]
        elif place.form == "lines":
            made += [(n, d, None) for n, d in damage.of_lines(rng, 12)]
        elif place.form == "safetensors":
            made += [(n, d, None) for n, d in damage.of_safetensors(rng, 18)]
        elif place.form == "npz":
            made += [(n, d, None) for n, d in damage.of_npz(rng, 16)]
        numbers = range(len(made))
        chosen = sorted(rng.sample(numbers, min(place.most, len(made)))) if place.most else numbers
        for i in chosen:
            name, harm, verdict = made[i]
            stated = place.stated.get(name, verdict)
            label = f"{place.name} {i} {name}"
            yield Case(label, place.command, place.kind, place.arguments, place, harm, stated)


def corpus_cases() -> Iterator[Case]:
    """`corpus/<place>/<refused or accepted>-<name>` takes the good file's place in a case."""
    known = {place.name: place for place in PLACES}
    for file in sorted(CORPUS.glob("*/*")):
        place, verdict = known[file.parent.name], file.name.partition("-")[0]
        if verdict not in ("refused", "accepted"):
            raise ValueError(f"{file}: begin its name with refused- or accepted-.")

        def harm(path: Path, file: Path = file) -> None:
            path.write_bytes(file.read_bytes())

        name = f"corpus/{place.name}/{file.name}"
        yield Case(name, place.command, place.kind, place.arguments, place, harm, verdict)


def _good(world: Path, place: Place) -> Path:
    for copy in place.copies:
        source, target = _copy_of(copy)
        if place.file == target:
            return world / source
        if place.file.startswith(target + "/"):
            return world / source / place.file.removeprefix(target + "/")
    raise ValueError(f"{place.name}: no copy holds {place.file}")


def _copy_of(copy: str) -> tuple[str, str]:
    source, _, target = copy.partition("=")
    return source, target or Path(source).name


# --- Fields and flags -----------------------------------------------------------------------------

_CONFIGURED = (
    *("train", "evaluate", "features", "audit", "simulate", "sliders", "ablate", "plan"),
    *("describe", "benchmark step", "benchmark data", "benchmark features"),
)
_GIVEN = {"config": "shapes:smoke", "dataset": "cirr"}  # of flags that commands require
_NO_NUMBERS = ("seven", "1e", "--", "1,2", "0x", "None", "١x")


def field_cases() -> Iterator[Case]:
    """Each field of a config with a value of another type, over all commands that take a config."""
    from dqe_jax.config import fields

    for i, (name, one) in enumerate(fields().items()):
        command = _CONFIGURED[i % len(_CONFIGURED)]
        bad: tuple[str, ...] = ()
        if isinstance(one.default, bool):
            bad = ("perhaps", "2")
        elif isinstance(one.default, int):
            bad = ("seven", "1.5")
        elif isinstance(one.default, float):
            bad = ("many", "1e")
            yield _field_case("describe", name, "nan")
        for value in bad:
            yield _field_case(command, name, value)
        yield _field_case(command, f"{name}_x", "1")


def _field_case(command: str, name: str, value: str) -> Case:
    arguments = (*command.split(), "--config=shapes:smoke", f"--config.{name}={value}")
    label = f"{command} --config.{name}={value}"
    last = name.rpartition(".")[2].removesuffix("_x")
    return Case(label, command, "fields", arguments, None, None, rules.REFUSED, last)


def flag_cases() -> Iterator[Case]:
    """Flags of each command: text in place of numbers, unknown ones, and ones that are missing."""
    import re

    from dqe_jax.cli.commands import COMMANDS

    folder = Path(__file__).resolve().parents[2] / "dqe_jax" / "cli"
    for command, (module, _) in COMMANDS.items():
        source = (folder / f"{module}.py").read_text()
        numbers = re.findall(r'DEFINE_(?:integer|float)\(\s*"(\w+)"', source)
        truths = re.findall(r'DEFINE_bool\(\s*"(\w+)"', source)
        chosen = re.findall(r'DEFINE_enum\(\s*"(\w+)"', source)
        required = re.findall(r'"(\w+)"', re.findall(r"^REQUIRED = \((.*)\)", source, re.M)[0])
        given = [f"--{name}={_GIVEN.get(name, 'x')}" for name in required]
        bad = [(flag, _NO_NUMBERS[i % len(_NO_NUMBERS)]) for i, flag in enumerate(numbers)]
        bad += [(flag, "nan") for flag in numbers] + [(flag, "perhaps") for flag in truths]
        bad += [(flag, "no-such-choice") for flag in chosen]
        for flag, value in [*bad, ("no_such_flag", "1")]:
            rest = [word for word in given if not word.startswith(f"--{flag}=")]
            arguments = (*command.split(), f"--{flag}={value}", *rest)
            yield Case(
                f"{command} --{flag}={value}",
                command,
                "flags",
                arguments,
                None,
                None,
                "refused",
                flag,
            )


# --- One case -------------------------------------------------------------------------------------


def check(
    case: Case, world: Path, base: Path, writable: Sequence[Path], *, own_process: bool = False
) -> Outcome:
    """Runs a case in a new directory and says what is wrong with how it ended."""
    work = base / "work"
    work.mkdir(parents=True)
    good = damaged = None
    if case.place is not None:
        for copy in case.place.copies:
            source, target = _copy_of(copy)
            kind = shutil.copytree if (world / source).is_dir() else shutil.copy2
            kind(world / source, work / target)
        good, damaged = _good(world, case.place), work / case.place.file
        if case.damage is not None:
            case.damage(damaged)
    wanted = case.verdict or _verdict(case, damaged, good)
    before = snapshot(work)
    arguments = [word.replace("{world}", str(world)) for word in case.arguments]
    if own_process:
        ended = fresh(arguments, work, limit=SECONDS)
    else:
        ended = run(arguments, work, limit=SECONDS, writable=writable)
    wrong = _wrong(case, wanted, ended, before, snapshot(work), base)
    return Outcome(case, wanted, ended, wrong)


def _verdict(case: Case, damaged: Path | None, good: Path | None) -> str:
    if damaged is None or good is None or case.place is None:
        return rules.EITHER
    if not damaged.is_file():
        return rules.EITHER
    return case.place.rule(damaged, good)


def snapshot(root: Path) -> dict[str, tuple[str, int]]:
    """What lies below a directory: of files a sum of the content, of all others what they are."""
    found = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if path.is_symlink():
            found[name] = (f"link to {path.readlink()}", 0)
        elif path.is_file():
            found[name] = ("file", zlib.crc32(path.read_bytes()))
        else:
            found[name] = ("directory" if path.is_dir() else "special", 0)
    return found


def _wrong(
    case: Case,
    wanted: str,
    ended: Ended,
    before: dict[str, tuple[str, int]],
    after: dict[str, tuple[str, int]],
    base: Path,
) -> str:
    """What is wrong; "" if nothing is."""
    if ended.status is None:
        return f"it ran longer than {SECONDS:.0f} s"
    if "Traceback (most recent call last)" in ended.said:
        return "a traceback"
    if ended.status not in (0, 2):
        return f"status {ended.status}"
    if ended.memory > MEMORY:
        return f"it held {ended.memory / 2**30:.1f} GiB"
    if ended.outside:
        return f"it wrote to {', '.join(ended.outside[:3])}"
    accepted = ended.status == 0 or _at_the_end(case, ended)
    may = case.place.may_change if case.place is not None and accepted else ()
    changed = [name for name, held in before.items() if after.get(name) != held]
    changed = [name for name in changed if not name.startswith(may) and not name.endswith("lock")]
    if changed:
        return f"it changed {', '.join(changed[:3])}"
    if not accepted:
        return _wrong_refusal(case, wanted, ended)
    if wanted == rules.REFUSED:
        return "it was accepted"
    if wanted == rules.SAME and case.place is not None:
        for name in case.place.results:
            found, right = (one / "work" / name for one in (base, base.parent / case.place.name))
            if not found.exists():
                return f"it did not write {name}"
            if not right.exists() or found.read_bytes() != right.read_bytes():
                return f"{name} is not that of the good file"
    return ""


def _at_the_end(case: Case, ended: Ended) -> bool:
    """Whether a command that cannot end well has read all that it reads."""
    words = case.place.good_words if case.place is not None else ""
    return bool(words) and ended.status == 2 and words in ended.said.splitlines()[-1]


def _wrong_refusal(case: Case, wanted: str, ended: Ended) -> str:
    if wanted in (rules.SAME, "accepted"):
        return "it was refused"
    sentences = [line for line in ended.said.splitlines() if line.startswith("error: ")]
    if len(sentences) != 1 or ended.said.strip().splitlines()[-1] != sentences[0]:
        return f"it ended without one sentence: {ended.said[-300:]!r}"
    if len(sentences[0]) > LONGEST:
        return f"a sentence of {len(sentences[0])} characters"
    named = (case.named,)
    if case.place is not None:
        # Of annotations that lack a query, the file that still ranks it is named.
        read = (case.place.file, *case.place.copies[1:]) if case.place.names else ("",)
        named = tuple(Path(file).stem.partition(".")[0] for file in read)
    if any(one in sentences[0] for one in named):
        return ""
    return f"the sentence does not name {' or '.join(named)}: {sentences[0]}"
