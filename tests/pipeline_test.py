"""The pipeline from records to batches, on made records of a few pixels and on `shapes`."""

from __future__ import annotations

import json
import types
from collections import Counter

import numpy as np
import pytest

from dqe_jax.data import examples, pipeline
from dqe_jax.data.builders import shapes
from dqe_jax.data.transforms import AUGMENTATIONS
from dqe_jax.utils.errors import UserError

SIZE = 16
SHAPES_OF_A_BATCH = {
    "reference_image": ((4, 72, 72, 3), np.uint8),
    "reference_photo": ((4,), np.int32),
    "text": ((4, 3, 5), np.int32),
    "target_image": ((4, 3, 72, 72, 3), np.uint8),
    "target_photo": ((4, 3), np.int32),
    "known_positives": ((4, 3, 2), np.int32),
    "mentions": ((4, 3, 2), np.float32),
    "valid": ((4, 3), np.bool_),
}

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
    return {"id": f"item-{row}".encode(), "image": [image], "photo": photo}


def query_record(number, reference, target, targets=None, texts=(b"make it red",)):
    targets = [target] if targets is None else targets
    return {
        "id": f"query-{number}".encode(),
        "texts": list(texts),
        "reference": reference,
        "target": target,
        "targets": targets,
        "valid": sorted(targets),
        "kind": b"color",
    }


def builder_of(queries, gallery):
    sources = {"train": Source(queries), "train_gallery": Source(gallery)}
    return types.SimpleNamespace(
        name="made",
        data_dir="/made",
        info=types.SimpleNamespace(splits=dict.fromkeys(sources)),
        as_data_source=lambda split: sources[split],
    )


def split_of(pairs, *, images=20, targets=None, photos=None, cache=True):
    """A split of queries with these (reference, target) rows."""
    targets, photos = targets or {}, photos or {}
    queries = [query_record(i, r, t, targets.get(i)) for i, (r, t) in enumerate(pairs)]
    gallery = [gallery_record(row, photos.get(row)) for row in range(images)]
    return pipeline.load_split(builder_of(queries, gallery), "train", SIZE, cache)


def batches_of(split, *, references=2, queries=2, augment="none", seed=0, threads=2):
    """Query `i` has the text `[i + 1]` and the mentions `[i]`."""
    number = np.arange(len(split.queries))
    return pipeline.train_batches(
        split,
        text=(number + 1)[:, None].astype(np.int32),
        mentions=number[:, None].astype(np.float32),
        references=references,
        queries_per_reference=queries,
        augment=augment,
        seed=seed,
        num_threads=threads,
        prefetch=4,
    )


def take(batches, count):
    return [next(batches) for _ in range(count)]


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for key in one:
        np.testing.assert_array_equal(one[key], other[key], err_msg=key)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    directory = str(tmp_path_factory.mktemp("shapes"))
    builder = shapes.make_builder(variant="smoke", prepared_dir=directory)
    builder.download_and_prepare()
    return builder


# ------------------------------------------------------------------------------------- load_split


def test_load_split_reads_columns(smoke):
    split = pipeline.load_split(smoke, "test", 72)
    queries, source = split.queries, smoke.as_data_source(split="test")
    assert split.name == "test"
    assert len(queries) == len(source) == 64
    assert queries.reference.dtype == queries.target.dtype == np.int32
    for row in (0, 17, 63):
        record = source[row]
        assert queries.ids[row] == record["id"].decode()
        assert queries.texts[row] == record["texts"][0].decode()
        assert queries.kinds[row] == record["kind"].decode()
        assert queries.reference[row] == record["reference"]
        assert queries.target[row] == record["target"]
        assert list(queries.targets[row]) == list(record["targets"])
        assert list(queries.valid[row]) == list(record["valid"])
        assert queries.targets[row].dtype == queries.valid[row].dtype == np.int32


def test_load_split_joins_captions_and_keeps_order_beyond_a_chunk():
    count = pipeline.READ_CHUNK + 3
    queries = [query_record(i, 0, 1, texts=(b"%d" % i, b" ", b"long")) for i in range(count)]
    split = pipeline.load_split(builder_of(queries, [gallery_record(0)] * 2), "train", SIZE)
    assert split.queries.texts == [f"{i} and long" for i in range(count)]
    assert split.queries.ids == [f"query-{i}" for i in range(count)]


def test_load_split_reads_no_image():
    builder = builder_of([query_record(0, 0, 1)], [gallery_record(0), gallery_record(1)])
    pipeline.load_split(builder, "train", SIZE)
    assert not builder.as_data_source("train_gallery").reads


