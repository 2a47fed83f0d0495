#!/usr/bin/env bash
# SFT of Qwen3-8B on your own traces of conversations with tool calls.
#
#   launch/recipes/sft_qwen3_8b.sh --config.data.source=jsonl:traces.jsonl [--workdir=DIR, other flags]
#
# Hardware: meant for a TPU v5e-16 or larger. Time and result: not yet run.
# DRY=1 prints what would run.
set -euo pipefail
# shellcheck source=../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
help 0 "$@"

become python -m jaxdeep sft --config=configs/search/sft.py --workdir=runs/sft_qwen3_8b "$@"
