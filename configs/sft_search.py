"""Teach Qwen3-8B to use the search tool, from traces of conversations with tool calls.

    python -m jaxdeep sft --config=configs/sft_search.py \
        --config.data.source=jsonl:traces.jsonl --workdir=runs/sft

Another checkpoint: --config.model.path=Qwen/Qwen3-0.6B (a hub id or a folder). Hardware: meant for a
TPU v5e-16 or larger (`mesh.data` takes all chips). Not yet run at this size.
"""

from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.model = ConfigDict(dict(path="Qwen/Qwen3-8B", dtype="bfloat16", thinking="write"))
    config.lora = ConfigDict(dict(rank=32, alpha=64.0))
    config.mesh = ConfigDict(dict(replica=1, data=-1, context=1, model=1))
    config.data = ConfigDict(dict(source="jsonl:traces.jsonl", accumulate=1))
    config.batch = ConfigDict(dict(rows=16, length=4096))
    config.train = ConfigDict(dict(steps=500, save_every=50, keep=2, start="", seed=0))
    config.optim = ConfigDict(
        dict(lr=2e-4, warmup=20, decay="cosine", steps=config.train.get_ref("steps"))
    )
    return config
