#!/usr/bin/env bash
# Trains with all GPUs of this machine, after making the virtual environment if it is missing.
#
#   launch/gpu/train.sh [--dry_run] --config=FILE [--workdir=DIR] [--config.field=value ...]
#
# Variables:
#   VENV           virtual environment                              default: .venv of this checkout
#   EXTRA          what is installed: gpu (CUDA 12) or gpu13         default: gpu
#   MAX_RESTARTS   how often training goes on after SIGTERM ended
#                  it (exit code 143); other errors always end it   default: 0
# With MAX_RESTARTS, Ctrl-C or `kill -TERM -- -PID` end it: they reach training and this script.
set -euo pipefail
. "$(dirname "$0")/../functions.sh"
parse "$@"
need_config

VENV=${VENV:-${root}/.venv}
MAX_RESTARTS=${MAX_RESTARTS:-0}
need_venv "${VENV}" "${EXTRA:-gpu}"

train=("${VENV}/bin/python" -m dqe_jax.main "${args[@]}")
if [ "${MAX_RESTARTS}" -eq 0 ]; then
  run exec "${train[@]}"
  exit
fi

stopped=false
trap 'stopped=true' INT TERM
for ((restarts = 0; ; restarts++)); do
  status=0
  run "${train[@]}" || status=$?
  if [ "${status}" -ne 143 ] || [ "${stopped}" = true ]; then exit "${status}"; fi
  if [ "${restarts}" -ge "${MAX_RESTARTS}" ]; then exit "${status}"; fi
  echo "Preempted: restart $((restarts + 1)) of ${MAX_RESTARTS}."
done
