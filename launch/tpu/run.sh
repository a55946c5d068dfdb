#!/usr/bin/env bash
# Creates a VM, runs one command on it, and deletes it, whatever happens.
#
#   launch/tpu/run.sh [train|evaluator] [--dry_run] --config=FILE [--config.field=value ...]
#
# A VM that was preempted is deleted and created again, and the same command goes on from the newest
# checkpoint, at most MAX_RESTARTS times. Other errors end the run. Start this script where it can
# stay (tmux): when it ends, so does the VM.
# Variables: launch/tpu/settings.sh. Arguments: launch/tpu/train.sh, launch/tpu/evaluator.sh.
set -euo pipefail
here=$(dirname "$0")
. "${here}/functions.sh"
needed+=(SOURCE REVISION) # for create.sh
parse "$@"
job=train
case "${args[0]:-}" in
  train | evaluator)
    job=${args[0]}
    args=("${args[@]:1}")
    ;;
esac
check_run
check_source
if [ "${detach}" = true ]; then die "run.sh deletes the VM at the end, so it cannot detach."; fi
if [ "${job}" = evaluator ] && ! on_bucket; then die "set WORKDIR to that of the training run."; fi
if [ "${DRY_RUN}" = false ] && state=$("${describe[@]}" 2>/dev/null); then
  die "there is a VM ${NAME} already (${state}): delete it with delete.sh, or set another NAME."
fi

delete() {
  "${here}/delete.sh" || echo "warning: ${NAME} may still cost money; see status.sh." >&2
}
child=
# shellcheck disable=SC2329 # the trap calls it
at_exit() {
  trap '' HUP INT PIPE TERM # nothing interrupts the deletion
  if [ -n "${child}" ]; then kill "${child}" 2>/dev/null || true; fi
  delete
}
trap at_exit EXIT

restarts=0
while true; do
  status=0
  if [ "${QUEUED}" = true ]; then
    "${here}/create.sh" & # it may wait for days, and a signal must end that
    child=$!
    wait "${child}" || status=$?
    child=
  else
    "${here}/create.sh" || status=$?
  fi
  if [ "${status}" -eq 0 ]; then
    "${here}/${job}.sh" "${args[@]}" & # so that a signal to this script ends the waiting at once
    child=$!
    wait "${child}" || status=$?
    child=
  elif [ "${restarts}" -gt 0 ]; then
    status=143 # right after a preemption there is often no other VM to be had
  fi
  if [ "${status}" -ne 0 ] && preempted; then status=143; fi
  if [ "${status}" -ne 143 ] || [ "${restarts}" -ge "${MAX_RESTARTS}" ]; then break; fi
  restarts=$((restarts + 1))
  echo "${NAME}: restart ${restarts} of ${MAX_RESTARTS}."
  delete
  sleep "${RESTART_SECONDS}"
done

if [ "${status}" -eq 0 ] && ! on_bucket; then
  run mkdir -p "${RESULTS}"
  from="${NAME}:dqe_jax/${WORKDIR}"
  run "${tpu[@]}" scp --recurse "${from}" "${RESULTS}" "${where[@]}" "${ssh_flags[@]}"
fi
exit "${status}"
