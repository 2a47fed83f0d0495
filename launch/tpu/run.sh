#!/usr/bin/env bash
# Starts one command on every worker, in the background: it does not need this machine any more.
#
#   NAME=pod ZONE=us-west4-a WORKDIR=gs://bucket/runs/grpo launch/tpu/run.sh \
#       bash launch/first_job.sh
#
# The command gets --workdir, a folder that all workers and all later TPUs share: in a bucket
# (mounted by gcsfuse), or on a file system that is mounted on every worker. It runs in the
# repository as setup.sh sent it; other files that it reads must be committed, or be on a shared
# file system (a mounted bucket is ../gcs/BUCKET). Set variables as in: env WANDB_MODE=offline
# python ... DRY=1 prints what would run.
set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
help 1 "$@"
need NAME ZONE WORKDIR
check_sent "$@"
on_all bash "$WORKER" start "$WORKDIR" "$@"
