"""A run of several processes: the same as of one, and it ends as one."""

import concurrent.futures
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

from dqe_jax.checkpoints import store
from dqe_jax.cli.config_files import load_config
from dqe_jax.distributed import processes
from dqe_jax.feature_store import manage
from dqe_jax.testing.small_runs import assert_params_agree, quick_xla_flags
from dqe_jax.training import loop
from dqe_jax.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
STEPS = 40
SIGNAL = 9  # lines of the log before a process gets it: between two refreshes of the bank
FIELDS = {
    "total_steps": STEPS,
    "log_every": 1,
    "eval_every": 40,
    "checkpoint_every": 40,
    "optimizer.warmup_steps": 4,
    "optimizer.learning_rate": 3e-4,
    "batch.references": 8,
    "batch.queries_per_reference": 2,
    "model.tiny.image_depth": 0,
    "model.tiny.text_depth": 0,
    "model.tiny.composer_depth": 1,
    "negatives.pool": "bank",
    "negatives.first_refresh": 0,
    "negatives.refresh_every": 8,
}


def fields_of(base, **fields):
    return {**FIELDS, "data.prepared_dir": str(base / "prepared"), **fields}


def command(base, workdir, *flags, **fields):
    """The command that trains, or without a workdir that which computes features ahead."""
    which = ["dqe_jax.main", f"--workdir={base / workdir}"] if workdir else ["dqe_jax.features"]
    return [
        *(sys.executable, "-m", *which, "--config=configs/shapes.py:smoke"),
        *(f"--config.{name}={value}" for name, value in fields_of(base, **fields).items()),
        *flags,
    ]


def environment(devices, **variables):
    # Programs of several processes are compiled anew: read from a cache they may wait for ever.
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": quick_xla_flags(devices),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        **variables,
    }


def free_port():
    with socket.socket() as held:
        held.bind(("localhost", 0))
        return held.getsockname()[1]


