"""The tiny base that comes with the package, from nothing: 1.2 M parameters that can read.

    make base        (its tokenizer, then the stages `reading` and `calling` of this file)

It learns from made-up worlds alone (`jaxdeep.envs.practice.Reading`): answering from passages, asking
a librarian, naming keywords, repeating; then also asking the librarian by a tool call. It never sees the
search tool or a real fact. Time: 23 + 7 minutes on two cores.
"""

from ml_collections import ConfigDict


def get_config(stage="reading"):
    """`reading` starts from nothing; `calling` goes on from its result and adds the syntax of calls."""
    config = ConfigDict()
    first = stage == "reading"
    config.model = ConfigDict(
        dict(
            path="tiny",
            weights="random",
            dtype="float32",
            thinking="none",
            tools_in_prompt=False,
            remat=False,
        )
    )
    config.lora = ConfigDict(dict(rank=0, alpha=1.0))
    config.mesh = ConfigDict(dict(data=1))
    config.data = ConfigDict(dict(source="reading:0" if first else "calling:1", accumulate=1))
    config.batch = ConfigDict(dict(rows=12, length=192))
    config.train = ConfigDict(
        dict(
            steps=3500 if first else 1000,
            save_every=250,
            keep=1,
            start="" if first else "runs/tiny_base-reading",
            seed=0,
        )
    )
    config.optim = ConfigDict(
        dict(
            name="muon",
            muon_lr=0.02,
            lr=0.01,
            steps=config.train.get_ref("steps"),
            warmup=20,
            decay="linear",
        )
    )
    return config
