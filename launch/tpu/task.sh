#!/usr/bin/env bash
# Runs one process of a run on TPUs, after telling jax where process 0 is.
#
#   launch/tpu/task.sh COMMAND...
#
# GKE says so in the environment, a TPU VM in its metadata. Process 0 is on the first worker of the
# first slice.
set -euo pipefail
# shellcheck source=../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
help 1 "$@"

task=$(dirname "${BASH_SOURCE[0]}")/../task.sh
[[ $DRY != 1 ]] || exec bash "$task" "$@"

attribute() {
  curl -sSf -H 'Metadata-Flavor: Google' \
    "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1"
}

# A line of the attribute tpu-env, such as MEGASCALE_NUM_SLICES: '2'.
tpu_env() { sed -n "s/^ *$1: *'\{0,1\}\([^']*\)'\{0,1\} *$/\1/p" <<<"$described"; }

if [[ ${TPU_WORKER_HOSTNAMES:-} ]]; then
  workers=$TPU_WORKER_HOSTNAMES number=$TPU_WORKER_ID
  slices=${MEGASCALE_NUM_SLICES:-1} slice=${MEGASCALE_SLICE_ID:-0}
  first=${MEGASCALE_COORDINATOR_ADDRESS:-}
else
  workers=$(attribute worker-network-endpoints) number=$(attribute agent-worker-number)
  described=$(attribute tpu-env)
  slices=$(tpu_env MEGASCALE_NUM_SLICES) slice=$(tpu_env MEGASCALE_SLICE_ID)
  first=$(tpu_env MEGASCALE_COORDINATOR_ADDRESS)
fi
commas=${workers//[!,]/}
count=$((${#commas} + 1))
if ((count * ${slices:-1} > 1)); then
  if [[ $first ]]; then
    first=${first%%:*}
  else # a host, or name:number:address
    first=${workers%%,*}
    first=${first##*:}
  fi
  export JAX_COORDINATOR_ADDRESS=$first:8476 JAX_NUM_PROCESSES=$((count * ${slices:-1}))
  export JAX_PROCESS_ID=$((${slice:-0} * count + number))
fi
exec bash "$task" "$@"
