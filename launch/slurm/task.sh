#!/usr/bin/env bash
# Runs one process of a job, after telling jax where process 0 is and which devices to use.
#
#   srun launch/slurm/task.sh COMMAND...
set -euo pipefail
# shellcheck source=../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
help 1 "$@"

if ((${SLURM_NTASKS:-1} > 1)); then
  # srun runs on the first node, and so does process 0
  export JAX_COORDINATOR_ADDRESS=$SLURM_LAUNCH_NODE_IPADDR:$((20000 + SLURM_JOB_ID % 20000))
  export JAX_NUM_PROCESSES=$SLURM_NTASKS JAX_PROCESS_ID=$SLURM_PROCID
  # by default jax uses one device per Slurm task
  if [[ ${SLURM_GPUS_ON_NODE:-} ]]; then
    JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((SLURM_GPUS_ON_NODE - 1)))
    export JAX_LOCAL_DEVICE_IDS
  fi
fi
exec bash "$(dirname "${BASH_SOURCE[0]}")/../task.sh" "$@"
