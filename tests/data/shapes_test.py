"""`shapes`: records, and that a query's text says exactly what its valid scenes are.

`apply` reads a text with a grammar of its own, written from the words alone: it picks out the
object that the text names (there must be exactly one), changes the scene, and gives every scene
that the text allows. Nothing of the generator is used for it but the words. Where relevance is
coarse, `content` of these scenes, read from the records, is compared.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections import Counter
from typing import NamedTuple

import numpy as np
import pytest

from dqe_jax.data import examples
from dqe_jax.data.builders import shapes, shapes_scenes
from dqe_jax.data.builders.shapes_variants import CONFIGS, ShapesConfig

EXACT = ("smoke", "hard_smoke")  # the text allows few scenes; in the other, all of a content
VARIANTS = (*EXACT, "coarse_smoke")
REFERENCES = {"train": 64, "validation": 16, "test": 16}
COARSE_KINDS = {"add", "remove", "color", "shape"}
PLAIN_KINDS = {*COARSE_KINDS, "size"}
KINDS = {
    "smoke": PLAIN_KINDS,
    "hard_smoke": PLAIN_KINDS | {"fill", "move", "compound"},
    "coarse_smoke": COARSE_KINDS,
}


class Object(NamedTuple):
    size: str
    fill: str
    color: str
    shape: str


# A scene is a frozenset of (cell, Object).


@dataclasses.dataclass(frozen=True)
class Prepared:
    variant: str
    records: dict[str, list[dict]]

    def scenes(self, split: str) -> list[frozenset]:
        gallery = self.records[examples.gallery_split(split)]
        return [scene_of(item["attributes"]) for item in gallery]


def decoded(value):
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, list):
        return [decoded(v) for v in value]
    return int(value) if isinstance(value, np.integer) else value


def prepare(variant: str, directory) -> Prepared:
    builder = shapes.make_builder(variant=variant, prepared_dir=str(directory))
    builder.download_and_prepare()
    records = {}
    for split in builder.info.splits:
        source = builder.as_data_source(split=split)
        records[split] = [{k: decoded(v) for k, v in source[i].items()} for i in range(len(source))]
    return Prepared(variant, records)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> dict[str, Prepared]:
    directory = tmp_path_factory.mktemp("shapes")
    return {variant: prepare(variant, directory) for variant in VARIANTS}


@pytest.fixture(params=VARIANTS)
def data(request, prepared) -> Prepared:
    return prepared[request.param]


@pytest.fixture(params=EXACT)
def exact(request, prepared) -> Prepared:
    return prepared[request.param]


@pytest.fixture
def coarse(prepared) -> Prepared:
    return prepared["coarse_smoke"]


def config_of(name: str) -> ShapesConfig:
    return next(config for config in CONFIGS if config.name == name)


# ------------------------------------------------------------------------------ reading the texts

SIZES = ("small", "large")
FILLS = ("plain", "striped")
COLORS = (
    *("gray", "red", "blue", "green", "brown", "purple", "cyan", "yellow"),
    *("orange", "pink", "black", "white"),
)
SHAPES = ("circle", "square", "triangle", "diamond", "cross")
FIELD_OF = {
    word: field
    for field, words in (("size", SIZES), ("fill", FILLS), ("color", COLORS), ("shape", SHAPES))
    for word in words
}
CELL_WORDS = {
    f"{y} {x}": (row, column)
    for row, y in enumerate(("top", "middle", "bottom"))
    for column, x in enumerate(("left", "center", "right"))
} | {"center": (1, 1), "middle": (1, 1)}
PLACE = re.compile(rf" (?:at|in) the ({'|'.join(CELL_WORDS)})$")
REMOVE = re.compile(r"(?:(?:remove|delete|take away|get rid of|without) the (.+)|the (.+) is gone)")
MOVE = re.compile(rf"(?:move|put) the (.+) to the ({'|'.join(CELL_WORDS)})")
ADD = re.compile(r"(?:add a|a|put a|there is a new|with a) (.+)")
CHANGES = [
    (re.compile(r"(?:make|paint|turn) the (.+) ([a-z]+)"), ("color", "size", "fill")),
    (re.compile(r"change the color of the (.+) to ([a-z]+)"), ("color",)),
    (re.compile(r"change the size of the (.+) to ([a-z]+)"), ("size",)),
    (re.compile(r"the (.+) (?:is now|becomes|gets) ([a-z]+)"), ("color", "size", "fill")),
    (
        re.compile(r"(?:make|change|turn|replace) the (.+?) (?:to |into |with )?a ([a-z]+)"),
        ("shape",),
    ),
    (re.compile(r"the (.+) becomes a ([a-z]+)"), ("shape",)),
    (re.compile(r"change the (.+) to be ([a-z]+)"), ("fill",)),
]


def scene_of(attributes) -> frozenset:
    pairs = (attribute.split("=") for attribute in attributes)
    return frozenset((CELL_WORDS[cell], Object(*words.split())) for cell, words in pairs)


def content(scene: frozenset) -> tuple:
    """Colours and shapes of a scene's objects, each as often as it is there."""
    return tuple(sorted((thing.color, thing.shape) for _, thing in scene))


