#!/usr/bin/env bash
# Runs one command to its end, through preemptions: creates the TPU, installs the package and starts
# the command, and does all of that again whenever the TPU is preempted. The run's state is in
# WORKDIR: the same command continues from the last checkpoint there. Then the TPU is deleted.
#
#   NAME=pod ZONE=us-west4-a TPU=v5litepod-16 SPOT=1 WORKDIR=gs://bucket/runs/grpo launch/tpu/keep.sh \
#       bash launch/first_job.sh
#
# The variables are those of create.sh and setup.sh. This script runs here, not on the TPU: in tmux,
# say. When the command cannot be run (status 2), fails RETRIES (5) times on one TPU, or a new TPU is
# not reached SILENT (20) times, the ends of the logs come here, the TPU is deleted and the status is
# 2; KEEP=1 leaves the TPU, which bills. DRY=1 prints what would run.
set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
help 1 "$@"
need NAME ZONE WORKDIR
export NAME ZONE WORKDIR TPU SLICES QUEUED
check_sent "$@"
pause() { sleep "${PAUSE:-30}"; }
bills="it bills: NAME=$NAME ZONE=$ZONE QUEUED=$QUEUED launch/tpu/stop.sh --delete"

if [[ $DRY == 1 ]]; then
  state
  bash "$HERE/create.sh"
  command_state
  bash "$HERE/setup.sh" && bash "$HERE/run.sh" "$@"
  bash "$HERE/stop.sh" --delete
  exit
fi

give_up() { # WHY
  on_all tail -n 200 .jaxdeep/log >"jaxdeep-$NAME.log" 2>&1 || true
  echo "error: $NAME: $*; the ends of the logs are in jaxdeep-$NAME.log" >&2
  [[ ${KEEP:-} != 1 ]] && bash "$HERE/stop.sh" --delete || echo "$bills" >&2
  exit 2
}

tries=0 silent=0 new='' # a TPU that was never reached
trap 'echo "$bills" >&2; exit 130' INT TERM
while true; do
  now=$(state) || now=unknown
  case $now in
    ACTIVE | READY)
      last=$(command_state)
      [[ $last == unreachable ]] || silent=0 new=''
      case $last in
        running) pause ;;
        unreachable) # where a command was started it may be well, and only this machine not reach it
          pause
          ((++silent % ${SILENT:-20} == 0)) || continue
          [[ $new ]] && give_up "not reached"
          echo "$NAME was not reached $silent times; $bills" >&2
          ;;
        "exited 0")
          bash "$HERE/stop.sh" --delete || fail "done, but $bills"
          exit ;;
        *) # what another keep.sh left does not count
          [[ $last != "exited 2" || $tries == 0 ]] || give_up "the command cannot be run"
          ((++tries <= ${RETRIES:-5})) || give_up "$last, $((tries - 1)) times"
          echo "$NAME: $last; starting the command" >&2
          [[ $last == none ]] || bash "$HERE/stop.sh" || true # workers where it still runs
          if ! bash "$HERE/setup.sh" || ! bash "$HERE/run.sh" "$@"; then pause; fi
          ;;
      esac
      ;;
    "")
      tries=0 silent=0 new=1 status=0
      bash "$HERE/create.sh" || status=$?
      ((status < 2)) || fail "$NAME cannot be created as it is asked for"
      ((!status)) || pause
      ;;
    FAILED | SUSPENDED | PREEMPTED | TERMINATED)
      echo "$NAME is $now; deleting what is left of it" >&2
      bash "$HERE/stop.sh" --delete || pause
      ;;
    *) pause ;;
  esac
done
