#!/usr/bin/env bash
# Runs one process of a run, and tells by its status a run that is done from one that was stopped.
#
#   launch/task.sh COMMAND...
#
# A process that gets SIGTERM saves and exits with 0, although the run is not finished. This script
# then exits with 143, and the scheduler starts the same command again. In a container the signal
# reaches process 1 only: as process 1, or with FORWARD=1, this script passes it on. Elsewhere
# schedulers signal every process. Where COMMAND is a script, it must end in `exec PROGRAM`. A
# COMMAND that does not exist gives status 2, as all that no restart can mend.
set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
help 1 "$@"
if [[ $DRY == 1 ]]; then
  run "$@"
  exit
fi

"$@" &
child=$!
stopped=
trap 'stopped=1; [[ $$ != 1 && ${FORWARD:-} != 1 ]] || kill -TERM "$child"' TERM
while true; do # a signal interrupts `wait`, not the command
  status=0
  wait "$child" || status=$?
  kill -0 "$child" 2>/dev/null || break
done
if [[ $stopped && ($status == 0 || $status -ge 128) ]]; then
  status=143
fi
if [[ $status == 126 || $status == 127 ]]; then
  echo "error: the shell cannot run the command $1 (status $status)" >&2
  status=2
fi
exit "$status"