def understand(description: str):
    """The fields that a description states, and its place or None."""
    place = PLACE.search(description)
    words = (description[: place.start()] if place else description).split()
    fields = {FIELD_OF[word]: word for word in words}
    assert len(fields) == len(words), f"{description!r} states a field twice"
    assert list(fields) == [f for f in Object._fields if f in fields], description  # word order
    assert "shape" in fields, description
    return fields, CELL_WORDS[place[1]] if place else None


def find(scene: frozenset, description: str):
    """The one (cell, object) that a description picks out."""
    fields, place = understand(description)
    found = [
        (cell, thing)
        for cell, thing in scene
        if place in (None, cell) and all(getattr(thing, f) == v for f, v in fields.items())
    ]
    assert len(found) == 1, f"{description!r} picks out {found} in {sorted(scene)}"
    return found[0]


def apply_one(text: str, scene: frozenset, *, hard: bool) -> tuple[str, set[frozenset]]:
    """The kind of a single edit, and all scenes that it allows."""
    cells = {cell for cell, _ in scene}
    if match := REMOVE.fullmatch(text):
        return "remove", {scene - {find(scene, match[1] or match[2])}}
    if match := MOVE.fullmatch(text):
        cell, thing = find(scene, match[1])
        goal = CELL_WORDS[match[2]]
        assert goal not in cells, text
        return "move", {scene - {(cell, thing)} | {(goal, thing)}}
    if match := ADD.fullmatch(text):
        fields, place = understand(match[1])
        free = set(CELL_WORDS.values()) - cells if place is None else {place}
        assert free, text
        assert not free & cells, text
        sizes = [fields["size"]] if "size" in fields else SIZES
        fill = fields["fill"] if hard else fields.get("fill", "plain")
        things = [Object(size, fill, fields["color"], fields["shape"]) for size in sizes]
        return "add", {scene | {(cell, thing)} for cell in free for thing in things}
    for pattern, kinds in CHANGES:
        match = pattern.fullmatch(text)
        value = match and {"bigger": "large", "smaller": "small"}.get(match[2], match[2])
        if not match or FIELD_OF.get(value) not in kinds:
            continue
        cell, thing = find(scene, match[1])
        kind = FIELD_OF[value]
        assert getattr(thing, kind) != value, f"{text!r} changes nothing"
        return kind, {scene - {(cell, thing)} | {(cell, thing._replace(**{kind: value}))}}
    raise AssertionError(f"no rule reads {text!r}")


def apply(text: str, scene: frozenset, *, hard: bool) -> tuple[str, set[frozenset]]:
    """The kind of a text, and all scenes that it allows for a reference."""
    parts = re.split(r", then | and then | and ", text)
    kinds, scenes = [], {scene}
    for part in parts:
        assert len(scenes) == 1, f"{text!r} goes on after an open edit"
        kind, scenes = apply_one(part, next(iter(scenes)), hard=hard)
        kinds.append(kind)
    assert len(parts) <= 2
    assert len(set(kinds)) == len(kinds), text
    return (kinds[0] if len(kinds) == 1 else "compound"), scenes


