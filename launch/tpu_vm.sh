#!/usr/bin/env bash
# Trains on a single-host Cloud TPU VM: creates it, installs, trains, copies the results, deletes it.
#
#   launch/tpu_vm.sh [--dry_run] [--config=configs/shapes.py] [--config.field=value ...]
#
# --dry_run prints the commands and runs nothing. Further arguments go to `python -m dqe_jax.main`.
#
# Variables (set them in the environment):
#   PROJECT   Google Cloud project (required)
#   ZONE      zone of the TPU                          default: us-west4-a
#   TYPE      accelerator of one host                  default: v5litepod-8
#   VERSION   TPU software version                     default: v2-alpha-tpuv5-lite
#   NAME      name of the VM                           default: dqe-jax
#   SOURCE    git address that the VM can clone        default: this checkout's `origin`
#   RESULTS   local directory for the run's results    default: runs/$NAME
set -euo pipefail

: "${PROJECT:?set PROJECT to your Google Cloud project}"
ZONE=${ZONE:-us-west4-a}
TYPE=${TYPE:-v5litepod-8}
VERSION=${VERSION:-v2-alpha-tpuv5-lite}
NAME=${NAME:-dqe-jax}
RESULTS=${RESULTS:-runs/${NAME}}
SOURCE=${SOURCE:-$(git -C "$(dirname "$0")" remote get-url origin)}

dry_run=false
main_args=()
for arg in "$@"; do
  if [ "${arg}" = --dry_run ]; then dry_run=true; else main_args+=("${arg}"); fi
done
[ "${#main_args[@]}" -gt 0 ] || main_args=(--config=configs/shapes.py)

run() {
  printf '+'
  printf ' %q' "$@"
  printf '\n'
  if [ "${dry_run}" = false ]; then "$@"; fi
}
where=(--project="${PROJECT}" --zone="${ZONE}")
tpu=(gcloud compute tpus tpu-vm)

printf -v remote 'git clone --depth=1 %q checkout && cd checkout && python3 -m venv .venv &&' "${SOURCE}"
remote+=" .venv/bin/pip install -q -e '.[tpu]' && .venv/bin/python -m dqe_jax.main --workdir=runs/vm"
for arg in "${main_args[@]}"; do printf -v remote '%s %q' "${remote}" "${arg}"; done

run "${tpu[@]}" create "${NAME}" "${where[@]}" --accelerator-type="${TYPE}" --version="${VERSION}"
# Whatever happens from here on, the VM is deleted: it costs money while it exists.
trap 'run "${tpu[@]}" delete "${NAME}" "${where[@]}" --quiet' EXIT
run "${tpu[@]}" ssh "${NAME}" "${where[@]}" --command="${remote}"
run mkdir -p "${RESULTS}"
run "${tpu[@]}" scp --recurse "${NAME}:checkout/runs/vm" "${RESULTS}" "${where[@]}"
