"""Readers of the benchmarks of docs/how-to/more-benchmarks.md: published files, rules, photos."""

from __future__ import annotations

import collections
import functools
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dqe_jax.data import preparation, regions, splits
from dqe_jax.data.annotations import genecis
from dqe_jax.data.annotations.schema import MALFORMED
from dqe_jax.data.builders.benchmarks import make_builder
from dqe_jax.data.datasets import DATASETS
from dqe_jax.data.photos import load_photo
from dqe_jax.data.raw_files import RawFiles
from dqe_jax.testing import standins

REAL = Path(__file__).resolve().parents[3] / "shared" / "annotations"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="the published annotations are not here")


@functools.cache
def real(dataset, folder, split="test"):
    return DATASETS[dataset].raw.read(RawFiles(REAL / folder), split)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def without(record, *names):
    return {name: value for name, value in record.items() if name not in names}


def prepared(dataset, raw, data, *, size=16, split="test", preprocess=None):
    """The split of a data set whose raw files are in a directory; nothing is missing."""
    builder = make_builder(
        dataset,
        str(data),
        image_size=size,
        preprocess=preprocess or DATASETS[dataset].raw.preprocess,
        raw_dir=str(raw),
        splits=(split,),
        num_workers=1,
    )
    preparation.prepare(builder)
    assert preparation.write_report(builder, preparation.report(builder), None) == []
    return splits.load_split(builder, split, size)


# --- GeneCIS --------------------------------------------------------------------------------------


@needs_real
@pytest.mark.parametrize(
    ("task", "queries", "candidates", "photos", "references", "conditions"),
    [
        ("focus_attribute", 2000, 10, 13348, 1863, 40),
        ("change_attribute", 2112, 15, 15058, 1797, 400),
        ("focus_object", 1960, 15, 2198, 218, 97),
        ("change_object", 1960, 15, 2739, 218, 109),
    ],
)
def test_genecis_counts(task, queries, candidates, photos, references, conditions):
    read = real("genecis", "genecis")
    own = [query for query in read.queries if query.pool == task]
    assert len(own) == queries
    assert {len(query.subset) for query in own} == {candidates}
    assert {len(set(query.subset)) for query in own} == {candidates}
    assert all(query.subset[0] == query.target for query in own)
    assert len({query.texts for query in own}) == conditions
    stems = [{genecis.stem(image) for image in (q.reference, *q.subset)} for q in own]
    assert len(set().union(*stems)) == photos
    assert len({genecis.stem(query.reference) for query in own}) == references
    # In 79 queries the reference's region is a candidate: it stays one.
    assert sum(q.reference in q.subset for q in own) == (79 if task == "change_attribute" else 0)
    assert {genecis.region(q.target) is None for q in own} == {task.endswith("object")}


@needs_real
def test_genecis_keeps_every_record():
    read = real("genecis", "genecis")
    assert not read.dropped
    assert read.official_queries == 8032
    again = [(q.id, q.target) for q in read.queries if f"{q.target}#2" in q.subset]
    assert [name for name, _ in again] == ["focus_attribute-14", "change_object-19"]
    boxes = [genecis.region(i) for i in read.images if "@" in i]
    assert min(min(box[2:]) for box in boxes) > 0
    assert any(min(box[:2]) < 0 for box in boxes)


OBJECT = {
    "condition": "car",
    "reference": {"val_image_id": 1},
    "target": {"val_image_id": 2},
    "gallery": [{"val_image_id": i} for i in (3, 2, 4)],
}
ATTRIBUTE = {
    "condition": "color",
    "reference": {"image_id": "9", "instance_bbox": [5, 4, 10, 8]},
    "target": {"image_id": "8", "instance_bbox": [1.5, 2, 3, 4.0]},
    "gallery": [{"image_id": "8", "instance_bbox": [0, 0, 3, 4]}],
}


def made_genecis(root, task="focus_object", records=()):
    for name in genecis.TASKS:
        write(root / "genecis" / f"{name}.json", list(records) if name == task else [])
    return RawFiles(root)


def test_genecis_made(tmp_path):
    (query,) = genecis.read(made_genecis(tmp_path, records=[OBJECT]), "test").queries
    assert query.id == "focus_object-0"
    assert query.subset == ("000000000002", "000000000003", "000000000002#2", "000000000004")
    assert (query.reference, query.texts) == ("000000000001", ("car",))
    files = made_genecis(tmp_path, "change_attribute", [ATTRIBUTE])
    (query,) = genecis.read(files, "test").queries
    assert query.subset == ("8@1.5,2,3,4.0", "8@0,0,3,4")
    assert genecis.region(query.target) == (1.5, 2, 3, 4)
    assert genecis.stem(query.target) == "8"


