"""The training binary.

python -m dqe_jax.main --config=configs/shapes.py [--workdir=DIR] [--config.field=value]

Several processes can train one run together: see --distributed. After SIGTERM or SIGINT the run
saves and ends with status 143 or 130; the same command continues it. `--init` starts from another
run, and `--feedback` learns from what users picked and rejected.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from absl import flags, logging
from ml_collections import config_flags

from dqe_jax.cli import command_line
from dqe_jax.utils.paths import on_disk

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config of the run.", lock_config=True)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Directory of the run; default: runs/<name of the config>."
)
_DATA_DIR = flags.DEFINE_string(
    "data_dir", None, "Directory of the raw data; short for --config.data.data_dir."
)
_STOP_AT = flags.DEFINE_integer(
    "stop_at",
    None,
    "End after this step, as if interrupted; the same command without it continues.",
    1,
)
_INIT = flags.DEFINE_string(
    "init", None, "Run or export whose parameters the run starts from; default: fresh ones."
)
_FEEDBACK = flags.DEFINE_string(
    "feedback", None, "Log of picks and rejections that dqe-jax serve wrote, to learn from too."
)
_FEEDBACK_SHARE = flags.DEFINE_float(
    "feedback_share", 0.2, "Share of the queries of an epoch that are of the log of --feedback."
)
_DISTRIBUTED = flags.DEFINE_enum(
    "distributed",
    "auto",
    ["auto", "on", "off"],
    "Join other processes: on lets JAX find them (TPU slices); auto does so under Slurm.",
)
_COORDINATOR = flags.DEFINE_string("coordinator", None, "host:port of process 0.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Processes of the run.", 1)
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.", 0)
REQUIRED = ("config",)


def main(argv: Sequence[str]) -> None:
    """Trains and evaluates."""
    del argv
    from dqe_jax.distributed import compiled, processes  # importing JAX takes seconds
    from dqe_jax.distributed.interrupts import Interrupted
    from dqe_jax.training.loop import train_and_evaluate
    from dqe_jax.training.session import Feedback

    processes.join(
        _DISTRIBUTED.value,
        coordinator=_COORDINATOR.value,
        num_processes=_NUM_PROCESSES.value,
        process_id=_PROCESS_ID.value,
    )
    compiled.keep_programs()
    config = _CONFIG.value
    command_line.use_data_dir(config, _DATA_DIR.value)
    workdir = _WORKDIR.value or command_line.default_workdir()
    with processes.ending_together():
        try:
            log = None
            if _FEEDBACK.value is not None:
                place = on_disk(_FEEDBACK.value, "--feedback")
                log = Feedback(place, _FEEDBACK_SHARE.value)
            train_and_evaluate(
                config, workdir, stop_at=_STOP_AT.value, init=_INIT.value, feedback=log
            )
        except Interrupted as interrupted:
            logging.info("Ended by %s; run the same command again to continue.", interrupted)
            processes.leave_at_once(interrupted.status)
            sys.exit(interrupted.status)
