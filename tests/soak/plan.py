"""Which faults a soak has, and at which moments: drawn by a seed."""

from __future__ import annotations

import dataclasses
import random

KILL_BOTH = "SIGKILL of both"
KILL_ONE = "SIGKILL of one, the other is left alone"
TERM_ONE = "SIGTERM of one"
TERM_BOTH = "SIGTERM of both"
PAUSE = "SIGSTOP of one for a minute"
SILENT = "SIGSTOP of one for ever"
FULL = "full disk"
CLOCK = "clock step of an hour"
KINDS = (KILL_BOTH, KILL_ONE, TERM_ONE, TERM_BOTH, PAUSE, SILENT, FULL, CLOCK)
# The run goes on after these; the others end it.
GOES_ON = (PAUSE, CLOCK)
MOMENTS = ("start-up", "features", "checkpoint", "bank", "step", "evaluation")
TRAINING = MOMENTS[2:]
MOST_PAUSES, MOST_SILENT = 5, 2
# Of what is left after pauses and silent peers.
_SHARES = {KILL_BOTH: 22, KILL_ONE: 25, TERM_ONE: 17, TERM_BOTH: 11, FULL: 13, CLOCK: 12}


@dataclasses.dataclass(frozen=True)
class Fault:
    """What is done to a run, and when.

    Attributes:
      kind: of `KINDS`.
      moment: of `MOMENTS`.
      process: 0 or 1, to which it is done where it is done to one.
      delay: seconds after the moment has begun, so that not all come at its first instant.
      number: at random, 0 or more: which line of a start, how many shards, how many steps.
      forward: of a clock step.
    """

    kind: str
    moment: str
    process: int
    delay: float
    number: int
    forward: bool = True


def draw(count: int, seed: int) -> list[list[Fault]]:
    """Faults by starts of the run: the last of each start ends it, those before it do not.

    Args:
      count: of all faults.
      seed: the same one gives the same faults.
    """
    rng = random.Random(seed)
    starts = []
    kinds = _kinds(count, rng)
    ending = [kind for kind in kinds if kind not in GOES_ON]
    going_on = [kind for kind in kinds if kind in GOES_ON]
    # Each of these has a start of its own, and is followed by a fault that ends it.
    before = rng.sample(range(len(ending)), len(going_on))
    first = dict(zip(before, going_on))
    for i, kind in enumerate(ending):
        start = []
        if i in first:
            start.append(_fault(first[i], MOMENTS, i, rng))
        start.append(_fault(kind, TRAINING if start else MOMENTS, i, rng))
        starts.append(start)
    return starts


def _kinds(count: int, rng: random.Random) -> list[str]:
    """The kinds of so many faults, in the order in which they come."""
    kinds = [PAUSE] * min(MOST_PAUSES, count // 10) + [SILENT] * min(MOST_SILENT, count // 50)
    left, total = count - len(kinds), sum(_SHARES.values())
    rest = [kind for kind, share in _SHARES.items() for _ in range(left * share // total)]
    # At least one of each, as far as they go.
    rest = (list(_SHARES) + rest)[:left] if len(rest) < len(_SHARES) else rest
    names, shares = list(_SHARES), list(_SHARES.values())
    rest += rng.choices(names, shares, k=left - len(rest))
    kinds += rest
    rng.shuffle(kinds)
    return kinds


def _fault(kind: str, moments: tuple[str, ...], i: int, rng: random.Random) -> Fault:
    moment = moments[i % len(moments)] if rng.random() < 0.5 else rng.choice(moments)
    return Fault(
        kind,
        moment,
        rng.randrange(2),
        rng.uniform(0, 0.05),
        rng.randrange(1000),
        rng.random() < 0.5,
    )
