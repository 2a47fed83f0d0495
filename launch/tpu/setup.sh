#!/usr/bin/env bash
# Sends this repository's last commit to every worker and installs it there.
#
#   NAME=pod ZONE=us-west4-a launch/tpu/setup.sh
#
# Changes that are not committed are not sent. PREPARE='COMMAND' runs on every worker first, for
# example to install gcsfuse. DRY=1 prints what would run.
set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
help 0 "$@"
need NAME ZONE

root=$(cd "$HERE/../.." && pwd)
git -C "$root" diff --quiet HEAD || echo "warning: changes that are not committed are not sent" >&2
bundle=${TMPDIR:-/tmp}/jaxdeep-$NAME.tgz
run git -C "$root" archive --format=tar.gz -o "$bundle" HEAD
tpu scp "$bundle" "$NAME:jaxdeep.tgz" "${EVERYWHERE[@]}"
unpack="mkdir -p jaxdeep; tar -xzf jaxdeep.tgz -C jaxdeep"
on_all bash -ec "${PREPARE:-true}; $unpack; bash $WORKER setup"
