"""The pipeline from records to batches, on made records of a few pixels and on `shapes`."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import types
from collections import Counter

import jax
import numpy as np
import pytest

from dqe_jax.data import examples, pipeline, preparation, records, splits
from dqe_jax.data.builders import shapes
from dqe_jax.data.index import from_json, make_index, read_index
from dqe_jax.data.transforms import AUGMENTATIONS, join_captions
from dqe_jax.embedding.sources import PlainImages, PlainTexts
from dqe_jax.method.batch import Batch
from dqe_jax.utils.errors import UserError

SIZE = 16
# ------------------------------------------------------------------------------------ made records


class Source:
    """A data source that counts how often a record is read."""

    def __init__(self, records):
        self.records, self.reads = records, Counter()

    def __len__(self):
        return len(self.records)

    def __getitem__(self, row):
        self.reads[int(row)] += 1
        return self.records[row]

    def __getitems__(self, rows):
        return [self[row] for row in rows]


def gallery_record(row, photo=None):
    """Content, and so the image, belongs to the photo."""
    photo = row if photo is None else photo
    image = np.random.default_rng(photo).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
    return {
        "id": f"item-{row}".encode(),
        "image": [image],
        "photo": photo,
        "texts": [],
        "pools": [],
    }


def missing_record(row):
    return gallery_record(row) | {"image": [], "texts": [b"is missing"]}


def query_record(number, reference, target, targets=None, texts=(b"make it red",)):
    targets = [target] if targets is None else targets
    return {
        "id": f"query-{number}".encode(),
        "texts": list(texts),
        "reference": reference,
        "target": target,
        "targets": targets,
        "valid": sorted(targets),
        "kinds": [b"color"],
        "attributes": [],
        "subset": [],
        "pools": [],
    }


def gallery_of(records, cache=True):
    source = Source(records)
    return splits.Gallery(source, make_index(records), SIZE, cache), source


def made_split(queries, gallery, **options):
    """A split of these records."""
    return splits.make_split(
        "train", queries, Source(gallery), make_index(gallery), SIZE, **options
    )


def split_of(pairs, *, images=20, targets=None, photos=None):
    """A split of queries with these (reference, target) rows."""
    targets, photos = targets or {}, photos or {}
    queries = [query_record(i, r, t, targets.get(i)) for i, (r, t) in enumerate(pairs)]
    return made_split(queries, [gallery_record(row, photos.get(row)) for row in range(images)])


def batches_of(
    split, *, references=2, queries=2, augment="none", seed=0, threads=2, process=0, processes=1
):
    """Query `i` has the text `[i + 1]` and the mentions `[i]`."""
    number = np.arange(len(split.queries))
    return pipeline.train_batches(
        split,
        images=PlainImages(split.gallery, augment),
        texts=PlainTexts((number + 1)[:, None, None].astype(np.int32)),
        mentions=number[:, None].astype(np.float32),
        references=references,
        queries_per_reference=queries,
        seed=seed,
        num_threads=threads,
        prefetch=4,
        process=process,
        num_processes=processes,
    )


def take(batches, count):
    return [next(batches) for _ in range(count)]


def assert_equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    directory = str(tmp_path_factory.mktemp("shapes"))
    builder = shapes.make_builder(variant="smoke", prepared_dir=directory)
    preparation.prepare(builder)
    return builder


# ------------------------------------------------------------------------------------- load_split


def test_load_split_reads_columns(smoke):
    split = splits.load_split(smoke, "test", 72)
    queries, source = split.queries, smoke.as_data_source(split="test")
    assert split.name == "test"
    assert len(queries) == len(source) == 64
    assert queries.reference.dtype == queries.target.dtype == np.int32
    for row in (0, 17, 63):
        record = source[row]
        assert queries.ids[row] == record["id"].decode()
        assert queries.texts[row] == record["texts"][0].decode()
        assert queries.kinds[row] == tuple(k.decode() for k in record["kinds"])
        assert queries.reference[row] == record["reference"]
        assert queries.target[row] == record["target"]
        assert list(queries.known_positives[row]) == list(record["targets"])
        assert list(queries.relevant[row]) == list(record["valid"])
        assert queries.known_positives[row].dtype == queries.relevant[row].dtype == np.int32


@pytest.mark.parametrize(
    ("captions", "expected"),
    [
        ("forward", ["0 and is long", "1 and is long"]),
        ("reverse", ["is long and 0", "is long and 1"]),
    ],
)
def test_captions_are_joined(captions, expected):
    texts = [(b"%d" % i, b" ", b" is long.") for i in range(2)]
    queries = [query_record(i, 0, 1, texts=t) for i, t in enumerate(texts)]
    split = made_split(queries, [gallery_record(0), gallery_record(1)], captions=captions)
    assert split.queries.texts == expected
    assert split.queries.captions[1] == ("1", " ", " is long.")


def test_a_single_caption_keeps_its_end():
    assert join_captions(["is it red? "]) == "is it red?"
    assert join_captions(["", "is it red?"]) == "is it red"
    assert join_captions(["", " "]) == ""


def test_queries_are_read_beyond_a_chunk(smoke, monkeypatch):
    expected = splits.load_split(smoke, "test", 72).queries.ids
    monkeypatch.setattr(records, "CHUNK", 7)
    assert splits.load_split(smoke, "test", 72).queries.ids == expected


def test_reading_a_split_reads_no_image():
    source = Source([gallery_record(0), gallery_record(1)])
    splits.make_split("train", [query_record(0, 0, 1)], source, make_index(source.records), SIZE)
    assert not source.reads


def test_what_is_missing_is_left_out_and_counted():
    gallery = [gallery_record(0), missing_record(1), gallery_record(2), gallery_record(3, photo=2)]
    queries = [
        query_record(0, 0, 2, targets=[2, 1]),
        query_record(1, 1, 2),  # no reference
        query_record(2, 2, 1),  # no target
        query_record(3, 3, 0) | {"subset": [3, 1, 0], "target": -1, "targets": [], "valid": [0, 1]},
    ]
    split = made_split(queries, gallery, official_queries=5)
    assert split.queries.ids == ["query-0", "query-3"]
    assert split.gallery.ids == ["item-0", "item-2", "item-3"]
    assert split.gallery.image_ids.tolist() == [0, 1, 1]
    assert split.queries.reference.tolist() == [0, 2]
    assert split.queries.target.tolist() == [1, -1]
    assert split.queries.known_positives[0].tolist() == [
        1
    ]  # what is not at hand cannot be a negative
    assert split.queries.relevant[1].tolist() == [0, 4]  # but counts as valid, beyond the gallery
    assert split.queries.subset[1].tolist() == [2, 0]
    assert str(split.coverage) == "2 of 5 queries, 3 of 4 gallery images"
    whole = dataclasses.replace(split.coverage, official_queries=2, official_gallery=3)
    assert str(whole) == "all 2 queries, all 3 gallery images"
    assert not split.coverage.complete
    np.testing.assert_array_equal(split.gallery[1], gallery[2]["image"][0])


def test_pools_are_rows_at_hand():
    gallery = [gallery_record(0), missing_record(1), gallery_record(2)]
    for record, pools in zip(gallery, ([b"a"], [b"a", b"b"], [b"a", b"b"])):
        record["pools"] = pools
    split = made_split([query_record(0, 0, 2) | {"pools": [b"b"]}], gallery)
    assert {name: rows.tolist() for name, rows in split.pools.items()} == {"a": [0, 1], "b": [1]}
    assert split.queries.pools == ["b"]


def test_an_index_goes_through_json():
    records = [gallery_record(0), missing_record(1), gallery_record(2, photo=0)]
    records[2]["pools"] = [b"a"]
    index = make_index(records)
    again = from_json(index.to_json())
    assert again.ids == index.ids == ["item-0", "item-1", "item-2"]
    assert again.missing == index.missing == {1: "is missing"}
    assert again.image_ids.tolist() == index.image_ids.tolist() == [0, 1, 0]
    assert {k: v.tolist() for k, v in again.pools.items()} == {"a": [2]}


def test_a_damaged_index_is_named(smoke, tmp_path):
    builder = types.SimpleNamespace(data_path=tmp_path, data_dir=str(tmp_path))
    with pytest.raises(UserError, match=r"test_gallery\.json is missing or damaged"):
        read_index(builder, "test_gallery")
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "test_gallery.json").write_text('{"ids": []}')
    with pytest.raises(
        UserError, match=r"test_gallery\.json .*KeyError.*prepare the data set again"
    ):
        read_index(builder, "test_gallery")


@pytest.mark.parametrize(
    "changes",
    [
        {"ids": "abc"},
        {"ids": [1, 2, 3]},
        {"ids": ["a"]},
        {"photo": [0, 1, 3]},
        {"photo": [0, 1, -1]},
        {"photo": [0, 1, 2**40]},
        {"photo": [[0], [1], [2]]},
        {"photo": "012"},
        {"missing": ["is missing"]},
        {"missing": {"9": "is missing"}},
        {"missing": {"1": 2}},
        {"pools": []},
        {"pools": {"a": [7]}},
        {"pools": {"a": 1}},
        b"\xff\xfe",
        b"[" * 100_000,
        b"[]",
    ],
)
def test_an_index_of_wrong_content_is_named(tmp_path, changes):
    builder = types.SimpleNamespace(data_path=tmp_path, data_dir=str(tmp_path))
    index = make_index([gallery_record(0), gallery_record(1), gallery_record(2)])
    file = tmp_path / "index" / "test_gallery.json"
    file.parent.mkdir()
    if isinstance(changes, dict):
        changes = json.dumps(json.loads(index.to_json()) | changes).encode()
    file.write_bytes(changes)
    with pytest.raises(UserError, match=r"test_gallery\.json is missing or damaged \(\w+\)"):
        read_index(builder, "test_gallery")


def test_truth_may_be_unknown():
    record = query_record(0, 0, 1) | {"valid": []}
    split = made_split([record], [gallery_record(0), gallery_record(1)])
    assert split.queries.relevant[0].shape == (0,)


def test_an_unknown_split_is_named_with_those_that_exist(smoke):
    with pytest.raises(UserError, match=r"no split 'dev'; it has \w+, \w+, \w+\.$") as error:
        splits.load_split(smoke, "dev", 72)
    assert all(split in str(error.value) for split in examples.SPLITS)
    assert "gallery" not in str(error.value)


# ---------------------------------------------------------------------------------------- gallery


def test_gallery_items(smoke):
    gallery = splits.load_split(smoke, "test", 72).gallery
    source = smoke.as_data_source(split="test_gallery")
    assert len(gallery) == len(source)
    assert gallery.image_shape == (72, 72, 3)
    image = gallery[5]
    assert image.dtype == np.uint8
    assert gallery.image_ids.dtype == np.int32
    assert gallery.ids[5] == source[5]["id"].decode()
    np.testing.assert_array_equal(image, source[5]["image"][0])


def test_the_cache_changes_nothing(smoke):
    with_cache, without = (splits.load_split(smoke, "test", 72, c).gallery for c in (True, False))
    for row in (3, 0, 3):
        np.testing.assert_array_equal(with_cache[row], without[row])


@pytest.mark.parametrize(("cache", "reads"), [(True, 1), (False, 3)])
def test_the_cache_reads_once(cache, reads):
    gallery, source = gallery_of([gallery_record(0), gallery_record(1)], cache)
    for _ in range(3):
        gallery[1]
    assert source.reads == {1: reads}


def test_the_image_id_of_a_copy_is_that_of_the_first():
    gallery, _ = gallery_of([gallery_record(0), gallery_record(1), gallery_record(2, photo=0)])
    assert gallery.image_ids.tolist() == [0, 1, 0]


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("size", [1, 4, 7, 20, 64])
def test_gallery_batches_are_complete_and_in_order(size, cache):
    gallery, source = gallery_of([gallery_record(row) for row in range(20)], cache)
    rows = np.random.default_rng(0).permutation(20)
    batches = list(gallery.batches(rows, size))
    assert [len(b) for b in batches] == [min(size, 20 - i) for i in range(0, 20, size)]
    expected = np.stack([source.records[row]["image"][0] for row in rows])
    np.testing.assert_array_equal(np.concatenate(batches), expected)


def test_gallery_batches_of_repeated_rows_and_of_none():
    gallery, _ = gallery_of([gallery_record(row) for row in range(3)])
    (batch,) = gallery.batches(np.array([2, 2, 1]), 8)
    np.testing.assert_array_equal(batch[0], batch[1])
    assert list(gallery.batches(np.array([], int), 8)) == []


def test_gallery_batches_can_be_left_early():
    gallery, _ = gallery_of([gallery_record(row) for row in range(20)])
    batches = gallery.batches(np.arange(20), 2)
    assert len(next(batches)) == 2
    batches.close()


# ---------------------------------------------------------------------------------------- batches


def test_a_batch_has_the_documented_arrays(smoke):
    split = splits.load_split(smoke, "train", 72)
    count = len(split.queries)
    batches = pipeline.train_batches(
        split,
        images=PlainImages(split.gallery, "flip_shift"),
        texts=PlainTexts(np.ones((count, 1, 5), np.int32)),
        mentions=np.ones((count, 2), np.float32),
        references=32,
        queries_per_reference=3,  # of eight: 3, 3 and 2
        seed=0,
    )
    batch = next(batches)
    spec = Batch.spec(
        queries=96,
        references=40,
        even=False,
        image_size=72,
        max_length=5,
        attributes=2,
        relevant=1,
    )
    found, expected = (
        {name: (x.shape, x.dtype) for name, x in vars(each).items() if x is not None}
        for each in (batch, spec)
    )
    assert found == expected
    documented = re.findall(r"^ {6}(\w+): ", Batch.__doc__, flags=re.M)
    assert documented == [field.name for field in dataclasses.fields(Batch)]
    assert batch.query_mask.mean() > 0.9
    assert batch.reference_mask.mean() > 0.9


def pairs_of_groups(*sizes):
    """Reference `i` has `sizes[i]` queries; targets are rows of their own, in mixed order."""
    pairs = [(r, 10 + i) for i, r in enumerate(np.repeat(np.arange(len(sizes)), sizes).tolist())]
    np.random.default_rng(3).shuffle(pairs)
    return pairs


def numbers(batch):
    """The queries of a batch that are no padding."""
    return batch.query[batch.query_mask].tolist()


def numbers_of(batches):
    """Those of some batches, in order."""
    return list(itertools.chain.from_iterable(map(numbers, batches)))


@pytest.mark.parametrize("sizes", [(2, 2, 2, 2), (2, 1, 3, 1, 1, 2)])
def test_what_belongs_together_stays_together(sizes):
    split = split_of(pairs_of_groups(*sizes))
    for batch in take(batches_of(split), 4):
        number = batch.text[:, 0] - 1
        np.testing.assert_array_equal(batch.query, number)
        np.testing.assert_array_equal(batch.mentions[:, 0], number)
        np.testing.assert_array_equal(split.queries.target[number], batch.target_id)
        for row, image in zip(batch.target_id, batch.target_image):
            np.testing.assert_array_equal(split.gallery[int(row)], image)
        for row, image in zip(batch.reference_id, batch.reference_image):
            np.testing.assert_array_equal(split.gallery[int(row)], image)
        reference = batch.reference
        if reference is None:
            reference = np.arange(4) * len(batch.reference_id) // 4
        own = batch.reference_id[reference]
        mask = batch.query_mask
        np.testing.assert_array_equal(own[mask], split.queries.reference[number][mask])
        assert set(reference[mask]) == set(np.flatnonzero(batch.reference_mask))


def test_each_epoch_has_each_query_once_in_an_order_of_its_own():
    split = split_of(pairs_of_groups(2, 1, 3, 1, 2))
    batches = batches_of(split, references=1)
    count = batches.packing.units
    epochs = [numbers_of(take(batches, count)) for _ in range(6)]
    assert all(sorted(epoch) == list(range(9)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 2


def test_epochs_go_on_where_batches_do_not_divide_them():
    split = split_of(pairs_of_groups(1, 1, 1, 1, 1))
    batches = take(batches_of(split, references=2, queries=1), 5)
    assert Counter(numbers_of(batches)) == dict.fromkeys(range(5), 2)
    assert all(batch.query_mask.all() for batch in batches)


def test_siblings_come_together():
    split = split_of(pairs_of_groups(4))
    for batch in take(batches_of(split, references=1), 20):
        assert len(set(numbers(batch))) == 2
        assert len(set(split.queries.reference[batch.query])) == len(batch.reference_id) == 1


def test_processes_read_parts_of_one_batch():
    split = split_of(pairs_of_groups(*[2, 1, 1] * 6), images=40)
    arguments = {"references": 4, "augment": "flip"}
    whole = take(batches_of(split, **arguments), 5)
    halves = [take(batches_of(split, **arguments, process=i, processes=2), 5) for i in (0, 1)]
    for one, *parts in zip(whole, *halves):
        assert_equal(one, jax.tree.map(lambda *x: np.concatenate(x), *parts))


def test_texts_are_cut_to_one_of_two_lengths_in_all_processes_alike():
    split = split_of(pairs_of_groups(*[2] * 30), images=80)
    needed = np.full(60, 5)
    needed[7] = 19
    text = np.arange(60)[:, None, None] * np.ones(24, int)
    arguments = dict(
        images=PlainImages(split.gallery),
        texts=PlainTexts(text.astype(np.int32)),
        mentions=np.zeros((60, 1), np.float32),
        references=4,
        queries_per_reference=2,
        seed=0,
        needed=needed,
        max_length=24,
    )
    parts = [pipeline.train_batches(split, **arguments, process=i, num_processes=2) for i in (0, 1)]
    assert parts[0].lengths == (8, 24)
    found = set()
    for one, other in zip(*(take(part, 30) for part in parts)):
        long = 7 in numbers(one) + numbers(other)
        assert one.text.shape[1] == other.text.shape[1] == (24 if long else 8)
        found.add(one.text.shape[1])
    assert found == {8, 24}
    words = pipeline.describe(parts[0], needed, 24)
    assert "8 queries over 4 references, an epoch 7.5 batches; 0.0% of the rows" in words
    assert "padded to 24 tokens, to 8 in about 87% of the batches" in words


def test_a_state_of_an_older_version_goes_on_with_a_warning(caplog):
    split = split_of(pairs_of_groups(2, 3, 1, 2, 2))
    batches = batches_of(split)
    expected = take(batches, 6)[5]
    with caplog.at_level("WARNING"):
        batches.set_state({"next_index": 5})
    assert "of an older version, which drew its batches otherwise" in caplog.text
    assert_equal(next(batches), expected)


def test_known_positives_hold_the_target_and_the_other_annotated_targets():
    split = split_of([(0, 10), (1, 11), (2, 12)], targets={0: [10, 15, 16], 1: [11, 17]})
    expected = {0: {10, 15, 16, -1}, 1: {11, 17, -1}, 2: {12, -1}}
    batch = next(batches_of(split, references=3, queries=1))
    for r, reference in enumerate(batch.reference_id):
        assert set(batch.known_positives[r].tolist()) | {-1} == expected[int(reference)]
        assert batch.known_positives[r, 0] == batch.target_id[r]


def test_known_positives_hold_the_image_id_where_the_target_is_a_copy():
    split = split_of([(0, 12)], photos={12: 5}, targets={0: [12, 14]})
    batch = next(batches_of(split, references=1, queries=1))
    assert batch.target_id.tolist() == [5]
    assert {5, 14} <= set(batch.known_positives.ravel().tolist())


def test_known_positives_hold_the_image_ids_of_other_targets_that_are_copies():
    split = split_of([(0, 10)], photos={14: 6}, targets={0: [10, 14]})
    batch = next(batches_of(split, references=1, queries=1))
    assert {10, 6} <= set(batch.known_positives.ravel().tolist())


def test_one_wording_is_drawn_for_each_query():
    split = split_of(pairs_of_groups(2, 2))
    number = np.arange(len(split.queries), dtype=np.int32)
    batches = pipeline.train_batches(
        split,
        images=PlainImages(split.gallery),
        texts=PlainTexts(np.stack([number, number + 100], axis=1)[..., None]),
        mentions=number[:, None].astype(np.float32),
        references=2,
        queries_per_reference=2,
        seed=0,
    )
    drawn = np.stack([batch.text[:, 0] for batch in take(batches, 20)])
    assert set((drawn % 100).ravel()) == set(number.tolist())
    assert 0.3 < (drawn >= 100).mean() < 0.7


def test_one_seed_one_stream_whatever_the_number_of_threads():
    split = split_of(pairs_of_groups(2, 3, 1, 2))
    one = take(batches_of(split, augment="flip_shift", seed=5, threads=1), 6)
    for a, b in zip(one, take(batches_of(split, augment="flip_shift", seed=5, threads=3), 6)):
        assert_equal(a, b)
    other = take(batches_of(split, augment="flip_shift", seed=6), 6)
    assert any((a.text != b.text).any() for a, b in zip(one, other))


@pytest.mark.parametrize("taken", [0, 1, 5])
def test_a_restored_state_resumes_exactly(taken):
    split = split_of(pairs_of_groups(2, 3, 1, 2, 2))
    batches = batches_of(split, augment="flip_shift")
    take(batches, taken)
    state = json.loads(json.dumps(batches.get_state()))  # as it is stored with a checkpoint
    expected = take(batches, 4)
    resumed = batches_of(split, augment="flip_shift")
    resumed.set_state(state)
    for a, b in zip(expected, take(resumed, 4)):
        assert_equal(a, b)


def test_a_state_goes_back_in_time_too():
    batches = batches_of(split_of(pairs_of_groups(2, 3, 1, 2, 2)))
    state = batches.get_state()
    first = take(batches, 3)
    batches.set_state(state)
    for a, b in zip(first, take(batches, 3)):
        assert_equal(a, b)


# ----------------------------------------------------------------------------------- augmentation


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_augmentations_keep_shape_and_type_and_do_not_write(name):
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    before = image.copy()
    for seed in range(8):
        out = AUGMENTATIONS[name](image, np.random.default_rng(seed))
        assert out.shape == image.shape
        assert out.dtype == np.uint8
        assert set(np.unique(out)) <= set(np.unique(image))
        again = AUGMENTATIONS[name](image, np.random.default_rng(seed))
        np.testing.assert_array_equal(out, again)
    np.testing.assert_array_equal(image, before)


def outcomes(name, image):
    return {AUGMENTATIONS[name](image, np.random.default_rng(s)).tobytes() for s in range(300)}


def test_what_each_augmentation_can_give():
    image = np.random.default_rng(1).integers(0, 256, (32, 32, 3), np.uint8)
    mirrored = image[:, ::-1]
    assert outcomes("none", image) == {image.tobytes()}
    assert outcomes("flip", image) == {image.tobytes(), mirrored.tobytes()}
    rows = np.clip(np.arange(-2, 34), 0, 31)  # 32 / 16 = 2 pixels to all sides
    shifts = {
        side[np.ix_(rows[y : y + 32], rows[x : x + 32])].tobytes()
        for side in (image, mirrored)
        for y in range(5)
        for x in range(5)
    }
    assert len(shifts) == 50
    assert outcomes("flip_shift", image) == shifts


def test_flips_come_up_about_half_of_the_time():
    image = np.random.default_rng(2).integers(0, 256, (8, 8, 3), np.uint8)
    rng = np.random.default_rng(0)
    flipped = sum((AUGMENTATIONS["flip"](image, rng) != image).any() for _ in range(400))
    assert 160 < flipped < 240


def test_training_images_are_augmented_one_by_one():
    split = split_of([(0, 10), (0, 10), (0, 10), (0, 10)])
    plain = split.gallery[10]
    seen = {
        image.tobytes()
        for batch in take(batches_of(split, references=1, queries=4, augment="flip"), 3)
        for image in batch.target_image
    }
    assert seen == {plain.tobytes(), plain[:, ::-1].tobytes()}
    np.testing.assert_array_equal(split.gallery[10], plain)
