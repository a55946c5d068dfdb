#!/usr/bin/env bash
# Runs on each worker of a VM, called by the other scripts: installs dqe_jax, and looks after jobs
# that do not need the connection.
#
#   launch/tpu/worker.sh install               makes the virtual environment
#   launch/tpu/worker.sh start JOB COMMAND...  starts a job, unless it is running
#   launch/tpu/worker.sh state JOB...          prints the state of jobs
#   launch/tpu/worker.sh tail JOB              prints the end of a job's log
#   launch/tpu/worker.sh follow JOB            prints it and what follows
#
# In runs/jobs/ a job has JOB.log, JOB.lock (locked while it runs) and, at its end, JOB.exit.
set -euo pipefail
cd "$(dirname "$0")/../.."
. launch/functions.sh
mkdir -p runs/jobs
action=$1
job=runs/jobs/${2:-}

state_of() {
  if ! flock --nonblock "runs/jobs/$1.lock" true; then
    echo running
  elif [ -f "runs/jobs/$1.exit" ]; then
    cat "runs/jobs/$1.exit"
  elif [ -f "runs/jobs/$1.log" ]; then
    echo lost
  else
    echo none
  fi
}

case "${action}" in
  install) need_venv .venv tpu ;;
  start)
    exec 9>"${job}.lock"
    if ! flock --wait=1 9; then
      echo "$2 is running already."
      exit
    fi
    rm -f "${job}.exit"
    setsid launch/tpu/worker.sh hold "${@:2}" >>"${job}.log" 2>&1 </dev/null & # it keeps the lock
    ;;
  hold)
    trap : TERM # the job ends by it; this must stay to note the exit code
    status=0
    "${@:3}" 9>&- || status=$?
    echo "${status}" >"${job}.exit"
    ;;
  state) for name in "${@:2}"; do echo "$(hostname) ${name} state=$(state_of "${name}")"; done ;;
  tail) tail -n 50 "${job}.log" | sed "s/^/$(hostname): /" ;;
  follow) tail -n 100 -F "${job}.log" ;;
  *) die "unknown action ${action}." ;;
esac
