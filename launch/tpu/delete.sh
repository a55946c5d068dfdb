#!/usr/bin/env bash
# Deletes the VM and what is on it.
#
#   launch/tpu/delete.sh [--dry_run]
#
# Variables: launch/tpu/settings.sh.
set -euo pipefail
. "$(dirname "$0")/functions.sh"
parse "$@"
need_no_args

if [ "${QUEUED}" = true ]; then
  run "${queue[@]}" delete "${NAME}" "${where[@]}" --force --quiet # the request, with its VM
else
  run "${tpu[@]}" delete "${NAME}" "${where[@]}" --quiet
fi
