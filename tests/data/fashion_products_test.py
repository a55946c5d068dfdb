"""Tests of the fashion products: on small made copies, and on the real photos where they are."""

import collections
import dataclasses
import functools
import hashlib
import io
import json
import os
import pathlib
import random
import resource
import signal
import statistics
import struct
import tarfile
import zlib

import numpy as np
import pytest
from etils import epath
from PIL import Image

from dqe_jax.data import examples
from dqe_jax.data.builders import fashion_products as fp
from dqe_jax.data.builders.fashion_raw import Photos
from dqe_jax.data.builders.fashion_texts import ATTRIBUTES, GRAMMAR
from dqe_jax.data.made import known as known_words
from dqe_jax.data.made import queries as made_queries
from dqe_jax.data.made.galleries import QUERIES_PER_REFERENCE, split_of
from dqe_jax.data.made.grammar import NA, changes
from dqe_jax.data.made.queries import TWO_CHANGES, Product, asked_values, neighbours
from dqe_jax.data.photos import decode_photo
from dqe_jax.utils import errors

REAL = pathlib.Path(__file__).resolve().parents[3] / "shared" / "fashion_products"
COLUMNS = [
    *("id", "gender", "masterCategory", "subCategory", "articleType", "baseColour"),
    *("season", "year", "usage"),
]
COUNT = 150
SIZE = 16
KINDS = {attribute.name: attribute.kind for attribute in GRAMMAR.attributes}
make_queries = functools.partial(made_queries.make_queries, fp.RULES)


# --- Made copies ----------------------------------------------------------------------------------


def encoded(seed, size=(24, 24), kind="JPEG"):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


def plain_png(seed, side=24):
    """A PNG whose bytes depend on no encoder: it is not compressed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (side, 3 * side), np.uint8)
    raw = b"".join(b"\0" + line.tobytes() for line in pixels)
    stored = struct.pack("<BHH", 1, len(raw), len(raw) ^ 0xFFFF) + raw
    blocks = (
        (b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)),
        (b"IDAT", b"\x78\x01" + stored + struct.pack(">I", zlib.adler32(raw))),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in blocks
    )


def made_rows(count=COUNT):
    rng = random.Random(0)
    return [
        [
            *(str(10000 + i), rng.choice(["Men", "Women"]), "Apparel", "Topwear"),
            *(rng.choice(["Tshirts", "Sandals"]), rng.choice(["Red", "Navy Blue", "NA"])),
            *(rng.choice(["Summer", "Fall"]), "2011", rng.choice(["Casual", "Sports"])),
        ]
        for i in range(count)
    ]


def made_photos(rows):
    return {row[0]: encoded(int(row[0])) for row in rows}


def write(directory, rows, photos, *, columns=COLUMNS, tar=True, end="\r\n"):
    directory.mkdir(parents=True, exist_ok=True)
    table = end.join(",".join(row) for row in [columns, *rows]) + end
    (directory / "styles.csv").write_bytes(table.encode())
    if not tar:
        (directory / "images").mkdir()
        for photo_id, data in photos.items():
            (directory / "images" / f"{photo_id}.jpg").write_bytes(data)
        return directory
    with tarfile.open(directory / "images.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
        for photo_id, data in photos.items():
            member = tarfile.TarInfo(f"images/{photo_id}.jpg")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return directory


def prepare(raw_dir, prepared_dir, *, size=SIZE, max_bad_fraction=None, **options):
    builder = fp.make_builder(
        raw_dir=str(raw_dir), prepared_dir=str(prepared_dir), image_size=size, **options
    )
    if max_bad_fraction is not None:
        builder.builder_config.max_bad_fraction = max_bad_fraction
    builder.download_and_prepare()
    return builder


def plain(value):
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, (list, np.ndarray)):
        return [plain(v) for v in value]
    return value.item() if isinstance(value, np.generic) else value


def records(builder, split, *, images=False):
    """All records of a split, without the images unless asked for."""
    source = builder.as_data_source(split)
    return [
        {k: plain(v) for k, v in source[i].items() if images or k != "image"}
        for i in range(len(source))
    ]


def everything(builder, *, images=False):
    return {split: records(builder, split, images=images) for split in builder.info.splits}


def values_of(item, relevant=ATTRIBUTES):
    stated = dict(pair.split("=", 1) for pair in item["attributes"])
    return tuple(stated[name] if name in relevant else None for name in ATTRIBUTES)


def check_properties(data, relevant=ATTRIBUTES):
    """What holds for every copy; `valid` against all tuples of the gallery."""
    asked = {}
    for split in examples.SPLITS:
        gallery = data[examples.gallery_split(split)]
        queries = data[split]
        tuples = [values_of(item, relevant) for item in gallery]
        photo = [item["photo"] for item in gallery]
        by_tuple = collections.defaultdict(list)
        for row, values in enumerate(tuples):
            by_tuple[values].append(row)
            assert photo[photo[row]] == photo[row] <= row
        asked[split] = {pair for query in queries for pair in query["attributes"]}
        per_reference = collections.Counter()
        seen_tuples = set()
        for query in queries:
            reference, target = query["reference"], query["target"]
            old, new = tuples[reference], tuples[target]
            changed = changes(old, new)
            assert 1 <= len(changed) <= 2
            assert query["attributes"] == [f"{ATTRIBUTES[i]}={new[i]}" for i in changed]
            one = KINDS[ATTRIBUTES[changed[0]]]
            assert query["kinds"] == [one if len(changed) == 1 else TWO_CHANGES]
            assert query["valid"] == by_tuple[new]
            assert query["targets"][0] == target
            assert len(set(query["targets"])) == len(query["targets"])
            assert set(query["targets"]) <= set(query["valid"])
            copies = {row for row in by_tuple[new] if photo[row] == photo[target]}
            assert copies <= set(query["targets"])
            assert photo[reference] not in {photo[row] for row in query["targets"]}
            assert len(query["texts"]) == 1
            text = query["texts"][0]
            assert text == text.lower() == " ".join(text.split()) != ""
            assert "{" not in text
            assert query["photo"] == -1
            assert (reference, new) not in seen_tuples
            seen_tuples.add((reference, new))
            per_reference[reference] += 1
        assert len({query["id"] for query in queries}) == len(queries)
        assert max(per_reference.values()) <= QUERIES_PER_REFERENCE[split]
    for split in ("validation", "test"):
        assert asked[split] <= asked["train"]
    ids = [i["id"] for split in examples.SPLITS for i in data[examples.gallery_split(split)]]
    assert len(set(ids)) == len(ids)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A made copy in a tar and its prepared data."""
    root = tmp_path_factory.mktemp("made")
    rows = made_rows()
    raw = write(root / "raw", rows, made_photos(rows))
    return raw, prepare(raw, root / "prepared")


