"""Shards, padding and placement; the mapped programs are tested where they are made."""

import jax
import numpy as np
import pytest

from dqe_jax.distributed import mesh


@pytest.mark.parametrize("shape", [(8,), (8, 3), (8, 0), (8, 0, 5), (8, 2, 3, 1)])
@pytest.mark.parametrize("num_devices", [1, 2, 8])
def test_unshard_undoes_shard(shape, num_devices):
    tree = {"x": np.arange(np.prod(shape)).reshape(shape)}
    shards = mesh.shard(tree, num_devices)
    assert shards["x"].shape == (num_devices, 8 // num_devices, *shape[1:])
    np.testing.assert_array_equal(mesh.unshard(shards)["x"], tree["x"])


@pytest.mark.parametrize(("rows", "multiple", "padded"), [(5, 4, 8), (8, 4, 8), (1, 3, 3)])
def test_padding_repeats_the_last_row(rows, multiple, padded):
    array = np.arange(rows * 2).reshape(rows, 2)
    result = mesh.pad_rows(array, multiple)
    assert result.shape == (padded, 2)
    np.testing.assert_array_equal(result[:rows], array)
    np.testing.assert_array_equal(result[rows:], np.repeat(array[-1:], padded - rows, axis=0))


def test_replicated_values_are_placed_as_the_map_returns_them():
    devices = jax.local_devices()[:2]
    placed = mesh.replicate({"x": np.ones(3, np.float32)}, devices)
    double = mesh.pmap(
        lambda tree, y: {"x": tree["x"] * 2}, in_axes=(None, 0), out_axes=None, devices=devices
    )
    out = double(placed, np.zeros((2, 1), np.float32))
    assert out["x"].shape == (3,)
    assert out["x"].sharding.is_equivalent_to(placed["x"].sharding, 1)
