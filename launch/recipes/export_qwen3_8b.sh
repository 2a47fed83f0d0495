#!/usr/bin/env bash
# Exports the result of the GRPO run for other programs: as an adapter for PEFT and vLLM, and as
# merged weights. Nothing needs importing: --config.model.path takes a Hugging Face folder or hub
# id.
#
#   launch/recipes/export_qwen3_8b.sh [--workdir=DIR of the run, other flags]
#
# TO (default models/qwen3_8b) is the folder to write. Hardware: a machine with 64 GB of memory.
# Time: not yet run. DRY=1 prints what would run.
set -euo pipefail
# shellcheck source=../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
help 0 "$@"

to=${TO:-models/qwen3_8b}
for what in adapter merged; do
  run python -m jaxdeep export --config=configs/search/grpo.py --workdir=runs/grpo_qwen3_8b "$@" \
    "--to=$to-$what" "--what=$what"
done
