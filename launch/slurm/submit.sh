#!/usr/bin/env bash
# Submits launch/slurm/train.sbatch for one node or several.
#
#   launch/slurm/submit.sh [--dry_run] --config=FILE [--workdir=DIR] [--config.field=value ...]
#
# On one node a single process uses all GPUs. On several nodes each GPU has a process, which is what
# JAX expects of Slurm, and the run's directory must be on a disk that all nodes share.
#
# Variables:
#   NODES          nodes                                            default: 1
#   GPUS           GPUs of a node                                   default: 8
#   CPUS_PER_GPU   CPU cores for each GPU                           default: 8
#   VENV           virtual environment, made if missing, on a
#                  disk that all nodes share                        default: .venv of this checkout
#   MAX_RESTARTS   how often the job returns to the queue           default: 100
#   SEEDS          an array of jobs, one run for each seed: 0-3 or
#                  1,5,7; run 5 is in WORKDIR/seed-5                default: empty, one run
# sbatch itself reads SBATCH_PARTITION, SBATCH_ACCOUNT, SBATCH_TIMELIMIT and others.
set -euo pipefail
. "$(dirname "$0")/../functions.sh"
parse "$@"
need_config

NODES=${NODES:-1}
GPUS=${GPUS:-8}
CPUS_PER_GPU=${CPUS_PER_GPU:-8}
export VENV=${VENV:-${root}/.venv}
export MAX_RESTARTS=${MAX_RESTARTS:-100}
SEEDS=${SEEDS:-}
if [ -n "${SEEDS}" ]; then need_workdir; fi
need_venv "${VENV}" gpu

if [ "${NODES}" -eq 1 ]; then
  tasks=1 cpus=$((GPUS * CPUS_PER_GPU))
else
  tasks=${GPUS} cpus=${CPUS_PER_GPU}
fi
options=(--nodes="${NODES}" --ntasks="$((NODES * tasks))" --ntasks-per-node="${tasks}")
options+=(--gpus-per-node="${GPUS}" --cpus-per-task="${cpus}")
if [ -n "${SEEDS}" ]; then options+=(--array="${SEEDS}"); fi
run sbatch "${options[@]}" "${root}/launch/slurm/train.sbatch" "${args[@]}"
