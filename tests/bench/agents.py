"""Conversations with tools, side by side: jaxdeep's engine; google-tunix's sampler as its agentic
learner calls it (one call for each turn of each conversation, of the turn's length) and, in
its favour, with one call a turn for all conversations; `transformers` generate with one call a turn
for all. All run the same toy Qwen3 (4 layers, width 256, fp32), each in a process of its own.

    make bench     (python tests/bench/agents.py [--conversations=64] [--turns=8] [--few=16])

Prompts have 200 to 600 tokens, turns 10 to 120 (log-normal), tool results 50 to 400, and a tool
takes up to 0.3 s. Contents are random, lengths are the same for all systems, and nothing stops
early. Systems that compile run the work twice, the second time with other tokens, when nothing is
left to compile. The peers get `few` conversations, tunix a quarter of that (16 at once take it more
than 25 GB), because all 64 would take them many minutes; jaxdeep runs both numbers. Printed: tokens
a second, in the first run with all compilation and in the second; of the second, tokens sampled for
each token wanted, prompt tokens computed for each new one, and programs compiled; peak memory above
that of the imports.

Then one conversation of a hundred tool calls, up to 60,000 tokens: the time of a turn near its end
and near its beginning, and the difference of its last log-probabilities from the trainer's forward
pass over the whole conversation.

Last: how many conversations of 6,000 tokens on average fit at once, each allowed 32,768, into the
memory of 8 rows of a contiguous cache.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import sys
import time

import numpy as np
import toy

LENGTH = 8192


def workload(conversations: int, turns: int, seed: int) -> list[dict]:
    """For each conversation its prompt, and for each turn the number of tokens to sample, the
    tool's result and the seconds it takes. Only the token ids depend on `seed`."""
    out = []
    for at in range(conversations):
        rng, words = np.random.default_rng(at), np.random.default_rng([at, seed])

        def ids(low, high, rng=rng, words=words):
            return words.integers(1, toy.V - 1, rng.integers(low, high + 1)).tolist()

        said = np.clip(np.exp(rng.normal(np.log(40), 0.7, turns)), 10, 120).astype(int).tolist()
        tools = [(ids(50, 400), float(rng.uniform(0, 0.3))) for _ in range(turns)]
        out.append(dict(prompt=ids(200, 600), said=said, tools=tools))
    return out


def new_tokens(work: list[dict]) -> int:
    """Tokens of prompts and tool results: their keys and values must be computed once."""
    return sum(len(w["prompt"]) + sum(len(ids) for ids, _ in w["tools"][:-1]) for w in work)


class Jaxdeep:
    """All conversations at once, each at its own pace."""

    def __init__(self, conversations: int) -> None:
        from jaxdeep.sample.engine import Engine, EngineConfig

        size = EngineConfig(slots=conversations, length=LENGTH, cache_gb=1.0, tile=32, chunk=512)
        self.engine = Engine(*toy.jaxdeep(LENGTH), size)
        self.engine.warm()

    def __call__(self, work: list[dict]) -> None:
        asyncio.run(together(talk(self.say, at, w) for at, w in enumerate(work)))

    async def say(self, tokens: list[int], n: int, seed: int) -> list[int]:
        from jaxdeep.types import Sampling

        return (await self.engine(tokens, seed=seed, max_new=n, sampling=Sampling(1.0))).tokens

    def counts(self) -> dict:
        found = self.engine.metrics()
        return dict(
            prefilled=found["prefilled"], sampled=found["sampled"], compiled=found["compilations"]
        )


async def talk(say, at: int, w: dict) -> None:
    """One conversation."""
    tokens = w["prompt"]
    for turn, (n, (result, seconds)) in enumerate(zip(w["said"], w["tools"], strict=True)):
        said = await say(tokens, n, at * 99 + turn)
        await asyncio.sleep(seconds)
        tokens = tokens + said[:n] + result


async def together(works) -> None:
    await asyncio.gather(*works)


class Batched:
    """All conversations take each turn together, at the length of the longest; surplus tokens are
    cut off."""

    def __init__(self, call, compiled=lambda: 0) -> None:
        self.call, self.compiled = call, compiled
        self.prefilled = self.sampled = 0

    def __call__(self, work: list[dict]) -> None:
        histories = [w["prompt"] for w in work]
        for turn in range(len(work[0]["said"])):
            wanted = [w["said"][turn] for w in work]
            said = self.sample(histories, max(wanted), turn)
            time.sleep(max(w["tools"][turn][1] for w in work))
            histories = [
                [*history, *tokens[:n], *w["tools"][turn][0]]
                for history, tokens, n, w in zip(histories, said, wanted, work, strict=True)
            ]

    def sample(self, histories: list[list[int]], n: int, seed: int) -> list[list[int]]:
        said = self.call(histories, n, seed)
        self.prefilled += sum(map(len, histories))
        self.sampled += n * len(histories)
        return said

    def counts(self) -> dict:
        return dict(prefilled=self.prefilled, sampled=self.sampled, compiled=self.compiled())


