#!/usr/bin/env bash
# Creates a TPU VM (of one host or several) and installs dqe_jax on all its workers.
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

read -ra flags <<<"--accelerator-type=${TYPE} --version=${VERSION} ${CREATE_FLAGS}"
if [ "${SPOT}" = true ]; then flags+=(--spot); fi
run "${tpu[@]}" create "${NAME}" "${where[@]}" "${flags[@]}"

install="rm -rf dqe_jax && git clone --quiet $(quote "${SOURCE}") dqe_jax && cd dqe_jax"
install+=" && git checkout --quiet $(quote "${REVISION}") && launch/tpu/worker.sh install"
remote all "${install}"
run "${ssh[@]}"
