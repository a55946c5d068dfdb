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
from dqe_jax.data.annotations import (
    circled,
    edir,
    fashion200k,
    genecis,
    icir,
    lasco,
    pinpoint,
    shoes,
)
from dqe_jax.data.annotations.schema import MALFORMED, UNKNOWN_IMAGE
from dqe_jax.data.builders.benchmarks import make_builder
from dqe_jax.data.datasets import DATASETS
from dqe_jax.data.photos import load_photo
from dqe_jax.data.raw_files import RawFiles
from dqe_jax.evaluation import protocols
from dqe_jax.testing import standins
from dqe_jax.utils.errors import UserError

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
            for box in (
                *([1, 2, 3], [1, 2, 0, 4], [1, 2, 3, "4"], "1,2,3,4"),
                *([1, 2, float("nan"), 4], [1, 2, float("inf"), 4], [1, 2, 10**400, 4]),
            )
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


# --- PinPoint -------------------------------------------------------------------------------------


@needs_real
def test_pinpoint_counts():
    read = real("pinpoint", "pinpoint")
    assert not read.dropped
    assert (len(read.queries), len(read.images)) == (7635, 109_600)
    positives = [query.relevant for query in read.queries]
    negatives = [query.negatives for query in read.queries]
    assert sum(map(len, positives)) == 69_278
    assert sum(len(set(own)) for own in positives) == 66_559
    assert (min(map(len, positives)), max(map(len, positives))) == (1, 45)
    assert sum(map(len, negatives)) == 264_112
    assert sum(own.count("") for own in negatives) == 6_729
    assert sum(len({*own} - {""}) for own in negatives) == 248_527
    assert sum(len(query.references) for query in read.queries) == 1_006
    assert len({query.reference for query in read.queries}) == 1_158
    assert len({image for query in read.queries for image in query.references}) == 153
    kinds = collections.Counter(query.kinds[0] for query in read.queries)
    assert (kinds["Swap"], kinds["Context Fit"], kinds["Explore"]) == (3398, 2520, 188)
    assert sum(query.reference in query.negatives for query in read.queries) == 4_217
    assert sum(query.reference in query.relevant for query in read.queries) == 56
    groups = collections.Counter((q.reference, q.references) for q in read.queries)
    assert len(groups) == 1_260
    assert sum(count > 1 for count in groups.values()) == 1_221


def test_a_device_in_place_of_pinpoints_queries_is_not_read(tmp_path):
    """Nor is a pipe, which would be read for ever."""
    standins.small_pinpoint(tmp_path)
    (tmp_path / pinpoint.QUERIES).unlink()
    (tmp_path / pinpoint.QUERIES).symlink_to("/dev/null")
    with pytest.raises(UserError, match=r"licensed\.parquet cannot be read: it is no regular file"):
        pinpoint.read(RawFiles(tmp_path), "test")


# --- Shoes ----------------------------------------------------------------------------------------


@needs_real
@pytest.mark.parametrize(
    ("split", "queries", "images", "identical"),
    [("train", 8_990, 10_000, 26), ("validation", 1_761, 4_658, 1)],
)
def test_shoes_counts(split, queries, images, identical):
    read = real("shoes", "shoes", split)
    assert not read.dropped
    assert (len(read.queries), len(read.images)) == (queries, images)
    # Of these the reference is the target: no ranking without the reference finds it.
    assert sum(query.reference == query.target for query in read.queries) == identical
    if split == "validation":
        assert len({query.reference for query in read.queries}) == 1_388
        assert len({query.target for query in read.queries}) == 1_334


SHOE = {"ImageName": "b.jpg", "ReferenceImageName": "a.jpg", "RelativeCaption": "is red"}


def made_shoes(root, records):
    write(root / "relative_captions_shoes.json", records)
    write(root / "train_im_names.txt", "c.jpg\nd.jpg\n")
    write(root / "eval_im_names.txt", "a.jpg\nb.jpg\n")
    return RawFiles(root)


def test_shoes_made(tmp_path):
    train = SHOE | {"ImageName": "c.jpg", "ReferenceImageName": "d.jpg"}
    across = SHOE | {"ReferenceImageName": "d.jpg"}
    nowhere = SHOE | {"ImageName": "z.jpg"}
    bad = [without(SHOE, "RelativeCaption"), SHOE | {"ReferenceImageName": ""}, 7]
    files = made_shoes(tmp_path, [SHOE, train, across, nowhere, *bad])
    read = shoes.read(files, "validation")
    assert [query.id for query in read.queries] == ["eval-0"]
    name = "relative_captions_shoes.json"
    unknown = [f"{name}:2", f"{name}:3"]
    malformed = [f"{name}:{i}" for i in (4, 5, 6)]
    assert read.dropped == {UNKNOWN_IMAGE: unknown, MALFORMED: malformed}
    read = shoes.read(files, "train")
    assert [(q.id, q.target, q.reference) for q in read.queries] == [("train-1", "c.jpg", "d.jpg")]
    assert shoes.stem("img_womens_clogs_851.jpg") == "img_womens_clogs_851"


