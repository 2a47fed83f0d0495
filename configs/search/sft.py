"""SFT of Qwen3-8B, LoRA of rank 32, on your own conversations, with tool calls or without.

    python -m jaxdeep sft --config=configs/search/sft.py \
        --config.data.source=jsonl:traces.jsonl --workdir=runs/sft

    --config.model.path=Qwen/Qwen3-0.6B              another checkpoint: a hub id or a folder
    --config.data.eval="{'rows': 64, 'every': 50}"   the loss on 64 rows held out, every 50 steps
    --config.data.learn.spans.think=0                masks reasoning out of the loss

Formats, mixtures of several sources: jaxdeep/data/README.md.

Hardware: meant for a TPU v5e-16 or larger; `mesh.data` takes all chips.
Time and result: not yet run at this size.
"""

from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.model = ConfigDict(dict(path="Qwen/Qwen3-8B", dtype="bfloat16", thinking="write"))
    config.lora = ConfigDict(dict(rank=32, alpha=64.0))
    config.mesh = ConfigDict(dict(replica=1, data=-1, context=1, model=1))
    config.data = ConfigDict(
        dict(
            source="jsonl:traces.jsonl",
            accumulate=1,
            long="cut",  # rows longer than batch.length: after the last turn that fits; or "drop"
            bad_rows="refuse",  # a malformed row stops the run; or "skip"
            check=True,  # reads all rows once before the run begins
            learn=dict(roles=("assistant",), spans=dict(), world=("tool_output", "tool_response")),
        )
    )
    config.sft = ConfigDict(dict(kl=dict(kind="k3", coef=0.0)))  # KL to the base; 0: none
    config.batch = ConfigDict(dict(rows=16, length=4096))
    config.train = ConfigDict(dict(steps=500, save_every=50, keep=2, start="", seed=0))
    steps = config.train.get_ref("steps")
    config.optim = ConfigDict(dict(lr=2e-4, warmup=steps // 25, decay="cosine", steps=steps))
    return config