@pytest.mark.parametrize(
    ("task", "record"),
    [
        *(("focus_object", without(OBJECT, name)) for name in OBJECT),
        ("focus_object", []),
        ("focus_object", OBJECT | {"gallery": []}),
        ("focus_object", OBJECT | {"gallery": [3]}),
        ("focus_object", OBJECT | {"condition": ""}),
        ("focus_object", OBJECT | {"target": {"val_image_id": "2"}}),
        ("focus_object", OBJECT | {"target": {"val_image_id": -2}}),
        ("focus_attribute", ATTRIBUTE | {"target": {"image_id": "8"}}),
        ("focus_attribute", ATTRIBUTE | {"target": {"image_id": 8, "instance_bbox": [1, 2, 3, 4]}}),
        *(
            ("focus_attribute", ATTRIBUTE | {"target": {"image_id": "8", "instance_bbox": box}})
            for box in ([1, 2, 3], [1, 2, 0, 4], [1, 2, 3, "4"], [1, 2, float("nan"), 4], "1,2,3,4")
        ),
        (
            "focus_attribute",
            ATTRIBUTE | {"target": {"image_id": "a", "instance_bbox": [1, 2, 3, 4]}},
        ),
    ],
)
def test_a_malformed_record_of_genecis_is_dropped_alone(tmp_path, task, record):
    sound = OBJECT if task == "focus_object" else ATTRIBUTE
    read = genecis.read(made_genecis(tmp_path, task, [record, sound]), "test")
    assert read.dropped == {MALFORMED: [f"{task}.json:0"]}
    assert len(read.queries) == 1


def test_the_crop_of_genecis_by_hand(tmp_path):
    # Grows left and up; where the border is in the way, on the other side.
    assert regions.crop_edges((50, 40, 20, 10), (200, 100)) == (36, 33, 70, 50)
    assert regions.crop_edges((7, 40, 20, 10), (200, 100)) == (0, 33, 34, 50)
    assert regions.crop_edges((180, 90, 30, 20), (200, 100)) == (159, 76, 200, 100)
    assert regions.crop_edges((-3, 0, 10, 10), (200, 12)) == (0, 0, 17, 12)
    pixels = np.random.default_rng(0).integers(0, 256, (100, 200, 3), np.uint8)
    photo = Image.fromarray(pixels)
    crop = np.asarray(regions.crop_of(photo, (50, 40, 20, 10)))
    assert crop.shape == (34, 34, 3)
    np.testing.assert_array_equal(crop[8:25], pixels[33:50, 36:70])
    assert not crop[:8].any()
    assert not crop[25:].any()
    photo.save(tmp_path / "8.png")
    read = load_photo("8.png", str(tmp_path), 34, "crop", region=(50, 40, 20, 10))
    (tmp_path / "crop.png").write_bytes(read.image)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "crop.png")), crop)
    beyond = load_photo("8.png", str(tmp_path), 34, "crop", region=(500, 40, 20, 10))
    assert beyond.image is None
    assert "the box [500, 40, 20, 10] is outside of the photo" in beyond.reason
    # Regions of one photo are photos of their own, and equal regions are copies.
    for x, equal in ((50, True), (60, False)):
        other = load_photo("8.png", str(tmp_path), 34, "crop", region=(x, 40, 20, 10))
        assert (other.number == read.number) == equal


def test_genecis_prepared(tmp_path):
    standins.small_genecis(tmp_path / "raw")
    split = prepared("genecis", tmp_path / "raw", tmp_path / "data")
    queries = split.queries
    assert len(queries) == 12
    assert split.pools.keys() == set(genecis.TASKS)
    for own, target, pool in zip(queries.subset, queries.target, queries.pools):
        assert own[0] == target
        assert len(own) == (10 if pool == "focus_attribute" else 15)
        assert set(own.tolist()) <= set(split.pools[pool].tolist())
    # References are there, and no task ranks them.
    ranked = set(np.concatenate([*split.pools.values()]).tolist())
    assert not ranked & set(queries.reference.tolist())
    assert collections.Counter(queries.pools) == dict.fromkeys(genecis.TASKS, 3)