# --- Domain conversion ----------------------------------------------------------------------------


@needs_real
def test_pic2word_counts_and_ceilings():
    read = real("pic2word", "domain_conversion/pic2word")
    assert not read.dropped
    assert (len(read.queries), len(read.images)) == (40_000, 16_983)
    by_domain = collections.defaultdict(list)
    for query in read.queries:
        by_domain[query.kinds[0]].append(len(query.relevant))
    best = {k: [] for k in (10, 50)}
    for domain, nothing, tenth, fiftieth in (
        ("cartoon", 2_350, 41.36, 75.49),
        ("origami", 4_700, 50.13, 53.00),
        ("toy", 2_800, 60.48, 72.00),
        ("sculpture", 2_900, 63.75, 70.95),
    ):
        counts = np.array(by_domain[domain])
        assert len(counts) == 10_000
        assert (counts == 0).sum() == nothing
        for k, expected in ((10, tenth), (50, fiftieth)):
            best[k].append((np.minimum(counts, k) / (counts + 1e-5)).mean())
            assert 100 * best[k][-1] == pytest.approx(expected, abs=0.006)
    note = protocols.PROTOCOLS["pic2word"].note
    assert f"at most {np.mean(best[10]):.3f} and R@50 at most {np.mean(best[50]):.3f}" in note
    assert read.queries[0].texts == ("a cartoon of",)


@needs_real
@pytest.mark.parametrize(
    ("dataset", "folder", "queries", "gallery", "nothing"),
    [
        ("imagenet_r", "pic2word", 67_932, 16_983, 14_721),
        ("ltll", "freedom/ltll", 488, 488, 0),
        ("nico", "freedom/nico", 43_615, 80_134, 0),
    ],
)
def test_freedom_counts(dataset, folder, queries, gallery, nothing):
    read = real(dataset, f"domain_conversion/{folder}")
    assert not read.dropped
    assert len(read.queries) == queries
    assert sum(map(len, read.pools.values())) == gallery
    counts = np.array([len(query.relevant) for query in read.queries])
    assert (counts == 0).sum() == nothing
    stated = {"imagenet_r": (0, 81, 14.0), "ltll": (2, 22, 10.2), "nico": (3, 798, 230.4)}
    assert (counts.min(), counts.max(), round(counts.mean(), 1)) == stated[dataset]
    assert len(read.unranked) == (8_723 if dataset == "nico" else 0)
    if dataset == "imagenet_r":
        # Of a perfect ranking: each pair, then means over targets and over sources.
        table = collections.defaultdict(list)
        for query, count in zip(read.queries, counts):
            table[query.kinds[0]].append(count > 0)
        of_source = collections.defaultdict(list)
        for pair, found in table.items():
            of_source[pair.split(" to ")[0]].append(np.mean(found))
        best = {source: 100 * np.mean(own) for source, own in of_source.items()}
        stated = {"photo": 68.1, "cartoon": 91.4, "origami": 98.0, "toy": 94.2, "sculpture": 93.9}
        assert best == pytest.approx(stated, abs=0.06)
        assert np.mean([*best.values()]) == pytest.approx(89.1, abs=0.06)


@needs_real
def test_minidn_names_the_list_that_is_not_here():
    with pytest.raises(UserError, match=r"minidn lacks the file database_files\.csv"):
        real("minidn", "domain_conversion/freedom/minidn")


@needs_real
def test_the_published_queries_of_minidn(tmp_path):
    lines = (REAL / "domain_conversion/freedom/minidn/query_files.csv").read_text()
    write(tmp_path / "minidn/query_files.csv", lines)
    write(tmp_path / "minidn/database_files.csv", lines.replace("minidn/", "made/"))
    read = DATASETS["minidn"].raw.read(RawFiles(tmp_path), "test")
    assert not read.dropped
    assert (len(read.queries), len(read.unranked)) == (7_560, 2_520)
    assert {len(query.relevant) for query in read.queries} == {5}
    assert len({query.kinds for query in read.queries}) == 12