def test_truth_may_be_unknown():
    record = query_record(0, 0, 1) | {"valid": []}
    split = pipeline.load_split(builder_of([record], [gallery_record(0)] * 2), "train", SIZE)
    assert split.queries.valid[0].shape == (0,)


def test_an_unknown_split_is_named_with_those_that_exist(smoke):
    with pytest.raises(UserError, match=r"no split 'dev'; it has \w+, \w+, \w+\.$") as error:
        pipeline.load_split(smoke, "dev", 72)
    assert all(split in str(error.value) for split in examples.SPLITS)
    assert "gallery" not in str(error.value)


def test_an_empty_split_is_an_error():
    with pytest.raises(UserError, match="'train' of made in /made has no query"):
        pipeline.load_split(builder_of([], [gallery_record(0)]), "train", SIZE)


# ---------------------------------------------------------------------------------------- gallery


def test_gallery_items(smoke):
    gallery = pipeline.load_split(smoke, "test", 72).gallery
    source = smoke.as_data_source(split="test_gallery")
    assert len(gallery) == len(source)
    assert gallery.image_shape == (72, 72, 3)
    image, photo = gallery[5]
    assert type(photo) is int
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, source[5]["image"][0])


def test_the_cache_changes_nothing(smoke):
    with_cache, without = (pipeline.load_split(smoke, "test", 72, c).gallery for c in (True, False))
    for row in (3, 0, 3):
        np.testing.assert_array_equal(with_cache[row][0], without[row][0])
        assert with_cache[row][1] == without[row][1]


@pytest.mark.parametrize(("cache", "reads"), [(True, 1), (False, 3)])
def test_the_cache_reads_once(cache, reads):
    source = Source([gallery_record(0), gallery_record(1)])
    gallery = pipeline.Gallery(source, SIZE, cache)
    for _ in range(3):
        gallery[1]
    assert source.reads == {1: reads}


def test_the_image_id_of_a_copy_is_that_of_the_first():
    source = Source([gallery_record(0), gallery_record(1), gallery_record(2, photo=0)])
    for cache in (True, False):
        gallery = pipeline.Gallery(source, SIZE, cache)
        assert [gallery[row][1] for row in (0, 1, 2, 2)] == [0, 1, 0, 0]


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("size", [1, 4, 7, 20, 64])
def test_gallery_batches_are_complete_and_in_order(size, cache):
    source = Source([gallery_record(row) for row in range(20)])
    gallery = pipeline.Gallery(source, SIZE, cache)
    rows = np.random.default_rng(0).permutation(20)
    batches = list(gallery.batches(rows, size))
    assert [len(b) for b in batches] == [min(size, 20 - i) for i in range(0, 20, size)]
    expected = np.stack([source.records[row]["image"][0] for row in rows])
    np.testing.assert_array_equal(np.concatenate(batches), expected)


def test_gallery_batches_of_repeated_rows_and_of_none():
    gallery = pipeline.Gallery(Source([gallery_record(row) for row in range(3)]), SIZE)
    (batch,) = gallery.batches(np.array([2, 2, 1]), 8)
    np.testing.assert_array_equal(batch[0], batch[1])
    assert list(gallery.batches(np.array([], int), 8)) == []


def test_gallery_batches_can_be_left_early():
    gallery = pipeline.Gallery(Source([gallery_record(row) for row in range(20)]), SIZE)
    batches = gallery.batches(np.arange(20), 2)
    assert len(next(batches)) == 2
    batches.close()


# ---------------------------------------------------------------------------------------- batches


def test_a_batch_has_the_documented_arrays(smoke):
    split = pipeline.load_split(smoke, "train", 72)
    count = len(split.queries)
    batches = pipeline.train_batches(
        split,
        text=np.ones((count, 5), np.int32),
        mentions=np.ones((count, 2), np.float32),
        references=4,
        queries_per_reference=3,
        augment="flip_shift",
        seed=0,
    )
    batch = next(batches)
    assert {k: (v.shape, v.dtype.type) for k, v in batch.items()} == SHAPES_OF_A_BATCH
    documented = {line.split("`")[1] for line in pipeline.__doc__.splitlines() if "| `" in line}
    assert set(batch) == documented
    assert batch["valid"].all()


def pairs_of_groups(*sizes):
    """Reference `i` has `sizes[i]` queries; targets are rows of their own, in mixed order."""
    pairs = [(r, 10 + i) for i, r in enumerate(np.repeat(np.arange(len(sizes)), sizes).tolist())]
    np.random.default_rng(3).shuffle(pairs)
    return pairs


