#!/usr/bin/env bash
# Follows the log of training or of the evaluator on one worker. Ctrl-C ends the following alone.
#
#   launch/tpu/logs.sh [--dry_run] [train|evaluator]
#
# Variables: launch/tpu/settings.sh (WORKER).
set -euo pipefail
. "$(dirname "$0")/functions.sh"
parse "$@"

on_worker "${WORKER}" follow "${args[0]:-train}"
run "${ssh[@]}"
