"""launch/slurm on a real Slurm: one controller and two node daemons on this machine.

    apt-get install -y slurm-wlm munge
    python -m pytest -m slow -n 0 -rP tests/launch/slurm_test.py

The daemons have a configuration, a directory and ports of their own and end with the tests, so
that a Slurm which the machine has is not touched. What remains a stand-in is the GPU: Slurm counts
one for each task, and training runs on the CPU.
"""

from __future__ import annotations

import getpass
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath

from dqe_jax.checkpoints import store
from dqe_jax.testing.small_runs import quick_xla_flags

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "sinfo")
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"  # where Debian has the daemons
MISSING = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(MISSING),
        reason=f"{', '.join(MISSING)} not installed: apt-get install -y slurm-wlm munge",
    ),
]

# The names of the nodes are addresses, since the first one is where JAX's processes meet.
NODES = ("127.0.0.1", "127.0.0.2")
FIELDS = {
    "log_every": 1,
    "eval_every": 100_000,
    "checkpoint_every": 100_000,
    "optimizer.warmup_steps": 4,
    "batch.references": 8,
    "batch.queries_per_reference": 2,
    "model.tiny.image_depth": 0,
    "model.tiny.text_depth": 0,
    "model.tiny.composer_depth": 1,
    "negatives.pool": "bank",
    "negatives.first_refresh": 4,
    "negatives.refresh_every": 50,
}


def free_ports(count: int) -> list[int]:
    held = [socket.socket() for _ in range(count)]
    for one in held:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in held]
    for one in held:
        one.close()
    return ports


class Cluster:
    """A controller and two nodes with two GPUs each, in a directory."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.env = {**os.environ, "PATH": PATH, "SLURM_CONF": str(folder / "slurm.conf")}
        self.daemons: list[subprocess.Popen] = []
        (folder / "munge.key").write_bytes(os.urandom(1024))
        (folder / "munge.key").chmod(0o400)
        (folder / "state").mkdir()
        (folder / "gres.conf").write_text("Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n")
        host, user = socket.gethostname().split(".")[0], getpass.getuser()
        controller, *ports = free_ports(1 + len(NODES))
        lines = [
            "ClusterName=test",
            f"SlurmctldHost={host}(127.0.0.1)",
            f"SlurmctldPort={controller}",
            f"SlurmUser={user}",
            f"SlurmdUser={user}",
            "AuthType=auth/munge",
            # A job that returns to the queue waits as long as a credential lives: else two minutes.
            f"AuthInfo=socket={folder}/munge.socket,cred_expire=5",
            f"StateSaveLocation={folder}/state",
            f"SlurmdSpoolDir={folder}/spool-%n",
            f"SlurmctldPidFile={folder}/slurmctld.pid",
            f"SlurmdPidFile={folder}/slurmd-%n.pid",
            "ProctrackType=proctrack/linuxproc",
            "TaskPlugin=task/none",
            "MpiDefault=none",
            "SelectType=select/cons_tres",
            "SelectTypeParameters=CR_Core",
            "GresTypes=gpu",
            "SlurmdParameters=config_overrides",
            "SchedulerParameters=sched_interval=2,batch_sched_delay=0",
            "ReturnToService=2",
            "PreemptType=preempt/partition_prio",
            "PreemptMode=REQUEUE",
            *(
                f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=8"
                " Gres=gpu:2"
                for node, port in zip(NODES, ports)
            ),
            "PartitionName=train Nodes=ALL Default=YES PriorityTier=1 GraceTime=60",
            "PartitionName=urgent Nodes=ALL PriorityTier=2",
        ]
        (folder / "slurm.conf").write_text("\n".join(lines) + "\n")

    def start(self) -> None:
        place = self.folder
        self._start(
            *("munged", "--foreground", "--force", f"--socket={place}/munge.socket"),
            *(f"--key-file={place}/munge.key", f"--log-file={place}/munged.log"),
            *(f"--pid-file={place}/munged.pid", f"--seed-file={place}/munged.seed"),
        )
        wait_until(lambda: (place / "munge.socket").exists(), 30, self.said)
        self._start("slurmctld", "-D", name="slurmctld")
        for node in NODES:
            self._start("slurmd", "-D", "-N", node, name=f"slurmd-{node}")
        wait_until(
            lambda: self.call("sinfo", "--noheader", "--format=%T").split() == ["idle"],
            60,
            self.said,
        )

    def _start(self, *command: str, name: str = "munged") -> None:
        with (self.folder / f"{name}.out").open("w") as log:
            self.daemons.append(
                subprocess.Popen(command, env=self.env, stdin=-3, stdout=log, stderr=log)
            )

    def stop(self) -> None:
        if len(self.daemons) > 1:
            self.call("scancel", f"--user={getpass.getuser()}")
            wait_until(lambda: not self.call("squeue", "--noheader"), 90, self.said)
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in self.daemons:
            try:
                daemon.wait(30)
            except subprocess.TimeoutExpired:
                daemon.kill()

    def said(self) -> str:
        """The ends of the daemons' logs."""
        files = sorted(self.folder.glob("*.out"))
        return "\n".join(f"{file.name}:\n{file.read_text()[-2000:]}" for file in files)

    def call(self, *command: str) -> str:
        result = subprocess.run(
            command, env=self.env, capture_output=True, text=True, check=False, timeout=60
        )
        return result.stdout.strip()

    def facts(self, job: str) -> dict[str, str]:
        """What Slurm knows of a job, such as its JobState, Restarts and ExitCode."""
        shown = self.call("scontrol", "show", "job", "--oneliner", job)
        return dict(re.findall(r"(\w+)=(\S+)", shown))

    def wait_for(self, job: str, *states: str, timeout: float = 120) -> dict[str, str]:
        wait_until(
            lambda: self.facts(job).get("JobState") in states,
            timeout,
            lambda: f"{self.facts(job)}\n{self.said()}",
        )
        return self.facts(job)


