# shellcheck shell=bash
# What the TPU scripts share. They source this file.
# shellcheck source=../functions.sh
. "$(dirname "${BASH_SOURCE[0]}")/../functions.sh"
# shellcheck source=settings.sh
. "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

needed+=(PROJECT)
tpu=(gcloud compute tpus tpu-vm)
where=(--project="${PROJECT}" --zone="${ZONE}")
describe=("${tpu[@]}" describe "${NAME}" "${where[@]}" --format="value(state)")
queue=(gcloud compute tpus queued-resources)
if [ -n "${FLEX_START}" ]; then
  QUEUED=true
  queue=(gcloud alpha compute tpus queued-resources) # the others do not know flex-start
fi
# A request has the name of its VM. Its state says as much as that of the VM, and is there before it.
if [ "${QUEUED}" = true ]; then
  describe=("${queue[@]}" describe "${NAME}" "${where[@]}" --format="value(state.state)")
fi
read -ra ssh_flags <<<"--quiet ${SSH_FLAGS}"
detach=false

several_hosts() { [ "${TYPE##*-}" -gt 8 ]; }
on_bucket() { [[ "${WORKDIR}" == gs://* ]]; }

# Whether the VM was preempted, or its time as a flex-start VM is over.
preempted() {
  if [ "${DRY_RUN}" = true ]; then return 1; fi
  case "$("${describe[@]}")" in PREEMPTED | TERMINATED | SUSPEND*) ;; *) return 1 ;; esac
}

# Takes --detach out of `args`, and ends a script whose arguments or variables cannot make a run.
check_run() {
  local arg rest=()
  need_config
  for arg in "${args[@]}"; do
    case "${arg}" in
      --detach) detach=true ;;
      --workdir | --workdir=*) die "set WORKDIR instead of --workdir." ;;
      *) rest+=("${arg}") ;;
    esac
  done
  args=("${rest[@]}")
  if on_bucket; then return; fi
  if several_hosts; then die "TYPE=${TYPE} has several hosts: set WORKDIR to gs://BUCKET/DIR."; fi
  if [ "${SPOT}" = true ]; then die "a spot VM may go: set WORKDIR to gs://BUCKET/DIR."; fi
  if [ -n "${FLEX_START}" ]; then die "a flex-start VM goes: set WORKDIR to gs://BUCKET/DIR."; fi
  case "${WORKDIR}" in /* | \~*) die "set WORKDIR to gs://BUCKET/DIR or a relative path." ;; esac
}

# Ends a script whose SOURCE would print and send a password.
check_source() {
  case "${SOURCE}" in
    http*://*@*) die "SOURCE holds a user or a password, which would be printed and sent: set one without." ;;
  esac
}

# Waits until a request that is queued has its VM.
wait_for_vm() {
  local state silences=0
  if [ "${DRY_RUN}" = true ]; then
    run "${describe[@]}"
    return
  fi
  while sleep "${POLL_SECONDS}"; do
    state=$("${describe[@]}") || state=
    case "${state}" in
      ACTIVE) return 0 ;;
      FAILED | SUSPEND*) die "the request ${NAME} is ${state}; delete.sh removes it." ;;
      "")
        silences=$((silences + 1))
        if [ "${silences}" -ge "${POLL_FAILURES}" ]; then die "no answer about ${NAME}."; fi
        ;;
      *)
        silences=0
        echo "${NAME}: ${state}"
        ;;
    esac
  done
}

# remote WORKERS COMMAND: sets `ssh` to what runs a line of shell on workers (a number, or all).
remote() {
  ssh=("${tpu[@]}" ssh "${NAME}" "${where[@]}" "${ssh_flags[@]}" --worker="$1" --command="$2")
}

# on_worker WORKERS ARGUMENT...: sets `ssh` to what calls worker.sh with these arguments.
on_worker() {
  remote "$1" "cd dqe_jax && launch/tpu/worker.sh $(quote "${@:2}")"
}

# run_job JOB WORKERS COMMAND...: starts a job and, without --detach, waits for its end.
# Returns 143 if the job or the VM was preempted.
run_job() {
  on_worker "$2" start "$1" "${@:3}"
  run "${ssh[@]}"
  if [ "${detach}" = true ]; then return; fi
  local status=0
  wait_for "$1" "$2" || status=$?
  case "${status}" in
    0) if [ "${DRY_RUN}" = false ]; then echo "${NAME}: $1 is done."; fi ;;
    143) echo "${NAME}: $1 was preempted." ;;
    *)
      on_worker "$2" tail "$1"
      run "${ssh[@]}"
      ;;
  esac
  return "${status}"
}

# wait_for JOB WORKERS: waits for the end of a job. Returns 0, or 143 if it was preempted, or 1.
wait_for() {
  local answer failures=0 silences=0
  on_worker "$2" state "$1"
  if [ "${DRY_RUN}" = true ]; then
    run "${describe[@]}"
    run "${ssh[@]}"
    return
  fi
  while sleep "${POLL_SECONDS}"; do
    if preempted; then return 143; fi
    answer=$("${ssh[@]}") || answer=
    case "${answer}" in
      *state=143*) return 143 ;;
      *state=[1-9]* | *state=lost* | *state=none*)
        # A preemption may show as a failure first: look twice.
        failures=$((failures + 1))
        if [ "${failures}" -ge 2 ]; then
          printf 'error: %s failed:\n%s\n' "$1" "${answer}" >&2
          return 1
        fi
        ;;
      *state=running*) silences=0 ;;
      *state=0*) return 0 ;;
      *)
        silences=$((silences + 1))
        if [ "${silences}" -ge "${POLL_FAILURES}" ]; then
          echo "error: no answer from ${NAME}; see status.sh." >&2
          return 1
        fi
        ;;
    esac
  done
}