class Single(Batched):
    """One call at a time, each for one conversation, while others wait for their tools."""

    def __call__(self, work: list[dict]) -> None:
        async def main() -> None:
            model = asyncio.Lock()

            async def say(tokens: list[int], n: int, seed: int) -> list[int]:
                async with model:
                    return (await asyncio.to_thread(self.sample, [tokens], n, seed))[0]

            await together(talk(say, at, w) for at, w in enumerate(work))

        asyncio.run(main())


SYSTEMS = {
    "jaxdeep": ("jaxdeep.sample.engine", Jaxdeep),
    "tunix": ("tunix.generate.sampler", lambda _: Single(*toy.tunix(LENGTH))),
    "tunix-batched": ("tunix.generate.sampler", lambda _: Batched(*toy.tunix(LENGTH))),
    "transformers": ("transformers.models.qwen3", lambda _: Batched(toy.transformers())),
}


def child(system: str, conversations: int, turns: int) -> None:
    module, build = SYSTEMS[system]
    importlib.import_module(module)
    if system == "transformers":
        importlib.import_module("torch")
    imports = toy.peak()
    rates, before = [], None
    for seed in range(1 if system == "transformers" else 2):
        work = workload(conversations, turns, seed)
        wanted = sum(sum(w["said"]) for w in work)
        start = time.perf_counter()
        if not seed:
            run = build(conversations)
        before = run.counts()
        run(work)
        rates.append(wanted / (time.perf_counter() - start))
    found = {name: value - before[name] for name, value in run.counts().items()}
    print(
        json.dumps(
            dict(
                first=rates[0],
                again=rates[-1],
                wasted=found["sampled"] / wanted,
                prefill=found["prefilled"] / new_tokens(work),
                programs=before["compiled"],
                compiled=found["compiled"],
                peak=toy.peak() - imports,
            )
        )
    )


def capacity(limit: int = 32768, mean: int = 6000, contiguous: int = 8) -> None:
    """How many conversations are in progress at once in the memory of `contiguous` rows of `limit`
    tokens."""
    import dataclasses

    from jaxdeep.model import paged
    from jaxdeep.sample.engine import Engine, EngineConfig

    params, cfg, mesh = toy.jaxdeep(limit)
    # the size of a page does not change how many are needed: one layer is enough
    cfg = dataclasses.replace(cfg, L=1)
    params = params | {"layers": {name: x[:1] for name, x in params["layers"].items()}}
    room = contiguous * limit * paged.page_bytes(cfg, mesh, 1) / 1e9
    size = EngineConfig(slots=128, length=limit, cache_gb=room, chunk=1024)
    engine = Engine(params, cfg, mesh, size)
    rng = np.random.default_rng(0)
    lengths = np.clip(np.exp(rng.normal(np.log(mean) - 0.32, 0.8, 128)), 500, limit - 64)

    async def main() -> tuple[float, float]:
        async def ask(n: int) -> None:
            await engine(rng.integers(1, toy.V - 1, n).tolist(), seed=0, max_new=16)

        asked = [asyncio.ensure_future(ask(int(n))) for n in lengths]
        rows = held = 0.0
        while not any(work.done() for work in asked):
            await asyncio.sleep(0.05)
            now = engine.metrics()
            rows, held = max(rows, now["rows"]), max(held, now["pages"])
        for work in asked:
            work.cancel()
        await asyncio.gather(*asked, return_exceptions=True)
        return rows, held * engine.config.page

    rows, held = asyncio.run(main())
    engine.close()
    print(json.dumps(dict(rows=rows, mean=held / rows, contiguous=contiguous, limit=limit)))


