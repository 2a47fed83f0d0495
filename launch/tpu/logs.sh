#!/usr/bin/env bash
# Shows the output of the command on the first worker, and follows it.
#
#   NAME=pod ZONE=us-west4-a launch/tpu/logs.sh [-n LINES, or other flags of tail; default -n 100 -f]
#
# DRY=1 prints what would run.
set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
help 0 "$@"
need NAME ZONE
(($#)) || set -- -n 100 -f
on_first tail "$@" .jaxdeep/log
