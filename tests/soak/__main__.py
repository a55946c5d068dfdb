"""`python -m tests.soak`: a run of two processes that is killed again and again.

    python -m tests.soak --kills=200 --seed=0 --table=soak.md      the long one
    python -m tests.soak --kills=10 --pause=5 --seed=113           that of CI

It trains once without faults, and once with them. Status 1 if anything is wrong. The same seed
draws the same faults.
"""

from __future__ import annotations

import argparse
import collections
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.soak import pair, plan, run

MOST_WRONG = 20  # after so many it is over


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a soak."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak")
    parser.add_argument("--kills", type=int, default=200, help="how many faults")
    parser.add_argument("--seed", type=int, default=0, help="of the faults")
    parser.add_argument("--pause", type=float, default=60, help="seconds of a SIGSTOP")
    parser.add_argument("--table", type=Path, help="file for the table")
    parser.add_argument("--place", type=Path, help="directory for the runs, kept; must be new")
    given = parser.parse_args(argv)
    began = time.monotonic()
    pair.warm()
    # Not a TemporaryDirectory, which the first fork that ends would remove.
    base = given.place or Path(tempfile.mkdtemp(prefix="soak-"))
    base.mkdir(parents=True, exist_ok=True)
    library = run.FAKETIME.format(platform.machine())
    soak = run.Soak(
        base.absolute(),
        given.kills,
        pause=given.pause,
        clock=library if os.path.exists(library) else "",
    )
    try:
        outcomes, wrong = _run(soak, given.kills, given.seed, began)
    finally:
        soak.close()
        if not given.place:
            shutil.rmtree(base)
    skipped = _not_run(soak)
    table = _table(outcomes, skipped, wrong, given.kills, given.seed, time.monotonic() - began)
    sys.stdout.write(table)
    if given.table:
        given.table.write_text(table)
    return 1 if wrong or any(outcome.wrong for outcome in outcomes) else 0


def _not_run(soak: run.Soak) -> dict[str, str]:
    """Kinds of faults that are not possible here, and why."""
    found = {}
    if soak.disk.reason:
        found[plan.FULL] = soak.disk.reason
    if not soak.clock:
        found[plan.CLOCK] = "libfaketime is not installed"
    return found


def _run(
    soak: run.Soak, kills: int, seed: int, began: float
) -> tuple[list[run.Outcome], list[str]]:
    """All outcomes, and what was wrong at the end."""
    run.prepare(soak.base)
    problem = soak.run_whole()
    if problem:
        return [], [problem]
    _tell(began, f"the run without faults has ended: {soak.total} steps")
    outcomes: list[run.Outcome] = []
    skipped = _not_run(soak)
    for faults in plan.draw(kills, seed):
        possible = [fault for fault in faults if fault.kind not in skipped]
        for fault in faults:
            if fault.kind in skipped:
                outcomes.append(run.Outcome(fault, f"not run: {skipped[fault.kind]}"))
        while possible:
            found = soak.meet(possible)
            for outcome in found:
                outcomes.append(outcome)
                _tell(
                    began,
                    f"{len(outcomes)}: {outcome.fault.kind}, {outcome.moment}, step "
                    f"{run.last_step(soak.workdir)}: {outcome.did} ({outcome.seconds:.1f} s)",
                )
                for line in outcome.wrong:
                    sys.stderr.write(f"WRONG: {line}\n")
            possible = possible[len(found) :]
        if sum(bool(outcome.wrong) for outcome in outcomes) >= MOST_WRONG:
            return outcomes, ["too much was wrong: the rest was not run"]
    return outcomes, soak.finish()


def _tell(began: float, text: str) -> None:
    sys.stderr.write(f"{time.monotonic() - began:6.0f} s  {text}\n")
    sys.stderr.flush()


def _table(
    outcomes: Sequence[run.Outcome],
    skipped: dict[str, str],
    wrong: Sequence[str],
    kills: int,
    seed: int,
    seconds: float,
) -> str:
    """By fault: how often, at which moments, what the run did, and what was lost or wrong."""
    lines = [
        f"Faults: {kills}, seed {seed}, {seconds / 60:.0f} minutes.",
        "",
        "| fault | times | what the run did | longest | wrong |",
        "| --- | --- | --- | --- | --- |",
    ]
    for kind in plan.KINDS:
        own = [outcome for outcome in outcomes if outcome.fault.kind == kind]
        if not own and kind not in skipped:
            continue
        did = collections.Counter(outcome.did for outcome in own)
        text = "; ".join(f"{count} {what}" for what, count in did.most_common())
        longest = max((outcome.seconds for outcome in own), default=0)
        bad = sum(bool(outcome.wrong) for outcome in own)
        lines.append(f"| {kind} | {len(own)} | {text} | {longest:.0f} s | {bad} |")
    ran = [outcome for outcome in outcomes if outcome.fault.kind not in skipped]
    bad = sum(bool(outcome.wrong) for outcome in ran)
    lines.append(f"| all | {len(ran)} | | | {bad} |")
    moments = collections.Counter(outcome.moment for outcome in ran)
    lines += ["", "| moment | times |", "| --- | --- |"]
    lines += [f"| {moment} | {moments[moment]} |" for moment in plan.MOMENTS]
    end = "; ".join(wrong) if wrong else "bit-identical, nothing lost"
    return "\n".join([*lines, "", f"End of the run: {end}.", ""])


if __name__ == "__main__":
    sys.exit(main())
