#!/usr/bin/env bash
# Runs launch/first_job.sh, a training of two steps, as a job: shows that a cluster is set up.
#
#   SCRATCH=/scratch/me VENV=$PWD/.venv launch/slurm/test.sh [flags of sbatch]
#
# Waits for the job, which runs on CPUs, and prints its last lines. WORKDIR is $SCRATCH/runs/test by
# default; a second job there finds the steps done, unless STEPS= asks for more. DRY=1 prints what
# would run.
set -euo pipefail
# shellcheck source=../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
help 0 "$@"
need SCRATCH
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export WORKDIR=${WORKDIR:-$SCRATCH/runs/test}
log=$WORKDIR/job.log
run mkdir -p "$WORKDIR"
status=0
JAX_PLATFORMS=cpu run sbatch --wait --job-name=jaxdeep-test "--output=$log" "$@" \
  launch/slurm/train.sbatch bash launch/first_job.sh --config.batch.rows=8 \
  "--config.train.steps=${STEPS:-2}" || status=$?
run tail -n 5 "$log"
exit "$status"
