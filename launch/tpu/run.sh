#!/usr/bin/env bash
# Starts one command on every worker, in the background: it goes on when this machine is switched off.
#
#   NAME=pod ZONE=us-west4-a WORKDIR=gs://bucket/runs/grpo launch/tpu/run.sh \
#       python -m jaxdeep grpo --config=configs/search/grpo.py --config.env.corpus=docs/
#
# The command gets --workdir, a folder that all workers and all later TPUs see: in a bucket (mounted by
# gcsfuse), or a path of a file system that is mounted on every worker. It runs in the repository as setup.sh
# sent it: what else it reads is committed, or lies where all workers see it (a mounted bucket is
# ../gcs/BUCKET). Variables go before it: env WANDB_MODE=offline python ... DRY=1 prints what would run.
set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
help 1 "$@"
need NAME ZONE WORKDIR
on_all bash "$WORKER" start "$WORKDIR" "$@"