def hundred(turns: int = 100, said: int = 40, told: int = 556) -> None:
    """One long conversation: the tokens each turn computes, its seconds, and whether the trainer
    agrees."""
    import jax
    import jax.numpy as jnp

    from jaxdeep.model import decoder, head
    from jaxdeep.sample.engine import Engine, EngineConfig
    from jaxdeep.types import Sampling

    length = turns * (said + told) + 512
    params, cfg, mesh = toy.jaxdeep(length)
    size = EngineConfig(slots=2, length=length, cache_gb=0.3, tile=32, chunk=512)
    engine = Engine(params, cfg, mesh, size)
    engine.warm()
    rng = np.random.default_rng(0)
    tokens, took, computed = rng.integers(1, toy.V - 1, 400).tolist(), [], []
    for turn in range(turns):
        before, start = engine.metrics()["prefilled"], time.perf_counter()
        done = asyncio.run(engine(tokens, seed=turn, max_new=said, sampling=Sampling(1.0)))
        took.append(time.perf_counter() - start)
        computed.append(engine.metrics()["prefilled"] - before)
        if turn < turns - 1:
            tokens = tokens + done.tokens + rng.integers(1, toy.V - 1, told).tolist()
    compiled = engine.metrics()["compilations"]
    engine.close()
    whole = np.array([tokens + done.tokens])

    @jax.jit
    def trainer(params, tokens_BT):
        hidden_BTD, _ = decoder.forward(params, None, tokens_BT, cfg=cfg)
        last_BtD = hidden_BTD[:, -said - 1 : -1]
        logp_BtV = jax.nn.log_softmax(head.logits(params, last_BtD, cfg=cfg))
        return jnp.take_along_axis(logp_BtV, tokens_BT[:, -said:, None], axis=-1)[0, :, 0]

    away = float(np.abs(np.asarray(trainer(params, whole)) - done.logps).max())
    tenth = [float(np.mean(computed[1:11])), float(np.mean(computed[-10:]))]
    seconds = [float(np.mean(took[1:11])), float(np.mean(took[-10:]))]
    print(
        json.dumps(
            dict(
                tokens=whole.size, turns=turns, prefilled=tenth, new=told + 1, seconds=seconds,
                away=away, compiled=compiled,
            )
        )
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--conversations", type=int, default=64)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--few", type=int, default=16, help="conversations of the peers")
    parser.add_argument("--system", choices=(*SYSTEMS, *ALONE))
    flags = parser.parse_args()
    if flags.system in ALONE:
        return ALONE[flags.system]()
    if flags.system:
        return child(flags.system, flags.conversations, flags.turns)
    runs = {f"jaxdeep, {flags.conversations}": ("jaxdeep", flags.conversations)}
    less = max(flags.few // 4, 1)
    few = dict.fromkeys(SYSTEMS, flags.few) | {"tunix": less, "tunix-batched": less}
    runs |= {f"{name}, {many}": (name, many) for name, many in few.items()}
    found, rows = {}, {}
    for name, (system, many) in runs.items():
        counts = (f"--conversations={many}", f"--turns={flags.turns}")
        found[name] = toy.apart(__file__, f"--system={system}", *counts)
        print(f"{name}: {found[name]['again']:.0f} tokens/s", file=sys.stderr)
    ours = found[f"jaxdeep, {flags.few}"]
    for name, row in found.items():
        rows[name] = [
            f"{row['first']:.0f}",
            f"{row['again']:.0f}",
            f"{ours['first'] / row['first']:.1f}",
            f"{ours['again'] / row['again']:.1f}",
            f"{row['wasted']:.2f}",
            f"{row['prefill']:.2f}",
            f"{row['programs']:.0f} + {row['compiled']:.0f}",
            f"{row['peak'] / 1e6:.0f}",
        ]
    print(f"{flags.turns} turns with a tool after each; the lengths are the same for all")
    columns = ("tokens/s", "again", "jaxdeep x", "again x", "sampled", "prefilled")
    toy.table((*columns, "compiled", "peak MB"), rows)
    print("sampled: for each token wanted; prefilled: for each new token of prompts and tools")
    long = toy.apart(__file__, "--system=hundred")
    print(
        f"{long['turns']} turns to {long['tokens']} tokens: prefilled {long['prefilled'][0]:.0f} a "
        f"turn at first and {long['prefilled'][1]:.0f} at last, of which {long['new']} are new; "
        f"{long['seconds'][0]:.2f} s and {long['seconds'][1]:.2f} s; {long['compiled']:.0f} "
        f"programs compiled; the last turn's log-probabilities are {long['away']:.1e} from the "
        "trainer's"
    )
    held = toy.apart(__file__, "--system=capacity")
    print(
        f"{held['rows']:.0f} conversations of {held['mean']:.0f} tokens on average in progress in "
        f"the bytes of {held['contiguous']} rows of {held['limit']}: "
        f"{held['rows'] / held['contiguous']:.1f} x"
    )


ALONE = {"hundred": hundred, "capacity": capacity}

if __name__ == "__main__":
    main()
