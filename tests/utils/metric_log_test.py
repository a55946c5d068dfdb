"""The metric log: lines by step, resuming, and TensorBoard events, read back by a small reader."""

from __future__ import annotations

import errno
import json
import os
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from etils import epath
from tensorboardX.proto import event_pb2

from dqe_jax.utils import metric_log
from dqe_jax.utils.errors import UserError
from dqe_jax.utils.metric_log import MetricLog

pytestmark = pytest.mark.core


@pytest.fixture
def workdir(tmp_path):
    return epath.Path(tmp_path)


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def write(workdir, steps, resume_step=0):
    log = MetricLog(workdir, resume_step)
    for step in steps:
        log.write(step, {"loss": 1.0 / step})
    log.close()


def events(workdir):
    """All events: records of length, checksum, data, checksum."""
    found = []
    for path in sorted((workdir / "events").iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            found.append(event_pb2.Event.FromString(data[at + 12 : at + 12 + length]))
            at += 12 + length + 4
        assert at == len(data)
    return found


def scalars(workdir):
    return [
        (value.tag, event.step, pytest.approx(value.simple_value))
        for event in events(workdir)
        for value in event.summary.value
    ]


def test_a_bucket_gets_whole_files(workdir, monkeypatch):
    """There appending replaces what a file holds."""
    monkeypatch.setattr(metric_log, "is_remote", lambda path: True)
    open_file = type(workdir).open

    def open_whole(self, mode="r", *args, **kwargs):
        assert "a" not in mode
        return open_file(self, mode, *args, **kwargs)

    monkeypatch.setattr(type(workdir), "open", open_whole)
    for resume, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        log = metric_log.MetricLog(workdir, resume_step=resume)
        for step in steps:
            log.write(step, {"loss": step / 2})
            assert log.steps()[-1] == step
        log.close()
    assert log.steps() == [1, 2, 3, 4]


def test_a_bucket_that_does_not_answer_for_a_while(workdir, monkeypatch, caplog):
    """What could not be written is in the next file, or in the last one."""
    monkeypatch.setattr(metric_log, "is_remote", lambda path: True)
    log = metric_log.MetricLog(workdir)
    write_text, down = type(workdir).write_text, [True]

    def write(self, text):
        if down[0]:
            raise ConnectionError("503")
        return write_text(self, text)

    monkeypatch.setattr(type(workdir), "write_text", write)
    with caplog.at_level("WARNING"):
        for step in (1, 2):
            log.write(step, {"loss": 1.0})
    assert len(caplog.records) == 1
    assert "metrics.jsonl cannot be written now (503)" in caplog.text
    down[0] = False
    log.write(3, {"loss": 1.0})
    assert log.steps() == [1, 2, 3]
    down[0] = True
    log.write(4, {"loss": 1.0})
    down[0] = False
    log.close()
    assert log.steps() == [1, 2, 3, 4]


def test_lines_in_order(workdir):
    log = MetricLog(workdir)
    log.write(2, {"loss": 0.5, "tau": 0.07})
    log.write(2, {"validation/R@1": 0.25, "queries": 3})
    log.write(4, {"loss": 0.25, "name": "words"})
    assert lines(workdir) == [  # there before the log is closed
        {"step": 2, "loss": 0.5, "tau": 0.07},
        {"step": 2, "validation/R@1": 0.25, "queries": 3},
        {"step": 4, "loss": 0.25, "name": "words"},
    ]
    log.close()


def test_a_fresh_log_is_empty_and_drops_what_was_there(workdir):
    write(workdir, [1, 2])
    write(workdir, [])
    assert lines(workdir) == []


@pytest.mark.parametrize(
    ("resume", "kept"), [(0, []), (2, [1, 2]), (3, [1, 2, 3]), (9, [1, 2, 3, 4])]
)
def test_resuming_keeps_the_steps_until_there(workdir, resume, kept):
    write(workdir, [1, 2, 3, 4])
    write(workdir, [resume + 1], resume_step=resume)
    assert [line["step"] for line in lines(workdir)] == [*kept, resume + 1]


def test_both_lines_of_the_resumed_step_are_kept(workdir):
    log = MetricLog(workdir)
    log.write(4, {"loss": 1.0})
    log.write(4, {"validation/R@1": 0.5})
    log.write(6, {"loss": 0.5})
    log.close()
    MetricLog(workdir, resume_step=4).close()
    assert lines(workdir) == [{"step": 4, "loss": 1.0}, {"step": 4, "validation/R@1": 0.5}]


@pytest.mark.parametrize("cut", range(1, 14))
def test_a_half_written_last_line_is_dropped(workdir, cut):
    write(workdir, [1, 2])
    path = workdir / "metrics.jsonl"
    whole = path.read_text()
    path.write_text(whole + '{"step": 3, "loss": 0.3}'[:-cut])
    write(workdir, [3], resume_step=2)
    assert [line["step"] for line in lines(workdir)] == [1, 2, 3]
    assert path.read_text().startswith(whole)


def test_a_last_line_without_its_newline_is_kept(workdir):
    path = workdir / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 0.5}')
    write(workdir, [2], resume_step=1)
    assert [line["step"] for line in lines(workdir)] == [1, 2]


