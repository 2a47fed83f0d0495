#!/usr/bin/env bash
# Runs on a worker; the other scripts call it there, from the home folder.
#
#   worker.sh setup                      installs the package that this script belongs to
#   worker.sh start WORKDIR COMMAND...   starts COMMAND --workdir=WORKDIR in the background
#   worker.sh status                     prints none, running, lost or exited STATUS
#   worker.sh stop                       tells the command to stop and waits until it has saved
set -euo pipefail
code=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
# shellcheck source=../common.sh
source "$code/launch/common.sh"
help 1 "$@"
state=$HOME/.jaxdeep
mkdir -p "$state"

alive() { [[ -e $state/pid ]] && kill -0 "$(<"$state/pid")" 2>/dev/null; }

# A folder of gs:// as a local path, mounted so that hosts see each other's files without delay.
mounted() {
  local bucket at
  bucket=${1#gs://}
  bucket=${bucket%%/*}
  at=$HOME/gcs/$bucket
  if ! mountpoint -q "$at"; then
    command -v gcsfuse >/dev/null || fail "gcsfuse, which mounts gs://$bucket, is not installed here"
    mkdir -p "$at"
    gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 \
      --rename-dir-limit=100000 --enable-streaming-writes=false "$bucket" "$at" >&2
  fi
  echo "$HOME/gcs/${1#gs://}"
}

case $1 in
  setup) # TPU VMs come with a Python that is too old
    cd "$code"
    export PATH=$PATH:$HOME/.local/bin
    command -v uv >/dev/null || python3 -m pip install -q --user uv
    [[ -e .venv ]] || uv venv -q --python 3.11 .venv
    uv pip install -q --python .venv/bin/python -e '.[tpu]'
    ;;
  start)
    ! alive || fail "a command is running here already (process $(<"$state/pid"))"
    export WORKDIR=$2
    shift 2
    [[ $WORKDIR != gs://* ]] || WORKDIR=$(mounted "$WORKDIR")
    cd "$code"
    export PATH=$code/.venv/bin:$PATH PYTHONUNBUFFERED=1 JAX_COMPILATION_CACHE_DIR=$WORKDIR/.xla
    rm -f "$state/status"
    setsid nohup bash launch/tpu/worker.sh hold "$@" "--workdir=$WORKDIR" >>"$state/log" 2>&1 </dev/null &
    echo $! >"$state/pid"
    ;;
  hold) # runs the command, in a session of its own that survives the end of ssh
    trap : TERM
    ended=0
    bash launch/tpu/task.sh "${@:2}" || ended=$?
    echo "$ended" >"$state/status"
    ;;
  status)
    if alive; then
      echo running
    elif [[ -e $state/status ]]; then
      echo "exited $(<"$state/status")"
    elif [[ -e $state/pid ]]; then
      echo lost
    else
      echo none
    fi
    ;;
  stop)
    alive || exit 0
    kill -TERM -- "-$(<"$state/pid")"
    for ((i = 0; i < ${GRACE:-300}; i++)); do
      alive || exit 0
      sleep 1
    done
    kill -KILL -- "-$(<"$state/pid")"
    ;;
  *) fail "worker.sh has no command $1" ;;
esac
