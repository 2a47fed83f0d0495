"""A small model learns to solve mazes: SFT on impatient demonstrations, then GRPO.

    python -m jaxdeep quickstart --config=configs/toy/maze.py

Mazes of 3 x 4 cells in AlphaMaze's form, one turn, the answer a run of moves; every walk that
arrives in a simulation is right (jaxdeep/envs/toy/maze.py). SFT trains all weights of 0.5 M
parameters from nothing, on demonstrations that mostly give up after two moves; its result is the
base of GRPO's adapter.

GRPO can only bring out what SFT has taught: after 150 steps of SFT the model knows no way longer
than two moves (0.33, and 0.35 after GRPO), after 800 it knows many and takes few. Larger mazes:
--config.sft.env.rows=5 and so on, in all of sft.env, grpo.env, grpo.dev and test.

Hardware: any CPU. Time: on one core a step of SFT 0.19 s, one of GRPO 1.1 s.
Result, share of 300 test mazes solved, seeds 0, 1, 2: 0.410, 0.417, 0.413 after SFT, 0.797, 0.793,
0.720 after GRPO.
"""

from ml_collections import ConfigDict


def env(split, number):
    return ConfigDict(
        dict(taskset="maze", split=split, rows=3, columns=4, loops=1, number=number, system="")
    )


def get_config():
    config = ConfigDict()
    config.seed = 0
    model = dict(
        path="maze",
        dtype="float32",
        weights="random",
        thinking="none",
        tools_in_prompt=False,
        remat="dots",
    )

    sft = config.sft = ConfigDict()
    sft.model = ConfigDict(model)
    sft.lora = ConfigDict(dict(rank=0, alpha=1.0))
    sft.mesh = ConfigDict(dict(data=1))
    sft.env = env("train", 1)
    sft.data = ConfigDict(dict(source="mazes:0"))
    sft.batch = ConfigDict(dict(rows=8, length=256))
    sft.train = ConfigDict(dict(steps=800, save_every=100, seed=config.get_ref("seed")))
    steps = sft.train.get_ref("steps")
    sft.optim = ConfigDict(
        dict(name="muon", muon_lr=0.02, lr=0.01, warmup=steps // 40, steps=steps)
    )

    grpo = config.grpo = ConfigDict()
    grpo.model = ConfigDict(model)  # SFT's result takes its place
    grpo.lora = ConfigDict(dict(rank=16, alpha=16.0))
    grpo.mesh = ConfigDict(dict(data=1))
    grpo.env = env("train", 2000)
    grpo.dev = env("dev", 64)
    grpo.rollout = ConfigDict(
        dict(
            slots=128,
            steps=8,
            limits=dict(
                max_turns=1,
                max_calls=0,
                turn_tokens=20,
                max_tokens=72,
                result_tokens=1,
                seconds=600.0,  # no tool can hang
            ),
        )
    )
    grpo.grpo = ConfigDict(dict(prompts=16, group=8, tolerance=1e-4, eval_every=25))
    grpo.batch = ConfigDict(dict(rows=8, length=288))
    grpo.train = ConfigDict(dict(steps=80, save_every=20, start="", seed=config.get_ref("seed")))
    steps = grpo.train.get_ref("steps")
    grpo.optim = ConfigDict(dict(lr=3e-3, warmup=steps // 26, steps=steps))

    config.test = env("test", 300)
    return config
