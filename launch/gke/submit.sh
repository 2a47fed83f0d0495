#!/usr/bin/env bash
# Starts one command on every host of one or several TPU slices, as a JobSet.
#
#   NAME=grpo IMAGE=REGISTRY/jaxdeep:1 TPU=v5e:4x4 SLICES=1 WORKDIR=gs://bucket/runs/grpo \
#       launch/gke/submit.sh bash launch/first_job.sh
#   kubectl logs -f -l jobset.sigs.k8s.io/jobset-name=grpo -c jaxdeep --prefix
#   kubectl delete jobset grpo
#
# The cluster needs JobSet, a node pool of the topology for each slice, and the Cloud Storage FUSE
# driver with a service account (ACCOUNT) that may write to the bucket. CHIPS_PER_HOST is 4 by
# default. When pods are preempted all start again from the last checkpoint, up to RESTARTS (100)
# times. DRY=1 writes the manifest and prints what would run.
set -euo pipefail
# shellcheck source=../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
help 1 "$@"
need NAME IMAGE TPU WORKDIR
[[ $WORKDIR == gs://*/* ]] || fail "WORKDIR=$WORKDIR is no folder of a bucket, gs://BUCKET/FOLDER"
[[ $TPU =~ ^[a-z0-9]+:[0-9]+(x[0-9]+)+$ ]] || fail "TPU=$TPU is not of the form v5e:4x4"

case ${TPU%%:*} in
  v4) ACCELERATOR=tpu-v4-podslice ;;
  v5e) ACCELERATOR=tpu-v5-lite-podslice ;;
  v5p) ACCELERATOR=tpu-v5p-slice ;;
  v6e) ACCELERATOR=tpu-v6e-slice ;;
  tpu7x) ACCELERATOR=tpu7x ;;
  *) fail "TPU=$TPU: choose v4, v5e, v5p, v6e or tpu7x" ;;
esac
TOPOLOGY=${TPU#*:}
chips=$((${TOPOLOGY//x/ * }))
CHIPS=${CHIPS_PER_HOST:-4}
((chips >= CHIPS)) || CHIPS=$chips
((chips % CHIPS == 0)) || fail "$chips chips of $TPU are no whole number of hosts with $CHIPS"
HOSTS=$((chips / CHIPS)) SLICES=${SLICES:-1} RESTARTS=${RESTARTS:-100} ACCOUNT=${ACCOUNT:-default}
BUCKET=${WORKDIR#gs://} BUCKET=${BUCKET%%/*}
WORKDIR=/gcs/${WORKDIR#gs://*/}
COMMAND=$(python3 -c 'import json, sys; print(json.dumps(sys.argv[1:]))' \
  bash launch/tpu/task.sh "$@" "--workdir=$WORKDIR")
export NAME IMAGE ACCELERATOR TOPOLOGY CHIPS HOSTS SLICES RESTARTS ACCOUNT BUCKET WORKDIR COMMAND

manifest=${TMPDIR:-/tmp}/jaxdeep-$NAME.yaml
python3 -c 'import os, string, sys; print(string.Template(sys.stdin.read()).substitute(os.environ), end="")' \
  <"$(dirname "${BASH_SOURCE[0]}")/jobset.yaml" >"$manifest"
run kubectl apply -f "$manifest"
