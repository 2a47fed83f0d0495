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

# What the command does on the TPU: running, exited STATUS, lost, none, or unreachable.
command_state() {
  local ask="bash $WORKER status 2>/dev/null || echo none" last
  last=$(on_first bash -c "$ask" | tail -n 1) || last=unreachable
  if [[ $last == "exited 0" ]] && on_all bash -c "$ask" | grep -x running >/dev/null; then
    last=running # on another worker
  fi
  echo "$last"
}

# Ends with status 2 where a word of a command names a file that the workers will not have: what is
# sent to them is the last commit.
check_sent() { # WORDS...
  local root word path
  root=$(cd "$HERE/../.." && pwd)
  for word in "$@"; do
    path=${word#--*=} path=${path%%:*} path=${path%/}
    [[ $path && $path != -* && $path != /* && $path != ../* && $path != *[[:space:]]* ]] || continue
    [[ $path == *.py || $path == *.sh || -e $root/$path ]] || continue
    git -C "$root" cat-file -e "HEAD:$path" 2>/dev/null ||
      fail "$word: $path is not in the last commit, which is what the workers get"
  done
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