def one_edit_away(a: frozenset, b: frozenset) -> bool:
    """Whether two scenes differ by one object more, one moved, or one value of one object."""
    only_a, only_b = sorted(a - b), sorted(b - a)
    if len(only_a) + len(only_b) == 1:
        return True
    if len(only_a) != 1 or len(only_b) != 1:
        return False
    ((cell_a, thing_a),), ((cell_b, thing_b),) = only_a, only_b
    if cell_a != cell_b:
        return thing_a == thing_b
    return sum(x != y for x, y in zip(thing_a, thing_b)) == 1


# --------------------------------------------------------------------------------------- records


def test_splits_and_ids(data):
    assert set(data.records) == {
        name for split in examples.SPLITS for name in (split, examples.gallery_split(split))
    }
    for split, count in REFERENCES.items():
        queries, gallery = data.records[split], data.records[examples.gallery_split(split)]
        train = 5 if data.variant == "coarse_smoke" else 8
        assert Counter(Counter(q["reference"] for q in queries).values()) == {
            {"train": train, "validation": 4, "test": 4}[split]: count
        }
        for records in (queries, gallery):
            assert [r["id"] for r in records] == [f"{split}-{i:06d}" for i in range(len(records))]


def test_rows_and_fields_are_those_of_the_schema(data):
    for split in examples.SPLITS:
        queries, gallery = data.records[split], data.records[examples.gallery_split(split)]
        for row, item in enumerate(gallery):
            assert item["photo"] == row
            assert (item["reference"], item["target"], item["kinds"]) == (-1, -1, [])
            assert item["texts"] == item["targets"] == item["valid"] == []
            assert len(item["image"]) == 1
        for query in queries:
            rows = [query["reference"], query["target"], *query["targets"], *query["valid"]]
            assert all(0 <= row < len(gallery) for row in rows)
            assert query["targets"] == [query["target"]]
            assert query["target"] in query["valid"]
            assert query["reference"] not in query["valid"]
            assert query["valid"] == sorted(set(query["valid"]))
            assert query["image"] == []
            assert query["photo"] == -1
            assert len(query["texts"]) == 1
            text = query["texts"][0]
            assert text == " ".join(text.lower().split()) != ""


def test_scenes_are_unique_and_disjoint_over_splits(data):
    scenes = [scene for split in examples.SPLITS for scene in data.scenes(split)]
    assert len(scenes) == len(set(scenes))


def test_siblings_have_different_targets(data):
    for split in examples.SPLITS:
        pairs = [(q["reference"], q["target"]) for q in data.records[split]]
        assert len(pairs) == len(set(pairs))


def test_kinds_are_covered(data):
    for split in examples.SPLITS:
        assert {query["kinds"][0] for query in data.records[split]} == KINDS[data.variant], split


# ----------------------------------------------------------------------------- text against scenes


def test_the_text_says_the_difference_and_valid_is_all_that_it_allows(exact):
    hard = exact.variant == "hard_smoke"
    for split in examples.SPLITS:
        scenes = exact.scenes(split)
        for query in exact.records[split]:
            reference = scenes[query["reference"]]
            kind, allowed = apply(query["texts"][0], reference, hard=hard)
            assert [kind] == query["kinds"], query
            assert scenes[query["target"]] in allowed, query
            assert query["valid"] == [r for r, scene in enumerate(scenes) if scene in allowed], (
                query
            )


def test_attributes_are_the_values_that_the_text_asks_for(exact):
    for split in examples.SPLITS:
        scenes = exact.scenes(split)
        for query in exact.records[split]:
            before = {cell: thing for cell, thing in scenes[query["reference"]]}
            after = {cell: thing for cell, thing in scenes[query["target"]]}
            changed = [
                f"{field}={getattr(after[cell], field)}"
                for cell in before.keys() & after.keys()
                for field in Object._fields
                if getattr(before[cell], field) != getattr(after[cell], field)
            ]
            if query["kinds"] == ["compound"]:  # one of the edits may move or remove what changed
                assert len(query["attributes"]) <= 2
                for attribute in query["attributes"]:
                    field, value = attribute.split("=")
                    assert FIELD_OF[value] == field
            else:
                assert query["attributes"] == changed


def test_open_edits_have_several_valid_scenes(prepared):
    several = {}
    for variant, data in prepared.items():
        held_out = data.records["validation"] + data.records["test"]
        several[variant] = [q for q in held_out if len(q["valid"]) > 1]
    assert not several["smoke"]
    assert len(several["hard_smoke"]) >= 2
    assert {q["kinds"][0] for q in several["hard_smoke"]} <= {"add", "compound"}


