"""`shapes`: generated scenes and edits, in the manner of CSS (TIRG, Vo et al., CVPR 2019).

A scene is a 3x3 grid with some cells taken by objects (shape, colour, size; `hard` adds a fill). A
query changes, adds or removes one thing ("make the large red circle blue"); `hard` also moves
objects, leaves things open ("add a red circle": any free cell, either size) and joins two edits.
Everything follows from a fixed seed: no download, the same records on every machine.

Every reference comes with several edits, most of them in pairs that differ in one value only, so
that galleries are full of near misses; those of validation and test hold further ones. `valid`
lists *all* gallery scenes that satisfy a query. Scenes of different splits are disjoint.

In `coarse` it does not matter where things lie and how large they are: a scene is valid if its
**content**, the colours and shapes of its objects, is what the text asks for. Galleries hold every
content in many arrangements, all valid for a query; its target is a random one of them. Contents
come in families, in which each has others that differ in one thing. A scene has no two objects
alike, and texts say nothing of places and sizes. Contents of different splits are disjoint.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image, ImageDraw

from dqe_jax.data.examples import SPLITS, GalleryItem, Query, features, gallery_split

SIZES = ("small", "large")
COLORS = {
    "gray": (115, 115, 115),
    "red": (205, 40, 45),
    "blue": (45, 75, 205),
    "green": (40, 140, 50),
    "brown": (130, 80, 40),
    "purple": (135, 45, 180),
    "cyan": (45, 190, 200),
    "yellow": (235, 205, 50),
}
HARD_COLORS = {
    **COLORS,
    "orange": (240, 135, 30),
    "pink": (245, 145, 190),
    "black": (25, 25, 25),
    "white": (255, 255, 255),
}
SHAPES = ("circle", "square", "triangle")
HARD_SHAPES = (*SHAPES, "diamond", "cross")
FILLS = ("plain", "striped")
CELLS = tuple(
    " ".join(words)
    for words in itertools.product(("top", "middle", "bottom"), ("left", "center", "right"))
)
BACKGROUND = (222, 222, 218)


@dataclasses.dataclass(frozen=True, order=True)
class Thing:
    """One object of a scene."""

    size: str
    color: str
    shape: str
    fill: str = "plain"


Scene = tuple["Thing | None", ...]  # one entry a cell of the grid, row by row


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


@dataclasses.dataclass(kw_only=True)
class ShapesConfig(tfds.core.BuilderConfig):
    """A variant of the data set.

    Attributes:
      hard: more shapes, colours, objects, fills, open and compound edits.
      image_size: pixels a side.
      references: references of train, validation and test.
      queries_per_reference: edits of each reference, of train, validation and test.
      near_misses: further gallery scenes for each reference of validation and test.
      coarse: places and sizes do not matter; what follows is of `coarse` alone.
      families: of contents, of train, validation and test.
      arrangements: gallery scenes of a content, the fewest and the most.
    """

    hard: bool = False
    image_size: int = 72
    references: tuple[int, int, int] = (5_000, 250, 500)
    queries_per_reference: tuple[int, int, int] = (8, 4, 4)
    near_misses: int = 6
    coarse: bool = False
    families: tuple[int, int, int] = (90, 8, 18)
    arrangements: tuple[int, int] = (10, 24)


CONFIGS = (
    ShapesConfig(name="plain", description="one change, addition or removal"),
    ShapesConfig(name="hard", description="compound and open edits", hard=True),
    ShapesConfig(name="smoke", description="a few scenes, for tests", references=(64, 16, 16)),
    ShapesConfig(
        name="hard_smoke", description="as smoke, hard", hard=True, references=(64, 16, 16)
    ),
    ShapesConfig(
        name="coarse",
        description="places and sizes do not matter",
        coarse=True,
        references=(8_000, 250, 500),
        queries_per_reference=(5, 4, 4),
    ),
    ShapesConfig(
        name="coarse_smoke",
        description="as smoke, coarse",
        coarse=True,
        references=(64, 16, 16),
        queries_per_reference=(5, 4, 4),
        families=(4, 1, 1),
    ),
)


class World:
    """The vocabulary of a variant: draws scenes, writes edits and renders."""

    def __init__(self, config: ShapesConfig):
        self.config = config
        self.colors = HARD_COLORS if config.hard else COLORS
        self.shapes = HARD_SHAPES if config.hard else SHAPES
        self.fills = FILLS if config.hard else FILLS[:1]
        self.num_objects = (3, 7) if config.hard else (2, 5)
        self._sprites: dict[tuple[Thing, int], tuple[np.ndarray, np.ndarray]] = {}

    def thing(self, rng: random.Random) -> Thing:
        """A random object."""
        return Thing(
            rng.choice(SIZES),
            rng.choice(list(self.colors)),
            rng.choice(self.shapes),
            rng.choice(self.fills),
        )

    def scene(self, rng: random.Random) -> Scene:
        """A random scene."""
        cells: list[Thing | None] = [None] * 9
        for cell in rng.sample(range(9), rng.randint(*self.num_objects)):
            cells[cell] = self.thing(rng)
        return tuple(cells)

    # ---- text ---------------------------------------------------------------------------------

    def name(self, rng: random.Random, scene: Scene, cell: int) -> str:
        """Words that pick out the object in `cell`: some of its attributes, or its place too."""
        thing = scene[cell]
        others = [t for i, t in enumerate(scene) if t is not None and i != cell]
        parts = ("size", "fill", "color") if self.config.hard else ("size", "color")
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
        fill = [thing.fill] if self.config.hard else []
        return " ".join([thing.size, *fill, thing.color, thing.shape])

    def place(self, rng: random.Random, cell: int) -> str:
        """The name of a cell with its preposition."""
        name = CELLS[cell]
        if name == "middle center":
            name = rng.choice(["center", "middle"])
        return rng.choice(["at the", "in the"]) + " " + name

    # ---- edits --------------------------------------------------------------------------------

    def kinds(self) -> tuple[str, ...]:
        """The kinds of a single edit."""
        plain = ("add", "remove", "color", "size", "shape")
        return (*plain, "fill", "move") if self.config.hard else plain

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
        thing, name = scene[cell], self.name(rng, scene, cell)
        if kind == "remove":
            text = rng.choice(REMOVALS).format(name)
            return Edit(text, kind, (replace(scene, {cell: None}),), (), cell)
        if kind == "move":
            goal = rng.choice(free)
            text = rng.choice(["move the {} to the {}", "put the {} to the {}"])
            text = text.format(name, CELLS[goal])
            return Edit(text, kind, (replace(scene, {cell: None, goal: thing}),), (), cell)
        values = {
            "color": tuple(self.colors),
            "size": SIZES,
            "shape": self.shapes,
            "fill": self.fills,
        }[kind]
        value = rng.choice([v for v in values if v != getattr(thing, kind)])
        result = replace(scene, {cell: dataclasses.replace(thing, **{kind: value})})
        text = rng.choice(TEMPLATES[kind]).format(name=name, value=value, bigger=BIGGER.get(value))
        return Edit(text, kind, (result,), (f"{kind}={value}",), cell)

    def _add(self, rng: random.Random, scene: Scene, cell: int, free: Sequence[int]) -> Edit:
        thing = self.thing(rng)
        things, cells = [thing], [cell]
        what, where = self.describe(thing), self.place(rng, cell)
        if self.config.hard and rng.random() < 0.3:  # left open: several scenes are right
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

    # ---- pixels -------------------------------------------------------------------------------

    def render(self, scene: Scene, rng: random.Random) -> np.ndarray:
        """The scene as uint8 `[H, W, 3]`; each object is off its cell's centre by up to 5 %."""
        size = self.config.image_size
        image = np.empty((size, size, 3), np.uint8)
        image[:] = BACKGROUND
        side = size // 3
        for cell, thing in enumerate(scene):
            if thing is None:
                continue
            mask, color = self._sprite(thing, side)
            jitter = max(1, round(side / 20))
            y = (cell // 3) * size // 3 + rng.randint(-jitter, jitter)
            x = (cell % 3) * size // 3 + rng.randint(-jitter, jitter)
            top, left = max(0, -y), max(0, -x)
            bottom, right = min(side, size - y), min(side, size - x)
            patch = image[y + top : y + bottom, x + left : x + right]
            alpha = mask[top:bottom, left:right]
            patch[:] = (alpha * color[top:bottom, left:right] + (1 - alpha) * patch).round()
        return image

    def _sprite(self, thing: Thing, side: int) -> tuple[np.ndarray, np.ndarray]:
        """Anti-aliased coverage `[side, side, 1]` and colour `[side, side, 3]` of an object."""
        key = (thing, side)
        if key not in self._sprites:
            scale = 8
            big = side * scale
            canvas = Image.new("L", (big, big), 0)
            draw = ImageDraw.Draw(canvas)
            radius = big * (0.42 if thing.size == "large" else 0.24)
            c = big / 2
            corners = {
                "square": [(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)],
                "triangle": [(0, -1), (0.98, 0.8), (-0.98, 0.8)],
                "diamond": [(0, -1.05), (0.75, 0), (0, 1.05), (-0.75, 0)],
            }
            if thing.shape == "circle":
                draw.ellipse((c - radius, c - radius, c + radius, c + radius), fill=255)
            elif thing.shape == "cross":
                arm = radius * 0.36
                draw.rectangle((c - arm, c - radius, c + arm, c + radius), fill=255)
                draw.rectangle((c - radius, c - arm, c + radius, c + arm), fill=255)
            else:
                points = [(c + radius * x, c + radius * y) for x, y in corners[thing.shape]]
                draw.polygon(points, fill=255)
            alpha = np.asarray(canvas.resize((side, side), Image.Resampling.BOX)) / 255.0
            color = np.empty((side, side, 3))
            color[:] = self.colors[thing.color]
            if thing.fill == "striped":
                dark = (np.arange(side) // 2) % 2 == 0
                color[dark] = color[dark] * 0.35 + 40
            self._sprites[key] = (alpha[..., None], color)
        return self._sprites[key]


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


def replace(scene: Scene, changes: dict[int, Thing | None]) -> Scene:
    """The scene with some cells replaced."""
    return tuple(changes.get(i, thing) for i, thing in enumerate(scene))


def describe_scene(scene: Scene) -> tuple[str, ...]:
    """`cell=attributes` for every object, the gallery record's attributes."""
    return tuple(
        f"{CELLS[i]}={t.size} {t.fill} {t.color} {t.shape}" for i, t in enumerate(scene) if t
    )


@dataclasses.dataclass
class Split:
    """The scenes of a split's gallery and its queries, as (reference row, target row, edit)."""

    scenes: list[Scene]
    queries: list[tuple[int, int, Edit]]


def make_split(world: World, split: str, used: set[Scene]) -> Split:
    """Draws a split.

    Args:
      world: the variant.
      split: `train`, `validation` or `test`.
      used: scenes of the splits before it, which this one avoids and to which it adds its own.
    """
    config = world.config
    if config.coarse:
        return _make_coarse_split(world, split, used)
    rng = random.Random(f"shapes:{config.name}:{split}")
    index = SPLITS.index(split)
    number, per_reference = config.references[index], config.queries_per_reference[index]
    scenes: list[Scene] = []
    queries: list[tuple[int, int, Edit]] = []
    rows: dict[Scene, int] = {}

    def row(scene: Scene) -> int:
        if scene not in rows:
            rows[scene] = len(scenes)
            scenes.append(scene)
        return rows[scene]

    kinds = (*world.kinds(), "compound", "compound") if config.hard else world.kinds()
    while number:
        reference = world.scene(rng)
        if reference in used or reference in rows:
            continue
        edits: list[Edit] = []
        while len(edits) < per_reference:
            kind = rng.choice(kinds)
            if len(edits) % 2 and edits[-1].kind != "compound" and rng.random() < 0.9:
                edit = world.twin(rng, reference, edits[-1])
            elif kind == "compound":
                edit = world.compound(rng, reference)
            else:
                edit = world.edit(rng, reference, kind)
            if (
                edit is None
                or reference in edit.results
                or any(result in used for result in edit.results)
                or any(edit.results[0] == other.results[0] for other in edits)
            ):
                continue
            edits.append(edit)
        reference_row = row(reference)
        for edit in edits:
            queries.append((reference_row, row(edit.results[0]), edit))
        if split != "train":
            _near_misses(world, rng, reference, edits, used, row)
        number -= 1
    used.update(rows)
    return Split(scenes, queries)


def _near_misses(world, rng, reference, edits, used, row) -> None:
    """Adds scenes one edit away from a target or from the reference, and open edits' other ends."""
    for edit in edits:
        for result in edit.results[1:3]:
            row(result)
    added = 0
    while added < world.config.near_misses:
        start = rng.choice([reference, *(edit.results[0] for edit in edits)])
        edit = world.edit(rng, start, rng.choice(world.kinds()))
        if edit is not None and edit.results[0] not in used:
            row(edit.results[0])
            added += 1


# ---- coarse relevance ---------------------------------------------------------------------------

Look = tuple[str, str]  # colour and shape of an object
Content = tuple[Look, ...]  # of the objects of a scene, ascending
Change = tuple[Look | None, Look | None, Content]  # what becomes what, with which content


def content_of(scene: Scene) -> Content:
    """What a scene shows, wherever and however large."""
    return tuple(sorted((thing.color, thing.shape) for thing in scene if thing is not None))


def _draw_slots(world: World, rng: random.Random) -> list[list[Look | None]]:
    """What each object of a family can be: one of these, None for absent.

    One object has three colours (or shapes), one has two shapes (or colours) or is absent, one may
    be absent, and two are always there. No two are alike, whatever is chosen.
    """
    looks = list(itertools.product(world.colors, world.shapes))
    colored = rng.random() < 0.5

    def variants(number: int, by_color: bool) -> list[Look | None]:
        color, shape = rng.choice(looks)
        if by_color:
            return [(color, shape) for color in rng.sample(list(world.colors), number)]
        return [(color, shape) for shape in rng.sample(world.shapes, number)]

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
            (old, new, content([*chosen[:i], new, *chosen[i + 1 :]]))
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


def _write_change(
    rng: random.Random, content: Content, old: Look | None, new: Look | None
) -> tuple[str, str, tuple[str, ...]]:
    """Text, kind and attributes of a change of this content."""
    if old is None:
        return rng.choice(ADDITIONS).format(" ".join(new), "").strip(), "add", ()
    color, shape = old
    alone = sum(shape == other for _, other in content) == 1
    name = shape if alone and rng.random() < 0.5 else f"{color} {shape}"
    if new is None:
        return rng.choice(REMOVALS).format(name), "remove", ()
    kind, value = ("color", new[0]) if new[1] == shape else ("shape", new[1])
    text = rng.choice(TEMPLATES[kind]).format(name=name, value=value)
    return text, kind, (f"{kind}={value}",)


def _draw_families(
    world: World, rng: random.Random, number: int, before: set[Content]
) -> dict[Content, list[Change]]:
    """The contents of so many families, none of them among those before, with their changes."""
    changes: dict[Content, list[Change]] = {}
    while number:
        family = _make_family(_draw_slots(world, rng))
        if before.isdisjoint(family) and changes.keys().isdisjoint(family):
            changes.update(family)
            number -= 1
    return changes


def _make_coarse_split(world: World, split: str, used: set[Scene]) -> Split:
    """Draws a split of `coarse`, with none of the contents of `used`; see `make_split`."""
    config = world.config
    rng = random.Random(f"shapes:{config.name}:{split}")
    index = SPLITS.index(split)
    number, per_reference = config.references[index], config.queries_per_reference[index]
    before = {content_of(scene) for scene in used}
    changes = _draw_families(world, rng, config.families[index], before)
    scenes = [
        scene
        for content in changes
        for scene in _arrange(rng, content, rng.randint(*config.arrangements))
    ]
    rng.shuffle(scenes)
    rows: dict[Content, list[int]] = defaultdict(list)
    for row, scene in enumerate(scenes):
        rows[content_of(scene)].append(row)

    queries: list[tuple[int, int, Edit]] = []
    for reference in rng.sample(range(len(scenes)), number):
        content = content_of(scenes[reference])
        for place in sorted(rng.sample(range(len(changes[content])), per_reference)):
            old, new, result = changes[content][place]
            target = rng.choice(rows[result])
            text, kind, attributes = _write_change(rng, content, old, new)
            edit = Edit(text, kind, (scenes[target],), attributes)
            queries.append((reference, target, edit))
    used.update(scenes)
    return Split(scenes, queries)


class Shapes(tfds.core.GeneratorBasedBuilder):
    """The TFDS builder; see the module's docstring."""

    VERSION = tfds.core.Version("2.0.0")
    BUILDER_CONFIGS = CONFIGS

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=features(self.builder_config.image_size),
            disable_shuffling=True,  # a record's row is its position in the split
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[Any]]:
        world = World(self.builder_config)
        used: set[Scene] = set()
        # Test first: its scenes do not change with the size of the training split.
        drawn = {name: make_split(world, name, used) for name in ("test", "validation", "train")}
        generators = {}
        for name in SPLITS:
            generators[name] = self._generate_examples(world, name, drawn[name], gallery=False)
            gallery = self._generate_examples(world, name, drawn[name], gallery=True)
            generators[gallery_split(name)] = gallery
        return generators

    def _generate_examples(self, world: World, name: str, split: Split, gallery: bool):
        if gallery:
            for row, scene in enumerate(split.scenes):
                rng = random.Random(f"render:{name}:{row}")
                image = world.render(scene, rng)
                item_id = f"{name}-{row:06d}"
                yield row, GalleryItem(item_id, image, row, describe_scene(scene)).record()
            return
        relevant = content_of if self.builder_config.coarse else lambda scene: scene
        rows = defaultdict(list)
        for row, scene in enumerate(split.scenes):
            rows[relevant(scene)].append(row)
        for index, (reference, target, edit) in enumerate(split.queries):
            valid = sorted({r for result in edit.results for r in rows.get(relevant(result), ())})
            yield (
                index,
                Query(
                    id=f"{name}-{index:06d}",
                    texts=[edit.text],
                    reference=reference,
                    target=target,
                    targets=[target],
                    valid=valid,
                    kinds=(edit.kind,),
                    attributes=edit.attributes,
                ).record(),
            )


def make_builder(*, variant: str, prepared_dir: str) -> Shapes:
    """The builder of a variant, whose records lie (or will lie) below `prepared_dir`."""
    return Shapes(config=variant, data_dir=prepared_dir, file_format="array_record")
