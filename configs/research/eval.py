"""Reports with citations from your own corpus: ask one question, or evaluate on many.

    python -m jaxdeep ask --config=configs/research/eval.py --config.env.corpus=docs/ \
        --config.env.questions=questions.jsonl --question="What is the capital of Chad?" \
        --workdir=runs/ask
    python -m jaxdeep eval --config=configs/research/eval.py --config.env.corpus=docs/ \
        --config.env.questions=questions.jsonl --config.train.start=runs/grpo --workdir=runs/eval

A question is a line with `question`, `answer` and optionally `nuggets`, facts that belong in its
report. `train.start` names the run whose adapter writes; empty is the model itself.

Hardware: that of search/grpo.py. Time and result: not yet run at this size.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

SEARCH = runpy.run_path(str(pathlib.Path(__file__).parents[1] / "search" / "eval.py"))


def get_config():
    config = SEARCH["get_config"]()
    config.env = ConfigDict(
        dict(
            taskset="jaxdeep.envs.research.tasks:Research",
            corpus="docs/",
            questions="questions.jsonl",
            k=3,
            chunk=1000,
        )
    )
    config.rollout.limits.turn_tokens = 2048  # a report is longer than an answer
    return config
