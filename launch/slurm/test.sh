#!/usr/bin/env bash
# A job of two steps on the tiny model that comes with the package: shows that a cluster is set up.
#
#   SCRATCH=/scratch/me VENV=$PWD/.venv launch/slurm/test.sh [flags of sbatch]
#
# It waits for the job, on CPUs, and prints its last lines. WORKDIR is $SCRATCH/runs/test if not set; given
# again, the job finds its steps done. STEPS= asks for more. DRY=1 prints what would run.
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
  launch/slurm/train.sbatch python -m jaxdeep sft --config=configs/sft_search.py \
  --config.model.path=tiny --config.model.dtype=float32 --config.data.source=reading:7 \
  --config.batch.rows=8 --config.batch.length=256 "--config.train.steps=${STEPS:-2}" \
  --config.train.save_every=1 || status=$?
run tail -n 5 "$log"
exit "$status"
