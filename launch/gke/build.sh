#!/usr/bin/env bash
# Builds the container image of the last commit and pushes it to its registry.
#
#   IMAGE=REGISTRY/jaxdeep:1 launch/gke/build.sh
#
# DRY=1 prints what would run.
set -euo pipefail
# shellcheck source=../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
help 0 "$@"
need IMAGE
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

git diff --quiet HEAD || echo "warning: changes that are not committed are not in the image" >&2
run bash -c "git archive HEAD | docker build -t $(quoted "$IMAGE") -f launch/gke/Dockerfile -"
run docker push "$IMAGE"
