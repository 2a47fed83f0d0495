#!/usr/bin/env bash
# Evaluates the GRPO run in the same folder, or another START, on questions that it was not trained
# on.
#
#   launch/recipes/eval_qwen3_8b.sh --config.env.corpus=docs/ --config.env.questions=test.jsonl \
#       [--workdir=DIR, --against=DIR of the evaluation of another START, other flags]
#
# START=runs/sft_qwen3_8b evaluates the SFT, START= the model itself. Hardware: meant for a TPU
# v5e-16 or larger. Time and result: not yet run. DRY=1 prints what would run.
set -euo pipefail
# shellcheck source=../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
help 0 "$@"

runs=$(dirname "${WORKDIR:-runs/eval_qwen3_8b}")
become python -m jaxdeep eval --config=configs/search/eval.py --workdir=runs/eval_qwen3_8b \
  "--config.train.start=${START-$runs/grpo_qwen3_8b}" "$@"