# --- Prepared data --------------------------------------------------------------------------------


def test_properties_of_made_copy(made):
    _, builder = made
    data = everything(builder)
    check_properties(data)
    galleries = [data[examples.gallery_split(split)] for split in examples.SPLITS]
    assert sum(map(len, galleries)) == COUNT
    for gallery in galleries:  # In the order of the table.
        assert [item["id"] for item in gallery] == sorted(item["id"] for item in gallery)
    assert "year=2011" in data["test_gallery"][0]["attributes"]
    metadata = builder.info.metadata
    assert metadata["rows"] == metadata["products"] == COUNT
    assert metadata["lost_rows"] == metadata["photos_without_row"] == 0
    for split in examples.SPLITS:
        counts = metadata["splits"][split]
        assert counts["queries"] == len(data[split]) == sum(counts["kinds"].values())
        assert counts["products"] == len(data[examples.gallery_split(split)])
        valid = [len(query["valid"]) for query in data[split]]
        assert counts["median_valid"] == statistics.median(valid)


def test_images_are_the_photos(made):
    raw, builder = made
    photos = Photos(epath.Path(raw))
    item = builder.as_data_source("test_gallery")[3]
    expected, _ = decode_photo(photos.read(item["id"].decode()), SIZE, "pad", 512)
    np.testing.assert_array_equal(item["image"][0], expected)
    assert len(builder.as_data_source("test")[0]["image"]) == 0


def test_preparing_again_gives_the_same_records(made, tmp_path):
    raw, builder = made
    again = prepare(raw, tmp_path)
    assert everything(again, images=True) == everything(builder, images=True)
    assert again.info.metadata == builder.info.metadata