def test_values_that_are_not_finite_become_null(workdir):
    """NaN and Infinity are no JSON, though Python writes and reads them."""
    log = MetricLog(workdir)
    log.write(1, {"loss": float("nan"), "tau": float("inf"), "least": -float("inf"), "mean": 1.5})
    log.close()
    MetricLog(workdir, resume_step=1).close()
    text = (workdir / "metrics.jsonl").read_text()
    found = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert found == {"step": 1, "loss": None, "tau": None, "least": None, "mean": 1.5}


DAMAGED_LINES = {
    "binary": b'{"step": 1, "loss": "\xff"}',
    "a list": b"[1]",
    "no step": b'{"loss": 1.0}',
    "a step that is none": b'{"step": "1", "loss": 1.0}',
    "a step that is a list": b'{"step": [1]}',
    "nested": b"[" * 100_000,
    "a long number": b'{"step": ' + b"1" * 10_000 + b"}",
}


@pytest.mark.parametrize("damaged", DAMAGED_LINES.values(), ids=DAMAGED_LINES.keys())
def test_a_damaged_line_is_dropped(workdir, damaged):
    write(workdir, [1, 2])
    path = workdir / "metrics.jsonl"
    path.write_bytes(damaged + b"\n" + path.read_bytes() + damaged + b"\n")
    log = MetricLog(workdir, resume_step=None, again="")
    assert log.steps() == [1, 2]
    log.close()
    assert [line["step"] for line in lines(workdir)] == [1, 2]


def test_what_is_no_file_in_place_of_a_log_is_refused(workdir):
    """Nothing is removed; a pipe would be read for ever."""
    write(workdir, [1, 2])
    path = Path(workdir, "timing.jsonl")
    path.unlink()
    path.symlink_to("/dev/null")
    with pytest.raises(UserError, match=r"timing\.jsonl cannot be read: it is no regular file"):
        MetricLog(workdir, resume_step=1)
    assert path.is_symlink()


def test_a_full_disk_is_an_error_of_the_caller(workdir, monkeypatch):
    """Not a traceback of a thread, after which the next numbers wait for ever."""

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    before = set(threading.enumerate())  # other tests may have left some
    log = MetricLog(workdir)
    log.write(1, {"loss": 0.5})
    monkeypatch.setattr("tensorboardX.record_writer.RecordWriter.flush", full)
    for step in range(2, 40):
        log.write(step, {"loss": 0.5})
    with pytest.raises(OSError, match="No space left"):
        log.close()
    assert set(threading.enumerate()) <= before


def test_tensorboard_has_the_numbers(workdir):
    log = MetricLog(workdir)
    log.write(2, {"loss": 0.5, "queries": 3, "name": "words"})
    log.write(3, {"test/R@1": 0.25})
    log.close()
    assert scalars(workdir) == [("loss", 2, 0.5), ("queries", 2, 3.0), ("test/R_at_1", 3, 0.25)]


def test_tensorboard_drops_what_a_resumed_run_takes_again(workdir, monkeypatch):
    write(workdir, [1, 2, 3, 4])
    now = time.time()  # the name of an event file is the second in which it was opened
    monkeypatch.setattr(time, "time", lambda: now + 60)
    write(workdir, [3, 4], resume_step=2)
    starts = [e.step for e in events(workdir) if e.HasField("session_log")]
    assert starts[-1] == 3  # "drop all of this step and later"
    assert sorted(step for _, step, _ in scalars(workdir)) == [1, 2, 3, 3, 4, 4]


WITHOUT_TORCH = """
import sys
from etils import epath
from dqe_jax.utils.metric_log import MetricLog

log = MetricLog(epath.Path(sys.argv[1]))
log.write(2, {"loss": 0.5})
log.close()
assert "torch" not in sys.modules
import torch  # whoever wants it still gets it

MetricLog(epath.Path(sys.argv[2])).close()
assert sys.modules["torch"] is torch
"""


def test_torch_is_not_imported(workdir, tmp_path):
    """Where it is installed, tensorboardX would load it at each start."""
    torch, mark = tmp_path / "site" / "torch" / "__init__.py", tmp_path / "imported"
    torch.parent.mkdir(parents=True)
    torch.write_text(f"open({str(mark)!r}, 'a').write('once, ')\nTensor = object\n")
    path = os.pathsep.join([str(torch.parent.parent), *sys.path])
    subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, str(workdir / "run"), str(workdir / "other")],
        env={**os.environ, "PYTHONPATH": path},
        check=True,
        timeout=120,
    )
    assert mark.read_text() == "once, "  # by the script itself
    assert scalars(workdir / "run") == [("loss", 2, 0.5)]
