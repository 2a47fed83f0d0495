#!/usr/bin/env bash
# Stops the command on every worker, after it has saved; with --delete, deletes the TPU instead.
#
#   NAME=pod ZONE=us-west4-a launch/tpu/stop.sh [--delete]
#
# DRY=1 prints what would run.
set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
help 0 "$@"
need NAME ZONE

if [[ ${1:-} != --delete ]]; then
  on_all bash "$WORKER" stop
elif [[ $QUEUED == 1 ]]; then
  tpu delete "$NAME" --force --quiet
else
  tpu delete "$NAME" --quiet
fi