def test_domain_conversion_made(tmp_path):
    write(tmp_path / "imgnet_targets.txt", "i/r/n1/toy_1.jpg 2007 \ni/real/n1/a.JPEG 6007 \n")
    write(tmp_path / "imgnet_real_query.txt", "i/real/n1/a.JPEG 7 \nnonsense\ni/x.JPEG 7\n")
    files = RawFiles(tmp_path)
    read = DATASETS["pic2word"].raw.read(files, "test")
    assert [q.id for q in read.queries] == [
        f"i/real/n1/a.JPEG to {domain}" for domain in ("cartoon", "origami", "toy", "sculpture")
    ]
    assert [q.relevant for q in read.queries] == [(), (), ("i/r/n1/toy_1.jpg",), ()]
    assert [len(names) for names in read.dropped.values()] == [4, 4]
    assert read.official_queries == 12
    read = DATASETS["imagenet_r"].raw.read(files, "test")
    assert len(read.queries) == 8
    (toy,) = [q for q in read.queries if q.kinds == ("photo to toy",)]
    assert (toy.texts, toy.relevant) == (("toy",), ("i/r/n1/toy_1.jpg",))
    write(tmp_path / "imgnet_targets.txt", "i/r/n1/toy_1.jpg 2007\ni/r/n1/toy_2.jpg 9007\n")
    with pytest.raises(UserError, match="line 2 must be a path with its label, not 'i/r/n1/toy_2"):
        DATASETS["pic2word"].raw.read(RawFiles(tmp_path), "test")
    write(tmp_path / "minidn/query_files.csv", "m/a.jpg real cup\nm/b.jpg other cup\nm/c.jpg real")
    write(tmp_path / "minidn/database_files.csv", "m/d.jpg sketch cup\nm/e.jpg sketch hat\n")
    read = DATASETS["minidn"].raw.read(RawFiles(tmp_path), "test")
    assert [q.kinds[0] for q in read.queries] == [
        *("photo to clipart", "photo to painting", "photo to sketch")
    ]
    assert read.queries[2].relevant == ("m/d.jpg",)
    assert read.pools == {"database": ["m/d.jpg", "m/e.jpg"]}
    assert "m/a.jpg" in read.unranked
    assert sum(map(len, read.dropped.values())) == 8  # two lines, for each of four domains


# --- The documented format only: LaSCo's queries, Fashion200k, i-CIR and others ------------------


@needs_real
def test_the_gallery_of_lasco(tmp_path):
    listed = REAL / "lasco" / "lasco_val_corpus.json"
    (tmp_path / listed.name).write_text(listed.read_text())
    record = {
        "qid": 42000,
        "query-text": "the dog sits",
        "query-image": [42, "val2014/COCO_val2014_000000000042.jpg"],
        "target-image": [73, "val2014/COCO_val2014_000000000073.jpg"],
    }
    far = record | {"qid": 1, "target-image": [1, "val2014/COCO_val2014_000000000001.jpg"]}
    bad = [without(record, "qid"), record | {"qid": 2, "query-image": [42]}, record]
    write(tmp_path / "lasco_val.json", [record, far, *bad])
    read = lasco.read(RawFiles(tmp_path), "validation")
    assert len(read.images) == 39_826
    assert not read.repeated_ids
    (query,) = read.queries
    assert (query.id, query.reference[-3:], query.target[-3:]) == ("42000", "042", "073")
    name = "lasco_val.json"
    assert read.dropped == {
        UNKNOWN_IMAGE: [f"{name}:1"],
        MALFORMED: [f"{name}:{i}" for i in (2, 3, 4)],
    }
    write(tmp_path / "lasco_train_corpus.json", {"COCO_train2014_000000000009.jpg": "t/a.jpg"})
    write(tmp_path / "lasco_train.json", [])
    assert lasco.read(RawFiles(tmp_path), "train").images == ["a"]


