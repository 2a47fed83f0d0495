#!/usr/bin/env bash
# Trains the tiny model that comes with the package for two steps: shows that a cluster or a TPU is
# set up.
#
#   launch/first_job.sh [--workdir=DIR, other flags]
#
# For up to 64 devices, by any launcher: launch/tpu/run.sh bash launch/first_job.sh,
# launch/gke/submit.sh bash launch/first_job.sh, launch/slurm/test.sh. DRY=1 prints what would run.
set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
help 0 "$@"

become python -m jaxdeep sft --config=configs/search/sft.py --workdir=runs/first_job \
  --config.model.path=tiny --config.model.dtype=float32 --config.data.source=reading:7 \
  --config.batch.rows=64 --config.batch.length=256 --config.train.steps=2 --config.train.save_every=1 \
  --config.optim.warmup=0 "$@"
