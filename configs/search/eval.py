"""Evaluate a model that was not trained here, or talk to it: model, task set and limits of grpo.py
beside this file. A run needs no configuration: `python -m jaxdeep eval runs/grpo`.

    python -m jaxdeep eval --config=configs/search/eval.py --config.env.corpus=docs/ \
        --config.env.questions=test.jsonl --workdir=runs/eval
    python -m jaxdeep chat --config=configs/search/eval.py --config.env.corpus=docs/ \
        --config.env.questions=test.jsonl

    --config.train.start=models/search    with this PEFT adapter

    --against=runs/eval-sft    (eval) a paired test against another evaluation of these questions

Hardware: that of grpo.py. Time and result: not yet run at this size.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

GRPO = runpy.run_path(str(pathlib.Path(__file__).with_name("grpo.py")))


def get_config():
    grpo = GRPO["get_config"]()
    config = ConfigDict({name: grpo[name] for name in ("model", "lora", "mesh", "env", "rollout")})
    config.env.questions = "test.jsonl"
    config.train = ConfigDict(dict(start="", seed=0))
    return config
