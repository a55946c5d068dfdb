"""The variants of `shapes`, by name."""

from __future__ import annotations

import dataclasses

import tensorflow_datasets as tfds


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
