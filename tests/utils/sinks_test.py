"""Services that get the metrics too: what they are told, and that none of them ends a run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
from etils import epath

from dqe_jax.testing.small_runs import small_config
from dqe_jax.training import loop
from dqe_jax.utils import sinks
from dqe_jax.utils.errors import UserError
from dqe_jax.utils.metric_log import MetricLog
from dqe_jax.utils.sinks import SINKS, Sinks

ROOT = Path(__file__).resolve().parents[2]


class Service(types.ModuleType):
    """Stands for a service's module; `fails` names the call that raises."""

    def __init__(self, fails=""):
        super().__init__("service")
        self.fails, self.opened, self.logged, self.finished = fails, [], [], 0

    def Settings(self, **settings):
        return settings

    def init(self, **arguments):
        if self.fails == "init":
            raise RuntimeError("no account")
        self.opened.append(arguments)
        return self

    def log(self, values, *, step):
        if self.fails == "log":
            raise ConnectionError("the cable is out")
        self.logged.append((step, values))

    def finish(self):
        if self.fails == "hang":
            time.sleep(20)
        if self.fails == "finish":
            raise ConnectionError("still out")
        self.finished += 1


@pytest.fixture
def service(monkeypatch):
    def stand_in(name, fails=""):
        made = Service(fails)
        monkeypatch.setitem(sys.modules, name, made)
        return made

    return stand_in


def open_sinks(directory, *names, fresh=True):
    path = epath.Path(directory)
    return Sinks(names, path, "project", {"seed": 1}, fresh=fresh)


def write(directory, *steps, names=SINKS, fresh=True):
    """A log of a run that has just taken these steps."""
    made = open_sinks(directory, *names, fresh=fresh)
    log = MetricLog(epath.Path(directory), resume_step=steps[0] - 1, sinks=made)
    for step in steps:
        log.write(step, {"loss": 1 / step, "name": "x"})
        log.write_timing(step, {"train_seconds": 1.0})
    log.close()


@pytest.mark.parametrize("name", SINKS)
def test_a_service_gets_the_numbers_of_all_lines(tmp_path, service, name):
    made = service(name)
    write(tmp_path, 1, 2, names=(name,))
    expected = [{"loss": 1.0}, {"train_seconds": 1.0}, {"loss": 0.5}, {"train_seconds": 1.0}]
    assert [values for _, values in made.logged] == expected
    assert [step for step, _ in made.logged] == [1, 1, 2, 2]
    assert made.finished == 1
    (opened,) = made.opened
    assert opened["project"] == "project"
    assert opened["config"] == {"seed": 1}
    assert tmp_path.name in opened["name"]


def test_a_run_that_goes_on_keeps_its_name_and_a_new_one_gets_another(tmp_path, service):
    made = {name: service(name) for name in SINKS}
    for fresh in (True, False, True):
        write(tmp_path, 1, fresh=fresh)
    for key, name in (("id", "wandb"), ("name", "trackio")):
        first, second, third = (opened[key] for opened in made[name].opened)
        assert first == second != third
        assert {opened["resume"] for opened in made[name].opened} == {"allow"}


def test_no_service_no_file(tmp_path):
    write(tmp_path, 1, names=())
    assert not (tmp_path / sinks.FILE).exists()


@pytest.mark.parametrize(
    ("fails", "told"),
    [
        ("init", "could not be opened (no account)"),
        ("log", "failed at step 1 (the cable is out)"),
        ("finish", "could not send everything (still out)"),
        ("hang", "could not send everything (it has not ended after 0 s)"),
    ],
)
def test_a_service_that_fails_is_told_once_and_the_others_go_on(
    tmp_path, service, caplog, monkeypatch, fails, told
):
    monkeypatch.setattr(sinks, "CLOSE_S", 0.05)
    service("wandb", fails)
    sound = service("trackio")
    with caplog.at_level("WARNING"):
        write(tmp_path, 1, 2, 3)
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 1
    assert f"config.log.sinks: wandb {told}; the run goes on" in warnings[0]
    assert len(sound.logged) == 6
    assert sound.finished == 1
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]


def test_a_service_that_is_not_installed_is_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(sinks.importlib.util, "find_spec", lambda name: None)
    config = small_config(tmp_path / "prepared", **{"log.sinks": ("trackio",)})
    with pytest.raises(UserError, match=r"names 'trackio', which is not installed: run `pip inst"):
        loop.train_and_evaluate(config, tmp_path / "run")
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------ the services themselves

# A process of its own for each: they have threads, hooks and state of the process.
WRITE = """
import sys
from dqe_jax.utils import metric_log, sinks
from etils import epath
name, directory, first = sys.argv[1], epath.Path(sys.argv[2]), int(sys.argv[3])
sinks.OPEN_S = 5
made = sinks.Sinks((name,), directory, "tests", {"seed": 3, "a.b": (1, 2)}, fresh=first == 1)
log = metric_log.MetricLog(directory, resume_step=first - 1, sinks=made)
for step in range(first, first + 3):
    log.write(step, {"loss": 1 / step, "validation/recall@1": step / 10})
log.close()
print(len(log.steps()))
"""


def run(name, directory, first, **variables):
    done = subprocess.run(
        [sys.executable, "-c", WRITE, name, str(directory), str(first)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "WANDB_SILENT": "true", **variables},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.slow  # W&B starts a service of its own
def test_wandb_offline(tmp_path):
    pytest.importorskip("wandb")
    workdir = tmp_path / "run"
    for first in (1, 4):
        said = run("wandb", workdir, first, WANDB_MODE="offline")
        assert "log.sinks" not in said.stderr
    own = json.loads((workdir / sinks.FILE).read_text())["id"]
    files = sorted(workdir.glob(f"wandb/offline-run-*-{own}/run-{own}.wandb"))
    assert len(files) == 2  # an attempt each, of one run
    for file in files:
        assert b"validation/recall@1" in file.read_bytes()


@pytest.mark.slow
def test_wandb_that_cannot_be_reached(tmp_path):
    pytest.importorskip("wandb")
    variables = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40}
    said = run("wandb", tmp_path / "run", 1, WANDB_MODE="online", **variables)
    assert "config.log.sinks: wandb could not be opened" in said.stderr
    assert said.stdout.split()[-1] == "3"


@pytest.mark.slow
def test_trackio_in_a_directory(tmp_path):
    pytest.importorskip("trackio")
    workdir, variables = tmp_path / "run", {"TRACKIO_DIR": str(tmp_path / "trackio")}
    for first in (1, 4):
        said = run("trackio", workdir, first, HF_HUB_OFFLINE="1", **variables)
        assert "log.sinks" not in said.stderr
    read = (
        "import json; from trackio.sqlite_storage import SQLiteStorage as s;"
        "(name,) = s.get_runs('tests'); print(json.dumps([[x['step'], x['loss']] "
        "for x in s.get_logs('tests', name)]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", read],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == [[step, pytest.approx(1 / step)] for step in range(1, 7)]
