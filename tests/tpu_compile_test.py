"""The training step compiles for a TPU slice, ahead of time and without a TPU."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = """
import importlib, json, sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from dqe_jax import programs, run_setup
from dqe_jax.data.pipeline import batch_shapes
from dqe_jax.models import build_model
from dqe_jax.optimizer import make_optimizer
from dqe_jax.train_step import TrainState

name, _, variant = sys.argv[1].partition(":")
config, chips = importlib.import_module(f"configs.{name}").get_config(variant), 8
devices = list(topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices)
assert len(devices) == chips
data, size = config.data, config.data.image_size
model = build_model(
    config.model, vocab_size=40, max_length=data.max_length, image_size=data.image_size
)
tx = make_optimizer(config.optimizer, config.total_steps)
step = programs.make_step(config, model, tx, devices)
params = jax.eval_shape(lambda: run_setup.init_params(model, config))
training = programs.splitter(config.model)(params)[0]
state = TrainState(jax.ShapeDtypeStruct((), jnp.int32), params, jax.eval_shape(tx.init, training))
batch = batch_shapes(config, config.batch.references // chips)
batch = {k: jax.ShapeDtypeStruct((chips, *shape), dtype) for k, (dtype, shape) in batch.items()}
compiled = step.lower(state, batch).compile()
memory, text = compiled.memory_analysis(), compiled.as_text()
print(json.dumps({
    "arguments": memory.argument_size_in_bytes,
    "temporaries": memory.temp_size_in_bytes,
    "parameters": sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params)),
    "moments": 8 * sum(x.size for x in jax.tree.leaves(training)),
    "all_gather": text.count("all-gather"),
    "all_reduce": text.count("all-reduce"),
}))
"""


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="needs libtpu, the TPU compiler (Linux x86-64)",
)
@pytest.mark.parametrize("config", ["shapes", "shapes:smoke"])
def test_compiles_for_eight_chips(config):
    environment = {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, config],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    # Parameters, and both moments of those that train.
    assert found["arguments"] > found["parameters"] + found["moments"]
    assert 0 < found["temporaries"] < 2**31
    assert found["all_gather"] > 0
    assert found["all_reduce"] > 0
