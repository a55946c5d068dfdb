"""A process whose peer is gone ends in one sentence, and is not thought gone for a short pause.

`python -m tests.soak` kills the processes of a true run.
"""

import jax
import pytest

from dqe_jax.distributed import processes
from dqe_jax.utils.errors import UserError

CLOSED = (
    "UNKNOWN: Gloo all-reduce failed: [external/gloo/gloo/transport/tcp/pair.cc:538] Read error "
    "[127.0.0.1]:14209: Connection reset by peer"
)
BARRIER = (
    "UNAVAILABLE: Failed to send RPC to coordination service. Either the leader task was "
    "preempted/died/restarted unexpectedly or this task is experiencing network issues."
)


@pytest.fixture
def ends(monkeypatch):
    """Of two processes; the statuses with which this one would end at once."""
    statuses = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(processes.atexit, "register", lambda _, status: statuses.append(status))
    return statuses


@pytest.mark.parametrize("text", [CLOSED, BARRIER])
def test_a_lost_process_ends_the_other_in_a_sentence(ends, text):
    with (
        pytest.raises(UserError, match="another process of this run has ended or cannot be reac"),
        processes.ending_together(),
    ):
        raise jax.errors.JaxRuntimeError(text)
    assert ends == [2]


def test_an_error_that_a_lost_process_led_to(ends):
    """Such as one of Orbax, which waits for the others while it saves."""
    failure = RuntimeError("the save has failed")
    failure.__cause__ = jax.errors.JaxRuntimeError(BARRIER)
    with pytest.raises(UserError, match="another process"), processes.ending_together():
        raise failure
    assert ends == [2]


def test_another_error_stays_what_it_is(ends):
    with pytest.raises(KeyError), processes.ending_together():
        raise KeyError("name")
    assert ends == [1]


def test_alone_nothing_is_lost(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 1)
    with pytest.raises(jax.errors.JaxRuntimeError), processes.ending_together():
        raise jax.errors.JaxRuntimeError(CLOSED)


def test_a_process_may_stand_still_for_a_minute(monkeypatch):
    """JAX gives word at half the time after which a process counts as lost."""
    given = {}
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **named: given.update(named))
    monkeypatch.setattr(processes, "leads", lambda: True)
    held = jax.config.values["jax_enable_preemption_service"]
    try:
        processes.join(coordinator="localhost:1", num_processes=2, process_id=0, environ={})
    finally:
        jax.config.update("jax_enable_preemption_service", held)
    assert given["heartbeat_timeout_seconds"] / 2 > 60


def test_a_process_that_is_lost_while_they_join(monkeypatch):
    """The first request for devices waits for those of all."""
    statuses, text = [], "Unable to initialize backend 'cpu': INTERNAL: Getting local topologies"
    monkeypatch.setattr(processes.atexit, "register", lambda _, status: statuses.append(status))
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **named: None)

    def fails():
        raise RuntimeError(text)

    monkeypatch.setattr(processes, "leads", fails)
    held = jax.config.values["jax_enable_preemption_service"]
    try:
        with pytest.raises(UserError, match=r"could not join localhost:1 .*local topologies"):
            processes.join(coordinator="localhost:1", num_processes=2, process_id=0, environ={})
    finally:
        jax.config.update("jax_enable_preemption_service", held)
    assert statuses == [2]
