#!/usr/bin/env bash
# Runs one process of a run, and says truthfully how it ended.
#
#   launch/task.sh COMMAND...
#
# A process that is told to stop (SIGTERM) saves and leaves with status 0, but the run is not at its end:
# then the status here is 143, and whoever schedules starts the same command again. As process 1 of a
# container this script alone is told, and passes it on, as it does with FORWARD=1; elsewhere all are told.
# A script as COMMAND ends in `exec PROGRAM`.
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
while true; do # a signal ends `wait`, not the command
  status=0
  wait "$child" || status=$?
  kill -0 "$child" 2>/dev/null || break
done
if [[ $stopped && ($status == 0 || $status -ge 128) ]]; then
  status=143
fi
exit "$status"
