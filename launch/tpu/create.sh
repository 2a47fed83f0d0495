#!/usr/bin/env bash
# Creates a TPU and waits until it is ready.
#
#   NAME=pod ZONE=us-west4-a TPU=v5litepod-16 launch/tpu/create.sh [gcloud flags, such as --network=...]
#
# SLICES=2 asks for two slices, SPOT=1 for preemptible capacity, QUEUED=0 for a TPU VM at once
# instead of a place in the queue, RUNTIME= for another software version. The status is 2 where the
# same request can never be met. DRY=1 prints what would run.
set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
help 0 "$@"
need NAME ZONE

case $TPU in
  v5litepod-*) version=v2-alpha-tpuv5-lite ;;
  v5p-*) version=v2-alpha-tpuv5 ;;
  v6e-*) version=v2-alpha-tpuv6e ;;
  tpu7x-* | v7x-*) fail "TPU=$TPU: the Cloud TPU API ends with v6e; launch/gke has TPU7x" ;;
  v2-* | v3-* | v4-*) version=tpu-ubuntu2204-base ;;
  *) version=${RUNTIME:-} ;;
esac
version=${RUNTIME:-$version}
[[ $version ]] || fail "TPU=$TPU is not known here: name its software version, RUNTIME=..."

flags=("--accelerator-type=$TPU")
[[ ${SPOT:-} != 1 ]] || flags+=(--spot)
if [[ $QUEUED == 0 ]]; then
  [[ $SLICES == 1 ]] || fail "SLICES=$SLICES needs QUEUED=1"
  flags+=("--version=$version")
else
  flags+=("--runtime-version=$version")
  if [[ $SLICES == 1 ]]; then
    flags+=("--node-id=$NAME")
  else
    flags+=("--node-count=$SLICES" "--node-prefix=$NAME")
  fi
fi
never='INVALID_ARGUMENT|PERMISSION_DENIED|UNAUTHENTICATED|NOT_FOUND'
errors=$(mktemp)
trap 'rm -f "$errors"' EXIT
status=0
tpu create "$NAME" "${flags[@]}" "$@" 2> >(tee "$errors" >&2) || status=$?
wait # for tee
if [[ $status != 0 ]]; then
  ! grep -qE "$never" "$errors" || status=2
  exit "$status"
fi

if [[ $DRY == 1 ]]; then
  state
  exit
fi
while true; do
  now=$(state)
  case $now in
    ACTIVE | READY) exit ;;
    FAILED | SUSPEND* | PREEMPTED | TERMINATED | "") echo "error: $NAME is ${now:-gone}" >&2 && exit 1 ;;
  esac
  echo "$NAME is $now" >&2
  sleep "${PAUSE:-30}"
done
