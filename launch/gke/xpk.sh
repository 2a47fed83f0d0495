#!/usr/bin/env bash
# Starts one command on every host of one or several TPU slices, through XPK.
#
#   NAME=grpo CLUSTER=pod ZONE=us-west4-a IMAGE=REGISTRY/jaxdeep:1 TPU=v5litepod-16 SLICES=1 \
#       STORAGE=runs WORKDIR=/gcs/runs/grpo launch/gke/xpk.sh bash launch/first_job.sh
#
# STORAGE is a bucket that `xpk storage attach` has attached to the cluster with the options that
# launch/README.md shows, and WORKDIR a folder below its mount point. When pods are preempted all
# start again from the last checkpoint, up to RESTARTS (100) times. DRY=1 prints what would run.
set -euo pipefail
# shellcheck source=../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
help 1 "$@"
need NAME CLUSTER ZONE IMAGE TPU WORKDIR
[[ $WORKDIR == /* ]] || fail "WORKDIR=$WORKDIR is no path under a mount point of the cluster's storage"

flags=("--cluster=$CLUSTER" "--zone=$ZONE" "--workload=$NAME" "--docker-image=$IMAGE"
  "--tpu-type=$TPU" "--num-slices=${SLICES:-1}" "--max-restarts=${RESTARTS:-100}"
  --restart-on-exit-codes=1 --termination-grace-period-seconds=300)
[[ ! ${PROJECT:-} ]] || flags+=("--project=$PROJECT")
[[ ! ${STORAGE:-} ]] || flags+=("--storage=$STORAGE")
words=(env FORWARD=1 "WORKDIR=$WORKDIR" "JAX_COMPILATION_CACHE_DIR=$WORKDIR/.xla"
  bash launch/tpu/task.sh "$@" "--workdir=$WORKDIR")
run xpk workload create "${flags[@]}" --command="exec $(quoted "${words[@]}")"
