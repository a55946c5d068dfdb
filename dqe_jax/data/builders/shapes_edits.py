"""Edits of scenes of `shapes`: their texts, and every scene that satisfies them."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Sequence
from typing import NamedTuple

from dqe_jax.data.builders.shapes_scenes import CELLS, SIZES, Scene, Thing, Vocabulary, replace

ADDITIONS = ("add a {} {}", "a {} {}", "put a {} {}", "there is a new {} {}", "with a {} {}")
REMOVALS = (
    "remove the {}",
    "delete the {}",
    "take away the {}",
    "without the {}",
    "get rid of the {}",
    "the {} is gone",
)
TEMPLATES = {
    "color": (
        "make the {name} {value}",
        "change the color of the {name} to {value}",
        "the {name} is now {value}",
        "paint the {name} {value}",
        "turn the {name} {value}",
        "the {name} becomes {value}",
    ),
    "size": (
        "make the {name} {value}",
        "make the {name} {bigger}",
        "change the size of the {name} to {value}",
        "the {name} is now {value}",
        "the {name} gets {bigger}",
    ),
    "shape": (
        "make the {name} a {value}",
        "change the {name} to a {value}",
        "turn the {name} into a {value}",
        "replace the {name} with a {value}",
        "the {name} becomes a {value}",
    ),
    "fill": (
        "make the {name} {value}",
        "the {name} is now {value}",
        "change the {name} to be {value}",
    ),
}
BIGGER = {"large": "bigger", "small": "smaller"}


@dataclasses.dataclass(frozen=True)
class Edit:
    """One modification.

    Attributes:
      text: what it asks for.
      kind: of change.
      results: every scene that satisfies it, the target first; in `coarse` the target alone.
      attributes: `name=value` that the text changes.
      cell: the one it is about; -1 in `coarse`.
    """

    text: str
    kind: str
    results: tuple[Scene, ...]
    attributes: tuple[str, ...]
    cell: int = -1


class DrawnQuery(NamedTuple):
    """A query: gallery rows of its reference and its target, and the edit that leads there."""

    reference: int
    target: int
    edit: Edit


@dataclasses.dataclass(frozen=True)
class DrawnSplit:
    """The scenes of a split's gallery, and its queries."""

    scenes: Sequence[Scene]
    queries: Sequence[DrawnQuery]


class Editor:
    """Writes random edits in the words of a variant."""

    def __init__(self, words: Vocabulary):
        """`words` are those of the variant."""
        self.words = words

    def name(self, rng: random.Random, scene: Scene, cell: int) -> str:
        """Words that pick out the object in `cell`: some of its attributes, or its place too."""
        thing = _thing_in(scene, cell)
        others = [t for i, t in enumerate(scene) if t is not None and i != cell]
        parts = ("size", "fill", "color") if self.words.hard else ("size", "color")
        choices = [
            fields
            for n in range(len(parts) + 1)
            for fields in itertools.combinations(parts, n)
            if not any(
                t.shape == thing.shape and all(getattr(t, f) == getattr(thing, f) for f in fields)
                for t in others
            )
        ]
        if choices and rng.random() < 0.9:
            fields = rng.choice(choices)
            words = [getattr(thing, f) for f in parts if f in fields]
            return " ".join([*words, thing.shape])
        return f"{self.describe(thing)} {self.place(rng, cell)}"

    def describe(self, thing: Thing) -> str:
        """All attributes of an object in words."""
        fill = [thing.fill] if self.words.hard else []
        return " ".join([thing.size, *fill, thing.color, thing.shape])

    def place(self, rng: random.Random, cell: int) -> str:
        """The name of a cell with its preposition."""
        name = CELLS[cell]
        if name == "middle center":
            name = rng.choice(["center", "middle"])
        return rng.choice(["at the", "in the"]) + " " + name

    def kinds(self) -> tuple[str, ...]:
        """The kinds of a single edit."""
        plain = ("add", "remove", "color", "size", "shape")
        return (*plain, "fill", "move") if self.words.hard else plain

    def edit(
        self, rng: random.Random, scene: Scene, kind: str, cell: int | None = None
    ) -> Edit | None:
        """A random edit of this kind, of this cell if one is given, or None if there is none."""
        taken = [i for i, t in enumerate(scene) if t is not None]
        free = [i for i, t in enumerate(scene) if t is None]
        cells = free if kind == "add" else taken
        if cell is not None:
            cells = [i for i in cells if i == cell]
        if not cells or (kind == "remove" and len(taken) < 2) or (kind == "move" and not free):
            return None
        cell = rng.choice(cells)
        if kind == "add":
            return self._add(rng, scene, cell, free)
        thing, name = _thing_in(scene, cell), self.name(rng, scene, cell)
        if kind == "remove":
            text = rng.choice(REMOVALS).format(name)
            return Edit(text, kind, (replace(scene, {cell: None}),), (), cell)
        if kind == "move":
            goal = rng.choice(free)
            text = rng.choice(["move the {} to the {}", "put the {} to the {}"])
            text = text.format(name, CELLS[goal])
            return Edit(text, kind, (replace(scene, {cell: None, goal: thing}),), (), cell)
        values = {
            "color": self.words.colors,
            "size": SIZES,
            "shape": self.words.shapes,
            "fill": self.words.fills,
        }[kind]
        value = rng.choice([v for v in values if v != getattr(thing, kind)])
        result = replace(scene, {cell: dataclasses.replace(thing, **{kind: value})})
        text = rng.choice(TEMPLATES[kind]).format(name=name, value=value, bigger=BIGGER.get(value))
        return Edit(text, kind, (result,), (f"{kind}={value}",), cell)

    def _add(self, rng: random.Random, scene: Scene, cell: int, free: Sequence[int]) -> Edit:
        thing = self.words.thing(rng)
        things, cells = [thing], [cell]
        what, where = self.describe(thing), self.place(rng, cell)
        if self.words.hard and rng.random() < 0.3:  # left open: several scenes are right
            if rng.random() < 0.5:
                cells, where = list(free), ""
            else:
                things = [dataclasses.replace(thing, size=size) for size in SIZES]
                what = what.removeprefix(f"{thing.size} ")
        text = rng.choice(ADDITIONS)
        results = [replace(scene, {c: t}) for c in cells for t in things]
        results.sort(key=lambda s: s != replace(scene, {cell: thing}))  # the drawn one first
        return Edit(text.format(what, where).strip(), "add", tuple(results), (), cell)

    def twin(self, rng: random.Random, scene: Scene, edit: Edit) -> Edit | None:
        """An edit of the same kind and cell with another value, or of another cell if none is left.

        Its result differs from that of `edit` in one thing: what a query must tell apart.
        """
        kind = edit.kind
        same_cell = kind in ("add", "color", "shape", "move")
        return self.edit(rng, scene, kind, edit.cell if same_cell else None)

    def compound(self, rng: random.Random, scene: Scene) -> Edit | None:
        """Two edits of different things; the second is worded for the scene after the first."""
        kinds = rng.sample(self.kinds(), 2)
        first = self.edit(rng, scene, kinds[0])
        if first is None or len(first.results) > 1:
            return None
        second = self.edit(rng, first.results[0], kinds[1])
        if second is None or scene in second.results:
            return None
        joint = rng.choice([" and ", ", then ", " and then "])
        return Edit(
            first.text + joint + second.text,
            "compound",
            second.results,
            first.attributes + second.attributes,
            second.cell,
        )


def _thing_in(scene: Scene, cell: int) -> Thing:
    thing = scene[cell]
    assert thing is not None, "only a cell that is taken can be named"
    return thing
