#!/usr/bin/env bash
# GRPO of Qwen3-8B on your own corpus and questions, starting from the published model, or from
# START, such as the run of sft_qwen3_8b.sh.
#
#   launch/recipes/grpo_qwen3_8b.sh --config.env.corpus=docs/ --config.env.questions=train.jsonl \
#       [--workdir=DIR, other flags]
#
# Hardware: meant for a TPU v5e-16 or larger, where it fits by `python -m jaxdeep plan`: heads are
# split over the 4 chips of a host, with 18 GB of keys and values on each host.
# Time and result: not yet run. DRY=1 prints what would run.
set -euo pipefail
# shellcheck source=../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
help 0 "$@"

become python -m jaxdeep grpo --config=configs/search/grpo.py --workdir=runs/grpo_qwen3_8b \
  "--config.train.start=${START:-}" --config.mesh.model=4 --config.rollout.cache_gb=18 "$@"