def test_the_format_changes_the_images_alone(made, tmp_path):
    raw, builder = made
    jpeg = prepare(raw, tmp_path, image_format="jpeg")
    assert everything(jpeg) == everything(builder)  # splits and copies are those of the photos
    one, other = (each.as_data_source("test_gallery")[3]["image"][0] for each in (jpeg, builder))
    assert 0 < np.abs(one.astype(int) - other).mean() < 8


def test_folder_gives_the_same_as_tar(made, tmp_path):
    _, builder = made
    rows = made_rows()
    raw = write(tmp_path / "raw", rows, made_photos(rows), tar=False, end="\n")
    folder = prepare(raw, tmp_path / "prepared")
    assert everything(folder, images=True) == everything(builder, images=True)


def test_configuration_names_copy_and_size(made, tmp_path):
    raw, builder = made
    name = builder.builder_config.name
    assert name.startswith(f"{SIZE}px-pad-")
    assert len(name) == len(f"{SIZE}px-pad-") + 8
    rows = made_rows()
    photos = made_photos(rows)

    def name_of(directory, size=SIZE, preprocess="pad", image_format="png"):
        builder = fp.make_builder(
            raw_dir=str(directory),
            prepared_dir=str(tmp_path),
            image_size=size,
            preprocess=preprocess,
            image_format=image_format,
        )
        return builder.builder_config.name

    assert name_of(write(tmp_path / "same", rows, photos)) == name
    assert name_of(write(tmp_path / "folder", rows, photos, tar=False)) == name
    assert name_of(tmp_path / "same", preprocess="crop") == name.replace("pad", "crop")
    jpeg = name_of(tmp_path / "same", image_format="jpeg")
    assert jpeg == name.replace("pad-", "pad-jpeg-")
    assert name_of(write(tmp_path / "fewer", rows[1:], photos)) != name
    assert name_of(write(tmp_path / "other", rows, photos | {"10000": b"other"})) != name
    assert name_of(raw, size=8) != name


def test_public_table_with_commas_in_names_and_empty_values(made, tmp_path):
    _, builder = made
    rows = made_rows()
    names = ["Plain", 'Gini, Jony "Girls", Black', "'Quote", '"Opens a quote, and more', ""]
    named = [[*row, names[i % len(names)]] for i, row in enumerate(rows)]
    for row in named:
        row[5] = "" if row[5] == "NA" else row[5]
    columns = [*COLUMNS, "productDisplayName"]
    raw = write(tmp_path / "raw", named, made_photos(rows), columns=columns)
    assert everything(prepare(raw, tmp_path / "prepared")) == everything(builder)


# --- Relevance ------------------------------------------------------------------------------------