def start(base, workdir, devices, *flags, environments=None, own=({}, {}), **fields):
    """Starts a run of several processes: one `Popen` each, with `devices` in all.

    `own` has fields of each.
    """
    started, count = [], len(own)
    coordinator = f"localhost:{free_port()}"
    for i in range(count):
        joining = ()
        if environments is None:
            joining = (f"--coordinator={coordinator}", f"--num_processes={count}")
            joining += (f"--process_id={i}",)
        started.append(
            subprocess.Popen(
                command(base, workdir, *joining, *flags, **fields, **own[i]),
                cwd=ROOT,
                env=environment(devices // count, **(environments or [{}] * count)[i]),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    return started


def alone(base, workdir, num_devices=1, **fields):
    """A run of this process alone."""
    config = load_config("shapes:smoke")
    config.update_from_flattened_dict(fields_of(base, num_devices=num_devices, **fields))
    loop.train_and_evaluate(config, base / workdir)


def outputs_of(started):
    """What they printed, when all have ended; read side by side, so that no full pipe blocks."""
    try:
        with concurrent.futures.ThreadPoolExecutor(len(started)) as pool:
            return list(pool.map(lambda process: process.communicate(timeout=600)[0], started))
    finally:
        for process in started:
            process.kill()


def finish(started, status=0):
    outputs = outputs_of(started)
    assert [process.returncode for process in started] == [status] * len(started), outputs
    return outputs


@pytest.fixture(scope="module")
def base(tmp_path_factory, prepared):
    base = tmp_path_factory.mktemp("processes")
    prepared(base)
    return base


@pytest.fixture(scope="module")
def one(base):
    """One process with one device."""
    alone(base, "one")
    return base / "one"


@pytest.fixture(scope="module")
def two(base):
    """Two processes with two devices each, joined by Slurm's variables; and what they printed.

    One of them gets a signal half-way, which must end both.
    """
    job = {
        "SLURM_JOB_ID": str(free_port()),  # JAX makes the coordinator's port of it
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_NODES": "1",
    }
    tasks = [{**job, "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)} for i in range(2)]
    # The state of the optimizer is in slices, so that saving gathers it from both.
    started = start(base, "two", 4, environments=tasks, **{"optimizer.shard_state": True})
    log = base / "two" / "metrics.jsonl"
    until = time.time() + 600
    while not (log.exists() and len(log.read_text().splitlines()) > SIGNAL):
        if time.time() > until or any(process.poll() is not None for process in started):
            for process in started:
                process.kill()
            pytest.fail(str(outputs_of(started)))
        time.sleep(0.02)
    started[1].send_signal(signal.SIGTERM)
    return base / "two", finish(started, status=143)


def arrays(workdir, step):
    return store.restore_params(store.open_for_reading(epath.Path(workdir)), step)


def opt_state(workdir, step):
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])  # theirs are not
    state = ocp.args.StandardRestore(fallback_sharding=here)
    manager = store.open_for_reading(epath.Path(workdir))
    return manager.restore(step, args=ocp.args.Composite(opt_state=state))["opt_state"]


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(one, other):
    """Parameters at the end, and the metrics of every step, those of the negatives too."""
    rate = FIELDS["optimizer.learning_rate"]
    assert_params_agree(arrays(one, STEPS), arrays(other, STEPS), learning_rate=rate)
    # A run that was stopped on purpose has evaluated there too.
    logged, again = ([x for x in lines(run) if "loss" in x] for run in (one, other))
    assert [line["step"] for line in logged] == [line["step"] for line in again]
    for first, second in zip(logged, again):
        assert first.keys() == second.keys()
        for name in first:
            assert second[name] == pytest.approx(first[name], rel=1e-3, abs=1e-4), (name, first)


def test_process_0_alone_writes_and_logs(two):
    workdir, (first, second) = two
    assert "Ready after" in first
    assert "Ready after" not in second
    assert "train:" not in second
    steps = [line["step"] for line in lines(workdir) if "loss" in line]
    assert steps == list(range(1, len(steps) + 1))
    assert len(list((workdir / "events").iterdir())) == 1


def test_a_signal_to_one_process_ends_all_of_them_after_one_save(two):
    workdir, outputs = two
    assert "SIGTERM after step" in outputs[0]
    saved = int(outputs[0].rpartition("SIGTERM after step ")[2].split(";")[0])
    assert SIGNAL <= saved < STEPS
    assert store.open_for_reading(epath.Path(workdir)).latest_step() == saved
    shapes = {x.shape for x in jax.tree.leaves(arrays(workdir, saved))}
    assert {np.shape(x) for x in jax.tree.leaves(opt_state(workdir, saved))} <= shapes | {()}


def test_two_processes_and_then_one_train_as_one_device_does(base, one, two):
    """The first part by two processes with 4 devices, the second by one with one device."""
    shutil.copytree(two[0], base / "moved")
    alone(base, "moved")
    assert_same_run(one, base / "moved")


@pytest.mark.slow  # the last test has its parts
def test_two_processes_train_as_one_with_eight_devices(base):
    alone(base, "eight", 8)
    finish(start(base, "whole", 8))
    assert_same_run(base / "eight", base / "whole")


@pytest.mark.slow  # `zero_test.py` has it in one process
def test_two_processes_with_a_sharded_optimizer_train_as_one_device_does(base, one):
    sharded = {"optimizer.shard_state": True}
    finish(start(base, "sharded", 8, "--stop_at=7", **sharded))
    finish(start(base, "sharded", 8, **sharded))
    assert_same_run(one, base / "sharded")


@pytest.mark.slow  # `twin_test.py` has it in one process
@pytest.mark.parametrize(
    "fields", [{"optimizer.shard_state": True}, {"batch.accumulate": 2}], ids=["sharded", "parts"]
)
def test_two_processes_map_by_shard_map_as_by_pmap(base, request, fields):
    """The same to the bit: all metrics, the parameters and the optimiser's state."""
    steps = {"total_steps": 12, "checkpoint_every": 6, "eval_every": 12}
    kind, runs = request.node.callspec.id, []
    for mapping in ("pmap", "shard_map"):
        runs.append(base / f"{kind}-{mapping}")
        finish(start(base, runs[-1].name, 4, mapping=mapping, **steps, **fields))
    held = [json.loads((run / "config.json").read_text())["mapping"] for run in runs]
    assert held == ["pmap", "shard_map"]
    logs = [(run / "metrics.jsonl").read_bytes() for run in runs]
    assert logs[0] == logs[1]
    assert logs[0].count(b'"loss"') == 12
    for read in (arrays, opt_state):
        jax.tree.map(np.testing.assert_array_equal, *(read(run, 12) for run in runs))


@pytest.mark.slow  # `feature_store/run_test.py` has it in one process
def test_two_processes_with_features_on_their_devices_train_as_one_device_does(base):
    """Each computes a part, and has a part in the memory of its devices."""
    fields = {
        "model.frozen": "('vision','text')",
        "data.augment": "flip",
        "features.place": "device",
    }
    alone(base, "features-one", **fields | {"model.frozen": ("vision", "text")})
    shutil.rmtree(base / "prepared" / "features")
    first, second = finish(start(base, "features-two", 4, **fields))
    assert "image tower is not computed in each step" in first
    assert "tower" not in second
    assert_same_run(base / "features-one", base / "features-two")


# Computed by functions that need no weights.
OUTSIDE = {
    "model.backbone": "features",
    "model.features.images": ("dqe_jax.testing.encoders:images",),
    "model.features.texts": ("dqe_jax.testing.encoders:texts",),
    **{"model.features.width": 16, "model.features.heads": 2, "model.features.embed_dim": 32},
    **{"model.features.composer_width": 16, "model.features.token_dim": 8},
    "model.features.dropout": 0.0,  # each device draws its own
    "data.augment": "flip",
}


@pytest.fixture(scope="module")
def outside(base):
    """A run of one device on features from outside."""
    own = {"features.directory": str(base / "outside"), "features.place": "host"}
    alone(base, "outside-one", **OUTSIDE | own)
    return base / "outside-one"


@pytest.mark.slow  # `feature_store/given_test.py` has three steps of it
def test_eight_devices_with_features_from_outside_train_as_one_does(base, outside):
    own = {"features.directory": str(base / "outside"), "features.place": "device"}
    alone(base, "outside-eight", 8, **OUTSIDE | own)
    assert_same_run(outside, base / "outside-eight")


@pytest.mark.slow
@pytest.mark.parametrize("place", ["device", "host"])
def test_two_processes_with_features_from_outside_train_as_one_device_does(base, outside, place):
    """The first computes them, since both see one disk; each holds a part, or a copy."""
    own = {"features.directory": str(base / f"outside-{place}"), "features.place": place}
    first, second = finish(start(base, f"outside-two-{place}", 8, **OUTSIDE | own))
    for kind in ("image", "text"):
        assert re.search(rf"encoders:{kind}s has computed features of [\d,]+ {kind}s", first)
        where = {"device": "in the memory of the devices", "host": "in the host's memory"}[place]
        assert re.search(rf"Features of [\d,]+ {kind}s .* lie {where}", first)
    assert "eatures of" not in second
    assert files_of(base / f"outside-{place}") == files_of(base / "outside")
    assert_same_run(outside, base / f"outside-two-{place}")


def files_of(root):
    return {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture(params=["towers", "encoders"])
def ahead(request, base):
    """What is computed ahead: fields, and the files that one process makes with two devices."""
    fields = {"data.augment": "flip", "model.frozen": ("vision", "text")}
    if request.param == "encoders":
        fields = OUTSIDE
    place = base / f"ahead-{request.param}"
    if not place.exists():
        config = load_config("shapes:smoke")
        own = {"features.directory": str(place), "num_devices": 2}
        config.update_from_flattened_dict(fields_of(base, **fields, **own))
        manage.compute(config)
    assert len(files_of(place)) > 6
    return fields, files_of(place)


@pytest.mark.slow
def test_two_processes_compute_features_ahead_as_one_does(base, ahead, tmp_path):
    """Of towers each computes a part of each batch."""
    fields, expected = ahead
    place = {"features.directory": str(tmp_path)}
    first, second = finish(start(base, None, 2, **fields, **place))
    assert len(re.findall("computed now, in|has computed features of", first)) == 2
    assert "omputed" not in second
    assert files_of(tmp_path) == expected


@pytest.mark.slow
def test_each_disk_gets_one_copy_of_features(base, ahead, tmp_path):
    """Of three processes the last two share a disk that the first does not see."""
    fields, expected = ahead
    own = [{"features.directory": str(tmp_path / name)} for name in ("a", "b", "b")]
    finish(start(base, None, 3, own=own, **fields))
    for name in ("a", "b"):
        found = files_of(tmp_path / name)
        assert found.keys() == expected.keys()
        for path, content in found.items():
            # Three devices have parts of other sizes, and sums may be rounded in another way.
            if path.suffix == ".npy" and path.stem != "keys":
                close = [np.load(io.BytesIO(one)) for one in (content, expected[path])]
                np.testing.assert_allclose(*close, atol=1e-5)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def test_slurms_variables_start_two_processes(two):
    (devices,) = [line for line in two[1][0].splitlines() if line.startswith("Devices: ")]
    assert len(devices.split(", ")) == 4


def test_an_error_of_all_processes_ends_all(base):
    started = start(base, "odd", 6)
    outputs = outputs_of(started)
    assert started[0].returncode == 2, outputs
    assert started[1].returncode, outputs  # its own error, or that the leader has gone
    message = "batch.references is 8: it must be a multiple of the 6 devices of 2 processes"
    assert message in outputs[0]


def test_an_error_of_the_leader_ends_all(base):
    """It alone writes, and the other waits for it."""
    (base / "held").mkdir()
    (base / "held" / "config.json").mkdir()
    started = start(base, "held", 2)
    outputs = outputs_of(started)
    assert started[0].returncode == 2, outputs
    assert "error: --workdir: cannot write to" in outputs[0]
    assert started[1].returncode, outputs


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"coordinator": "a:1"}, "--num_processes and --process_id missing"),
        ({"coordinator": "a:1", "num_processes": 2, "process_id": 2}, "--process_id is 2"),
        (
            {"mode": "off", "coordinator": "a:1", "num_processes": 2, "process_id": 1},
            "contradict",
        ),
    ],
)
def test_arguments_that_do_not_fit_together(arguments, message):
    with pytest.raises(UserError, match=message):
        processes.join(**arguments, environ={})


def test_alone_nothing_is_joined(monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", None)
    processes.join(environ={})
    processes.join(environ={"SLURM_NTASKS": "8"})  # a batch script, not a task
    processes.join("off", environ={"SLURM_NTASKS": "8", "SLURM_STEP_NODELIST": "a"})
