"""Splits of `shapes` in which all that a text says counts: places and sizes too."""

from __future__ import annotations

import random
from collections.abc import Container, Sequence

from dqe_jax.data.builders.shapes_edits import DrawnQuery, DrawnSplit, Edit, Editor
from dqe_jax.data.builders.shapes_scenes import HARD, PLAIN, Scene
from dqe_jax.data.builders.shapes_variants import ShapesConfig
from dqe_jax.data.examples import SPLITS


def make_exact_split(config: ShapesConfig, split: str, used: set[Scene]) -> DrawnSplit:
    """Draws a split: see `shapes.make_split`."""
    rng = random.Random(f"shapes:{config.name}:{split}")
    index = SPLITS.index(split)
    number, per_reference = config.references[index], config.queries_per_reference[index]
    words = HARD if config.hard else PLAIN
    editor = Editor(words)
    queries: list[DrawnQuery] = []
    rows: dict[Scene, int] = {}  # of the gallery's scenes, in order
    while number:
        reference = words.scene(rng)
        if reference in used or reference in rows:
            continue
        edits = _draw_edits(editor, rng, reference, used, per_reference)
        reference_row = rows.setdefault(reference, len(rows))
        for edit in edits:
            target_row = rows.setdefault(edit.results[0], len(rows))
            queries.append(DrawnQuery(reference_row, target_row, edit))
        if split != "train":
            for scene in _near_misses(editor, rng, reference, edits, used, config.near_misses):
                rows.setdefault(scene, len(rows))
        number -= 1
    used.update(rows)
    return DrawnSplit(list(rows), queries)


def _draw_edits(
    editor: Editor, rng: random.Random, reference: Scene, used: Container[Scene], number: int
) -> list[Edit]:
    """Edits of a reference with different targets; most of them in pairs, see `Editor.twin`."""
    kinds = editor.kinds()
    if editor.words.hard:
        kinds = (*kinds, "compound", "compound")
    edits: list[Edit] = []
    while len(edits) < number:
        kind = rng.choice(kinds)
        if len(edits) % 2 and edits[-1].kind != "compound" and rng.random() < 0.9:
            edit = editor.twin(rng, reference, edits[-1])
        elif kind == "compound":
            edit = editor.compound(rng, reference)
        else:
            edit = editor.edit(rng, reference, kind)
        if (
            edit is not None
            and reference not in edit.results
            and not any(result in used for result in edit.results)
            and not any(edit.results[0] == other.results[0] for other in edits)
        ):
            edits.append(edit)
    return edits


def _near_misses(
    editor: Editor,
    rng: random.Random,
    reference: Scene,
    edits: Sequence[Edit],
    used: Container[Scene],
    number: int,
) -> list[Scene]:
    """Open edits' other ends, and `number` scenes one edit away from a target or the reference."""
    scenes = [result for edit in edits for result in edit.results[1:3]]
    total = len(scenes) + number
    while len(scenes) < total:
        start = rng.choice([reference, *(edit.results[0] for edit in edits)])
        edit = editor.edit(rng, start, rng.choice(editor.kinds()))
        if edit is not None and edit.results[0] not in used:
            scenes.append(edit.results[0])
    return scenes
