"""The harness of a run that is killed again and again. A short soak is a job of the workflow."""

import collections

import pytest

from tests.soak import check, plan
from tests.soak.disk import Disk


def test_the_seed_draws_the_faults():
    assert plan.draw(50, 3) == plan.draw(50, 3)
    assert plan.draw(50, 3) != plan.draw(50, 4)


@pytest.mark.parametrize("count", [1, 6, 10, 50, 200])
def test_each_start_is_ended_by_a_fault(count):
    starts = plan.draw(count, 0)
    assert sum(map(len, starts)) == count
    for start in starts:
        assert start[-1].kind not in plan.GOES_ON
        assert all(fault.kind in plan.GOES_ON for fault in start[:-1])


def test_two_hundred_have_all_kinds_at_all_moments():
    faults = [fault for start in plan.draw(200, 0) for fault in start]
    kinds = collections.Counter(fault.kind for fault in faults)
    assert set(kinds) == set(plan.KINDS)
    assert kinds[plan.PAUSE] == 5
    moments = collections.Counter(fault.moment for fault in faults)
    assert set(moments) == set(plan.MOMENTS)
    assert min(moments.values()) >= 15
    assert {fault.process for fault in faults} == {0, 1}


def test_the_ten_faults_of_ci_are_of_all_kinds_but_one():
    faults = [fault for start in plan.draw(10, 113) for fault in start]
    assert {fault.kind for fault in faults} == {*plan.KINDS} - {plan.SILENT}
    assert {fault.moment for fault in faults} == {*plan.MOMENTS}


LINES = b'{"step": 1}\n{"step": 2}\n{"step": 2, "v": 0}\n{"step": 3}\n'


@pytest.mark.parametrize(
    ("found", "saved", "problem"),
    [
        (LINES, 3, ""),
        (LINES[:30], 1, ""),  # cut in a line that is written anew
        (b"", 0, ""),
        (LINES[:12], 1, ""),
        (LINES[:24], 2, "has 2 lines, although step 2 is saved"),
        (LINES[:12] + LINES[:12], 1, "line 2 of metrics.jsonl is not that"),  # twice
        (LINES[:12] + LINES[24:], 1, "line 2 of metrics.jsonl is not that"),  # one is lost
        (LINES + b"x", 3, "line 5 of metrics.jsonl is not that"),
    ],
)
def test_lines_that_are_lost_or_twice(found, saved, problem):
    said = check.Lines(LINES).problem(found, saved)
    assert problem in said
    assert bool(problem) == bool(said)


@pytest.mark.parametrize(
    ("step", "now", "may"),
    [
        (10, {5}, False),  # the newest one is gone
        (10, {15}, False),
        (10, {15, 20}, True),  # two are kept
        (12, {15}, True),  # of an interruption, needed until the next one
        (12, {10}, False),
    ],
)
def test_which_checkpoints_may_be_removed(step, now, may):
    assert check.may_be_removed(step, now, keep=2, every=5) == may


def test_a_disk_is_full_and_free_again(tmp_path):
    disk = Disk(tmp_path / "disk")
    try:
        if disk.reason:
            pytest.skip(disk.reason)
        disk.fill(0)
        with pytest.raises(OSError, match="No space left"):
            (disk.place / "file").write_bytes(b"x" * 8192)
        disk.free()
        (disk.place / "file").write_bytes(b"x" * 8192)
    finally:
        disk.close()
