"""Facts from the text of a compiled program (HLO): its collectives, and the compiler's cycles.

Loops count as often as they run where the number is in the text; what an asynchronous operation
starts counts once.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
from collections.abc import Iterator

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "collective-permute",
    "all-to-all",
    "ragged-all-to-all",
    "collective-broadcast",
)
_BITS = {"pred": 8, "token": 0, "c64": 64, "c128": 128, "opaque": 0}
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.-]+) = (.*?) ([a-z][a-z0-9-]*)\((.*)")
_CALLED = re.compile(
    r"\b(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.-]+)"
)
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_GROUPS = re.compile(r"replica_groups=\{\{([\d,]*)\}|replica_groups=\[\d+,(\d+)\]")


def shape_bytes(shape: str) -> int:
    """Bytes of an array or of all arrays of a tuple, without padding.

    Args:
      shape: `bf16[8,128]{1,0:T(8,128)}` or `(f32[2], s32[])`.
    """
    total = 0
    for dtype, sizes in _ARRAY.findall(shape):
        bits = _BITS.get(dtype)
        if bits is None:
            bits = _number(r"(\d+)", dtype)
        count = 1
        for size in filter(None, sizes.split(",")):
            count *= int(size)
        total += count * bits // 8
    return total


def _number(pattern: str, text: str) -> int:
    """The integer that the group of a pattern finds.

    Raises:
      ValueError: there is none.
    """
    found = re.search(pattern, text)
    if not found:
        raise ValueError(f"there is no {pattern} in {text!r}")
    return int(found[1])


def elements(shape: str) -> list[str]:
    """The elements of a tuple's shape, themselves shapes; of an array's, itself alone."""
    if not shape.startswith("("):
        return [shape]
    found, depth, start = [], 0, 1
    for i, letter in enumerate(shape):
        depth += (letter in "([{") - (letter in ")]}")
        if (letter == "," and depth == 1) or (letter == ")" and depth == 0):
            found.append(shape[start:i].strip())
            start = i + 1
    return [element for element in found if element]


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of a computation.

    Attributes:
      name: of its result.
      shape: of its result.
      opcode: `fusion`, `all-gather-start` ...
      rest: operands and attributes.
      root: whether it is the computation's result.
    """

    name: str
    shape: str
    opcode: str
    rest: str
    root: bool

    @functools.cached_property
    def operands(self) -> list[str]:
        """Names of the operands."""
        depth = 1
        for end, letter in enumerate(self.rest):
            depth += (letter in "([{") - (letter in ")]}")
            if depth == 0:
                return re.findall(r"%([\w.-]+)", self.rest[:end])
        return []

    @functools.cached_property
    def called(self) -> dict[str, str]:
        """Names of the computations that it calls, by role."""
        found = dict(_CALLED.findall(self.rest))
        branches = _BRANCHES.search(self.rest)
        if branches:
            names = re.findall(r"[\w.-]+", branches[1])
            found |= {f"branch {i}": name for i, name in enumerate(names)}
        return found

    @property
    def cycles(self) -> int:
        """The compiler's estimate; 0 if it gives none."""
        found = _CYCLES.search(self.rest)
        return int(found[1]) if found else 0


@dataclasses.dataclass
class Traffic:
    """Collectives of one kind in one run of a program, on one device.

    Attributes:
      count: how many.
      bytes: of their results.
      sent: bytes that a device sends, in a ring: all-reduce twice its size, the others once.
    """

    count: int = 0
    bytes: int = 0
    sent: float = 0.0


