# shellcheck shell=bash disable=SC2034
# The variables of the TPU scripts, which source this file. Set them in the environment.
#
#   PROJECT          Google Cloud project                           default: none, it is needed
#   ZONE             zone of the TPU                                default: us-west4-a
#   TYPE             accelerator type; one whose number is above 8
#                    is a slice of several hosts                    default: v5litepod-8
#   VERSION          TPU software version                           default: v2-alpha-tpuv5-lite
#   NAME             name of the VM                                 default: dqe-jax
#   SPOT             true: a spot VM, cheaper, may be preempted     default: false
#   QUEUED           true: asks by a queued resource and waits
#                    until there is a TPU, however long             default: false
#   FLEX_START       how long a flex-start VM may run, such as
#                    10h (at most 7d); it is queued too             default: empty
#   WORKDIR          directory of the run. gs://BUCKET/DIR is required for several hosts, for spot
#                    and for flex-start VMs; other paths are relative to the checkout on the VM
#                                                                   default: runs/vm
#   RESULTS          local directory to which run.sh copies a
#                    WORKDIR that is not on gs://                   default: runs/$NAME
#   SOURCE           git address that the VM can clone              default: `origin` here
#   REVISION         commit that the VM checks out; push it first   default: the commit here
#   PLATFORM         JAX platform of the evaluator; `cpu` on a VM
#                    that trains, because its TPU is taken          default: empty, JAX chooses
#   WORKER           worker whose log logs.sh follows               default: 0
#   MAX_RESTARTS     how often run.sh goes on after a preemption    default: 10
#   RESTART_SECONDS  pause before run.sh creates a VM again         default: 60
#   POLL_SECONDS     pause between two looks at a job               default: 60
#   POLL_FAILURES    looks without an answer before giving up       default: 20
#   CREATE_FLAGS     more flags for `gcloud ... create`, such as
#                    --network=NAME                                 default: empty
#   SSH_FLAGS        more flags for `gcloud ... ssh` and `scp`,
#                    such as --internal-ip                          default: empty

PROJECT=${PROJECT:-}
ZONE=${ZONE:-us-west4-a}
TYPE=${TYPE:-v5litepod-8}
VERSION=${VERSION:-v2-alpha-tpuv5-lite}
NAME=${NAME:-dqe-jax}
SPOT=${SPOT:-false}
FLEX_START=${FLEX_START:-}
QUEUED=${QUEUED:-false}
WORKDIR=${WORKDIR:-runs/vm}
RESULTS=${RESULTS:-runs/${NAME}}
SOURCE=${SOURCE:-$(git -C "${root:?}" remote get-url origin 2>/dev/null || true)}
REVISION=${REVISION:-$(git -C "${root}" rev-parse HEAD 2>/dev/null || true)}
PLATFORM=${PLATFORM:-}
WORKER=${WORKER:-0}
MAX_RESTARTS=${MAX_RESTARTS:-10}
RESTART_SECONDS=${RESTART_SECONDS:-60}
POLL_SECONDS=${POLL_SECONDS:-60}
POLL_FAILURES=${POLL_FAILURES:-20}
CREATE_FLAGS=${CREATE_FLAGS:-}
SSH_FLAGS=${SSH_FLAGS:-}

export SOURCE REVISION # a VM that run.sh creates again gets the same code