def test_near_misses(exact):
    """The gallery holds scenes that differ in one thing from what a query starts from or wants."""
    for split in ("validation", "test"):
        scenes = exact.scenes(split)
        targets: dict[int, list[int]] = {}
        for query in exact.records[split]:
            targets.setdefault(query["reference"], []).append(query["target"])
        for reference, rows in targets.items():
            near = {
                row
                for row, scene in enumerate(scenes)
                if row != reference
                and any(one_edit_away(scene, scenes[r]) for r in (reference, *rows))
            }
            assert len(near) >= 5
            if exact.variant == "smoke":  # all four edits are single ones
                assert sum(one_edit_away(scenes[reference], s) for s in scenes) >= 4


@pytest.mark.parametrize("name", ["plain", "hard"])
def test_full_size_test_split(name):
    config = config_of(name)
    split = shapes.make_split(config, "test", set())
    assert len(split.scenes) >= 5000
    assert len(set(split.scenes)) == len(split.scenes)
    assert len(split.queries) == 4 * config.references[2] == 2000
    scenes = [scene_of(shapes_scenes.describe_scene(scene)) for scene in split.scenes]
    several = 0
    for reference, target, edit in split.queries:
        kind, allowed = apply(edit.text, scenes[reference], hard=config.hard)
        assert kind == edit.kind, edit
        assert scenes[target] in allowed, edit
        assert {scene_of(shapes_scenes.describe_scene(s)) for s in edit.results} == allowed, edit
        several += len(edit.results) > 1
    assert (several >= 20) == config.hard


@pytest.mark.parametrize("name", ["smoke", "coarse_smoke"])
def test_the_test_split_does_not_change_with_the_size_of_the_training_split(name):
    config = config_of(name)
    larger = dataclasses.replace(config, references=(128, 16, 16), families=(8, 1, 1))
    one, other = (shapes.make_split(c, "test", set()) for c in (config, larger))
    assert one == other


# ------------------------------------------------------------------------------- coarse relevance


def test_coarse_texts_ask_for_a_content_and_valid_are_all_scenes_that_have_it(coarse):
    for split in examples.SPLITS:
        scenes = coarse.scenes(split)
        contents = [content(scene) for scene in scenes]
        for query in coarse.records[split]:
            text = query["texts"][0]
            kind, allowed = apply_one(text, scenes[query["reference"]], hard=False)
            assert [kind] == query["kinds"], query
            (asked,) = {content(scene) for scene in allowed}
            assert query["valid"] == [r for r, other in enumerate(contents) if other == asked]
            assert query["target"] in query["valid"]
            assert 10 <= len(query["valid"]) <= 24


def test_coarse_texts_say_nothing_of_places_and_sizes(coarse):
    words = {
        word
        for split in examples.SPLITS
        for query in coarse.records[split]
        for word in query["texts"][0].split()
    }
    places = {word for cell in CELL_WORDS for word in cell.split()}
    assert not words & {*SIZES, "size", "bigger", "smaller", "move", "at", "plain", *places}
    assert {"circle", "square", "triangle", "red", "blue"} <= words


def test_coarse_attributes_are_the_values_that_the_text_asks_for(coarse):
    for split in examples.SPLITS:
        scenes = coarse.scenes(split)
        for query in coarse.records[split]:
            before = set(content(scenes[query["reference"]]))
            after = set(content(scenes[query["target"]]))
            changed = []
            if len(before) == len(after):
                ((old, new),) = zip(before - after, after - before)
                pairs = zip(("color", "shape"), old, new)
                changed = [f"{field}={value}" for field, was, value in pairs if was != value]
            assert query["attributes"] == changed


def test_coarse_scenes_have_no_two_objects_alike(coarse):
    for split in examples.SPLITS:
        for scene in coarse.scenes(split):
            assert 3 <= len(scene) == len(set(content(scene))) <= 5


def test_coarse_contents_are_disjoint_over_splits(coarse):
    found = [{content(scene) for scene in coarse.scenes(split)} for split in examples.SPLITS]
    assert [len(contents) for contents in found] == [4 * 18, 18, 18]
    assert len(set().union(*found)) == 6 * 18


