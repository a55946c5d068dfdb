#!/usr/bin/env bash
# Trains on all workers of a VM that launch/tpu/create.sh made, and waits until training has ended.
#
#   launch/tpu/train.sh [--dry_run] [--detach] --config=FILE [--config.field=value ...]
#
# Training does not need the connection: --detach, Ctrl-C or a lost network end the waiting alone,
# and the same command waits again. Exit code 143: preempted.
# Variables: launch/tpu/settings.sh. Other arguments go to `python -m dqe_jax.main`.
set -euo pipefail
. "$(dirname "$0")/functions.sh"
parse "$@"
check_run

train=(.venv/bin/python -m dqe_jax.main --workdir="${WORKDIR}" "${args[@]}")
if several_hosts; then train+=(--distributed=on); fi
run_job train all "${train[@]}"
