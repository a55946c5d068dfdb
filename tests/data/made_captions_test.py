"""Triplets that are made from captions: near images whose captions differ."""

import random

import numpy as np
import pytest

from dqe_jax.data import examples
from dqe_jax.data.builders.benchmarks import make_builder
from dqe_jax.data.made import from_captions
from dqe_jax.data.made.queries import Product
from dqe_jax.data.made.settings import made_fields
from dqe_jax.data.records import read_records
from dqe_jax.testing import encoders
from dqe_jax.testing.commands import run_module
from dqe_jax.testing.standins import write_photo
from dqe_jax.utils.errors import UserError

SIZE = 16


def write_captions(root, count=150):
    lines = ["image;caption"]
    for i in range(count):
        write_photo(root / "photos" / f"{i:03d}.jpg", key=f"c{i}", size=(20, 20))
        colour, thing = ("Red", "Blue", "Green")[i % 3], ("shirt", "long {dress}")[i % 2]
        lines.append(f"{i:03d};A {colour} {thing}." if i else f"{i:03d};")
    (root / "captions.csv").write_text("\n".join(lines))


def make(root, **options):
    return from_captions.triplets_from_captions(
        root / "captions.csv",
        root / "photos",
        root / "made",
        encode=encoders.images,
        encoder="small",
        image_size=SIZE,
        **options,
    )


def test_near_images_with_other_captions(tmp_path):
    write_captions(tmp_path)
    facts = make(tmp_path)
    assert "Only the target" in facts["truth"]
    assert facts["images_without_caption"] == 1
    assert facts["attributes"] == []
    assert made_fields(tmp_path / "made") == {}
    builder = make_builder("triplets", str(tmp_path / "made"), image_size=SIZE, preprocess="pad")
    for split in examples.SPLITS:
        gallery = list(read_records(builder, examples.gallery_split(split)))
        captions = [(item["attributes"] or [b"caption="])[0].decode()[8:] for item in gallery]
        queries = list(read_records(builder, split))
        assert len(queries) == facts["splits"][split]["queries"] > 0
        for query in queries:
            old, new = captions[query["reference"]], captions[query["target"]]
            assert old != new
            assert old
            assert new
            assert list(query["valid"]) == []  # nobody knows them
            assert list(query["targets"]) == [query["target"]]
            text, kind = query["texts"][0].decode(), query["kinds"][0].decode()
            assert kind in (from_captions.REPLACED, from_captions.OTHER)
            if old.split()[1] != new.split()[1]:
                assert new.split()[1].lower() in text
    again = make(tmp_path)  # nothing to do
    assert again == facts


def test_targets_are_the_nearest_with_other_captions():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(60, 8))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    products = [Product(f"p{i}", (f"caption {i // 2}",), i) for i in range(60)]
    products[5] = Product("p5", ("caption 2",), 4)  # a copy of the photo before
    queries = from_captions.make_queries(products, vectors, 3)
    assert {query.reference for query in queries} == set(range(60))
    for query in queries:
        own = products[query.reference]
        order = np.argsort(-(vectors @ vectors[query.reference]), kind="stable")
        place, seen = 0, {own.values}
        for row in order:
            if row != query.reference and products[row].values not in seen:
                seen.add(products[row].values)
                place += 1
                if row == query.target:
                    break
        assert place <= 20
        assert products[query.target].photo != own.photo
        if query.target == 4:
            assert query.known_positives == [4, 5]


@pytest.mark.parametrize(
    ("old", "new", "kind", "words"),
    [
        ("A red shirt.", "a blue shirt", from_captions.REPLACED, {"red", "blue"}),
        ("a shirt", "a shirt with {laces}", from_captions.ADDED, {"with", "{laces}"}),
        ("a red shirt with laces", "a red shirt", from_captions.REMOVED, {"with", "laces"}),
        ("a red shirt", "two dogs on grass", from_captions.OTHER, {"two", "dogs", "on", "grass"}),
    ],
)
def test_texts_say_how_captions_differ(old, new, kind, words):
    rng = random.Random(0)
    for _ in range(20):
        text, found = from_captions.modification(old, new, rng)
        assert found == kind
        assert words <= set(text.replace(",", "").split())


def test_too_few_captions(tmp_path):
    write_captions(tmp_path, 5)
    with pytest.raises(UserError, match=r"leaves the split '\w+' empty .*captions that differ\."):
        make(tmp_path)


def test_the_command_with_captions(tmp_path):
    write_captions(tmp_path)
    arguments = (
        *("triplets", "--table=captions.csv", "--images=photos", "--output=made"),
        *("--image_size=16", "--caption_column=Caption"),
    )
    done = run_module("dqe_jax", *arguments, "--attributes=x", cwd=tmp_path)
    assert "--caption_column goes without --attributes" in done.stderr
    encoder = "--encoder=dqe_jax.testing.encoders:images"
    done = run_module("dqe_jax", *arguments, encoder, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Only the target of a query is known" in done.stderr
