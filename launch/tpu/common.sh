# shellcheck shell=bash
# Functions that the scripts for TPU VMs share, and their settings:
#
#   NAME, ZONE      the TPU; required
#   PROJECT         the project, if it is not the one that gcloud is set to
#   TPU             accelerator type, default v5litepod-16
#   SLICES          number of slices, default 1; more need QUEUED=1
#   QUEUED          1 (default): a queued resource, which waits for capacity; 0: a TPU VM now, or an error
#   SPOT            1: cheaper, may be preempted at any time

# shellcheck disable=SC2034 # the scripts that source this use the variables
# shellcheck source=../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

TPU=${TPU:-v5litepod-16}
SLICES=${SLICES:-1}
QUEUED=${QUEUED:-1}
HERE=$(dirname "${BASH_SOURCE[0]}")
WORKER=jaxdeep/launch/tpu/worker.sh # on the TPU, from the home folder

if [[ $QUEUED == 1 ]]; then
  KIND=queued-resources EVERYWHERE=(--worker=all --node=all)
else
  KIND=tpu-vm EVERYWHERE=(--worker=all)
fi

tpu() { # VERB WORDS...
  run gcloud compute tpus "$KIND" "$@" "--zone=$ZONE" ${PROJECT:+"--project=$PROJECT"}
}

on_all() { # COMMAND... on every worker of every slice
  tpu ssh "$NAME" "${EVERYWHERE[@]}" "--command=$(quoted "$@")"
}

on_first() {
  tpu ssh "$NAME" --worker=0 "--command=$(quoted "$@")"
}

# The TPU's state in Google's words; empty if there is no such TPU.
state() {
  local column=state
  [[ $QUEUED == 0 ]] || column=state.state
  local list=(tpu list "--format=value(name.basename(),$column)")
  if [[ $DRY == 1 ]]; then
    "${list[@]}"
  else
    "${list[@]}" | awk -v name="$NAME" '$1 == name { print $2 }'
  fi
}
