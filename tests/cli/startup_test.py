"""What the import of the main job loads: every start of a run waits for it."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# What `dqe-jax train` imports before it looks at the config.
MAIN_JOB = (
    *("dqe_jax.cli.commands", "dqe_jax.cli.train", "dqe_jax.distributed.compiled"),
    *("dqe_jax.distributed.processes", "dqe_jax.training.loop"),
)
# They come when they are needed, or not at all.
LATER = {
    *("torch", "tensorflow", "tensorflow_datasets", "transformers", "orbax", "grain"),
    *("matplotlib", "tensorboardX", "pyarrow", "huggingface_hub", "google.protobuf", "scipy"),
    *("fastapi", "starlette", "uvicorn", "pydantic", "prometheus_client", "dqe_jax.serving"),
}
# Of Python, JAX and Flax 1,200 at the time of writing.
MOST = 1600


def test_the_main_job_imports_what_it_needs_at_once():
    code = f"import json, sys, {', '.join(MAIN_JOB)}; print(json.dumps(sorted(sys.modules)))"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    )
    loaded = set(json.loads(done.stdout))
    assert {"jax", "flax", "dqe_jax.training.loop"} <= loaded
    assert not LATER & loaded
    assert len(loaded) < MOST
