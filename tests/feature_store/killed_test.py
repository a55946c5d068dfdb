"""Commands that are killed at random moments: run again, they end with the same bytes.

`python -m pytest -m slow -n 0 -rP tests/feature_store/killed_test.py` prints when each kill came.
"""

import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from dqe_jax.feature_store.manage import list_stores
from dqe_jax.testing.small_runs import compiles_quickly

pytestmark = pytest.mark.slow  # ten kills are ten starts; other files have the parts in one process

ROOT = Path(__file__).resolve().parents[2]
KILLS = 10
# The command, with shards of one batch, so that there are many.
SMALL_SHARDS = """
from dqe_jax.cli import commands
from dqe_jax.feature_store import given, imports, store
store.SHARD_BYTES = given.SHARD_ROWS = 1
imports.SHARD_BYTES = 4096
commands.run("features")
"""
FIELDS = {
    **{"num_devices": 1, "eval.batch_size": 4, "data.augment": "flip"},
    **{"model.tiny.image_depth": 0, "model.tiny.text_depth": 0},
}
TOWERS = {"model.frozen": "('vision','text')"}
ENCODERS = {
    "model.backbone": "features",
    "model.features.images": "('dqe_jax.testing.encoders:images',)",
    "model.features.texts": "('dqe_jax.testing.encoders:texts',)",
}


class Command:
    """`dqe-jax features` on small shards; what it says goes to a file."""

    def __init__(self, base, *flags, **fields):
        own = {**FIELDS, "data.prepared_dir": base / "prepared", **fields}
        self._flags = [*(f"--config.{name}={value}" for name, value in own.items()), *flags]
        self._base = base
        self.log = base / "log"

    def start(self, root):
        """A process that writes stores to `root`."""
        with self.log.open("w") as log:
            return subprocess.Popen(
                [
                    *(sys.executable, "-c", SMALL_SHARDS, "--config=configs/shapes.py:smoke"),
                    *(*self._flags, f"--config.features.directory={root}"),
                ],
                cwd=ROOT,
                # Programs are kept in a place of their own: a kill may leave half of one.
                env={
                    **os.environ,
                    "JAX_PLATFORMS": "cpu",
                    **compiles_quickly(self._base / "compiled"),
                },
                stdout=log,
                stderr=log,
            )

    def finish(self, root):
        """Runs to the end; what it said."""
        assert self.start(root).wait(600) == 0, self.log.read_text()
        return self.log.read_text()

    def kill(self, root, begun, delay):
        """Kills a process that is at work, `delay` seconds after `begun` of its id holds."""
        process = self.start(root)
        until = time.time() + 600
        try:
            while not begun(process.pid):
                assert process.poll() is None, self.log.read_text()
                assert time.time() < until, self.log.read_text()
                time.sleep(0.0005)
            time.sleep(delay)
        finally:
            process.kill()
        return process.wait(60) == -9


def files_of(root):
    return {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def shards_of(root):
    """The whole shards of all stores of computed features."""
    return [path for path in root.glob("*/shard-*") if not path.name.endswith(".partial")]


def rows_of(root):
    return dict(sorted((store.kind, store.rows) for store in list_stores(root)))


@pytest.fixture(scope="module")
def base(tmp_path_factory, prepared):
    directory = tmp_path_factory.mktemp("killed")
    prepared(directory)
    return directory


@pytest.mark.parametrize(
    ("fields", "seed"), [(TOWERS, 1), (ENCODERS, 2)], ids=["towers", "encoders"]
)
def test_computing_goes_on_to_equal_bytes(base, tmp_path, fields, seed):
    """Ten kills of one store after another, over the whole time of computing it."""
    command, rng = Command(base, **fields), random.Random(seed)
    whole, root = tmp_path / "whole", tmp_path / "killed"
    command.finish(whole)
    expected, total = files_of(whole), len(shards_of(whole))
    all_rows = rows_of(whole)
    assert set(all_rows) == {"image", "text"}
    assert total > 10 * KILLS
    moments = sorted(rng.sample(range(total - total // 10), KILLS))
    landed = []
    for moment in moments:
        before = len(shards_of(root))

        def begun(pid, moment=moment, before=before):
            """Whether so many shards are there, and this process has begun to write its own."""
            held = len(shards_of(root))
            writes = held > before or any(root.glob(f"*/shard-*.{pid}.partial"))
            return writes and held >= moment

        assert command.kill(root, begun, rng.uniform(0, 0.02)), command.log.read_text()
        left = [path.name for path in root.rglob("*.partial")]
        landed.append((rows_of(root), len(left)))
        # What is there is whole, and will stay.
        for shard in shards_of(root):
            for path, content in files_of(shard).items():
                assert content == expected[(shard / path).relative_to(root)]
    held = rows_of(root)
    said = command.finish(root)
    for rows, partial in landed:
        print(f"killed with {rows} of {all_rows} rows stored; half-written shards: {partial}")
    assert all(sum(rows.values()) < sum(all_rows.values()) for rows, _ in landed)
    assert sum(held.values()) > 0
    for kind, rows in all_rows.items():
        new = rows - held.get(kind, 0)
        words = rf"{kind}s has computed features of {new:,} {kind}s in"
        if fields is TOWERS:
            words = rf"the frozen {kind} tower makes of {rows:,} .*; {new:,} of them were computed"
        assert not new or re.search(words, said), said
    assert files_of(root) == expected


def test_an_import_is_done_again(base, tmp_path):
    """Of a killed one nothing is found, and the next one removes what it left."""
    rng = random.Random(3)
    ids = np.array([f"photo {i}" for i in range(2000)])
    tokens = np.random.default_rng(0).normal(size=(len(ids), 4, 16)).astype(np.float32)
    np.savez(tmp_path / "own.npz", id=ids, tokens=tokens)
    command = Command(base, f"--import_images={tmp_path / 'own.npz'}", "--name=mine")
    whole, root = tmp_path / "whole", tmp_path / "killed"
    command.finish(whole)
    expected, total = files_of(whole), len(shards_of(whole))
    assert rows_of(whole) == {"image": len(ids)}
    assert total > 10 * KILLS
    for moment in sorted(rng.sample(range(total - total // 10), KILLS)):
        left = list(root.glob("*.partial"))

        def begun(pid, moment=moment):
            place = root / f"mine.{pid}.partial"
            return place.exists() and len(list(place.glob("shard-*"))) >= moment

        assert command.kill(root, begun, rng.uniform(0, 0.01)), command.log.read_text()
        (partial,) = root.glob("*.partial")
        assert partial not in left
        for place in left:
            assert f"{place} is what a killed import has left" in command.log.read_text()
        assert list_stores(root) == []
        print(f"killed with {len(list(partial.glob('shard-*')))} of {total} shards written")
    said = command.finish(root)
    assert f"{partial} is what a killed import has left: it is removed." in said
    assert files_of(root) == expected
