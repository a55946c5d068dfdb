"""Triplets from images alone: attributes that a zero-shot model guesses."""

import csv

import numpy as np
import pytest

from dqe_jax.data import examples
from dqe_jax.data.builders.benchmarks import make_builder
from dqe_jax.data.made.from_table import triplets_from_table
from dqe_jax.data.made.guessing import guess_table
from dqe_jax.data.records import read_records
from dqe_jax.testing import encoders
from dqe_jax.testing.standins import write_photo
from dqe_jax.utils.errors import UserError

SIZE = 16
VALUES = (
    '[light]\nvalues = ["bright", "dark"]\n\n[tint]\nprompt = "it is {value}"\n'
    'values = ["red", "blue"]\n'
)


@pytest.fixture
def place(tmp_path):
    for i in range(150):
        write_photo(tmp_path / "photos" / f"{i:03d}.jpg", key=f"g{i}", size=(20, 20))
    (tmp_path / "photos" / "bad.jpg").write_bytes(b"")
    (tmp_path / "values.toml").write_text(VALUES)
    return tmp_path


def guessed(place, guess=encoders.brightness, **options):
    return guess_table(
        place / "photos",
        place / "values.toml",
        place / "made",
        guess=guess,
        image_size=SIZE,
        **options,
    )


def test_guesses_become_a_table_and_claim_no_truth(place):
    table, names = guessed(place)
    assert names == ("light", "tint")
    rows = list(csv.DictReader(table.open()))
    assert [row["image"] for row in rows] == [f"{i:03d}.jpg" for i in range(150)]
    for name in names:
        assert sum(not row[name] for row in rows) == 30  # those with the smallest lead
    facts = triplets_from_table(
        table, place / "photos", place / "made", attributes=names, image_size=SIZE, guessed_by="x"
    )
    assert facts["made_from"] == "attributes that x guessed"
    assert "guesses" in facts["truth"]
    builder = make_builder("triplets", str(place / "made"), image_size=SIZE, preprocess="pad")
    of = {row["image"]: row for row in rows}
    for split in examples.SPLITS:
        gallery = list(read_records(builder, examples.gallery_split(split)))
        for query in read_records(builder, split):
            assert list(query["valid"]) == []
            target = of[gallery[query["target"]]["id"].decode()]
            for pair in query["attributes"]:
                name, value = pair.decode().split("=")
                assert target[name] == value
    # A table that is there may have been corrected: it is kept.
    table.write_text(table.read_text().replace("dark", "dim"))
    assert "dim" in guessed(place)[0].read_text()
    assert "dim" not in guessed(place, overwrite=True)[0].read_text()


@pytest.mark.parametrize(
    ("values", "guess", "sentence"),
    [
        ("x", None, r"values\.toml is not TOML"),
        ("", None, r"names no attribute"),
        ("[a]\nvalues = ['b']", None, r"\[a\] must have values, a list of two"),
        ("[a]\nvalues = ['b', 'c']\nprompt = 'x'", None, r"prompt of \[a\] must be .*{value}"),
        (VALUES, lambda images, texts: np.zeros((2, 2)), r"gives \[2, 2\] for 32 images and 2"),
        (VALUES, lambda images, texts: 1 / 0, r"--guess fails on light \(division by zero\)"),
    ],
)
def test_errors(place, values, guess, sentence):
    (place / "values.toml").write_text(values)
    with pytest.raises(UserError, match=sentence):
        guessed(place, guess)
