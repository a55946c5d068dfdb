"""Batches that lie on the devices before they are asked for, and how long a run waits for them."""

import threading
import types

import jax
import numpy as np
import pytest

from dqe_jax.config import RunConfig
from dqe_jax.distributed import mesh
from dqe_jax.training import data_wait
from dqe_jax.training.data_wait import DataWait, advice
from dqe_jax.training.prefetch import AHEAD, DeviceBatches


class Counting:
    """A loader whose batches are numbers; `gate` holds it back, `bad` fails."""

    def __init__(self, bad=None):
        self.next, self.bad, self.gate = 0, bad, threading.Event()
        self.gate.set()

    def __next__(self):
        assert self.gate.wait(30)
        if self.next == self.bad:
            raise OSError("the disk is gone")
        self.next += 1
        return np.full((2, 3), self.next - 1)

    def get_state(self):
        return {"next_index": self.next}

    def set_state(self, state):
        self.next = state["next_index"]


def sent(x):
    return jax.device_put(x)


@pytest.fixture
def opened():
    """A function that opens batches, which are closed in the end."""
    made = []

    def open_(loader, **options):
        made.append(DeviceBatches(loader, sent, **options))
        return made[-1]

    yield open_
    for batches in made:
        batches.close()


def numbers(batches, count):
    return [int(next(batches)[0, 0]) for _ in range(count)]


def test_batches_come_in_order_from_the_devices(opened):
    batches = opened(Counting())
    assert isinstance(next(batches), jax.Array)
    assert numbers(batches, 4) == [1, 2, 3, 4]


def test_nothing_is_read_before_it_is_asked_for_and_few_ahead(opened):
    loader = Counting()
    batches = opened(loader)
    assert loader.next == 0
    numbers(batches, 3)
    batches._drop()  # what is being read is over
    assert 3 <= loader.next <= 3 + AHEAD


def test_the_state_is_that_of_what_was_taken(opened):
    batches = opened(Counting())
    assert batches.get_state() == {"next_index": 0}
    numbers(batches, 3)
    assert batches.get_state() == {"next_index": 3}
    assert numbers(batches, 2) == [3, 4]
    batches.set_state({"next_index": 3})  # while others wait
    assert batches.get_state() == {"next_index": 3}
    assert numbers(batches, 2) == [3, 4]
    fresh = opened(Counting())
    fresh.set_state({"next_index": 5})
    assert numbers(fresh, 2) == [5, 6]


def test_an_error_comes_with_its_own_batch(opened):
    batches = opened(Counting(bad=2))
    assert numbers(batches, 2) == [0, 1]
    assert batches.wait() >= 0  # it is told where the batch is taken
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)
    assert batches.get_state() == {"next_index": 2}


def test_a_batch_that_is_there_is_not_waited_for(opened):
    loader = Counting()
    batches = opened(loader)
    numbers(batches, 1)
    for waiting in batches._waiting:  # all that are read before the gate is closed
        waiting.result()
    assert batches.wait(busy="not looked at") == 0
    loader.gate.clear()
    numbers(batches, AHEAD)
    threading.Timer(0.05, loader.gate.set).start()
    assert batches.wait(busy=sent(np.zeros(1))) > 0
    assert batches._waiting[0].done()


def test_placed_batches_are_what_a_map_takes():
    devices = jax.devices()[:4]
    tree = {"a": np.arange(24).reshape(8, 3), "b": np.arange(8.0)}
    placed = mesh.place(tree, devices)
    jax.tree.map(np.testing.assert_array_equal, placed, mesh.shard(tree, 4))
    assert [shard.device for shard in placed["a"].addressable_shards] == devices
    again = mesh.placer(devices)(placed["a"])
    assert again.sharding.is_equivalent_to(placed["a"].sharding, 3)


# ------------------------------------------------------------------------- the time without data


def test_the_share_of_the_time_between_two_lines():
    wait = DataWait(RunConfig())
    wait.add(0.5)
    wait.add(1.0)
    assert wait.take(6.0) == {"data_wait_seconds": 1.5, "data_wait": 0.25}
    assert wait.take(2.0) == {"data_wait_seconds": 0.0, "data_wait": 0.0}
    wait.add(1.0)
    assert wait.take(0.0)["data_wait"] == 1.0


def test_a_run_that_waits_is_told_once_and_not_for_a_moment(caplog):
    wait = DataWait(RunConfig())
    for seconds in (0.9, 0.9, 9.0, 9.0, 20.0):
        wait.add(seconds / 2)
        wait.take(seconds)
    (told,) = caplog.messages
    assert told.startswith("For 50% of the time the devices waited for data: ")
    caplog.clear()
    wait = DataWait(RunConfig())
    wait.add(1.9)
    wait.take(10.0)
    assert not caplog.messages


def test_the_advice_names_what_is_left_to_do(monkeypatch):
    config = RunConfig().with_changes({"data.dataset": "fashioniq", "data.cache_images": False})
    said = advice(config, 0.31, cores=8)
    assert said.startswith("For 31% of the time the devices waited for data: read with more thre")
    assert "config.data.num_threads is 2, this machine has 8 cores" in said
    assert "config.data.cache_images=True) or store images as JPEG or raw (config.data." in said
    stored = advice(config, 0.31, cores=2, stored=True)
    assert "data: keep features in memory (config.features.place); `dqe-jax" in stored
    done = config.with_changes({"data.cache_images": True, "data.image_format": "jpeg"})
    assert "data: take a machine with more or faster cores; `dqe-jax" in advice(done, 0.3, cores=2)
    monkeypatch.setattr(data_wait, "os", types.SimpleNamespace(cpu_count=lambda: None))
    wait = DataWait(config)
    wait.add(9.0)
    assert wait.take(10.0)["data_wait"] == 0.9
