"""Plain decoding, side by side: prompts of 32 tokens, 256 new ones, temperature 1, in batches of 1,
8 and 32, by jaxdeep's engine, the samplers of google-tunix and SkyRL-tx, and `transformers`
generate. All run the same toy Qwen3, each in a process of its own, in rounds.

    make bench     (python tests/bench/decode.py [--rounds=3] [--skyrl-python=PATH])

SkyRL-tx needs other versions of its dependencies: `--skyrl-python` is an interpreter that has
skyrl[jax]==0.3.0. Printed: new tokens a second (median of the rounds, in each round the best of
three calls after two that compile), and jaxdeep's as a multiple of the better of tunix's and
SkyRL-tx's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time

import numpy as np
import toy

PROMPT, NEW, BATCHES = 32, 256, (1, 8, 32)


def jaxdeep(batch: int):
    from jaxdeep.sample.engine import Engine, EngineConfig
    from jaxdeep.types import Sampling

    chunk = max(PROMPT * batch, 64)
    size = EngineConfig(slots=batch, length=PROMPT + NEW, chunk=chunk, steps=64)
    engine = Engine(*toy.jaxdeep(PROMPT + NEW), size)

    async def every(prompts: list[list[int]], n: int, seed: int) -> list[list[int]]:
        calls = (
            engine(prompt, seed=seed + i, max_new=n, sampling=Sampling(1.0))
            for i, prompt in enumerate(prompts)
        )
        return [said.tokens for said in await asyncio.gather(*calls)]

    return lambda prompts, n, seed: asyncio.run(every(prompts, n, seed))


SYSTEMS = {
    "jaxdeep": jaxdeep,
    "tunix": lambda batch: toy.tunix(PROMPT + NEW)[0],
    "skyrl-tx": lambda batch: toy.skyrl(),
    "transformers": lambda batch: toy.transformers(),
}


def child(system: str) -> None:
    rates = {}
    for batch in BATCHES:
        call = SYSTEMS[system](batch)
        seconds = []
        for at in range(5):
            # other prompts each time, so that none is found in the cache of keys and values
            prompts = np.random.default_rng([batch, at]).integers(1, toy.V - 1, (batch, PROMPT))
            start = time.perf_counter()
            said = call(prompts.tolist(), NEW, 100 * at)
            seconds.append(time.perf_counter() - start)
            assert [len(tokens) for tokens in said] == [NEW] * batch, [len(t) for t in said]
        rates[str(batch)] = batch * NEW / min(seconds[2:])
    print(json.dumps(rates))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--skyrl-python", default="", help="an interpreter with skyrl[jax]==0.3.0")
    parser.add_argument("--system", choices=SYSTEMS)
    flags = parser.parse_args()
    if flags.system:
        return child(flags.system)
    pythons = dict.fromkeys(SYSTEMS, sys.executable) | {"skyrl-tx": flags.skyrl_python}
    if not flags.skyrl_python:
        del pythons["skyrl-tx"]
        print("without SkyRL-tx: name an interpreter that has it with --skyrl-python")
    rounds = {name: [] for name in pythons}
    for _ in range(flags.rounds):
        for name, python in pythons.items():
            rounds[name].append(toy.apart(__file__, f"--system={name}", python=python))
    rates = {
        name: [statistics.median(found[str(batch)] for found in every) for batch in BATCHES]
        for name, every in rounds.items()
    }
    rows = {name: [f"{rate:,.0f}" for rate in row] for name, row in rates.items()}
    best = [max(r) for r in zip(*(rates[name] for name in rates if name in PEERS), strict=True)]
    rows["jaxdeep x"] = [f"{a / b:.2f}" for a, b in zip(rates["jaxdeep"], best, strict=True)]
    print(
        f"new tokens/s after prompts of {PROMPT}; jaxdeep x: times the better of "
        f"{' and '.join(PEERS)}"
    )
    toy.table([f"batch {batch}" for batch in BATCHES], rows)


PEERS = ("tunix", "skyrl-tx")

if __name__ == "__main__":
    main()
