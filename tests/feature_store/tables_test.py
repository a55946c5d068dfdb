"""Rows on the devices, in memory and on disk are the same rows."""

import jax
import ml_dtypes
import numpy as np
import pytest

from dqe_jax.feature_store import shards, tables
from dqe_jax.feature_store.shards import KEY_BYTES, RowSpec

SPECS = {
    "tokens": RowSpec((3, 4), np.dtype(ml_dtypes.bfloat16)),
    "pooled": RowSpec((5,), np.dtype(np.float32)),
}
COUNT = 21


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Two shards, their arrays, and rows of them in an order of their own."""
    directory = tmp_path_factory.mktemp("store")
    rng = np.random.default_rng(0)
    arrays = {
        name: rng.normal(size=(COUNT, *spec.shape)).astype(spec.dtype)
        for name, spec in SPECS.items()
    }
    keys = rng.integers(0, 256, (COUNT, KEY_BYTES)).astype(np.uint8)
    for number, part in enumerate((slice(0, 8), slice(8, COUNT))):
        shards.write_shard(
            directory, number, keys[part], {name: x[part] for name, x in arrays.items()}
        )
    held, _ = shards.open_shards(directory, SPECS)
    order = rng.permutation(COUNT)
    return held, {name: x[order] for name, x in arrays.items()}, order


def part_of(held, order):
    return tables.Part(held, SPECS, order, {name: name for name in SPECS})


def assert_equal(found, expected):
    for name in SPECS:
        got = np.asarray(found[name])
        assert got.dtype == SPECS[name].dtype
        np.testing.assert_array_equal(got, expected[name])


@pytest.mark.parametrize("place", tables.PLACES)
@pytest.mark.parametrize("num_devices", [1, 2, 8])
def test_rows_are_those_that_were_stored(stored, place, num_devices):
    held, arrays, order = stored
    table = tables.make_table(place, [part_of(held, order)], jax.devices()[:num_devices])
    rows = np.random.default_rng(1).integers(0, COUNT, (num_devices, 6))
    assert_equal(table.rows(rows), {name: x[rows] for name, x in arrays.items()})
    # As in a batch: each row is drawn alone, and those of references and targets stand apart.
    drawn = [[table.draw(int(row)) for row in line] for line in rows]
    whole = [jax.tree.map(lambda *each: np.stack(each), *line) for line in drawn]
    batch = jax.tree.map(lambda *each: np.stack(each), *whole)
    first = jax.tree.map(lambda x: x[:, :2], batch)
    rest = jax.tree.map(lambda x: x[:, 2:].reshape(num_devices, 2, 2, *x.shape[2:]), batch)
    reference, target = table.resolve((first, rest))
    assert_equal(reference, {name: x[rows[:, :2]] for name, x in arrays.items()})
    targets = rows[:, 2:].reshape(num_devices, 2, 2)
    assert_equal(target, {name: x[targets] for name, x in arrays.items()})


def test_rows_on_devices_are_exchanged_in_parts(stored, monkeypatch):
    held, arrays, order = stored
    monkeypatch.setattr(tables, "EXCHANGE", 1)
    tables._look_up_program.cache_clear()
    table = tables.make_table("device", [part_of(held, order)], jax.devices()[:2])
    rows = np.arange(2 * 9).reshape(2, 9)
    assert_equal(table.rows(rows), {name: x[rows] for name, x in arrays.items()})
    tables._look_up_program.cache_clear()


class Told:
    """A device that says how much memory it has."""

    process_index = 0

    def __init__(self, **stats):
        self.stats = stats or None

    def memory_stats(self):
        return self.stats


@pytest.mark.parametrize(
    ("device", "host", "nbytes", "expected"),
    [
        (Told(bytes_limit=1000, bytes_in_use=200), 0, 800, "device"),  # of two: 400 each
        (Told(bytes_limit=1000, bytes_in_use=200), 1602, 801, "host"),
        (Told(bytes_limit=1000, bytes_in_use=200), 1600, 801, "disk"),
        (Told(), 100, 50, "host"),
    ],
)
def test_the_first_place_with_room(monkeypatch, device, host, nbytes, expected):
    class Memory:
        available = host

    monkeypatch.setattr(tables.psutil, "virtual_memory", lambda: Memory)
    assert tables.choose_place("auto", nbytes, [device, device]) == expected
    assert tables.choose_place("disk", nbytes, [device, device]) == "disk"
