"""The tiny base that ships with the package, from nothing: 1.2 M parameters that can read.

    make base
    python -m jaxdeep sft --config=configs/toy/tiny_base.py:reading --workdir=runs/tiny_base-reading
    python -m jaxdeep sft --config=configs/toy/tiny_base.py:choosing \
        --workdir=runs/tiny_base-choosing

`make base` also makes its tokenizer, and copies the result into the package.

It learns from made-up worlds alone (`jaxdeep.envs.toy.practice.Reading`): answering from passages,
asking a librarian in words or by a tool call, naming keywords, repeating; then more of the same
where a passage states several things and one is asked for. It never sees the search tool or a real
fact.

Hardware: any CPU. Time: 40 + 45 minutes on two cores. Result: jaxdeep/assets/tiny, the base of
configs/search/quickstart.py.
"""

from ml_collections import ConfigDict


def get_config(stage="reading"):
    """`reading` starts from nothing, `choosing` goes on from its result."""
    first = stage == "reading"
    config = ConfigDict()
    config.model = ConfigDict(
        dict(
            path="tiny",
            weights="random",
            dtype="float32",
            thinking="none",
            tools_in_prompt=False,
            remat="dots",
        )
    )
    config.lora = ConfigDict(dict(rank=0, alpha=1.0))
    config.mesh = ConfigDict(dict(data=1))
    config.data = ConfigDict(
        dict(source="reading:0" if first else "choosing:1", accumulate=1, long="drop")
    )
    config.batch = ConfigDict(dict(rows=12, length=192))
    config.train = ConfigDict(
        dict(
            steps=6000,
            save_every=250,
            keep=1,
            start="" if first else "runs/tiny_base-reading",
            seed=0,
        )
    )
    config.optim = ConfigDict(
        dict(
            name="muon",
            muon_lr=0.02 if first else 0.015,
            lr=0.01 if first else 0.0075,
            steps=config.train.get_ref("steps"),
            warmup=config.train.get_ref("steps") // 300,
            decay="linear",
        )
    )
    return config