class Module:
    """A compiled program.

    Attributes:
      computations: instructions by name of the computation.
      entry: name of the one that runs.
      endless: loops whose number of rounds is not in the text: they count once.
    """

    def __init__(self, text: str):
        """Reads `compiled.as_text()`."""
        self.computations: dict[str, list[Instruction]] = {}
        self.entry, self.endless = "", 0
        here: list[Instruction] = []
        for line in text.splitlines():
            if line and not line[0].isspace():
                found = _COMPUTATION.match(line)
                if found:
                    here = self.computations[found[2]] = []
                    self.entry = found[2] if found[1] else self.entry
                continue
            found = _INSTRUCTION.match(line)
            if found:
                here.append(
                    Instruction(found[2], found[3], found[4], found[5], root=bool(found[1]))
                )
        self._runs = self._count_runs()

    def rounds(self, computation: str, loop: Instruction) -> int | None:
        """How often a `while` of a computation runs its body; None if that is not in the text."""
        known = _TRIPS.search(loop.rest)
        if known:
            return int(known[1])
        condition = self.computations.get(loop.called.get("condition", ""), [])
        root = next((i for i in condition if i.root), None)
        if root is None:
            return None
        by_name = {i.name: i for i in condition}
        operands = [by_name[name] for name in root.operands if name in by_name]
        if root.opcode == "fusion":
            inner = self.computations.get(root.called.get("calls", ""), [])
            root = next((i for i in inner if i.root), root)
        direction = re.search(r"direction=(\w+)", root.rest)
        if root.opcode != "compare" or not direction or direction[1] not in ("LT", "GT"):
            return None
        limits = [self._constant(i, computation, loop) for i in operands]
        limits = [limit for limit in limits if limit]  # what counts starts at 0
        return limits[0] if len(limits) == 1 else None

    def _constant(self, value: Instruction, computation: str, loop: Instruction) -> int | None:
        """The number that an operand of a loop's condition stands for, if it is a constant."""
        if value.opcode == "get-tuple-element":
            index = _number(r"index=(\d+)", value.rest)
            outer = {i.name: i for i in self.computations[computation]}
            state = outer.get(loop.operands[0]) if loop.operands else None
            if state is None or state.opcode != "tuple" or index >= len(state.operands):
                return None
            value = outer.get(state.operands[index], state)
            while value.opcode in ("copy", "bitcast") and value.operands[0] in outer:
                value = outer[value.operands[0]]
        if value.opcode != "constant" or not value.shape.startswith(("s32[]", "u32[]", "s64[]")):
            return None
        return _number(r"^(-?\d+)", value.rest)

    def _count_runs(self) -> dict[str, float]:
        """How often each computation runs; those inside fusions too."""
        runs: dict[str, float] = collections.defaultdict(float)

        def visit(name: str, times: float) -> None:
            runs[name] += times
            for instruction in self.computations.get(name, []):
                inner = times
                if instruction.opcode == "while":
                    rounds = self.rounds(name, instruction)
                    self.endless += rounds is None
                    inner = times * (1 if rounds is None else rounds)
                if instruction.opcode in ("async-update", "async-done"):
                    continue  # they name the computation that async-start runs
                for role, called in instruction.called.items():
                    if role != "to_apply" or instruction.opcode == "call":
                        visit(called, inner)

        visit(self.entry, 1)
        return runs

    def _each(self) -> Iterator[tuple[str, Instruction, float]]:
        """Every instruction that runs, with its computation and how often it does."""
        for name, times in self._runs.items():
            for instruction in self.computations.get(name, []):
                yield name, instruction, times

    def cycles(self) -> float:
        """The compiler's estimate of cycles in computing; collectives and copies have none.

        Of alternatives (`conditional`) all count.
        """
        inside = {
            i.called["calls"] for _, i, _ in self._each() if i.opcode == "fusion" and i.called
        }
        return sum(times * i.cycles for name, i, times in self._each() if name not in inside)

    def traffic(self) -> dict[str, Traffic]:
        """Collectives by kind; kinds without any are left out."""
        found: dict[str, Traffic] = {}
        for name, instruction, times in self._each():
            kind = instruction.opcode.removesuffix("-start")
            if kind not in COLLECTIVES or self._continues(name):
                continue
            parts = elements(instruction.shape)
            if instruction.opcode in ("all-gather-start", "collective-permute-start"):
                parts = [max(parts, key=shape_bytes)]  # the operand stands beside the result
            size = sum(map(shape_bytes, parts))
            groups = _GROUPS.search(instruction.rest)
            members = 1
            if groups:
                members = int(groups[2]) if groups[2] else groups[1].count(",") + 1
            if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
                # The name that the TPU compiler gives a reduce-scatter that it has fused with its
                # consumer.
                kind, size = "reduce-scatter", size // members
            share = (members - 1) / members
            factor = {
                "all-gather": share,
                "all-reduce": 2 * share,
                "reduce-scatter": members - 1,
                "all-to-all": share,
                "ragged-all-to-all": share,
                "collective-permute": 1,
                "collective-broadcast": 1,
            }[kind]
            sum_ = found.setdefault(kind, Traffic())
            sum_.count += int(times)
            sum_.bytes += int(times * size)
            sum_.sent += times * size * factor
        return found

    def _continues(self, computation: str) -> bool:
        """Whether a computation goes on with a collective that another one has started.

        The compiler weaves a collective into several fusions: the first ends in
        `AsyncCollectiveStart`, and all of them repeat the collective.
        """
        body = self.computations[computation]
        woven = any(i.opcode in COLLECTIVES and "chain_id=" in i.rest for i in body)
        return woven and not any('"AsyncCollectiveStart"' in i.rest for i in body)
