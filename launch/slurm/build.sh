#!/usr/bin/env bash
# Builds the container for jobs, on a machine that can download packages.
#
#   SCRATCH=/scratch/me IMAGE=/scratch/me/jaxdeep.sif launch/slurm/build.sh [flags of apptainer build]
#
# DRY=1 prints what would run.
set -euo pipefail
# shellcheck source=../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
help 0 "$@"
need IMAGE SCRATCH
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
# shellcheck source=env.sh
source launch/slurm/env.sh
run mkdir -p "$APPTAINER_CACHEDIR" "$APPTAINER_TMPDIR"
run apptainer build "$@" "$IMAGE" launch/slurm/container.def
