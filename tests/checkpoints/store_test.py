"""Saving what lies on several devices."""

import jax
import numpy as np
from etils import epath

from dqe_jax.checkpoints import store
from dqe_jax.distributed import mesh
from dqe_jax.testing.small_runs import run_config


def test_small_arrays_of_several_devices_are_saved_without_compiling(tmp_path, caplog):
    rng = np.random.default_rng(0)
    shapes = [(), (4,), (8, 7), (2, 3, 12)]
    small = {str(i): rng.normal(size=shape).astype(np.float32) for i, shape in enumerate(shapes)}
    large = {"large": rng.normal(size=(8, store.SLICED // 32)).astype(np.float32)}
    config, devices = run_config(tmp_path, checkpoint_every=1), jax.devices()[:4]
    params, both = (mesh.replicate(tree, devices) for tree in (small, small | large))
    with store.open_for_training(epath.Path(tmp_path), config) as manager:
        with jax.log_compiles(), caplog.at_level("WARNING"):
            store.save(manager, 1, params, params, {})
            manager.wait_until_finished()
        assert "XLA compilation" not in caplog.text
        store.save(manager, 2, both, params, {})
        manager.wait_until_finished()
        for step, expected in ((1, small), (2, small | large)):
            found = store.restore_params(manager, step)
            jax.tree.map(np.testing.assert_array_equal, found, expected)