def wait_until(what, timeout: float, said) -> None:
    until = time.monotonic() + timeout
    while not what():
        assert time.monotonic() < until, said()
        time.sleep(0.1)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # the path of a socket must be short
    cluster = Cluster(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)


class Runs:
    """Jobs that launch/slurm/submit.sh submits, on two nodes with a task on each."""

    def __init__(self, cluster: Cluster, base: Path):
        self.cluster, self.base = cluster, base
        python = base / "venv" / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        (python.parent / "pip").write_text("#!/bin/sh\n")  # asked whether dqe_jax is installed
        for file in python.parent.iterdir():
            file.chmod(0o755)

    def submit(self, name: str, *flags: str, variables=None, **fields) -> str:
        """The number of the job; its log is NAME.log."""
        fields = {**FIELDS, "data.prepared_dir": str(self.base / "prepared"), **fields}
        result = subprocess.run(
            [
                ROOT / "launch" / "slurm" / "submit.sh",
                *("--config=configs/shapes.py:smoke", f"--workdir={self.base / name}"),
                *(f"--config.{field}={value}" for field, value in fields.items()),
                *flags,
            ],
            cwd=ROOT,
            env={
                **self.cluster.env,
                "VENV": str(self.base / "venv"),
                **{"NODES": "2", "GPUS": "1", "CPUS_PER_GPU": "2"},
                "SBATCH_OUTPUT": str(self.base / f"{name}.log"),
                "SBATCH_TIMELIMIT": "20",
                **{"JAX_PLATFORMS": "cpu", "XLA_FLAGS": quick_xla_flags(1)},
                "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
                **(variables or {}),
            },
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert result.returncode == 0, result.stderr
        return re.search(r"Submitted batch job (\d+)", result.stdout)[1]

    def finish(self, job: str, name: str, state: str = "COMPLETED", timeout: float = 400):
        """What Slurm says of a job that must end in a state."""
        ends = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
        facts = self.cluster.wait_for(job, *ends, timeout=timeout)
        assert facts["JobState"] == state, f"{facts}\n{self.said(name)}"
        return facts

    def said(self, name: str) -> str:
        path = self.base / f"{name}.log"
        return path.read_text() if path.exists() else ""

    def lines(self, name: str) -> list[dict[str, float]]:
        """What the run logged of its steps; a line that is being written does not count."""
        path = self.base / name / "metrics.jsonl"
        whole = path.read_text().split("\n")[:-1] if path.exists() else []
        return [line for line in map(json.loads, whole) if "loss" in line]

    def wait_for_step(self, name: str, step: int) -> None:
        wait_until(lambda: len(self.lines(name)) >= step, 180, lambda: self.said(name))

    def params(self, name: str) -> dict[str, np.ndarray]:
        manager = store.open_for_reading(epath.Path(self.base / name))
        return store.restore_params(manager, manager.latest_step())


@pytest.fixture(scope="module")
def runs(cluster, tmp_path_factory, prepared) -> Runs:
    base = tmp_path_factory.mktemp("runs")
    prepared(base)
    return Runs(cluster, base)


def test_two_tasks_train_together(runs):
    job = runs.submit("two", total_steps=60)
    facts = runs.finish(job, "two")
    assert (facts["ExitCode"], facts["Restarts"], facts["NumTasks"]) == ("0:0", "0", "2")
    (devices,) = re.findall(r"Devices: .*", runs.said("two"))  # process 0 alone logs
    assert len(devices.split(", ")) == 2
    assert [line["step"] for line in runs.lines("two")] == list(range(1, 61))


def assert_same_run(runs: Runs, name: str, other: str) -> None:
    """Every step of the log, and all parameters at the end, to the byte."""
    assert runs.lines(name) == runs.lines(other)
    first, second = runs.params(name), runs.params(other)
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_a_job_that_its_time_limit_stops_returns_to_the_queue_and_ends_as_if_it_had_not(runs):
    # Slurm's limits are minutes, and it sends the signal half a minute to a minute before it must.
    seconds = json.loads((runs.base / "two" / "timing.jsonl").read_text().split("\n")[-2])
    steps = int(60 * (60 / seconds["train_seconds"]))
    limit = {"SBATCH_TIMELIMIT": "2", "SBATCH_SIGNAL": "TERM@30"}
    for attempt in range(3):
        name = f"limited-{attempt}"
        job = runs.submit(name, variables=limit, total_steps=steps)
        facts = runs.finish(job, name, timeout=800)
        if int(facts["Restarts"]) > 0:
            break
        steps *= 2  # the machine has become quicker
    assert int(facts["Restarts"]) > 0
    assert facts["ExitCode"] == "0:0"
    said = runs.said(name)
    print(said)
    assert said.count("SIGTERM after step") >= 1, said
    runs.finish(runs.submit("unlimited", total_steps=steps), "unlimited", timeout=800)
    assert_same_run(runs, "unlimited", name)


def test_a_preempted_job_saves_and_goes_on_behind_the_urgent_one(runs):
    job = runs.submit("preempted", total_steps=60, variables={"GPUS": "2"})
    runs.wait_for_step("preempted", 5)
    urgent = runs.submit(
        "urgent", total_steps=2, variables={"GPUS": "2", "SBATCH_PARTITION": "urgent"}
    )
    runs.finish(urgent, "urgent")
    facts = runs.finish(job, "preempted")
    assert (facts["ExitCode"], facts["Restarts"]) == ("0:0", "1")
    assert "SIGTERM after step" in runs.said("preempted")


def test_a_cancelled_job_saves_and_stays_away_and_can_go_on_by_hand(runs):
    job = runs.submit("cancelled", total_steps=60)
    runs.wait_for_step("cancelled", 5)
    runs.cluster.call("scancel", job)
    facts = runs.finish(job, "cancelled", "CANCELLED")
    assert facts["Restarts"] == "0"
    wait_until(lambda: not runs.cluster.call("squeue", "--noheader"), 60, runs.cluster.said)
    saved = store.steps_of(epath.Path(runs.base / "cancelled"))
    assert max(saved, default=0) >= 5, runs.said("cancelled")
    assert runs.cluster.facts(job)["JobState"] == "CANCELLED"
    runs.finish(runs.submit("cancelled", total_steps=60), "cancelled")
    assert_same_run(runs, "two", "cancelled")


def test_an_array_trains_a_run_for_each_seed(runs):
    alone = {"NODES": "1", "SEEDS": "3,5"}
    job = runs.submit("array", total_steps=4, variables=alone)
    for seed in ("3", "5"):
        facts = runs.finish(f"{job}_{seed}", "array")
        assert (facts["ExitCode"], facts["ArrayTaskId"]) == ("0:0", seed)
        config = json.loads((runs.base / "array" / f"seed-{seed}" / "config.json").read_text())
        assert config["seed"] == int(seed)
    losses = [[line["loss"] for line in runs.lines(f"array/seed-{seed}")] for seed in (3, 5)]
    assert len(losses[0]) == len(losses[1]) == 4
    assert losses[0] != losses[1]


def test_a_job_that_fails_is_not_requeued(runs):
    job = runs.submit("failed", **{"batch.references": 7})
    facts = runs.finish(job, "failed", "FAILED", timeout=300)
    assert facts["Restarts"] == "0"
    assert facts["ExitCode"] != "0:0"
    assert "batch.references is 7: it must be a multiple of" in runs.said("failed")
