"""The lease of a workdir in a bucket, in a store of this process that has its generations."""

import json
import time

import pytest
import tensorstore as ts

from dqe_jax.training import lease as leases
from dqe_jax.training.lease import OBJECT, BusyError, Lease
from dqe_jax.utils.errors import UserError

SECONDS = 0.3


@pytest.fixture
def store():
    return ts.KvStore.open({"driver": "memory"}, context=ts.Context()).result()


def take(store):
    return Lease(store, "gs://bucket/run", SECONDS)


def held(store):
    found = store.read(OBJECT).result()
    return json.loads(found.value) if found.state == "value" else None


def test_a_lease_is_renewed_and_given_back(store):
    with take(store) as lease:
        first = held(store)["renewed"]
        time.sleep(2 * SECONDS)
        assert held(store)["renewed"] > first
        lease.check()
    assert held(store) is None
    take(store).close()


def test_a_second_trainer_is_kept_out_in_one_sentence(store):
    with take(store) as lease:
        with pytest.raises(BusyError, match=r"process \d+ of .* trains in gs://bucket/run: wait"):
            take(store)
        lease.check()


def test_the_lease_of_a_dead_process_is_taken_over(store):
    """Whoever holds one and was only slow is told, and writes nothing more."""
    slow = take(store)
    slow._closed.set()  # its thread stops: so it seems dead
    slow._thread.join()
    since = time.monotonic()
    with take(store) as other:
        assert SECONDS <= time.monotonic() - since < 10 * SECONDS
        with pytest.raises(BusyError, match=r"process \d+ .* has taken over the run in gs://"):
            slow.check()
        slow.close()
        assert held(store)["token"] == other._token  # it has removed nothing


def test_a_write_whose_answer_was_lost_is_known_again(store, monkeypatch):
    """The request is sent again, and refused: the object is of another generation by then."""

    class Lost:
        def __init__(self, key, value, if_equal):
            store.write(key, value, if_equal=if_equal).result()
            self._second = store.write(key, value, if_equal=if_equal)

        def result(self, **_):
            return self._second.result()

    class Unsure:
        read = store.read

        def write(self, key, value, if_equal):
            return Lost(key, value, if_equal)

    with take(Unsure()) as lease:
        time.sleep(SECONDS)
        lease.check()
        assert held(store)["renewed"] > 1


def test_an_outage_is_told_and_survived(store, caplog):
    lease, down = take(store), [True]

    class Down:
        def write(self, *args, **kwargs):
            if down[0]:
                raise ValueError("UNAVAILABLE: no answer")
            return store.write(*args, **kwargs)

        read = store.read

    with caplog.at_level("WARNING"):
        lease._store = Down()
        time.sleep(SECONDS)
        down[0] = False
        time.sleep(SECONDS)
    lease.check()
    lease.close()
    assert "could not be renewed (UNAVAILABLE: no answer)" in caplog.text
    assert held(store) is None


def test_a_damaged_lease_is_somebodys(store):
    store.write(OBJECT, b"\xff{").result()
    with take(store):
        assert held(store)["renewed"] == 1


def test_a_bucket_that_cannot_be_had_is_told(monkeypatch, tmp_path):
    with pytest.raises(UserError, match=r"--workdir: gs://X/run cannot be locked .*: name a buck"):
        leases.take_lease("gs://X/run")
