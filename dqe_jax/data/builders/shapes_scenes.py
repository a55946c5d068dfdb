"""What scenes of `shapes` are made of, how they are drawn, and how they look."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

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
HARD_COLORS = {  # of the hard variants, as HARD_SHAPES
    **COLORS,
    "orange": (240, 135, 30),
    "pink": (245, 145, 190),
    "black": (25, 25, 25),
    "white": (255, 255, 255),
}
SHAPES = ("circle", "square", "triangle")
HARD_SHAPES = (*SHAPES, "diamond", "cross")
# Corners of the shapes that have straight sides only, in units of their radius.
CORNERS = {
    "square": [(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)],
    "triangle": [(0, -1), (0.98, 0.8), (-0.98, 0.8)],
    "diamond": [(0, -1.05), (0.75, 0), (0, 1.05), (-0.75, 0)],
}
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


Scene = tuple[Thing | None, ...]  # one entry a cell of the grid, row by row
Look = tuple[str, str]  # colour and shape of an object
Content = tuple[Look, ...]  # of the objects of a scene, ascending


def replace(scene: Scene, changes: Mapping[int, Thing | None]) -> Scene:
    """The scene with some cells replaced."""
    return tuple(changes.get(i, thing) for i, thing in enumerate(scene))


def describe_scene(scene: Scene) -> tuple[str, ...]:
    """`cell=attributes` for every object, the gallery record's attributes."""
    return tuple(
        f"{CELLS[i]}={t.size} {t.fill} {t.color} {t.shape}" for i, t in enumerate(scene) if t
    )


def content_of(scene: Scene) -> Content:
    """What a scene shows, wherever and however large."""
    return tuple(sorted((thing.color, thing.shape) for thing in scene if thing is not None))


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """What the things of a variant can be.

    Attributes:
      hard: whether it is that of the hard variants.
      colors: names.
      shapes: names.
      fills: names.
      num_objects: of a scene, the fewest and the most.
    """

    hard: bool
    colors: tuple[str, ...]
    shapes: tuple[str, ...]
    fills: tuple[str, ...]
    num_objects: tuple[int, int]

    def thing(self, rng: random.Random) -> Thing:
        """A random object."""
        return Thing(
            rng.choice(SIZES),
            rng.choice(self.colors),
            rng.choice(self.shapes),
            rng.choice(self.fills),
        )

    def scene(self, rng: random.Random) -> Scene:
        """A random scene."""
        cells: list[Thing | None] = [None] * 9
        for cell in rng.sample(range(9), rng.randint(*self.num_objects)):
            cells[cell] = self.thing(rng)
        return tuple(cells)


PLAIN = Vocabulary(False, tuple(COLORS), SHAPES, FILLS[:1], num_objects=(2, 5))
HARD = Vocabulary(True, tuple(HARD_COLORS), HARD_SHAPES, FILLS, num_objects=(3, 7))


class Sprite(NamedTuple):
    """An object as it is painted: coverage float `[side, side, 1]`, colour `[side, side, 3]`."""

    alpha: np.ndarray
    color: np.ndarray


class Renderer:
    """Renders scenes, and keeps the sprites of their objects."""

    def __init__(self, image_size: int):
        """`image_size` is in pixels a side; nothing is drawn yet."""
        self.image_size = image_size
        self._sprites: dict[Thing, Sprite] = {}

    def render(self, scene: Scene, rng: random.Random) -> np.ndarray:
        """The scene as uint8 `[H, W, 3]`; each object is off its cell's centre by up to 5%."""
        size = self.image_size
        image = np.empty((size, size, 3), np.uint8)
        image[:] = BACKGROUND
        side = size // 3
        for cell, thing in enumerate(scene):
            if thing is None:
                continue
            if thing not in self._sprites:
                self._sprites[thing] = sprite_of(thing, side)
            mask, color = self._sprites[thing]
            jitter = max(1, round(side / 20))
            y = (cell // 3) * size // 3 + rng.randint(-jitter, jitter)
            x = (cell % 3) * size // 3 + rng.randint(-jitter, jitter)
            top, left = max(0, -y), max(0, -x)
            bottom, right = min(side, size - y), min(side, size - x)
            patch = image[y + top : y + bottom, x + left : x + right]
            alpha = mask[top:bottom, left:right]
            patch[:] = (alpha * color[top:bottom, left:right] + (1 - alpha) * patch).round()
        return image


def sprite_of(thing: Thing, side: int) -> Sprite:
    """An object in a cell of `side` pixels, with smooth edges."""
    scale = 8
    big = side * scale
    canvas = Image.new("L", (big, big), 0)
    draw = ImageDraw.Draw(canvas)
    radius = big * (0.42 if thing.size == "large" else 0.24)
    c = big / 2
    if thing.shape == "circle":
        draw.ellipse((c - radius, c - radius, c + radius, c + radius), fill=255)
    elif thing.shape == "cross":
        arm = radius * 0.36
        draw.rectangle((c - arm, c - radius, c + arm, c + radius), fill=255)
        draw.rectangle((c - radius, c - arm, c + radius, c + arm), fill=255)
    else:
        draw.polygon([(c + radius * x, c + radius * y) for x, y in CORNERS[thing.shape]], fill=255)
    alpha = np.asarray(canvas.resize((side, side), Image.Resampling.BOX)) / 255.0
    color = np.empty((side, side, 3))
    color[:] = HARD_COLORS[thing.color]
    if thing.fill == "striped":
        dark = (np.arange(side) // 2) % 2 == 0
        color[dark] = color[dark] * 0.35 + 40
    return Sprite(alpha[..., None], color)
