"""A share of the training queries, and captions of photos in place of queries."""

import dataclasses

import numpy as np
import pytest

from dqe_jax.data import datasets, splits
from dqe_jax.data.chosen import caption, captions_of, share_of, without_kinds
from dqe_jax.testing.small_runs import run_config
from dqe_jax.utils.errors import UserError


def test_a_caption_is_what_is_stated():
    stated = ["gender=Men", "articleType=Tshirts", "baseColour=Navy Blue", "usage=NA", "season="]
    assert caption(stated) == "men, tshirts, navy blue"
    assert caption(["a=x", "b=x"]) == "x"
    assert caption([]) == caption(["usage=NA"]) == ""


def test_captions_ask_for_their_photos():
    attributes = [["color=red"], ["color=blue"], ["color=NA"], ["color=red"]]
    queries = captions_of(attributes, ["a", "b", "c", "d"])
    assert queries.ids == ["a-caption", "b-caption", "d-caption"]
    assert queries.texts == ["red", "blue", "red"]
    np.testing.assert_array_equal(queries.target, [0, 1, 3])
    np.testing.assert_array_equal(queries.reference, queries.target)
    assert [rows.tolist() for rows in queries.relevant] == [[0, 3], [1], [0, 3]]
    assert [rows.tolist() for rows in queries.known_positives] == [[0, 3], [1], [0, 3]]
    assert len(queries.take(np.array([2]))) == 1


@pytest.fixture(scope="module")
def opened(tmp_path_factory, prepared):
    base = tmp_path_factory.mktemp("chosen")
    prepared(base)
    data = run_config(base / "prepared").data
    return data, datasets.open_dataset(data)


def test_a_share_is_part_of_a_larger_one(opened):
    data, builder = opened
    whole = splits.open_split(data, builder, "train").queries

    def ids(share):
        return set(
            splits.open_split(
                dataclasses.replace(data, train_share=share), builder, "train"
            ).queries.ids
        )

    half, quarter = ids(0.5), ids(0.25)
    assert quarter < half < set(whole.ids)
    assert len(half) / len(whole) == pytest.approx(0.5, abs=0.1)
    assert len(ids(0.0001)) >= 1  # never nothing
    assert share_of(whole, 1.0) is whole
    # Only of training: what is evaluated stays.
    shared = dataclasses.replace(data, train_share=0.25)
    test = splits.open_split(shared, builder, "test")
    assert test.queries.ids == splits.open_split(data, builder, "test").queries.ids


def test_a_split_with_captions_has_a_digest_of_its_own(opened):
    data, builder = opened
    captioned = dataclasses.replace(data, queries="captions")
    own, other = (splits.open_split(x, builder, "test") for x in (captioned, data))
    assert own.digest != other.digest
    assert len(own.queries) <= len(own.gallery)
    assert all(own.queries.texts)
    assert own.gallery.ids == other.gallery.ids


def test_data_without_attributes_have_no_captions(opened, monkeypatch):
    data, builder = opened
    monkeypatch.setattr(splits, "captions_of", lambda attributes, ids: captions_of([], []))
    with pytest.raises(UserError, match=r"config\.data\.queries is 'captions': .* 'triplets'"):
        splits.open_split(dataclasses.replace(data, queries="captions"), builder, "test")


def test_kinds_that_are_left_out(opened):
    data, builder = opened
    whole = splits.open_split(data, builder, "train").queries
    left = dataclasses.replace(data, leave_out=("color",))
    kept = splits.open_split(left, builder, "train").queries
    assert kept.ids == [id_ for id_, kinds in zip(whole.ids, whole.kinds) if "color" not in kinds]
    assert 0 < len(kept) < len(whole)
    test = splits.open_split(left, builder, "test").queries
    assert any("color" in own for own in test.kinds)  # evaluation has them
    with pytest.raises(UserError, match="leave_out: no training query is of the kind 'colour'"):
        without_kinds(whole, ("colour",))
    kinds = sorted({kind for own in whole.kinds for kind in own})
    with pytest.raises(UserError, match="leaves no training query"):
        without_kinds(whole, kinds)
