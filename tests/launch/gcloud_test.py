"""The commands of launch/tpu, read by the real gcloud; the files of launch/gke and launch/sky.

gcloud's own parser refuses what it does not know before it looks for an account. There is none
here, so a command that it accepts ends for lack of one, and nothing is asked of any network.
"""

from __future__ import annotations

import concurrent.futures
import math
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NO_ACCOUNT = "You do not currently have an active account selected"
CONFIG = "--config=configs/shapes.py"
needs_gcloud = pytest.mark.skipif(shutil.which("gcloud") is None, reason="gcloud is not installed")
VARIABLES = {
    "on-demand": {},
    "spot-slice": {"SPOT": "true", "TYPE": "v5litepod-16"},
    "queued": {"QUEUED": "true"},
    "queued-spot": {"QUEUED": "true", "SPOT": "true"},
    "flex-start": {"FLEX_START": "10h"},
    "extra-flags": {"CREATE_FLAGS": "--network=n", "SSH_FLAGS": "--internal-ip"},
}
SCRIPTS = {
    **{"create": [], "delete": [], "status": [], "logs": []},
    **{"train": [CONFIG], "evaluator": [CONFIG, "--split=validation"], "run": [CONFIG]},
}


def dry_run(script: str, *args: str, **variables: str) -> list[str]:
    """The commands that a script prints."""
    env = {
        **os.environ,
        **{"PROJECT": "my-project", "SOURCE": "https://example.com/a.git", "REVISION": "abc"},
        **{"WORKDIR": "gs://bucket/run", "PLATFORM": "cpu", **variables},
    }
    result = subprocess.run(
        [ROOT / "launch" / "tpu" / f"{script}.sh", "--dry_run", *args],
        env=env,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return [line[2:] for line in result.stdout.splitlines() if line.startswith("+ ")]


def parsed(command: str, folder: Path) -> subprocess.CompletedProcess:
    """What gcloud says of a command, without an account, a question or a network."""
    env = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "CLOUDSDK_CONFIG": str(folder / "config"),
        "CLOUDSDK_CORE_DISABLE_PROMPTS": "1",
        "CLOUDSDK_CORE_CHECK_GCE_METADATA": "false",
        "CLOUDSDK_CORE_DISABLE_USAGE_REPORTING": "true",
        "CLOUDSDK_COMPONENT_MANAGER_DISABLE_UPDATE_CHECK": "true",
    }
    return subprocess.run(
        ["bash", "-c", command],
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.mark.slow
@needs_gcloud
def test_gcloud_itself_accepts_every_command_of_a_dry_run(tmp_path):
    commands: dict[str, str] = {}
    for kind, variables in VARIABLES.items():
        for script, args in SCRIPTS.items():
            for command in dry_run(script, *args, **variables):
                commands.setdefault(command, f"{script}, {kind}")
    # A run that is not on a bucket is copied from its VM.
    for command in dry_run("run", CONFIG, WORKDIR="runs/vm"):
        commands.setdefault(command, "run, copied")
    called = [command for command in commands if command.startswith("gcloud ")]
    verbs = {
        re.match(r"gcloud (?:alpha )?compute tpus (\S+ \S+)", command)[1] for command in called
    }
    assert verbs == {
        *(f"tpu-vm {verb}" for verb in ("create", "delete", "describe", "scp", "ssh")),
        *(f"queued-resources {verb}" for verb in ("create", "delete", "describe")),
    }
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda command: parsed(command, tmp_path), called))
    print(f"gcloud has read {len(called)} commands.")
    refused = [
        f"{commands[command]}: {command}\n{result.stderr}"
        for command, result in zip(called, results)
        if result.returncode != 1 or NO_ACCOUNT not in result.stderr
    ]
    assert not refused, "\n".join(refused)


@pytest.mark.slow
@needs_gcloud
@pytest.mark.parametrize(
    ("change", "answer"),
    [(("--zone", "--zoen"), "unrecognized arguments"), (("create", "make"), "Invalid choice")],
)
def test_gcloud_refuses_what_it_does_not_know(tmp_path, change, answer):
    command = dry_run("create")[0]
    assert NO_ACCOUNT in parsed(command, tmp_path).stderr
    result = parsed(command.replace(*change), tmp_path)
    assert result.returncode == 2
    assert answer in result.stderr


# ----------------------------------------------------------------------------- Kubernetes, SkyPilot


def test_the_job_set_asks_for_the_hosts_of_its_slice():
    yaml = pytest.importorskip("yaml")
    manifest = yaml.safe_load((ROOT / "launch" / "gke" / "jobset.yaml").read_text())
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (job,) = manifest["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    shape = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert spec["parallelism"] == spec["completions"]
    assert spec["completions"] * chips == math.prod(map(int, shape.split("x")))
    assert container["resources"]["requests"] == container["resources"]["limits"]
    # Exit codes that must not start it again are those of `dqe-jax`, not that of SIGTERM.
    (rule,) = spec["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["values"] == [1, 2]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    assert pod["restartPolicy"] == "Never"  # what a podFailurePolicy asks for
    assert container["args"][0] == "train"
    assert "--distributed=on" in container["args"]


def test_the_task_of_skypilot_sets_the_variables_that_it_uses():
    yaml = pytest.importorskip("yaml")
    task = yaml.safe_load((ROOT / "launch" / "sky" / "train.yaml").read_text())
    used = set(re.findall(r"\$\{(\w+)\}", task["setup"] + task["run"]))
    assert used == set(task["envs"])


# Its own environment has the interpreter: it asks for releases that nothing here needs.
READ_TASK = """
import sys, sky
task = sky.Task.from_yaml(sys.argv[1])
print(sky.__version__, task.name, *task.resources, sep="|")
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("sky") is None, reason="skypilot is not installed: no sky on PATH")
def test_skypilot_itself_reads_the_task(tmp_path):
    """The machine that it would look for; a field that it does not know is refused."""
    python = Path(shutil.which("sky")).with_name("python")
    file = ROOT / "launch" / "sky" / "train.yaml"
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(file.read_text().replace("setup:", "set_up:"))
    read, refused = (
        subprocess.run(
            [python, "-c", READ_TASK, task],
            cwd=ROOT,
            env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        for task in (file, wrong)
    )
    assert read.returncode == 0, read.stderr
    found = read.stdout.strip().splitlines()[-1]
    print(found)
    assert "|dqe-jax|GCP([Spot], {'tpu-v5litepod-8': 1}" in found
    assert refused.returncode != 0
    assert "set_up" in refused.stderr


def test_the_container_file_knows_the_extras():
    text = (ROOT / "launch" / "Containerfile").read_text()
    extras = (ROOT / "setup.py").read_text()
    for platform in ("gpu", "tpu"):
        assert f'"{platform}": [' in extras
        assert platform in re.search(r"(\S+ \| \S+)\) extras=serve,", text)[1]
