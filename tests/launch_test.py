"""The launch script, against a stand-in `gcloud` that records its calls."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "launch" / "tpu_vm.sh"
STAND_IN = """#!/usr/bin/env bash
printf '%q ' "$@" >> "$CALLS"
printf '\\n' >> "$CALLS"
[ "$4" != ssh ] || exit "${SSH_STATUS:-0}"
"""


@pytest.fixture
def cloud(tmp_path):
    """Runs the script with the stand-in; gives its result and the calls it made."""
    gcloud = tmp_path / "bin" / "gcloud"
    gcloud.parent.mkdir()
    gcloud.write_text(STAND_IN)
    gcloud.chmod(0o755)
    calls = tmp_path / "calls"

    def run(*args, **variables):
        env = {
            "PATH": f"{gcloud.parent}:{os.environ['PATH']}",
            "CALLS": str(calls),
            "PROJECT": "p",
            "SOURCE": "https://example.com/a b.git",
            "RESULTS": str(tmp_path / "results"),
            **variables,
        }
        env = {key: value for key, value in env.items() if value is not None}
        result = subprocess.run(
            ["bash", str(SCRIPT), *args], env=env, capture_output=True, text=True, check=False
        )
        lines = calls.read_text().splitlines() if calls.exists() else []
        return result, [shlex.split(line) for line in lines]

    return run


def verbs(calls):
    return [call[3] for call in calls]


def test_a_dry_run_prints_and_calls_nothing(cloud):
    result, calls = cloud("--dry_run", "--config=configs/shapes.py:hard")
    assert result.returncode == 0
    assert calls == []
    printed = [shlex.split(line[2:]) for line in result.stdout.splitlines()]
    assert [line[4] for line in printed if line[0] == "gcloud"] == [
        *("create", "ssh", "scp", "delete"),
    ]


def test_arguments_reach_the_remote_shell_as_they_are(cloud):
    result, calls = cloud("--config=configs/shapes.py", "--config.data.data_dir=/a b/$HOME;c")
    assert result.returncode == 0
    assert verbs(calls) == ["create", "ssh", "scp", "delete"]
    command = next(arg for arg in calls[1] if arg.startswith("--command="))
    remote = shlex.split(command.removeprefix("--command="))
    assert "--config.data.data_dir=/a b/$HOME;c" in remote
    assert "https://example.com/a b.git" in remote


def test_the_vm_is_deleted_when_training_fails(cloud):
    result, calls = cloud(SSH_STATUS="3")
    assert result.returncode == 3
    assert verbs(calls) == ["create", "ssh", "delete"]


def test_a_missing_project_is_named(cloud):
    result, calls = cloud(PROJECT=None)
    assert result.returncode != 0
    assert "set PROJECT" in result.stderr
    assert calls == []