# Of a made copy: its name, a digest of its records without images, and products and queries of each
# split. If this changes on purpose, raise the builder's VERSION: prepared copies would be stale.
FINE = ("16px-pad-d144da5c", "7e543d35a764830b", (102, 13, 35), (792, 22, 69))


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A made copy prepared twice: with fine and with coarse relevance."""
    root = tmp_path_factory.mktemp("two")
    rows = made_rows()
    raw = write(root / "raw", rows, {row[0]: plain_png(int(row[0])) for row in rows})
    return tuple(
        prepare(raw, root / "data", **options) for options in ({}, {"relevance": "coarse"})
    )


def test_fine_relevance_is_the_default_and_what_it_was(two):
    builder, _ = two
    config = builder.builder_config
    data = everything(builder)
    digest = hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]
    products = tuple(len(data[examples.gallery_split(split)]) for split in examples.SPLITS)
    queries = tuple(len(data[split]) for split in examples.SPLITS)
    assert (config.name, digest, products, queries) == FINE
    named = fp.make_builder(
        raw_dir=config.raw_dir, prepared_dir=builder.data_dir, image_size=SIZE, relevance="fine"
    )
    assert named.builder_config == config


def test_coarse_relevance_is_of_article_and_color_alone(two):
    fine, coarse = two
    size, preprocess, digest = fine.builder_config.name.split("-")
    assert coarse.builder_config.name == f"{size}-{preprocess}-coarse-{digest}"
    data = everything(coarse)
    check_properties(data, ("baseColour", "articleType"))
    valid = {}
    for split in examples.SPLITS:
        # The galleries are the same, with all attributes stated.
        name = examples.gallery_split(split)
        assert data[name] == records(fine, name)
        assert data[name][0]["attributes"][2].startswith("gender=")
        valid[split] = [len(query["valid"]) for query in data[split]]
        for query in data[split]:
            words = query["texts"][0].replace(",", "").split()
            others = ("men", "women", "summer", "fall", "casual", "sports", "sporty")
            assert not {word.removesuffix("'s") for word in words}.intersection(others)
            assert query["kinds"][0] in ("color", "article", TWO_CHANGES)
    fine_valid = [len(query["valid"]) for query in records(fine, "train")]
    assert statistics.median(valid["train"]) > 4 * statistics.median(fine_valid)
    assert max(len(query["targets"]) for query in data["train"]) == 1


# --- Rules: duplicates ----------------------------------------------------------------------------


def test_identical_photos_share_split_and_photo(tmp_path):
    rows = made_rows()
    photos = made_photos(rows)
    # Copies: of bytes with the same and with other attributes, and of pixels with other bytes.
    rows[1][1:] = rows[0][1:]
    photos["10001"] = photos["10000"]
    rows[3][5], rows[2][5] = "Red", "Navy Blue"
    photos["10003"] = photos["10002"]
    photos["10005"] = photos["10004"] + b"\0 after the end of the image"
    rows[5][1:] = rows[4][1:]
    data = everything(
        prepare(write(tmp_path / "raw", rows, photos), tmp_path / "prepared"), images=True
    )
    check_properties(data)
    place = {
        item["id"]: (split, row, item)
        for split in examples.SPLITS
        for row, item in enumerate(data[examples.gallery_split(split)])
    }
    for first, copy in (("10000", "10001"), ("10002", "10003"), ("10004", "10005")):
        assert place[first][0] == place[copy][0]
        assert place[copy][2]["photo"] == place[first][1] != place[copy][1]
        assert place[copy][2]["image"] == place[first][2]["image"]
    # Other attributes: a member of the gallery and of valid sets, not a reference or target.
    split = place["10002"][0]
    ambiguous = {place["10002"][1], place["10003"][1]}
    for query in data[split]:
        assert query["reference"] not in ambiguous
        assert not ambiguous & set(query["targets"])


def product(i, *values, photo=None):
    return Product(str(i), values, i if photo is None else photo)


def test_targets_hold_copies_of_the_target():
    old = ("Red", "Tshirts", "Men", "Casual", "Fall")
    new = ("Blue", *old[1:])
    products = [product(0, *old), *(product(i, *new, photo=1) for i in (1, 2)), product(3, *new)]
    queries, dropped = make_queries(products, 2)
    (query,) = [query for query in queries if query.reference == 0]
    assert dropped == 0
    assert query.relevant == [1, 2, 3]
    assert sorted(query.known_positives) in ([1, 2], [3])
    assert query.known_positives[0] == query.target
    assert query.attributes == ["baseColour=Blue"]
    assert query.kinds == ("color",)


def test_targets_hold_answers_to_the_same_question():
    old = ("Red", "Tshirts", "Men", "Casual", "Fall")
    new = ("Blue", *old[1:])
    # Forty products with one photo ask for the same in few words: some of them in the same.
    products = [product(i, *old, photo=0) for i in range(40)]
    products += [product(i, *new) for i in range(40, 60)]
    queries, _ = make_queries(products, 1)
    answers = collections.defaultdict(set)
    for query in queries[:40]:
        answers[query.texts[0]].add(query.target)
    assert max(map(len, answers.values())) > 1
    for query in queries:
        if query.reference < 40:
            assert set(query.known_positives) == answers[query.texts[0]]
            assert query.relevant == list(range(40, 60))
        else:  # All the red ones are copies of one photo.
            assert query.known_positives[1:] == sorted(set(range(40)) - {query.target})


def test_copy_of_the_reference_is_never_a_target():
    old = ("Red", "Tshirts", "Men", "Casual", "Fall")
    blue = ("Blue", *old[1:])
    assert make_queries([product(0, *old), product(1, *blue, photo=0)], 2) == ([], 0)
    queries, _ = make_queries(
        [product(0, *old), product(1, *blue, photo=0), product(2, *blue), product(3, *old)], 2
    )
    assert {(query.reference, query.target) for query in queries} == {(2, 3), (3, 2)}
    assert queries[0].relevant == [0, 3]


# --- Rules: queries -------------------------------------------------------------------------------


def random_products(count, seed=0):
    rng = random.Random(seed)
    sizes = (6, 5, 2, 3, 4)
    return [
        product(i, *(f"{name}{rng.randrange(n)}" for name, n in zip("abcde", sizes)))
        for i in range(count)
    ]


def test_neighbours_equal_brute_force():
    tuples = {p.values for p in random_products(120)}
    found = neighbours(tuples)
    assert found.keys() == tuples
    for values in tuples:
        expected = collections.defaultdict(list)
        for other in sorted(tuples):
            if len(changed := changes(values, other)) in (1, 2):
                expected[changed].append(other)
        assert found[values] == expected


def test_kinds_are_balanced():
    queries, _ = make_queries(random_products(600), 8)
    kinds = collections.Counter(query.kinds[0] for query in queries)
    assert kinds.keys() == {*KINDS.values(), TWO_CHANGES}
    assert 0.25 < kinds.pop(TWO_CHANGES) / len(queries) < 0.36
    # Though five colors can be asked for, and only one other gender.
    assert kinds["color"] < 3 * kinds["gender"]


def test_unknown_values_are_dropped():
    products = random_products(200)
    queries, none = make_queries(products, 2)
    asked = asked_values(queries)
    assert none == 0
    known = asked - {("baseColour", "a0")}
    kept, dropped = make_queries(products, 2, known)
    assert dropped > 0
    assert len(kept) == len(queries) - dropped
    assert asked_values(kept) == known
    assert {q.texts[0] for q in kept} <= {q.texts[0] for q in queries}


def test_split_fractions():
    counts = collections.Counter(split_of(str(i), fp.SPLIT_SALT) for i in range(20000))
    assert counts["train"] / 20000 == pytest.approx(0.72, abs=0.015)
    assert counts["validation"] / 20000 == pytest.approx(0.08, abs=0.015)
    assert counts["test"] / 20000 == pytest.approx(0.20, abs=0.015)


def test_words():
    assert known_words.article_words("Tshirts") == ("a t-shirt", "t-shirts")
    assert known_words.article_words("Watches") == ("a watch", "watches")
    assert known_words.article_words("Dresses") == ("a dress", "dresses")
    assert known_words.article_words("Flip Flops") == ("a pair of flip flops", "flip flops")
    assert known_words.article_words("Umbrellas") == ("an umbrella", "umbrellas")
    assert known_words.article_words("Mobile Pouch") == ("a mobile pouch", "mobile pouches")
    assert known_words.article_words("Travel Accessory") == (
        "a travel accessory",
        "travel accessories",
    )


def test_texts_vary_and_say_the_change():
    rng = random.Random(0)
    old = ("Red", "Tshirts", "Men", "Casual", "Fall")
    for position, value, words in (
        (0, "Navy Blue", ("navy blue",)),
        (1, "Sandals", ("sandals",)),
        (2, "Women", ("women",)),
        (3, "Sports", ("sport",)),
        (4, "Winter", ("winter",)),
    ):
        new = (*old[:position], value, *old[position + 1 :])
        texts = {GRAMMAR.modification(old, new, rng) for _ in range(300)}
        assert len(texts) >= 8
        assert all(any(word in text for word in words) for text in texts)
        named = [f" {old[position].lower().replace('tsh', 't-sh')[:4]}" in text for text in texts]
        assert any(named)
        assert not all(named)
        # A value that is not stated is said so, and never named as the old one.
        unstated = (*old[:position], NA, *old[position + 1 :])
        for text in [GRAMMAR.modification(old, unstated, rng) for _ in range(20)]:
            assert any(word in text for word in ("stated", "any given"))
        for text in [GRAMMAR.modification(unstated, new, rng) for _ in range(50)]:
            assert " na" not in text.replace("navy", "")
    both = {GRAMMAR.modification(old, ("Blue", *old[1:4], "Winter"), rng) for _ in range(50)}
    assert len(both) > 40
    assert all("blue" in text and "winter" in text for text in both)


# --- Bad input ------------------------------------------------------------------------------------


def bomb():
    out = io.BytesIO()
    Image.new("1", (8000, 8000)).save(out, "PNG")
    return out.getvalue()


def header_of_a_huge_png():
    out = io.BytesIO()
    Image.new("L", (2, 2)).save(out, "PNG")
    data = bytearray(out.getvalue())
    data[16:24] = (60000).to_bytes(4, "big") * 2
    return bytes(data)


def test_bad_photos_are_dropped_and_named(tmp_path, caplog):
    rows = made_rows()
    photos = made_photos(rows)
    del photos["10000"]
    photos["10001"] = photos["10001"][: len(photos["10001"]) // 2]
    photos["10002"] = b"<html>not found</html>"
    photos["10003"] = bomb()
    photos["10004"] = b""
    photos["10005"] = header_of_a_huge_png()
    rows[6] = rows[6][:4]  # An incomplete row.
    photos["99999"] = encoded(1)
    raw = write(tmp_path / "raw", rows, photos)
    with caplog.at_level("WARNING"):
        builder = prepare(raw, tmp_path / "prepared", max_bad_fraction=0.1)
    data = everything(builder)
    check_properties(data)
    lost = {str(10000 + i) for i in range(7)}
    kept = {i["id"] for split in examples.SPLITS for i in data[examples.gallery_split(split)]}
    assert kept == {row[0] for row in rows} - lost
    metadata = builder.info.metadata
    assert metadata["lost_rows"] == 7
    assert metadata["lost"].keys() == lost
    assert metadata["lost"]["10000"] == "images/10000.jpg is missing"
    assert "8000 x 8000 pixels" in metadata["lost"]["10003"]
    assert metadata["photos_without_row"] == 1
    assert metadata["photos_without_row_ids"] == ["99999"]
    messages = " ".join(record.getMessage() for record in caplog.records)
    assert "7 rows lost" in messages
    assert "1 photos without a row: 99999" in messages


def test_repeated_ids_keep_the_first(made, tmp_path):
    _, builder = made
    rows = made_rows()
    repeated = [*rows, [rows[0][0], *rows[1][1:]]]
    again = prepare(write(tmp_path / "raw", repeated, made_photos(rows)), tmp_path / "prepared")
    assert everything(again) == everything(builder)
    assert again.info.metadata["duplicate_ids"] == ["10000"]


def test_too_many_bad_photos(tmp_path):
    rows = made_rows()
    photos = made_photos(rows)
    del photos["10007"]
    raw = write(tmp_path / "one", rows, photos)
    assert prepare(raw, tmp_path / "prepared").info.metadata["lost_rows"] == 1  # Below 1%.
    del photos["10008"]
    raw = write(tmp_path / "two", rows, photos)
    with pytest.raises(errors.UserError, match=r"2 of 150 products .*10007.* is missing") as e:
        prepare(raw, tmp_path / "prepared")
    assert str(raw) in str(e.value)
    assert "--data_dir" in str(e.value)


def check_error(raw_dir, tmp_path, *parts):
    with pytest.raises(errors.UserError) as e:
        prepare(raw_dir, tmp_path / "prepared")
    message = str(e.value)
    for part in ("--data_dir", *parts):
        assert part in message
    assert "\n" not in message
    assert message.endswith(".")


def test_missing_directory(tmp_path):
    check_error(tmp_path / "none", tmp_path, "none", "does not exist")
    check_error("", tmp_path, "does not exist")


def test_missing_table(tmp_path):
    (tmp_path / "raw").mkdir()
    check_error(tmp_path / "raw", tmp_path, "raw has no styles.csv")


@pytest.mark.parametrize("column", ["id", *ATTRIBUTES])
def test_missing_column(tmp_path, column):
    columns = ["other" if name == column else name for name in COLUMNS]
    write(tmp_path / "raw", made_rows(3), {}, columns=columns)
    check_error(tmp_path / "raw", tmp_path, "styles.csv", f"no column '{column}'")


def test_empty_table(tmp_path):
    write(tmp_path / "raw", [], {})
    check_error(tmp_path / "raw", tmp_path, "styles.csv", "'train' empty")
    (tmp_path / "raw" / "styles.csv").write_text("")
    check_error(tmp_path / "raw", tmp_path, "styles.csv", "it has none")


def test_missing_photos(tmp_path):
    raw = write(tmp_path / "raw", made_rows(3), {})
    (raw / "images.tar").unlink()
    check_error(raw, tmp_path, str(raw), "neither images.tar nor a folder images/")


def test_damaged_archive(tmp_path):
    rows = made_rows(20)
    raw = write(tmp_path / "raw", rows, made_photos(rows))
    data = (raw / "images.tar").read_bytes()
    for damaged in (data[: len(data) // 2], b"not an archive" * 100, b""):
        (raw / "images.tar").write_bytes(damaged)
        with pytest.raises(errors.UserError, match="not a complete uncompressed tar"):
            prepare(raw, tmp_path / "prepared")


ENDLESS = {"pipe": os.mkfifo, "device": lambda path: os.symlink("/dev/zero", path)}


@pytest.fixture
def alarm():
    """Ends a test that waits for a file without an end, or reads one until the memory is full."""

    def ring(*_):
        raise TimeoutError("it would wait for ever")

    before = signal.signal(signal.SIGALRM, ring)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    held = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + (4 << 30), limits[1]))
    signal.alarm(60)
    yield
    signal.alarm(0)
    resource.setrlimit(resource.RLIMIT_AS, limits)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("make", ENDLESS.values(), ids=ENDLESS.keys())
def test_files_without_an_end(tmp_path, alarm, make):
    """A photo of that kind counts as lost; a table or an archive is an error."""
    rows = made_rows()
    raw = write(tmp_path / "raw", rows, made_photos(rows), tar=False)
    photo = raw / "images" / f"{rows[3][0]}.jpg"
    photo.unlink()
    make(photo)
    builder = prepare(raw, tmp_path / "prepared", max_bad_fraction=0.1)
    lost = builder.info.metadata["lost"]
    assert lost == {rows[3][0]: f"images/{rows[3][0]}.jpg is no regular file"}
    make(raw / "images.tar")
    with pytest.raises(errors.UserError, match=r"images\.tar is not .*no regular file"):
        prepare(raw, tmp_path / "prepared")
    (raw / "styles.csv").unlink()
    make(raw / "styles.csv")
    check_error(raw, tmp_path, "styles.csv")


def test_empty_split(tmp_path):
    rows = made_rows(2)
    raw = write(tmp_path / "raw", rows, made_photos(rows))
    check_error(raw, tmp_path, "styles.csv", "empty", "more products")


def test_size_out_of_range(made, tmp_path):
    raw, _ = made
    with pytest.raises(errors.UserError, match="image size 0"):
        prepare(raw, tmp_path, size=0)


# --- Photos ---------------------------------------------------------------------------------------


def test_portrait_photos_are_padded_with_white():
    out = io.BytesIO()
    Image.new("RGB", (60, 80), (0, 0, 0)).save(out, "PNG")
    image, _ = decode_photo(out.getvalue(), 40, "pad", 512)
    assert image.shape == (40, 40, 3)
    assert (image[:, :5] == 255).all()
    assert (image[:, 35:] == 255).all()
    assert (image[:, 5:35] == 0).all()


def test_digest_is_of_pixels_and_not_of_the_size_asked_for():
    data = encoded(3, (700, 900))
    image, digest = decode_photo(data, 32, "pad", 512)
    assert (
        digest
        == decode_photo(data, 64, "pad", 512)[1]
        == decode_photo(data + b"\0", 32, "pad", 512)[1]
    )
    assert digest != decode_photo(encoded(4, (700, 900)), 32, "pad", 512)[1]
    assert image.dtype == np.uint8


def test_other_modes_become_rgb():
    for mode in ("L", "CMYK"):
        out = io.BytesIO()
        Image.new(mode, (20, 20)).save(out, "JPEG")
        assert decode_photo(out.getvalue(), 8, "pad", 512)[0].shape == (8, 8, 3)


def test_hidden_files_of_an_archive_are_no_photos(tmp_path):
    rows = made_rows(3)
    raw = write(tmp_path / "raw", rows, made_photos(rows) | {"._10000": b"fork"})
    assert Photos(epath.Path(raw)).sizes.keys() == {row[0] for row in rows}


# --- The real photos ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_dir(), reason=f"the photos are not at {REAL}")
def test_some_real_photos(tmp_path):
    (tmp_path / "raw").mkdir()
    table = (REAL / "styles.csv").read_bytes().splitlines(keepends=True)
    (tmp_path / "raw" / "styles.csv").write_bytes(b"".join(table[:401]))
    (tmp_path / "raw" / "images.tar").symlink_to(REAL / "images.tar")
    builder = prepare(tmp_path / "raw", tmp_path / "prepared", size=64)
    metadata = builder.info.metadata
    assert metadata["rows"] == metadata["products"] == 400
    assert metadata["photos_without_row"] == 7600
    assert metadata["lost_rows"] == 0
    data = everything(builder, images=True)
    check_properties(data)
    for split in examples.SPLITS:
        assert len(data[split]) == metadata["splits"][split]["queries"] > 0
        for item in data[examples.gallery_split(split)]:
            image = np.asarray(item["image"][0])
            assert image.shape == (64, 64, 3)
            assert image.std() > 1


# Of the stored queries of all 8,000 photos, as they were before other tables could be prepared.
STORED = {"train": "b29680cda306a84f", "validation": "3530646ff1d4f9c4", "test": "787681b9c35cc20f"}


def stored_digest(builder, split):
    """Of the records as they are stored; their fields are in no fixed order there."""
    from array_record.python.array_record_module import ArrayRecordReader
    from tensorflow_datasets.proto import tf_example_pb2

    (path,) = pathlib.Path(builder.data_path).glob(f"fashion_products-{split}.array_record-*")
    digest = hashlib.sha256()
    for record in ArrayRecordReader(str(path)).read_all():
        example = tf_example_pb2.Example.FromString(record)
        fields = example.SerializeToString(deterministic=True)
        digest.update(len(fields).to_bytes(8, "big") + fields)
    return digest.hexdigest()[:16]


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_dir(), reason=f"the photos are not at {REAL}")
def test_real_photos(tmp_path):
    builder = prepare(REAL, tmp_path, size=64)
    assert {split: stored_digest(builder, split) for split in examples.SPLITS} == STORED
    metadata = builder.info.metadata
    assert metadata["rows"] == metadata["products"] == 8000
    assert metadata["lost_rows"] == metadata["photos_without_row"] == 0
    assert metadata["duplicate_ids"] == []
    splits = metadata["splits"]
    # 149 products in 74 groups have identical photos; those of 6 groups have other attributes.
    assert sum(splits[split]["distinct_photos"] for split in examples.SPLITS) == 8000 - 149 + 74
    assert sum(splits[split]["ambiguous_photos"] for split in examples.SPLITS) == 6
    data = {split: records(builder, split) for split in builder.info.splits if split != "train"}
    # Reading all queries of train takes long: they are made again from the gallery, and a sample of
    # those stored is compared.
    products = [
        Product(item["id"], values_of(item), item["photo"]) for item in data["train_gallery"]
    ]
    made_again, _ = make_queries(products, QUERIES_PER_REFERENCE["train"])
    data["train"] = [
        {k: v for k, v in query.record().items() if k != "image"} for query in made_again
    ]
    stored = builder.as_data_source("train")
    assert len(stored) == len(made_again)
    for i in random.Random(0).sample(range(len(stored)), 1000):
        assert {k: plain(v) for k, v in stored[i].items() if k != "image"} == data["train"][i]
    check_properties(data)
    # With coarse relevance, dozens of the photos are valid for a query.
    relevant = fp.RELEVANCE["coarse"]
    alike = [
        dataclasses.replace(product, values=values_of(item, relevant))
        for product, item in zip(products, data["train_gallery"])
    ]
    coarse, _ = make_queries(alike, QUERIES_PER_REFERENCE["train"])
    valid = [len(query.relevant) for query in coarse]
    assert (len(coarse), statistics.median(valid), max(valid)) == (46121, 28, 198)
    for split, products, queries in (
        ("train", 5777, 45429),
        ("validation", 621, 1192),
        ("test", 1602, 3169),
    ):
        assert splits[split]["products"] == products
        assert splits[split]["queries"] == len(data[split]) == queries
        two = splits[split]["kinds"][TWO_CHANGES]
        assert two / queries < 0.35
        assert splits[split]["kinds"].keys() == {*KINDS.values(), TWO_CHANGES}
    # No two values of an attribute have the same words, or texts would be ambiguous.
    values = collections.defaultdict(set)
    for split in examples.SPLITS:
        for item in data[examples.gallery_split(split)]:
            for name, value in zip(ATTRIBUTES, values_of(item)):
                values[name].add(value)
    for attribute in GRAMMAR.attributes:
        those = values[attribute.name]
        words = {tuple(attribute.words(value).values()) for value in those}
        assert len(words) == len(those)
