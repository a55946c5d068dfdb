#!/usr/bin/env bash
# Follows the run in WORKDIR and evaluates each checkpoint, until training is done.
#
#   launch/tpu/evaluator.sh [--dry_run] [--detach] --config=FILE [--split=validation]
#
# It shares WORKDIR alone with training: give it a VM of its own (another NAME, a TYPE of one host,
# WORKDIR on gs://), or PLATFORM=cpu on worker 0 of a VM that trains.
# Variables: launch/tpu/settings.sh. Other arguments go to `python -m dqe_jax.evaluate`.
set -euo pipefail
. "$(dirname "$0")/functions.sh"
parse "$@"
check_run
if several_hosts && [ "${PLATFORM}" != cpu ]; then
  die "the evaluator runs on one host: set PLATFORM=cpu, or TYPE and NAME of a VM of its own."
fi

evaluate=(.venv/bin/python -m dqe_jax.evaluate --workdir="${WORKDIR}" --watch "${args[@]}")
if [ -n "${PLATFORM}" ]; then evaluate=(env JAX_PLATFORMS="${PLATFORM}" "${evaluate[@]}"); fi
run_job evaluator 0 "${evaluate[@]}"
