#!/usr/bin/env bash
# GRPO of Qwen3-8B on your own corpus and questions, from the SFT that lies beside it.
#
#   launch/recipes/grpo_qwen3_8b.sh --config.env.corpus=docs/ --config.env.questions=train.jsonl \
#       [--workdir=DIR, other flags; --config.train.start= begins from the model itself]
#
# Hardware: meant for a TPU v5e-16 or larger, where the plan says that it fits: heads over the 4 chips of a
# host, 18 GB of keys and values in each host. Time and result: not yet run.
# DRY=1 prints what would run.
set -euo pipefail
# shellcheck source=../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
help 0 "$@"

runs=$(dirname "${WORKDIR:-runs/grpo_qwen3_8b}")
become python -m jaxdeep grpo --config=configs/search/grpo.py --workdir=runs/grpo_qwen3_8b \
  "--config.train.start=$runs/sft_qwen3_8b" --config.mesh.model=4 --config.rollout.cache_gb=18 "$@"