def test_coarse_contents_come_in_many_arrangements(coarse):
    """Places and sizes give no hint: they vary, also between a reference and its target."""
    for split in examples.SPLITS:
        scenes = coarse.scenes(split)
        groups: dict[tuple, list[frozenset]] = {}
        for scene in scenes:
            groups.setdefault(content(scene), []).append(scene)
        for those in groups.values():
            assert 10 <= len(those) <= 24
            assert len({frozenset(cell for cell, _ in scene) for scene in those}) >= 5
            assert len({frozenset(thing for _, thing in scene) for scene in those}) >= 4
        kept = [
            len(scenes[q["reference"]] & scenes[q["target"]]) / len(scenes[q["reference"]])
            for q in coarse.records[split]
        ]
        assert np.mean(kept) < 0.1


def test_coarse_near_misses(coarse):
    """Around each target are contents one thing away: each in many scenes, none of them valid."""
    for split in examples.SPLITS:
        contents = {content(scene) for scene in coarse.scenes(split)}
        for one in contents:
            near = [
                other
                for other in contents
                if (differing := set(one) ^ set(other))
                and (
                    len(differing) == 1
                    or (len(one) == len(other) and len(differing) == 2 and share_a_word(differing))
                )
            ]
            assert len(near) >= 5


def share_a_word(looks) -> bool:
    (color, shape), (other_color, other_shape) = looks
    return color == other_color or shape == other_shape


def test_full_size_coarse_splits():
    config = config_of("coarse")
    used, before = set(), set()
    for split, queries in (("test", 2000), ("validation", 1000), ("train", 40_000)):
        drawn = shapes.make_split(config, split, used)
        scenes = [scene_of(shapes_scenes.describe_scene(scene)) for scene in drawn.scenes]
        assert len(scenes) == len(set(scenes)) > {"test": 5000, "validation": 2000}.get(split, 25e3)
        contents = Counter(map(content, scenes))
        assert not before & contents.keys()
        before |= contents.keys()
        assert len(drawn.queries) == queries
        valid = [contents[content(scenes[target])] for _, target, _ in drawn.queries]
        assert (min(valid), max(valid)) == (10, 24)
        assert 15 <= np.median(valid) <= 19
        for reference, target, edit in drawn.queries[:2000]:
            kind, allowed = apply_one(edit.text, scenes[reference], hard=False)
            assert kind == edit.kind
            assert {content(scene) for scene in allowed} == {content(scenes[target])}
        # No kind is rare.
        kinds = Counter(edit.kind for _, _, edit in drawn.queries)
        assert kinds.keys() == COARSE_KINDS
        assert min(kinds.values()) > 0.2 * queries


# ---------------------------------------------------------------------------------- fixed content

# What the generator makes today. If it is changed on purpose, raise the builder's VERSION, since
# prepared copies would be stale, and put the new values here.
TEXTS = {
    "smoke": [
        "the yellow square is now cyan",
        "make the yellow square purple",
        "add a small brown circle at the bottom right",
        "there is a new small cyan triangle in the bottom right",
        "change the large blue circle to a triangle",
        "replace the large blue circle at the bottom center with a square",
    ],
    "hard_smoke": [
        "a small striped orange square in the bottom right",
        "there is a new large striped black square at the bottom right",
        "put the brown circle to the top right",
        "move the plain brown circle to the middle left",
        "the striped circle is now large",
        "make the diamond striped and then delete the small plain purple circle in the top left",
    ],
    "coarse_smoke": [
        "turn the cyan square into a circle",
        "turn the cyan square into a triangle",
        "add a brown triangle",
        "the triangle is gone",
        "the cyan circle becomes a triangle",
        "put a brown triangle",
    ],
}
RECORDS_SHA = {
    "smoke": "235790b184ce6070",
    "hard_smoke": "8448bf7371ffd712",
    "coarse_smoke": "6fc68723f2f8f62f",
}
# Rendered by Pillow, whose drawing could change by a pixel between major versions.
IMAGES_SHA = {
    "smoke": "57957a5855f66655",
    "hard_smoke": "eb29234268bb3841",
    "coarse_smoke": "9391fe035f1c26a4",
}


