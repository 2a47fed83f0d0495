# shellcheck shell=bash
# What the scripts for TPU VMs share: which TPU is meant, and how it is reached.
#
#   NAME, ZONE      the TPU; required
#   PROJECT         the project, where gcloud's own setting is not meant
#   TPU             accelerator type, default v5litepod-16
#   SLICES          number of slices, default 1; more need QUEUED=1
#   QUEUED          1 (default): a queued resource; 0: a TPU VM that is there now or not at all
#   SPOT            1: cheaper, may be taken back at any time

# shellcheck disable=SC2034 # for those that source this
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

# The state as Google names it; nothing where there is no such TPU.
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
