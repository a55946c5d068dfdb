"""`python -m tests.fuzz`: runs the cases, and writes what came of them.

    python -m tests.fuzz --table=fuzz.md                 everything
    python -m tests.fuzz --only=cirr --seed=7            the cases whose names hold a text
    python -m tests.fuzz --light                         without those that need a trained run

Status 1 if anything is wrong. The same seed gives the same cases.
"""

from __future__ import annotations

import argparse
import collections
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
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


def _run(given: argparse.Namespace, root: Path, place: Path) -> list[Outcome]:
    places = [one for one in PLACES if not (given.light and one.trained)]
    cases = [*file_cases(root, given.seed, places), *field_cases(), *flag_cases()]
    cases += [case for case in corpus_cases() if case.place in places]
    texts = [text for text in given.only.split(",") if text]
    if texts:
        cases = [case for case in cases if any(text in case.name for text in texts)]
    rng = random.Random(given.seed)
    if given.sample:
        cases = rng.sample(cases, min(given.sample, len(cases)))
    before = snapshot(root)
    writable = [Path(_compiled())]
    outcomes = []
    used = {case.place.name: case.place for case in cases if case.place is not None}
    for one in used.values():  # the good file is accepted, and says what the same result is
        case = Case(f"{one.name} good", one.command, one.kind, one.arguments, one, None, "accepted")
        outcomes.append(_told(check(case, root, place / one.name, writable)))
    for i, case in enumerate(cases):
        outcomes.append(_told(check(case, root, place / str(i), writable)))
        shutil.rmtree(place / str(i), ignore_errors=True)
    for i, case in enumerate(rng.sample(cases, min(given.fresh, len(cases)))):
        outcomes.append(_told(check(case, root, place / f"fresh{i}", writable, own_process=True)))
    if snapshot(root) != before:
        raise RuntimeError("a case has changed the good files")
    return outcomes


def _compiled() -> str:
    import jax

    return jax.config.values["jax_compilation_cache_dir"]


def _told(outcome: Outcome) -> Outcome:
    if outcome.wrong:
        said = outcome.ended.said.strip()[-1500:]
        sys.stderr.write(f"WRONG {outcome.case.name}: {outcome.wrong}\n{said}\n\n")
    if outcome.ended.seconds > 20:
        sys.stderr.write(f"slow: {outcome.case.name}: {outcome.ended.seconds:.0f} s\n")
    return outcome


def _table(outcomes: Sequence[Outcome]) -> str:
    """By command and kind: cases, refused, accepted, those whose verdict was stated, and wrong."""
    rows: dict[tuple[str, str], collections.Counter[str]] = collections.defaultdict(
        collections.Counter
    )
    for outcome in outcomes:
        ended = "refused" if outcome.refused else "accepted"
        for key in ((outcome.case.command, outcome.case.kind), ("all", "")):
            rows[key] += collections.Counter(
                {
                    "cases": 1,
                    ended: outcome.ended.status in (0, 2),
                    "stated": outcome.wanted != "either",
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
