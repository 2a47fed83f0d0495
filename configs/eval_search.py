"""Evaluate a search agent, or talk to it: the model and tool of configs/grpo_search.py.

    python -m jaxdeep eval --config=configs/eval_search.py --config.env.corpus=docs/ \
        --config.env.questions=test.jsonl --config.train.start=runs/grpo --workdir=runs/eval

`--against=runs/eval-sft` adds a paired test. `python -m jaxdeep chat` takes the same flags. Not yet run
at this size.
"""

from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.model = ConfigDict(dict(path="Qwen/Qwen3-8B", dtype="bfloat16", thinking="write"))
    config.lora = ConfigDict(dict(rank=32, alpha=64.0))
    config.mesh = ConfigDict(dict(replica=1, data=-1, context=1, model=1))
    config.env = ConfigDict(
        dict(corpus="docs/", questions="test.jsonl", k=5, chunk=1000, first=0, count=0)
    )
    config.rollout = ConfigDict(
        dict(
            slots=64,
            chunk=512,
            steps=16,
            limits=dict(
                max_turns=9,
                max_calls=8,
                turn_tokens=1024,
                max_tokens=8192,
                result_tokens=800,
                seconds=600.0,
            ),
        )
    )
    config.train = ConfigDict(dict(steps=1, start="", seed=0))
    return config
