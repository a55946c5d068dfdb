"""`shard_map` in place of `pmap`: the same results to the bit, the same donation, one compilation.

The whole runs are slow: `python -m pytest -m slow tests/distributed/twin_test.py`.
"""

import re

import jax
import numpy as np
import pytest
from etils import epath
from jax import lax

from dqe_jax.checkpoints import store
from dqe_jax.distributed import mesh, twin
from dqe_jax.performance.planning import programs
from dqe_jax.performance.planning.stores import Counts
from dqe_jax.testing.small_runs import run_config
from dqe_jax.training import loop, session, zero

DEVICES = 4
BANK = {"negatives.pool": "bank", "negatives.first_refresh": 1, "negatives.refresh_every": 2}
EVERYTHING = {**BANK, "optimizer.shard_state": True, "batch.accumulate": 2}
RUNS = {
    "plain": {},
    "bank": BANK,
    "sharded": {"optimizer.shard_state": True},
    "accumulated": {"batch.accumulate": 2},
    "chunks": {"batch.chunks": 2},
    "everything": {**EVERYTHING, "optimizer.ema_decay": 0.9, "negatives.mining": "refresh"},
}


def devices():
    return mesh.devices_of(DEVICES)


def both(fn, **axes):
    return [mapped(fn, devices=devices(), **axes) for mapped in (mesh.pmap, twin.shard_map)]


def test_a_function_of_sharded_and_replicated_arrays():
    """Trees of axes, sums, slices, and indices of devices; a part that is None."""

    def fn(state, x, scale):
        index = lax.axis_index(mesh.AXIS)
        total = lax.psum(x * scale, mesh.AXIS)
        own = state["own"] + lax.psum_scatter(total.reshape(DEVICES, -1), mesh.AXIS)
        every = lax.all_gather(own, mesh.AXIS)
        return {"own": own, "all": state["all"] + every.sum(), "none": None}, index

    rng = np.random.default_rng(0)
    own = rng.normal(size=(DEVICES, 2)).astype(np.float32)
    x = rng.normal(size=(DEVICES, 8)).astype(np.float32)
    axes = {"own": 0, "all": None, "none": None}
    found = []
    for mapped in both(fn, in_axes=(axes, 0, None), out_axes=(axes, 0)):
        state = {"own": own, "all": np.float32(0), "none": None}
        for _ in range(2):  # what comes out goes in
            state, index = mapped(state, x, np.float32(1.5))
        assert mapped.lower(state, x, np.float32(1)).as_text()
        np.testing.assert_array_equal(index, np.arange(DEVICES))
        found.append(state)
    assert found[0]["all"].shape == ()
    jax.tree.map(np.testing.assert_array_equal, *found)
    for one, other in zip(*map(jax.tree.leaves, found), strict=True):
        assert one.sharding.is_equivalent_to(other.sharding, one.ndim)


def test_what_is_donated_is_gone():
    def add(x, y):
        return x + y

    for mapped in both(add, in_axes=(0, 0), out_axes=0, donate_argnums=(0,)):
        x = mesh.placer(devices())(np.ones((DEVICES, 8), np.float32))
        assert mapped(x, np.ones((DEVICES, 8), np.float32)).sum() == 2 * 8 * DEVICES
        assert x.is_deleted()


def config_of(base, **changes):
    fields = {"total_steps": 4, "log_every": 1, "checkpoint_every": 2, "eval_every": 0}
    fields |= {"num_devices": DEVICES, "optimizer.warmup_steps": 1}
    return run_config(base / "prepared", **fields | changes)


STEPS = {
    "plain": {},
    "bank": {**BANK, "optimizer.shard_state": True, "optimizer.ema_decay": 0.9},
    "chunks": {"batch.chunks": 2},
}


@pytest.mark.parametrize(
    "name", ["bank", *(pytest.param(n, marks=pytest.mark.slow) for n in ("plain", "chunks"))]
)
def test_steps_are_the_same_program(monkeypatch, name):
    """Operation by operation: equal code computes equal bits. Nothing is compiled."""
    monkeypatch.setattr(zero, "LEAST", 1)
    wanted = "bank step" if name == "bank" else "step"
    sizes = {"counts": Counts(100), "vocabulary": 30, "names": (wanted,)}
    codes = []
    for mapping in ("pmap", "shard_map"):
        config = run_config("", mapping=mapping, num_devices=DEVICES, **STEPS[name])
        (program,), _ = programs.make_programs(config, devices(), **sizes)
        # Names of functions differ: that of the module, and of what is mapped.
        text = program.mapped.lower(*program.arguments).as_text()
        codes.append(re.sub(r"@[\w.]+|jax\.\w+_info = \"[^\"]*\"", "", text))
    assert len(codes[0].splitlines()) > 500
    assert codes[0] == codes[1]


def recorded(make_step, kinds):
    """`make_step`, which adds what programs its steps are of to `kinds`."""

    def make(config, *args, **kwargs):
        kinds.add(config.mapping)
        return make_step(config, *args, **kwargs)

    return make


@pytest.fixture(scope="module")
def base(tmp_path_factory, prepared):
    base = tmp_path_factory.mktemp("twin")
    prepared(base)
    return base


def arrays_of(workdir):
    manager = store.open_for_reading(epath.Path(workdir))
    return {item: store.restore_params(manager, 4, item) for item in ("params", "opt_state")}


@pytest.mark.slow  # twelve steps to compile
@pytest.mark.parametrize("name", RUNS)
def test_runs_are_the_same_to_the_bit(base, monkeypatch, name):
    """Every feature of the step; the second half of the twin's goes on from a checkpoint."""
    monkeypatch.setattr(zero, "LEAST", 1)
    one, other = base / name, base / f"{name}-twin"
    loop.train_and_evaluate(config_of(base, **RUNS[name]), one)
    made = set()
    for which in ("make_step", "make_accumulation"):
        monkeypatch.setattr(session, which, recorded(getattr(session, which), made))
    config = config_of(base, mapping="shard_map", **RUNS[name])
    loop.train_and_evaluate(config, other, stop_at=2)
    loop.train_and_evaluate(config, other)
    assert made == {"shard_map"}
    assert (one / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
    jax.tree.map(np.testing.assert_array_equal, arrays_of(one), arrays_of(other))


@pytest.mark.slow
def test_all_programs_of_a_run_can_be_the_twins(base, monkeypatch):
    """The day `pmap` goes: the bank, the features and the ranking are mapped by `shard_map` too."""
    changes = {**BANK, "eval_every": 4, "total_steps": 4, "negatives.bank_dtype": "bfloat16"}
    loop.train_and_evaluate(config_of(base, **changes), base / "pmap")
    monkeypatch.setattr(mesh, "pmap", twin.shard_map)
    for remembered in (mesh._placer, mesh._gather_rows):
        remembered.cache_clear()
    jax.clear_caches()
    config = config_of(base, mapping="shard_map", **changes)
    measured = loop.train_and_evaluate(config, base / "all")
    for remembered in (mesh._placer, mesh._gather_rows):
        remembered.cache_clear()
    assert measured["queries"] > 0
    files = [base / name / "metrics.jsonl" for name in ("pmap", "all")]
    assert files[0].read_bytes() == files[1].read_bytes()
    jax.tree.map(np.testing.assert_array_equal, *(arrays_of(file.parent) for file in files))


def test_a_config_chooses_and_pmap_is_the_default():
    assert twin.mapper(run_config("").mapping) is mesh.pmap
    assert twin.mapper(run_config("", mapping="shard_map").mapping) is twin.shard_map
