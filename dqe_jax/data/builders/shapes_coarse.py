"""Splits of `shapes` in which places and sizes do not matter: only contents are asked for."""

from __future__ import annotations

import itertools
import random
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from dqe_jax.data.builders.shapes_edits import (
    ADDITIONS,
    REMOVALS,
    TEMPLATES,
    DrawnQuery,
    DrawnSplit,
    Edit,
)
from dqe_jax.data.builders.shapes_scenes import (
    PLAIN,
    SIZES,
    Content,
    Look,
    Scene,
    Thing,
    content_of,
)
from dqe_jax.data.builders.shapes_variants import ShapesConfig
from dqe_jax.data.examples import SPLITS


class Change(NamedTuple):
    """What becomes what, None for absent, and the content that comes of it."""

    old: Look | None
    new: Look | None
    result: Content


def make_coarse_split(config: ShapesConfig, split: str, used: set[Scene]) -> DrawnSplit:
    """Draws a split, with none of the contents of `used`: see `shapes.make_split`."""
    rng = random.Random(f"shapes:{config.name}:{split}")
    index = SPLITS.index(split)
    number, per_reference = config.references[index], config.queries_per_reference[index]
    before = {content_of(scene) for scene in used}
    changes = _draw_families(rng, config.families[index], before)
    scenes = [
        scene
        for content in changes
        for scene in _arrange(rng, content, rng.randint(*config.arrangements))
    ]
    rng.shuffle(scenes)
    rows: dict[Content, list[int]] = defaultdict(list)
    for row, scene in enumerate(scenes):
        rows[content_of(scene)].append(row)

    queries: list[DrawnQuery] = []
    for reference in rng.sample(range(len(scenes)), number):
        content = content_of(scenes[reference])
        for place in sorted(rng.sample(range(len(changes[content])), per_reference)):
            change = changes[content][place]
            target = rng.choice(rows[change.result])
            edit = _write_change(rng, content, change, scenes[target])
            queries.append(DrawnQuery(reference, target, edit))
    used.update(scenes)
    return DrawnSplit(scenes, queries)


def _draw_families(
    rng: random.Random, number: int, before: set[Content]
) -> dict[Content, list[Change]]:
    """The contents of so many families, none of them among those before, with their changes."""
    changes: dict[Content, list[Change]] = {}
    while number:
        family = _make_family(_draw_slots(rng))
        if before.isdisjoint(family) and changes.keys().isdisjoint(family):
            changes.update(family)
            number -= 1
    return changes


def _draw_slots(rng: random.Random) -> list[list[Look | None]]:
    """What each object of a family can be: one of these, None for absent.

    One object has three colours (or shapes), one has two shapes (or colours) or is absent, one may
    be absent, and two are always there. No two are alike, whatever is chosen.
    """
    looks = list(itertools.product(PLAIN.colors, PLAIN.shapes))
    colored = rng.random() < 0.5

    def variants(number: int, by_color: bool) -> list[Look | None]:
        color, shape = rng.choice(looks)
        if by_color:
            return [(color, shape) for color in rng.sample(PLAIN.colors, number)]
        return [(color, shape) for shape in rng.sample(PLAIN.shapes, number)]

    while True:
        changing, replaced = variants(3, colored), variants(2, not colored)
        others = rng.sample(looks, 3)
        if len({*changing, *replaced, *others}) == 8:
            return [changing, [*replaced, None], [others[0], None], [others[1]], [others[2]]]


def _make_family(slots: list[list[Look | None]]) -> dict[Content, list[Change]]:
    """The contents of a family, with all changes of each; those of one object are neighbours."""

    def content(chosen: Sequence[Look | None]) -> Content:
        return tuple(sorted(look for look in chosen if look is not None))

    return {
        content(chosen): [
            Change(old, new, content([*chosen[:i], new, *chosen[i + 1 :]]))
            for i, old in enumerate(chosen)
            for new in slots[i]
            if new != old
        ]
        for chosen in itertools.product(*slots)
    }


def _arrange(rng: random.Random, content: Content, number: int) -> list[Scene]:
    """Different scenes of this content."""
    scenes: dict[Scene, None] = {}
    while len(scenes) < number:
        cells: list[Thing | None] = [None] * 9
        for cell, (color, shape) in zip(rng.sample(range(9), len(content)), content):
            cells[cell] = Thing(rng.choice(SIZES), color, shape)
        scenes[tuple(cells)] = None
    return list(scenes)


def _write_change(rng: random.Random, content: Content, change: Change, target: Scene) -> Edit:
    """The edit that asks for a change of this content."""
    old, new = change.old, change.new
    if old is None:
        assert new is not None, "a change adds, removes or replaces"
        text = rng.choice(ADDITIONS).format(" ".join(new), "").strip()
        return Edit(text, "add", (target,), ())
    color, shape = old
    alone = sum(shape == other for _, other in content) == 1
    name = shape if alone and rng.random() < 0.5 else f"{color} {shape}"
    if new is None:
        return Edit(rng.choice(REMOVALS).format(name), "remove", (target,), ())
    kind, value = ("color", new[0]) if new[1] == shape else ("shape", new[1])
    text = rng.choice(TEMPLATES[kind]).format(name=name, value=value)
    return Edit(text, kind, (target,), (f"{kind}={value}",))
