"""`python -m tests.fuzz`: runs the cases, and writes what came of them.

    python -m tests.fuzz --table=fuzz.md                 everything
    python -m tests.fuzz --only=cirr --seed=7            the cases whose names hold a text
    python -m tests.fuzz --light                         without those that need a trained run
    python -m tests.fuzz --kept=fuzz.jsonl               goes on where it was stopped

Status 1 if anything is wrong. The same seed gives the same cases.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.fuzz import server, world
from tests.fuzz.cases import (
    Case,
    Outcome,
    check,
    corpus_cases,
    field_cases,
    file_cases,
    flag_cases,
    snapshot,
)
from tests.fuzz.places import PLACES


@dataclasses.dataclass(frozen=True)
class Kept:
    """What the table needs of an outcome; `ended` is "refused", "accepted" or "otherwise"."""

    name: str
    command: str
    kind: str
    ended: str
    stated: bool
    wrong: str

    @classmethod
    def of(cls, outcome: Outcome) -> Kept:
        """Of an outcome."""
        ended = "accepted" if outcome.ended.status in (0, 2) else "otherwise"
        return cls(
            name=outcome.case.name,
            command=outcome.case.command,
            kind=outcome.case.kind,
            ended="refused" if outcome.refused else ended,
            stated=outcome.wanted != "either",
            wrong=outcome.wrong,
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the cases that the arguments name."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--seed", type=int, default=0, help="of the generated files")
    parser.add_argument("--only", default="", help="cases whose names hold one of these, by commas")
    parser.add_argument("--light", action="store_true", help="without what needs a trained run")
    parser.add_argument("--sample", type=int, default=0, help="so many of them, drawn by the seed")
    parser.add_argument(
        "--fresh", type=int, default=0, help="so many also as processes of their own"
    )
    parser.add_argument("--table", type=Path, help="file for the table")
    parser.add_argument(
        "--kept", type=Path, help="file of outcomes: those that are right there are not run again"
    )
    parser.add_argument("--world", type=Path, help="directory of the good files, kept")
    given = parser.parse_args(argv)
    server.warm()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as place:
        root = given.world or Path(place, "world")
        if not root.exists():
            _in_a_fork(lambda: world.build(root, trained=not given.light))
        outcomes = _run(given, root, Path(place))
    table = _table(outcomes)
    sys.stdout.write(table)
    if given.table:
        given.table.write_text(table)
    return 1 if any(outcome.wrong for outcome in outcomes) or not outcomes else 0


def _in_a_fork(work) -> None:  # type: ignore[no-untyped-def]
    """Does what asks JAX for a device, of which this process must have none."""
    child = os.fork()
    if not child:
        status = 1
        try:
            work()
            status = 0
        finally:
            sys.stdout.flush()
            os._exit(status)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        raise RuntimeError("the good files could not be made")


def _run(given: argparse.Namespace, root: Path, place: Path) -> list[Kept]:
    places = [one for one in PLACES if not (given.light and one.trained)]
    cases = [*file_cases(root, given.seed, places), *field_cases(), *flag_cases()]
    cases += [case for case in corpus_cases() if case.place in places]
    texts = [text for text in given.only.split(",") if text]
    if texts:
        cases = [case for case in cases if any(text in case.name for text in texts)]
    rng = random.Random(given.seed)
    if given.sample:
        cases = rng.sample(cases, min(given.sample, len(cases)))
    held = _held(given.kept)
    outcomes = []
    before = snapshot(root)
    writable = [Path(_compiled())]

    def told(outcome: Outcome) -> None:
        outcomes.append(Kept.of(outcome))
        _tell(outcome)
        if given.kept is not None and not outcome.wrong:
            with given.kept.open("a") as file:
                file.write(json.dumps(vars(outcomes[-1])) + "\n")

    for i, case in enumerate(_with_good_ones(cases)):
        # Of a good file, whose results others must give.
        good = case.place.name if case.place is not None and case.damage is None else ""
        if case.name in held and not good:
            outcomes.append(held[case.name])
            continue
        base = place / (good or str(i))
        told(check(case, root, base, writable))
        if not good:
            shutil.rmtree(base, ignore_errors=True)
    for i, case in enumerate(rng.sample(cases, min(given.fresh, len(cases)))):
        case = dataclasses.replace(case, name=f"{case.name} in a process of its own")
        told(check(case, root, place / f"fresh{i}", writable, own_process=True))
    if snapshot(root) != before:
        raise RuntimeError("a case has changed the good files")
    return outcomes


def _with_good_ones(cases: Sequence[Case]) -> Iterator[Case]:
    """The cases, before the first of each place that of its good file, which is accepted."""
    seen = set()
    for case in cases:
        one = case.place
        if one is not None and one.name not in seen:
            seen.add(one.name)
            label = f"{one.name} good"
            yield Case(label, one.command, one.kind, one.arguments, one, None, "accepted")
        yield case


def _held(path: Path | None) -> dict[str, Kept]:
    """The outcomes of an earlier run, by the names of their cases."""
    if path is None or not path.exists():
        return {}
    outcomes = (Kept(**json.loads(line)) for line in path.read_text().splitlines())
    return {outcome.name: outcome for outcome in outcomes}


def _compiled() -> str:
    import jax

    return jax.config.values["jax_compilation_cache_dir"]


def _tell(outcome: Outcome) -> None:
    if outcome.wrong:
        said = outcome.ended.said.strip()[-1500:]
        sys.stderr.write(f"WRONG {outcome.case.name}: {outcome.wrong}\n{said}\n\n")
    if outcome.ended.seconds > 20:
        sys.stderr.write(f"slow: {outcome.case.name}: {outcome.ended.seconds:.0f} s\n")


def _table(outcomes: Sequence[Kept]) -> str:
    """By command and kind: cases, refused, accepted, those whose verdict was stated, and wrong."""
    rows: dict[tuple[str, str], collections.Counter[str]] = collections.defaultdict(
        collections.Counter
    )
    for outcome in outcomes:
        for key in ((outcome.command, outcome.kind), ("all", "")):
            rows[key] += collections.Counter(
                {
                    "cases": 1,
                    outcome.ended: 1,
                    "stated": outcome.stated,
                    "wrong": bool(outcome.wrong),
                }
            )
    columns = ("cases", "refused", "accepted", "stated", "wrong")
    lines = ["| command | input | " + " | ".join(columns) + " |", "| --- " * 7 + "|"]
    for (command, kind), counts in sorted(rows.items(), key=lambda row: (row[0][0] == "all", row)):
        numbers = " | ".join(f"{counts[column]:,}" for column in columns)
        lines.append(f"| {command} | {kind} | {numbers} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    began = time.monotonic()
    status = main()
    sys.stderr.write(f"{time.monotonic() - began:.0f} s\n")
    sys.exit(status)
