"""Indexing that is killed at random moments loses and doubles nothing."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from dqe_jax.search import store
from dqe_jax.search.index import open_index
from dqe_jax.testing.small_runs import compiles_quickly

COUNT, KILLS = 600, 10
# With small shards, so that kills fall between and into writes.
COMMAND = """
import sys
from dqe_jax.search import store
store.SHARD_ROWS = 20
from dqe_jax.search.loading import load
load(sys.argv[1], num_devices=1, batch_size=4).index(sys.argv[2], output=sys.argv[3])
"""


@pytest.mark.slow
def test_kills_at_random_moments(run, model, tmp_path):
    rng = np.random.default_rng(0)
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(COUNT):
        pixels = rng.integers(0, 255, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).resize((300, 300)).save(photos / f"{number:04d}.png")
    arguments = [sys.executable, "-c", COMMAND, str(run[1]), str(photos), str(tmp_path / "index")]
    env = os.environ | compiles_quickly() | {"JAX_PLATFORMS": "cpu"}

    def start():
        return subprocess.Popen(arguments, env=env, stdout=subprocess.DEVNULL)

    def rows():
        return sum(
            len(np.load(path, mmap_mode="r"))
            for path in (tmp_path / "index").glob("shard-*[0-9]/keys.npy")
        )

    killed = 0
    while killed < KILLS:
        before, process = rows(), start()
        until = time.monotonic() + 120
        # From the first write on, a random part of a second later.
        while process.poll() is None and rows() == before and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(float(rng.uniform(0, 0.3)))
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        killed += 1
        if (tmp_path / "index" / store.IMAGES).exists():
            break
    assert killed > 3
    done = start()
    assert done.wait(300) == 0
    index = open_index(tmp_path / "index", model=model)
    assert index.ids == tuple(f"{number:04d}.png" for number in range(COUNT))
    assert rows() == COUNT
    fresh = model.index(photos)
    np.testing.assert_allclose(
        index._vectors.embeddings(index._contents),
        fresh._vectors.embeddings(fresh._contents),
        atol=1e-5,
    )
