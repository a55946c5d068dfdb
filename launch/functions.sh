# shellcheck shell=bash
# What all launch scripts share. They source this file.
#
# Variables:
#   DRY_RUN   true: print commands, run nothing; --dry_run sets it     default: false
export DRY_RUN=${DRY_RUN:-false}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
args=()
needed=() # names of variables that a script cannot do without

die() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

# parse ARGUMENT...: sorts a script's arguments; those that are not for it become `args`.
parse() {
  local arg
  for arg in "$@"; do
    case "${arg}" in
      --dry_run) DRY_RUN=true ;;
      --help)
        sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" # the comment at the script's top
        exit 0
        ;;
      *) args+=("${arg}") ;;
    esac
  done
  need_variables ${needed[@]+"${needed[@]}"}
}

# need_variables NAME...: ends a script that lacks variables, and names them all.
need_variables() {
  local name missing=""
  for name in "$@"; do
    if [ -z "${!name:-}" ]; then missing+="${missing:+, }${name}"; fi
  done
  [ -z "${missing}" ] || die "set ${missing}: launch/tpu/settings.sh says what they are."
}

# Ends a script that takes no arguments but got some.
need_no_args() {
  [ "${#args[@]}" -eq 0 ] || die "unexpected argument ${args[0]}; --help says what there is."
}

# Ends a script whose arguments name no config.
need_config() {
  local arg
  for arg in ${args[@]+"${args[@]}"}; do
    if [ "${arg%%=*}" = --config ]; then return; fi
  done
  die "name a config: --config=FILE."
}

# Ends a script whose arguments name no directory of the run.
need_workdir() {
  local arg
  for arg in ${args[@]+"${args[@]}"}; do
    if [[ "${arg}" == --workdir=?* ]]; then return; fi
  done
  die "several seeds need a directory for their runs: --workdir=DIR."
}

# quote WORD...: prints the words so that a shell reads them back as they are.
quote() {
  printf '%q' "$1"
  if [ "$#" -gt 1 ]; then printf ' %q' "${@:2}"; fi
}

# run COMMAND...: prints the command and, unless this is a dry run, runs it.
run() {
  printf '+ %s\n' "$(quote "$@")" || true # a terminal that went away must not stop a deletion
  if [ "${DRY_RUN}" = false ]; then "$@"; fi
}

# need_venv DIR EXTRA: makes a virtual environment with dqe_jax and an extra of setup.py, unless it
# is there.
need_venv() {
  if [ -x "$1/bin/pip" ] && "$1/bin/pip" show --quiet dqe_jax 2>/dev/null; then return; fi
  if python3 -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    run python3 -m venv "$1"
  else
    # The images of TPU VMs have Python 3.10; uv fetches a newer one.
    run python3 -m pip install --quiet --user uv
    run python3 -m uv venv --quiet --seed --python=3.12 "$1"
  fi
  run "$1/bin/pip" install --quiet --editable "${root}[$2]"
}