def test_fashion200k_made(tmp_path):
    for category in fashion200k.CATEGORIES:
        write(tmp_path / f"labels/{category}_test_detect_all.txt", "")
    write(
        tmp_path / "labels/dress_test_detect_all.txt",
        "w/d/1_0.jpeg\t-5.07\t red a-line dress. \nw/d/1_1.jpeg\t1\tred a-line dress.\n"
        "w/d/2_0.jpeg\t0.5\tblue a-line dress.\n",
    )
    write(tmp_path / "labels/top_test_detect_all.txt", "w/t/3_0.jpeg\t2\tred top & belt\n")
    lines = "w/d/2_0.jpeg w/d/1_0.jpeg\nw/d/1_0.jpeg w/t/3_0.jpeg\nw/d/9.jpeg w/d/1_0.jpeg\nw/d\n"
    write(tmp_path / "test_queries.txt", lines)
    read = fashion200k.read(RawFiles(tmp_path), "test")
    first, second = read.queries
    assert first.texts == ("replace blue with red",)
    assert first.relevant == ("w/d/1_0.jpeg", "w/d/1_1.jpeg")
    assert second.texts == ("replace a-line with top",)
    assert (second.kinds, second.relevant) == (("top",), ("w/t/3_0.jpeg",))
    name = "test_queries.txt"
    assert read.dropped == {UNKNOWN_IMAGE: [f"{name}:2"], MALFORMED: [f"{name}:3"]}
    assert fashion200k.description_of(" a? b&c* ") == "aquestionmark bandmarkcstarmark"
    assert fashion200k.replacement("red dress", "red dress") == "replace dress with dress"
    write(tmp_path / "labels/top_test_detect_all.txt", "w/t/3_0.jpeg 2 red top\n")
    with pytest.raises(UserError, match="line 1 must be a path, a score and a description"):
        fashion200k.read(RawFiles(tmp_path), "test")


def test_icir_made(tmp_path):
    database = "d/1.jpg,crowd,7\nd/2.jpg,night,7\nd/1.jpg,night,7,more\nd/3.jpg,crowd,8\n"
    write(tmp_path / "icir/database_files.csv", database)
    lines = "q/1.jpg,crowd,7\nq/1.jpg,night,7\nq/2.jpg,x\nq/2.jpg,x,9"
    write(tmp_path / "icir/query_files.csv", lines)
    read = icir.read(RawFiles(tmp_path), "test")
    assert read.pools == {"7": ["d/1.jpg", "d/2.jpg"], "8": ["d/3.jpg"]}
    assert [q.relevant for q in read.queries] == [("d/1.jpg",), ("d/2.jpg", "d/1.jpg")]
    assert read.unranked == ["q/1.jpg", "q/2.jpg"]
    assert read.repeated_ids == ["d/1.jpg"]
    name = "query_files.csv"
    assert read.dropped == {MALFORMED: [f"{name}:2"], UNKNOWN_IMAGE: [f"{name}:3"]}
    write(tmp_path / "icir/database_files.csv", "d/1.jpg,crowd,7\nd/2.jpg,,7\n")
    with pytest.raises(UserError, match="line 2 must be a path, a text and an instance"):
        icir.read(RawFiles(tmp_path), "test")


def test_edir_made(tmp_path):
    standins.small_edir(tmp_path)
    read = edir.read(RawFiles(tmp_path), "test")
    assert not read.dropped
    assert (len(read.queries), len(read.pools["corpus"]), len(read.unranked)) == (10, 24, 5)
    first = read.queries[0]
    assert (first.id, first.texts, first.kinds) == ("q0", ("make it red",), ("color",))
    assert first.reference in read.unranked
    assert (first.target, first.known_positives) == (
        "510_000000003_2.png",
        ("510_000000003_2.png",),
    )
    assert edir.stem(first.target) == "510_000000003_2"


EDIR = {"id": "q", "image": "a.png", "text": "redder", "metadata": {"subcategory": "color"}}
INSTANCE = {"qid": "q", "pos": ["a.png"], "neg": ["b.png"]}


@pytest.mark.parametrize(
    ("record", "instances", "reason"),
    [
        *((without(EDIR, name), [INSTANCE], MALFORMED) for name in EDIR),
        ([], [INSTANCE], MALFORMED),
        (EDIR | {"text": ""}, [INSTANCE], MALFORMED),
        (EDIR | {"metadata": {}}, [INSTANCE], MALFORMED),
        *(
            (EDIR, instances, MALFORMED)
            for instances in (
                *([], [INSTANCE] * 2, [[]], [INSTANCE | {"qid": "z"}]),
                *([without(INSTANCE, name)] for name in ("pos", "neg")),
                *([INSTANCE | {"pos": pos}] for pos in ([], ["a.png", "b.png"], [""], [3])),
            )
        ),
        (EDIR, [INSTANCE | {"pos": ["z.png"]}], UNKNOWN_IMAGE),
    ],
)
def test_records_of_edir_that_are_not_sound(tmp_path, record, instances, reason):
    corpus = [{"id": name, "image": name} for name in ("a.png", "b.png")]
    rows = {"corpus": corpus, "queries": [record], "instances": instances}
    for name, lines in rows.items():
        write(tmp_path / f"{name}.jsonl", "\n".join(map(json.dumps, lines)))
    read = edir.read(RawFiles(tmp_path), "test")
    assert read.dropped == {reason: ["queries.jsonl:1"]}
    assert not read.queries