def test_what_belongs_together_stays_together():
    split = split_of(pairs_of_groups(2, 2, 2, 2))
    for batch in take(batches_of(split), 4):
        number = batch["text"][..., 0] - 1  # [R, Q], the queries
        np.testing.assert_array_equal(batch["mentions"][..., 0], number)
        reference = split.queries.reference[number]
        np.testing.assert_array_equal(reference[:, 0], reference[:, 1])
        np.testing.assert_array_equal(reference[:, 0], batch["reference_photo"])
        np.testing.assert_array_equal(split.queries.target[number], batch["target_photo"])
        for r in range(2):
            image = split.gallery[int(reference[r, 0])][0]
            np.testing.assert_array_equal(batch["reference_image"][r], image)
            for q in range(2):
                image = split.gallery[int(batch["target_photo"][r, q])][0]
                np.testing.assert_array_equal(batch["target_image"][r, q], image)


def test_each_epoch_has_each_reference_once_in_an_order_of_its_own():
    split = split_of(pairs_of_groups(2, 1, 3, 1, 2))
    batches = batches_of(split, references=1)
    epochs = [[int(b["reference_photo"][0]) for b in take(batches, 5)] for _ in range(6)]
    assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 2


def test_epochs_go_on_where_batches_do_not_divide_them():
    split = split_of(pairs_of_groups(1, 1, 1, 1, 1))
    batches = take(batches_of(split, references=2), 5)
    seen = Counter(int(photo) for b in batches for photo in b["reference_photo"])
    assert seen == dict.fromkeys(range(5), 2)


def test_queries_of_a_reference_are_distinct_and_all_drawn_in_time():
    split = split_of(pairs_of_groups(4))
    drawn = [b["text"][0, :, 0].tolist() for b in take(batches_of(split, references=1), 20)]
    assert all(len(set(pair)) == 2 for pair in drawn)
    assert {number for pair in drawn for number in pair} == {1, 2, 3, 4}


def test_references_with_too_few_queries_are_padded_with_what_is_there():
    split = split_of(pairs_of_groups(1, 2, 5))
    for batch in take(batches_of(split, references=3, queries=4), 3):
        for r, reference in enumerate(batch["reference_photo"]):
            count = {0: 1, 1: 2, 2: 4}[int(reference)]
            assert batch["valid"][r].tolist() == [q < count for q in range(4)]
            real = batch["text"][r, :count, 0].tolist()
            assert len(set(real)) == count
            assert set(batch["text"][r, :, 0].tolist()) == set(real)


def test_known_positives_hold_the_target_and_the_other_annotated_targets():
    split = split_of([(0, 10), (1, 11), (2, 12)], targets={0: [10, 15, 16], 1: [11, 17]})
    expected = {0: {10, 15, 16, -1}, 1: {11, 17, -1}, 2: {12, -1}}
    batch = next(batches_of(split, references=3, queries=1))
    for r, reference in enumerate(batch["reference_photo"]):
        assert set(batch["known_positives"][r, 0].tolist()) | {-1} == expected[int(reference)]
        assert batch["known_positives"][r, 0, 0] == batch["target_photo"][r, 0]


def test_known_positives_hold_the_image_id_where_the_target_is_a_copy():
    split = split_of([(0, 12)], photos={12: 5}, targets={0: [12, 14]})
    batch = next(batches_of(split, references=1, queries=1))
    assert batch["target_photo"].tolist() == [[5]]
    assert {5, 14} <= set(batch["known_positives"].ravel().tolist())


def test_known_positives_hold_the_image_ids_of_other_targets_that_are_copies():
    split = split_of([(0, 10)], photos={14: 6}, targets={0: [10, 14]})
    batch = next(batches_of(split, references=1, queries=1))
    assert {10, 6} <= set(batch["known_positives"].ravel().tolist())


def test_one_seed_one_stream_whatever_the_number_of_threads():
    split = split_of(pairs_of_groups(2, 3, 1, 2))
    one = take(batches_of(split, augment="flip_shift", seed=5, threads=1), 6)
    for a, b in zip(one, take(batches_of(split, augment="flip_shift", seed=5, threads=3), 6)):
        assert_equal(a, b)
    other = take(batches_of(split, augment="flip_shift", seed=6), 6)
    assert any((a["text"] != b["text"]).any() for a, b in zip(one, other))


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
    plain = split.gallery[10][0]
    seen = {
        image.tobytes()
        for batch in take(batches_of(split, references=1, queries=4, augment="flip"), 3)
        for image in batch["target_image"][0]
    }
    assert seen == {plain.tobytes(), plain[:, ::-1].tobytes()}
    np.testing.assert_array_equal(split.gallery[10][0], plain)
