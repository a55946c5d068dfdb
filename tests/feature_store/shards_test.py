"""Stores on disk: what is written is read again, and what is damaged is not."""

import os

import ml_dtypes
import numpy as np
import pytest

from dqe_jax.data.digest import digests_of_rows
from dqe_jax.feature_store import keys, shards
from dqe_jax.feature_store.shards import KEY_BYTES, RowSpec
from dqe_jax.utils.errors import UserError

SPECS = {
    "tokens": RowSpec((3, 4), np.dtype(np.float32)),
    "pooled": RowSpec((5,), np.dtype(ml_dtypes.bfloat16)),
}


def made(count, seed=0):
    rng = np.random.default_rng(seed)
    arrays = {
        name: rng.normal(size=(count, *spec.shape)).astype(spec.dtype)
        for name, spec in SPECS.items()
    }
    return rng.integers(0, 256, (count, KEY_BYTES)).astype(np.uint8), arrays


def read(held, names_of_rows):
    rows = shards.find_rows(held, names_of_rows)
    out = {n: np.empty((len(rows), *spec.shape), spec.dtype) for n, spec in SPECS.items()}
    for name, array in out.items():
        shards.read_rows(held, name, SPECS[name], rows, array)
    return out


def test_rows_are_found_by_their_keys(tmp_path):
    first, second = made(4, 1), made(3, 2)
    shards.write_shard(tmp_path, 0, *first)
    shards.write_shard(tmp_path, 1, *second)
    held, rest = shards.open_shards(tmp_path, SPECS)
    assert rest == []
    assert shards.next_number(held) == 2
    wanted = np.concatenate([second[0][[2, 0]], first[0][[3]]])
    found = read(held, wanted)
    for name in SPECS:
        expected = np.concatenate([second[1][name][[2, 0]], first[1][name][[3]]])
        np.testing.assert_array_equal(found[name], expected)
        assert found[name].dtype == SPECS[name].dtype
    other = np.zeros((1, KEY_BYTES), np.uint8)
    assert shards.find_rows(held, other) == [-1]
    assert shards.find_rows([], first[0]).tolist() == [-1] * 4


def test_an_empty_store(tmp_path):
    assert shards.open_shards(tmp_path / "none", SPECS) == ([], [])
    assert shards.next_number([]) == 0


def pipe(place):
    """It would be read for ever."""
    (place / "shard.json").unlink()
    os.mkfifo(place / "shard.json")


@pytest.mark.parametrize(
    "harm",
    [
        lambda place: os.truncate(place / "tokens.npy", 100),
        lambda place: os.truncate(place / "keys.npy", 0),
        lambda place: (place / "pooled.npy").unlink(),
        lambda place: (place / "shard.json").unlink(),
        lambda place: (place / "shard.json").write_text("{"),
        lambda place: (place / "shard.json").write_text("[]"),
        lambda place: (place / "shard.json").write_text("{}"),
        lambda place: (place / "shard.json").write_text('{"a":' * 10**5),
        lambda place: (place / "keys.npy").write_bytes(
            bytes(len(place.joinpath("keys.npy").read_bytes()))
        ),
        pipe,
        lambda place: place.rename(place.parent / f"{place.name}.1.partial"),
    ],
)
def test_a_damaged_shard_is_left_out_and_removed(tmp_path, harm):
    shards.write_shard(tmp_path, 0, *made(4, 1))
    shards.write_shard(tmp_path, 1, *made(4, 2))
    harm(tmp_path / "shard-000000")
    held, rest = shards.open_shards(tmp_path, SPECS)
    assert [shard.directory.name for shard in held] == ["shard-000001"]
    assert len(rest) == 1
    shards.remove_damaged(rest)
    assert [path.name for path in tmp_path.iterdir()] == ["shard-000001"]


def test_a_shard_of_other_arrays_is_damaged(tmp_path):
    keys_, arrays = made(4)
    shards.write_shard(tmp_path, 0, keys_, {**arrays, "tokens": arrays["tokens"][:, :2]})
    assert shards.open_shards(tmp_path, SPECS)[0] == []


def test_what_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(OSError, match="No space left"):
        shards.write_shard(tmp_path, 0, *made(4))
    assert list(tmp_path.iterdir()) == []


def test_numbers_that_are_not_finite_are_named():
    _, arrays = made(4)
    shards.check_finite(arrays, ["a", "b", "c", "d"])
    arrays["pooled"][2, 1] = np.nan
    with pytest.raises(UserError, match=r"makes numbers of c that are not finite: check config"):
        shards.check_finite(arrays, ["a", "b", "c", "d"])


def test_keys_depend_on_all_that_rows_depend_on():
    tower = {"a": {"kernel": np.ones((2, 3), np.float32)}, "b": np.zeros(2, np.float32)}
    facts = {"kind": "image", "image_size": 64}
    key = keys.store_key(facts, tower)
    assert len(key) == 16
    assert key == keys.store_key({"image_size": 64, "kind": "image"}, {"b": tower["b"], **tower})
    others = [
        keys.store_key({**facts, "image_size": 32}, tower),
        keys.store_key(facts, {**tower, "b": np.ones(2, np.float32)}),
        keys.store_key(facts, {**tower, "b": np.zeros(2, np.float16)}),
        keys.store_key(facts, {**tower, "c": np.zeros(2, np.float32)}),
        keys.store_key(facts, {**tower, "a": {"kernel": np.ones((3, 2), np.float32)}}),
    ]
    assert len({key, *others}) == 6
    contents = digests_of_rows(np.arange(6).reshape(2, 3))
    assert contents.shape == (2, KEY_BYTES - 1)
    assert (contents[0] != contents[1]).any()
    both = [keys.row_keys(contents, view) for view in (0, 1)]
    np.testing.assert_array_equal(both[0][:, :-1], both[1][:, :-1])
    assert (both[0] != both[1]).any(1).all()
