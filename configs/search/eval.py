"""Evaluate a search agent, or talk to it: the model and tool of grpo.py beside this file.

    python -m jaxdeep eval --config=configs/search/eval.py --config.env.corpus=docs/ \
        --config.env.questions=test.jsonl --config.train.start=runs/grpo --workdir=runs/eval

`--against=runs/eval-sft` adds a paired test. `python -m jaxdeep chat` takes the same flags. Not yet run
at this size.
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
