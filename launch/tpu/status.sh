#!/usr/bin/env bash
# Prints the state of the VM and, for each worker, whether training and the evaluator run.
#
#   launch/tpu/status.sh [--dry_run]
#
# A job is `running`, ended with an exit code, `lost` (ended without one) or `none`.
# Variables: launch/tpu/settings.sh.
set -euo pipefail
. "$(dirname "$0")/functions.sh"
parse "$@"
need_no_args

run "${describe[@]}"
on_worker all state train evaluator
run "${ssh[@]}"
