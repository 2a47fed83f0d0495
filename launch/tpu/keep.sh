#!/usr/bin/env bash
# Runs one command to its end, through preemptions: creates the TPU, installs the package and starts
# the command, and does all of that again whenever the TPU is preempted. The run's state is in
# WORKDIR: the same command continues from the last checkpoint there. When the command is done the
# TPU is deleted.
#
#   NAME=pod ZONE=us-west4-a TPU=v5litepod-16 SPOT=1 WORKDIR=gs://bucket/runs/grpo launch/tpu/keep.sh \
#       python -m jaxdeep grpo --config=configs/search/grpo.py
#
# The variables are those of create.sh and setup.sh. This script runs here, not on the TPU: in tmux,
# or on a small machine. When the command cannot be run (status 2), or fails RETRIES (5) times on
# one TPU, the script ends and leaves the TPU for inspection. DRY=1 prints what would run.
set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
help 1 "$@"
need NAME ZONE WORKDIR
export NAME ZONE WORKDIR TPU SLICES QUEUED
pause() { sleep "${PAUSE:-30}"; }
ask="bash $WORKER status 2>/dev/null || echo none"

if [[ $DRY == 1 ]]; then
  state
  bash "$HERE/create.sh"
  on_first bash -c "$ask"
  bash "$HERE/setup.sh"
  bash "$HERE/run.sh" "$@"
  bash "$HERE/stop.sh" --delete
  exit
fi

tries=0
while true; do
  if ! now=$(state); then
    pause
    continue
  fi
  case $now in
    ACTIVE | READY)
      last=$(on_first bash -c "$ask" | tail -n 1) || last=unreachable
      if [[ $last == "exited 0" ]] && on_all bash -c "$ask" | grep -x running; then
        last=running # on another worker
      fi
      case $last in
        running | unreachable) pause ;;
        "exited 0")
          echo "done" >&2
          exec bash "$HERE/stop.sh" --delete
          ;;
        "exited 2") fail "the command cannot be run; launch/tpu/logs.sh shows why" ;;
        *)
          ((++tries <= ${RETRIES:-5})) || fail "$NAME: $last, $((tries - 1)) times; see its log"
          echo "$NAME: $last; starting the command" >&2
          [[ $last == none ]] || bash "$HERE/stop.sh" || true # workers where it still runs
          if ! bash "$HERE/setup.sh" || ! bash "$HERE/run.sh" "$@"; then
            pause
          fi
          ;;
      esac
      ;;
    "")
      tries=0
      bash "$HERE/create.sh" || pause
      ;;
    FAILED | SUSPENDED | PREEMPTED | TERMINATED)
      echo "$NAME is $now; deleting what is left of it" >&2
      bash "$HERE/stop.sh" --delete || pause
      ;;
    *) pause ;;
  esac
done
