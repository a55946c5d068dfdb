"""A run that gets one fault after another, and what it did about each."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

from tests.soak import check, plan
from tests.soak.disk import Disk
from tests.soak.pair import LIMIT, START_LINES, Pair, Process, compiling, last_step
from tests.soak.plan import Fault

CHECKPOINT, EVALUATION, FIRST, REFRESH, KEEP = 5, 10, 2, 4, 8
END = 30  # steps before the end in which a run is met while it starts alone
STEPS = 4  # of a run, for each fault
FIELDS = {
    "checkpoint_every": CHECKPOINT,
    "eval_every": EVALUATION,
    "log_every": 1,
    "num_devices": 2,
    "optimizer.warmup_steps": 4,
    "batch.references": 4,
    "batch.queries_per_reference": 2,
    "data.augment": "flip",
    "model.tiny.image_depth": 0,
    "model.tiny.text_depth": 0,
    "model.tiny.composer_depth": 1,
    "model.frozen": "('vision','text')",
    "features.place": "device",
    "negatives.pool": "bank",
    "negatives.warmup": "rule",
    "negatives.first_refresh": FIRST,
    "negatives.refresh_every": REFRESH,
}
# On CPUs a collective waits for so long that a slow machine may reach it.
TIMED_OUT = "a process had waited for 30 s for the other: one sentence, status 2"
AGAIN = 5
# JAX measures by the clock when a process was last heard of.
BY_CLOCK = "ended by JAX, which takes a process for lost (SIGABRT)"
# JAX aborts a process that cannot go on; now and then that fails while it prints its threads.
BY_JAX = (-6, -11)
FAKETIME = "/usr/lib/{}-linux-gnu/faketime/libfaketime.so.1"


@dataclasses.dataclass
class Outcome:
    """What came of a fault.

    Attributes:
      fault: that was done.
      did: what the run did, in a few words.
      moment: the moment at which it came.
      seconds: from the fault to the end of both processes, or until it went on.
      wrong: what must not be; empty if all is well.
    """

    fault: Fault
    did: str = ""
    moment: str = ""
    seconds: float = 0.0
    wrong: list[str] = dataclasses.field(default_factory=list)


class Soak:
    """One run of two processes, and the same run again with faults."""

    def __init__(self, base: Path, kills: int, *, pause: float, clock: str):
        """Prepares nothing yet.

        Args:
          base: directory for all files.
          kills: how many faults there will be.
          pause: seconds of a SIGSTOP.
          clock: the library of libfaketime; "" if there is none.
        """
        self.base, self.pause, self.clock = base, pause, clock
        self.total = END + 10 + STEPS * kills
        self.whole, self.cache = base / "whole", base / "programs"
        self.logs = base / "logs"
        self.logs.mkdir(parents=True)
        self.disk = Disk(base / "disk")
        self.workdir = self.disk.place / "run"
        self.stores = 0  # how many directories of features were begun
        self.starts = 0
        self.started_fresh = 0
        self.held: dict[int, dict[str, str]] = {}  # checkpoints that were complete

    # --- The whole run -----------------------------------------------------------------------

    def run_whole(self) -> str:
        """The run without faults; what went wrong."""
        pair = self._to_the_end(self.whole, self.base / "features", keep=10**6, writes=True)
        if [process.status for process in pair.both] != [0, 0]:
            return f"the whole run ended with {[p.status for p in pair.both]}: {_tail(pair)}"
        self.lines = check.Lines((self.whole / "metrics.jsonl").read_bytes())
        self.features = check.files_of(self.base / "features")
        self.shards = len(check.shards_of(self.base / "features"))
        self.reader = check.Reader(self.whole)
        return ""

    # --- Faults ------------------------------------------------------------------------------

    def meet(self, faults: list[Fault]) -> list[Outcome]:
        """One start, and its faults up to the one that ends it: there may be some left."""
        self.starts += 1
        near_end = last_step(self.workdir) > self.total - END
        if near_end:
            faults = [dataclasses.replace(fault, moment="start-up") for fault in faults]
        if any(fault.moment == "features" for fault in faults):
            self._empty_features()
        stepped = any(fault.kind == plan.CLOCK for fault in faults)
        own: list[dict[str, str]] = [{}, {}]
        if stepped:
            own = [self._clock(i) for i in range(2)]
        self.started_fresh += stepped
        pair = self._start(self.workdir, self._features(), keep=KEEP, own=own, forked=not stepped)
        outcomes = []
        try:
            for fault in faults:
                outcome = Outcome(fault, moment=fault.moment)
                outcomes.append(outcome)
                if not self._wait_for(pair, fault):
                    if _timed_out(pair):
                        outcome.did = TIMED_OUT
                        break
                    outcome.wrong.append(f"it did not come to the moment: {_tail(pair)}")
                    break
                outcome.seconds = -time.monotonic()
                self._do(pair, outcome)
                outcome.seconds += time.monotonic()
                if outcome.wrong or pair.ended():
                    break
        finally:
            pair.close()
            self.disk.free()
        outcomes[-1].wrong += self._state()
        return outcomes

    def _wait_for(self, pair: Pair, fault: Fault) -> bool:
        """Waits for the moment of a fault."""
        moment, number = fault.moment, fault.number
        if moment == "start-up":
            wanted = (*START_LINES, "")[number % (len(START_LINES) + 1)]
            found = pair.wait(lambda: wanted in pair.both[0].said())
        elif moment == "features":
            root, goal = self._features(), number % self.shards
            held = len(check.shards_of(root))

            def writes() -> bool:
                now = len(check.shards_of(root))
                begun = now > held or any(root.glob(f"*/shard-*.{pair.both[0].pid}.partial"))
                return begun and now >= min(goal, self.shards - 1)

            found = pair.wait(writes)
        elif moment == "checkpoint":
            root = self.workdir / "checkpoints"

            def saves() -> bool:
                return pair.ready() and any(root.glob("*.orbax-checkpoint-tmp*"))

            # Those of the last start are removed before this one is ready.
            found = pair.wait(saves)
        else:
            # Known once this start has logged a step: the next one that fits.
            found = pair.wait(lambda: pair.own_step() > pair.before or pair.own_step() >= 1)
            step = pair.own_step() + 1
            while not _fits(step, moment):
                step += 1
            found = found and pair.wait(lambda: pair.own_step() >= step)
        if found:
            time.sleep(fault.delay)  # so that not all come at the first instant of the moment
        return found

    def _do(self, pair: Pair, outcome: Outcome) -> None:
        """Does what a fault says, and sees what comes of it."""
        fault, both = outcome.fault, pair.both
        one, other = both[fault.process], both[1 - fault.process]
        ready = pair.ready()
        if fault.kind == plan.KILL_BOTH:
            for process in both:
                process.send(signal.SIGKILL)
            self._must_end(pair, outcome)
            outcome.did = "both were killed"
            statuses = [process.status for process in both]
            if statuses != [-9, -9]:
                outcome.wrong.append(f"they ended with {statuses}")
        elif fault.kind == plan.KILL_ONE:
            one.send(signal.SIGKILL)
            self._must_end(pair, outcome)
            if one.status != -9:
                outcome.wrong.append(f"the killed process ended with {one.status}")
            self._lost(outcome, other)
        elif fault.kind in (plan.TERM_ONE, plan.TERM_BOTH):
            for process in both if fault.kind == plan.TERM_BOTH else [one]:
                process.send(signal.SIGTERM)
            self._must_end(pair, outcome)
            self._terminated(outcome, pair, fault, ready)
        elif fault.kind == plan.SILENT:
            one.send(signal.SIGSTOP)
            until = time.monotonic() + LIMIT
            while not other.ended() and time.monotonic() < until:
                time.sleep(0.05)
            if not other.ended():
                outcome.wrong.append(f"the other process waits for ever: {_tail(pair)}")
            else:
                self._lost(outcome, other)
        elif fault.kind == plan.PAUSE:
            one.send(signal.SIGSTOP)
            time.sleep(self.pause)
            one.send(signal.SIGCONT)
            self._goes_on(pair, outcome, f"waited {self.pause:.0f} s and went on")
        elif fault.kind == plan.CLOCK:
            for i in (0, 1) if fault.number % 2 else (fault.process,):
                self._set_clock(i, 3600 if fault.forward else -3600)
            self._goes_on(pair, outcome, "went on")
        else:
            self.disk.fill(fault.number * 64)
            self._must_end(pair, outcome)
            self._full(outcome, pair)

    def _must_end(self, pair: Pair, outcome: Outcome) -> None:
        if not pair.wait_for_end():
            outcome.wrong.append(f"both should have ended: {_tail(pair)}")

    def _lost(self, outcome: Outcome, other: Process) -> None:
        """What the process did whose peer was lost."""
        said, status = other.said(), other.status
        outcome.did = f"the other ended by itself, status {status}"
        if "Traceback" in said:
            outcome.wrong.append(f"a traceback: {_short(said)}")
        elif status == 2 and said.count("error: ") == 1:
            outcome.did = "the other ended with one sentence, status 2"
        elif status not in BY_JAX:
            outcome.wrong.append(f"it ended with {status}: {_short(said)}")

    def _terminated(self, outcome: Outcome, pair: Pair, fault: Fault, ready: bool) -> None:
        statuses = [process.status for process in pair.both]
        if statuses == [143, 143]:
            outcome.did = "saved, status 143 of both"
            said = pair.both[0].said()
            saved = int(said.rpartition("SIGTERM after step ")[2].split(";")[0] or -1)
            if saved not in check.checkpoints_of(self.workdir):
                outcome.wrong.append(f"step {saved} is not saved")
            return
        if _timed_out(pair):
            outcome.did = TIMED_OUT
            return
        # Before training nothing is to be saved: the signal ends a process as it ends any.
        outcome.did = "had not begun to train: ended by the signal"
        if ready and -15 not in statuses:
            outcome.wrong.append(f"they ended with {statuses}: {_tail(pair)}")
        for i, process in enumerate(pair.both):
            signalled = fault.kind == plan.TERM_BOTH or i == fault.process
            allowed = (-15, 143, 2, *BY_JAX) if signalled else (2, *BY_JAX)
            if process.status not in allowed or "Traceback" in process.said():
                outcome.wrong.append(f"it ended with {process.status}: {_short(process.said())}")

    def _full(self, outcome: Outcome, pair: Pair) -> None:
        first, second = pair.both
        outcome.did = "ended with one sentence, status 2"
        said = first.said()
        if first.status != 2 or said.count("error: ") != 1 or "Traceback" in said:
            outcome.wrong.append(f"it ended with {first.status}: {_short(said)}")
        if second.status not in (2, *BY_JAX) or "Traceback" in second.said():
            outcome.wrong.append(f"the other ended with {second.status}: {_short(second.said())}")

    def _goes_on(self, pair: Pair, outcome: Outcome, did: str) -> None:
        """Waits for further steps, or for the start to end."""
        outcome.did = did
        ready, step = pair.ready(), pair.own_step()
        further = step + 3 if ready else -1
        if pair.wait(lambda: pair.own_step() >= max(further, 1)):
            return
        if outcome.fault.kind == plan.CLOCK and _ended_by_clock(pair):
            outcome.did = BY_CLOCK
            return
        if outcome.fault.kind == plan.PAUSE and pair.wait_for_end(LIMIT):
            # On CPUs a collective may give up after 30 s.
            outcome.did = "the other process ended with one sentence, status 2"
            if all(p.status in (2, *BY_JAX) and "Traceback" not in p.said() for p in pair.both):
                return
        outcome.wrong.append(f"it did not go on: {_tail(pair)}")

    # --- What must hold ----------------------------------------------------------------------

    def _state(self) -> list[str]:
        """What is wrong with the files of the run, now that both processes have ended."""
        wrong = []
        now = check.checkpoints_of(self.workdir)
        for step, files in self.held.items():
            if step in now and now[step] != files:
                wrong.append(f"the checkpoint of step {step} has changed")
            if step not in now and not check.may_be_removed(step, set(now), KEEP, CHECKPOINT):
                wrong.append(f"the checkpoint of step {step} is lost")
        for step in sorted(now.keys() - self.held.keys()):
            problem = self.reader.problem(self.workdir, step, as_whole=step % CHECKPOINT == 0)
            wrong += [problem] if problem else []
        self.held = now
        root = self.workdir / "checkpoints"
        wrong += [f"{path.name} is there" for path in root.glob("*damaged*")]
        log = self.workdir / "metrics.jsonl"
        found = log.read_bytes() if log.exists() else b""
        problem = self.lines.problem(found, max(now, default=0))
        wrong += [problem] if problem else []
        for place in check.shards_of(self._features()):
            name = str(place.relative_to(self._features()))
            for file, digest in check.files_of(place).items():
                if self.features.get(f"{name}/{file}") != digest:
                    wrong.append(f"{name}/{file} of the features differs")
        return wrong

    def finish(self) -> list[str]:
        """The rest of the run without faults; what is wrong at its end."""
        pair = self._to_the_end(self.workdir, self._features(), keep=KEEP)
        if [process.status for process in pair.both] != [0, 0]:
            return [f"the last start ended with {[p.status for p in pair.both]}: {_tail(pair)}"]
        wrong = self._state()
        log = self.workdir / "metrics.jsonl"
        if log.read_bytes() != self.lines.expected:
            wrong.append("metrics.jsonl is not that of the whole run")
        if max(self.held, default=0) != self.total:
            wrong.append(f"the checkpoint of step {self.total} is missing")
        if self._whole_features() != self.features:
            wrong.append("the features are not those of the whole run")
        runs = self.workdir, self.whole
        for file in (self.whole / "eval").glob("*.json"):
            ours, its = (json.loads((run / "eval" / file.name).read_bytes()) for run in runs)
            # The name of a run is its directory.
            if {**ours, "name": ""} != {**its, "name": ""}:
                wrong.append(f"eval/{file.name} is not that of the whole run")
        return wrong

    def close(self) -> None:
        """Gives everything back."""
        if hasattr(self, "reader"):
            self.reader.close()
        self.disk.close()

    # --- Parts -------------------------------------------------------------------------------

    def _start(
        self,
        workdir: Path,
        features: Path,
        *,
        keep: int,
        writes: bool = False,
        own: list[dict[str, str]] | None = None,
        forked: bool = True,
    ) -> Pair:
        fields = {
            **FIELDS,
            "total_steps": self.total,
            "keep_checkpoints": keep,
            "data.prepared_dir": self.base / "prepared",
            "features.directory": features,
        }
        flags = ["--config=configs/shapes.py:smoke"]
        flags += [f"--config.{name}={value}" for name, value in fields.items()]
        name = f"{self.starts:03d}"
        variables = compiling(self.cache, writes=writes)
        return Pair(flags, workdir, self.logs, name, variables, own or [{}, {}], forked=forked)

    def _to_the_end(self, *args: Path, **kwargs: Any) -> Pair:
        """As `_start`, without faults, and again if a process had waited too long for the other."""
        for _ in range(AGAIN):
            self.starts += 1  # names their logs
            pair = self._start(*args, **kwargs)
            pair.wait_for_end(3600)
            pair.close()
            if not _timed_out(pair):
                break
        return pair

    def _features(self) -> Path:
        return self.disk.place / f"features-{self.stores}"

    def _whole_features(self) -> dict[str, str]:
        held = check.files_of(self._features())
        return {name: digest for name, digest in held.items() if ".partial" not in name}

    def _empty_features(self) -> None:
        """Another directory of features, if that of now is filled: they are computed anew."""
        if len(check.shards_of(self._features())) >= self.shards:
            shutil.rmtree(self._features())
            self.stores += 1

    def _clock(self, i: int) -> dict[str, str]:
        """The environment in which a process reads its clock from a file."""
        self._set_clock(i, 0)
        return {
            "LD_PRELOAD": self.clock,
            "FAKETIME_TIMESTAMP_FILE": str(self.base / f"clock-{i}"),
            "FAKETIME_CACHE_DURATION": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "DONT_FAKE_MONOTONIC": "1",
        }

    def _set_clock(self, i: int, seconds: int) -> None:
        new = self.base / f"clock-{i}.new"
        new.write_text(f"{seconds:+d}\n")
        new.replace(self.base / f"clock-{i}")


def _fits(step: int, moment: str) -> bool:
    """Whether the moment begins when the line of a step is written."""
    evaluates = step % EVALUATION == 0
    refreshes = step >= FIRST and (step - FIRST) % REFRESH == 0
    if moment == "evaluation":
        return evaluates
    if moment == "bank":
        return refreshes and not evaluates
    return not evaluates and not refreshes and step % CHECKPOINT != 0


def _ended_by_clock(pair: Pair) -> bool:
    """Whether JAX has ended both, since by the clock one was not heard of for too long."""
    pair.wait_for_end(60)
    return all(p.status == -6 and "heartbeat" in p.said() for p in pair.both)


def _timed_out(pair: Pair) -> bool:
    """Whether a process ended because it had waited for the other, which compiled for longer."""
    pair.wait_for_end(60)
    said = [process.said() for process in pair.both]
    return any("Read timeout" in one and one.count("error: ") == 1 for one in said)


def _tail(pair: Pair) -> str:
    return " | ".join(f"{p.status}: {_short(p.said())}" for p in pair.both)


def _short(said: str) -> str:
    """The end of what a process printed, without stacks in C++ and lists of modules."""
    noise = ("    @ ", "Extension modules")
    lines = [line[:300] for line in said.splitlines() if not line.startswith(noise)]
    return "\n".join(lines[-60:])


def prepare(base: Path) -> None:
    """Prepares the data in a fork: all starts read the same."""
    child = os.fork()
    if not child:
        status = 1
        try:
            from dqe_jax.data import datasets
            from dqe_jax.testing.small_runs import run_config

            datasets.open_dataset(run_config(base / "prepared").data)
            status = 0
        finally:
            os._exit(status)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        raise RuntimeError("the data could not be prepared")