def records_digest(data: Prepared) -> str:
    bare = {
        split: [
            {k: v for k, v in record.items() if k not in ("image", "kinds", "subset", "pools")}
            | {"kind": "".join(record["kinds"])}
            for record in records
        ]
        for split, records in sorted(data.records.items())
    }
    return hashlib.sha256(json.dumps(bare, sort_keys=True).encode()).hexdigest()[:16]


def images_digest(data: Prepared) -> str:
    images = [data.records["test_gallery"][row]["image"][0] for row in range(0, 160, 20)]
    return hashlib.sha256(b"".join(image.tobytes() for image in images)).hexdigest()[:16]


def test_content_is_the_one_written_down_here(data):
    assert [q["texts"][0] for q in data.records["test"][:6]] == TEXTS[data.variant]
    assert records_digest(data) == RECORDS_SHA[data.variant]
    assert images_digest(data) == IMAGES_SHA[data.variant]


def test_preparing_again_gives_the_same(prepared, tmp_path):
    again, before = prepare("hard_smoke", tmp_path), prepared["hard_smoke"]
    assert records_digest(again) == records_digest(before)
    for split in examples.SPLITS:
        name = examples.gallery_split(split)
        for one, other in zip(again.records[name], before.records[name]):
            np.testing.assert_array_equal(one["image"][0], other["image"][0])


# ---------------------------------------------------------------------------------------- pixels


def cells_of(image: np.ndarray):
    """The inner part of each cell, which the jitter of other cells does not reach."""
    third = len(image) / 3
    for place in sorted(set(CELL_WORDS.values())):
        y, x = (int(i * third) for i in place)
        yield place, image[y + 3 : y + 21, x + 3 : x + 21].astype(int)


def test_images_show_the_objects_and_nothing_else(data):
    for item in data.records["test_gallery"]:
        image = item["image"][0]
        assert image.dtype == np.uint8
        assert image.shape == (72, 72, 3)
        there = {cell for cell, _ in scene_of(item["attributes"])}
        for cell, pixels in cells_of(image):
            off = np.abs(pixels - shapes_scenes.BACKGROUND).max(-1) > 20
            assert (off.sum() >= 20) == (cell in there), (item["id"], cell)
            assert off.any() == (cell in there)


def test_plain_objects_have_their_color(data):
    for item in data.records["test_gallery"]:
        pixels = dict(cells_of(item["image"][0]))
        for cell, thing in scene_of(item["attributes"]):
            if thing.fill == "plain":
                center = pixels[cell][9, 9]
                np.testing.assert_array_equal(center, shapes_scenes.HARD_COLORS[thing.color])


def test_any_two_objects_look_different():
    things = [
        shapes_scenes.Thing(size, color, shape, fill)
        for size in shapes_scenes.SIZES
        for color in shapes_scenes.HARD_COLORS
        for shape in shapes_scenes.HARD_SHAPES
        for fill in shapes_scenes.FILLS
    ]
    drawn = []
    for thing in things:
        alpha, color = shapes_scenes.sprite_of(thing, 24)
        drawn.append(alpha * color + (1 - alpha) * np.array(shapes_scenes.BACKGROUND))
    flat = np.stack(drawn).reshape(len(things), -1)
    for i, thing in enumerate(things):
        differing = (np.abs(flat - flat[i]) > 15).sum(1)
        differing[i] = 999
        nearest = int(differing.argmin())
        assert differing[nearest] >= 15, (thing, things[nearest], differing[nearest])


def test_large_is_larger_than_small():
    for shape in shapes_scenes.HARD_SHAPES:
        area = {
            size: shapes_scenes.sprite_of(shapes_scenes.Thing(size, "red", shape), 24)[0].sum()
            for size in shapes_scenes.SIZES
        }
        assert area["large"] > 2 * area["small"]


# ------------------------------------------------------------------------------------- the reader


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("remove the circle", "picks out"),  # there are two
        ("remove the blue square", "picks out"),  # there is none
        ("make the large circle large", "changes nothing"),
        ("add a small red circle at the top left", "add a small"),  # the cell is taken
        ("the circle dances", "no rule"),
    ],
)
def test_the_reader_refuses(text, message):
    scene = scene_of(["top left=large plain red circle", "center=small plain blue circle"])
    with pytest.raises(AssertionError, match=message):
        apply(text, scene, hard=False)
