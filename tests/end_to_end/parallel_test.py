"""Shards, padding and placement, and that runs agree on any number of devices.

The mapped programs are tested where they are made.
"""

import jax
import numpy as np
import pytest

from dqe_jax.checkpoints import store
from dqe_jax.distributed import mesh
from dqe_jax.testing.small_runs import assert_params_agree, small_config
from dqe_jax.training import loop


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


RATE = 1e-3
FIELDS = {
    **{"total_steps": 20, "log_every": 1, "eval_every": 0, "checkpoint_every": 20},
    **{"optimizer.warmup_steps": 4, "optimizer.learning_rate": RATE, "batch.references": 8},
    **{"negatives.pool": "bank", "negatives.first_refresh": 0, "negatives.refresh_every": 8},
    **{"model.tiny.image_depth": 1, "model.tiny.text_depth": 1},
}


def test_runs_agree_on_any_number_of_devices(tmp_path, prepared):
    """At a learning rate at which biases of keys are some 2e-4 apart, and nothing else is."""
    prepared(tmp_path)
    params = []
    for count in (1, 8):
        workdir = tmp_path / f"run-{count}"
        config = small_config(tmp_path / "prepared", num_devices=count, **FIELDS)
        loop.train_and_evaluate(config, workdir)
        params.append(store.restore_params(store.open_for_reading(workdir), 20))
    assert_params_agree(*params, learning_rate=RATE)


@pytest.mark.parametrize(("name", "width", "part"), [("qkv", 2, 1), ("key_value", 3, 0)])
def test_the_bound_is_wide_for_biases_of_keys_alone(name, width, part):
    one = {"a": {name: {"kernel": np.ones((4, 6)), "bias": np.zeros(6)}}, "scale": np.float32(1)}
    for at in range(6):
        moved = np.zeros(6)
        moved[at] = 5e-4
        other = {**one, "a": {name: {"kernel": np.ones((4, 6)), "bias": moved}}}
        if at // width == part:
            assert_params_agree(one, other, learning_rate=RATE)
        else:
            with pytest.raises(AssertionError, match=rf"a/{name}/bias: 0\.0005 apart"):
                assert_params_agree(one, other, learning_rate=RATE)
    with pytest.raises(AssertionError, match="scale"):
        assert_params_agree(one, one | {"scale": np.float32(1.001)}, learning_rate=RATE)
