"""GRPO of Qwen3-8B, LoRA of rank 32, as a search agent on your own corpus and questions.

    python -m jaxdeep grpo --config=configs/search/grpo.py --config.env.corpus=docs/ \
        --config.env.questions=questions.jsonl --config.train.start=runs/sft --workdir=runs/grpo
    python -m jaxdeep plan --config=configs/search/grpo.py --topology=v5e:4x4 \
        --config.mesh.model=4 --config.rollout.cache_gb=18

The corpus is a file or folder of Markdown, text or JSONL; a question is a line with `question` and
`answer`. `train.start` is the run of sft.py to begin from; leave it empty to begin from the model
itself.

Hardware: meant for a TPU v5e-16 or larger, with the two flags of the plan above, which fits there;
without them 16 chips of v5e do not hold it.
Time and result: not yet run at this size.
"""

from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.model = ConfigDict(dict(path="Qwen/Qwen3-8B", dtype="bfloat16", thinking="write"))
    config.lora = ConfigDict(dict(rank=32, alpha=64.0))
    config.mesh = ConfigDict(dict(replica=1, data=-1, context=1, model=1))
    config.env = ConfigDict(
        dict(
            taskset="search",
            corpus="docs/",
            questions="questions.jsonl",
            k=5,
            chunk=1000,
            first=0,
            count=0,
            rewards=dict(answer=1.0, format=0.1, retry=0.1),
        )
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
    # algorithm: one word for many settings, all of them in jaxdeep/rl/algorithms.py
    # tolerance: the largest difference between sampler and trainer in any token's log-probability,
    # in nats; in bfloat16 both round differently
    config.grpo = ConfigDict(
        dict(prompts=16, group=8, algorithm="default", tolerance=1.0, eval_every=0)
    )
    # after a collapse: off, warn, stop or rollback; signs and limits in jaxdeep/train/guard.py
    config.guard = ConfigDict(dict(action="rollback"))
    config.batch = ConfigDict(dict(rows=16, length=8192))
    config.train = ConfigDict(dict(steps=200, save_every=10, keep=4, start="", seed=0))
    steps = config.train.get_ref("steps")
    config.optim = ConfigDict(dict(lr=2e-5, warmup=steps // 40, decay="constant", steps=steps))
    return config
