#!/usr/bin/env bash
# Creates a TPU VM (of one host or several), by a queued resource if QUEUED or FLEX_START says so, and installs dqe_jax on all its workers.
#
#   launch/tpu/create.sh [--dry_run]
#
# Variables: launch/tpu/settings.sh. The VM costs money until launch/tpu/delete.sh.
set -euo pipefail
. "$(dirname "$0")/functions.sh"
needed+=(SOURCE REVISION)
parse "$@"
need_no_args
check_source

if [ "${SPOT}" = true ] && [ -n "${FLEX_START}" ]; then
  die "a VM is a spot or a flex-start one: set SPOT or FLEX_START."
fi
read -ra flags <<<"--accelerator-type=${TYPE} ${CREATE_FLAGS}"
if [ "${SPOT}" = true ]; then flags+=(--spot); fi
if [ -n "${FLEX_START}" ]; then
  flags+=(--provisioning-model=flex-start --max-run-duration="${FLEX_START}")
fi
if [ "${QUEUED}" = true ]; then
  flags+=(--runtime-version="${VERSION}" --node-id="${NAME}")
  run "${queue[@]}" create "${NAME}" "${where[@]}" "${flags[@]}"
  wait_for_vm
else
  run "${tpu[@]}" create "${NAME}" "${where[@]}" "${flags[@]}" --version="${VERSION}"
fi

install="rm -rf dqe_jax && git clone --quiet $(quote "${SOURCE}") dqe_jax && cd dqe_jax"
install+=" && git checkout --quiet $(quote "${REVISION}") && launch/tpu/worker.sh install"
remote all "${install}"
run "${ssh[@]}"