def test_a_corpus_of_edir_that_is_not_sound(tmp_path):
    standins.small_edir(tmp_path)
    for line in ('{"id": "a.png"}', '{"id": "a.png", "image": "b.png"}', "{", "[]"):
        write(tmp_path / "corpus.jsonl", f'{{"id": "c", "image": "c"}}\n{line}\n')
        with pytest.raises(UserError, match=r"corpus\.jsonl: line 2: .*get the file again"):
            edir.read(RawFiles(tmp_path), "test")


SESSION = {
    "session_id": "s", "subset": "cirr_val", "ground_truth_ids": ["b"], "num_turns": 1,
    "turns": [{"turn": 1, "reference_image_id": "a", "relative_caption": "redder"}],
}  # fmt: skip


def test_circled_made(tmp_path):
    standins.small_circled(tmp_path)
    read = circled.read(RawFiles(tmp_path), "test")
    assert not read.dropped
    assert {name: len(images) for name, images in read.pools.items()} == {
        "fashioniq_dress_val": 14, "cirr_val": 14, "circo_val": 14,
    }  # fmt: skip
    assert len(read.queries) == 15
    last = read.queries[-1]
    assert (last.id, last.kinds) == ("circo_val_0001/3", ("circo_val", "turn 3"))
    assert (last.reference, last.target, last.relevant) == ("205", "209", ("209", "210"))
    assert circled.stem(last.reference) == "000000000205"
    assert circled.stem("0123456789") == "0123456789"  # an id of FashionIQ
    # What is there is read.
    for path in tmp_path.rglob("circo_val.json"):
        path.unlink()
    assert set(circled.read(RawFiles(tmp_path), "test").pools) == {
        "fashioniq_dress_val",
        "cirr_val",
    }
    for path in tmp_path.rglob("*_val.json"):
        path.unlink()
    with pytest.raises(UserError, match=r"lacks the sessions of CIRCLED; put some of fashioniq"):
        circled.read(RawFiles(tmp_path), "test")


@pytest.mark.parametrize(
    ("session", "reason"),
    [
        *((without(SESSION, n), MALFORMED) for n in ("session_id", "ground_truth_ids", "turns")),
        *((SESSION | {"turns": turns}, MALFORMED) for turns in ([], [7], {})),
        *(
            (SESSION | {"turns": [without(SESSION["turns"][0], name)]}, MALFORMED)
            for name in SESSION["turns"][0]
        ),
        *((SESSION | {"ground_truth_ids": ids}, MALFORMED) for ids in ([], "b", [""], [True])),
        ([], MALFORMED),
        (SESSION | {"ground_truth_ids": ["z"]}, UNKNOWN_IMAGE),
    ],
)
def test_sessions_of_circled_that_are_not_sound(tmp_path, session, reason):
    write(tmp_path / "split.rc2.val.json", {"a": "./dev/a.png", "b": "./dev/b.png"})
    write(tmp_path / "cirr_val.json", [SESSION | {"session_id": "t"}, session])
    read = circled.read(RawFiles(tmp_path), "test")
    assert [query.id for query in read.queries] == ["t/1"]
    assert read.dropped == {reason: ["cirr_val.json:1"]}


def test_questions_of_two_images_and_explicit_negatives_are_stored(tmp_path):
    standins.small_pinpoint(tmp_path / "raw")
    split = prepared("pinpoint", tmp_path / "raw", tmp_path / "data")
    queries, ids = split.queries, split.gallery.ids
    assert len(queries) == 6
    assert [len(own) for own in queries.references] == [0, 1] * 3
    assert ids[queries.references[1][0]] == f"{4:032x}"
    assert queries.negatives[0][-1] == -1
    assert [ids[row] for row in queries.negatives[0][:-1]] == [f"{i:032x}" for i in (10, 11)]
    assert (queries.target == -1).all()
    # Without its second image a query is left out.
    next((tmp_path / "raw").rglob(f"{4:032x}.jpg")).unlink()
    builder = make_builder(
        "pinpoint",
        str(tmp_path / "other"),
        image_size=16,
        preprocess="squash",
        raw_dir=str(tmp_path / "raw"),
        splits=("test",),
        num_workers=1,
    )
    preparation.prepare(builder)
    found = preparation.report(builder)
    assert found.splits["test"].dropped == {"reference missing": 1}
    assert len(splits.load_split(builder, "test", 16).queries) == 5
