"""Conversations with tools, side by side: jaxdeep's engine; google-tunix's sampler as its agentic learner
drives it (one call a turn and conversation, the budget of the turn as its length) and, kinder, once a turn
for all; `transformers` generate once a turn for all. The same toy Qwen3 (4 layers, width 256, fp32), each
in a process of its own.

    make bench     (python tests/bench/agents.py [--conversations=64] [--turns=8] [--single=4])

Prompts of 200 to 600 tokens, turns of 10 to 120 (log-normal), tool results of 50 to 400, tools that take
up to 0.3 s; what is said is random, the lengths are the same for all. `single` conversations are enough
for the slowest. Printed: tokens wanted and sampled a second, prompt tokens computed for each new one,
programs compiled (of jaxdeep after its warm-up), peak memory of the process above what its imports hold.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import resource
import subprocess
import sys
import time

import numpy as np

V, D, F, L, N, K, H = 4096, 256, 768, 4, 4, 2, 64
LENGTH = 8192
SYSTEMS = ("jaxdeep", "tunix", "tunix-batched", "transformers")


def workload(conversations: int, turns: int, seed: int = 0) -> list[dict]:
    """For each conversation its prompt, and for each turn how many tokens to sample, what the tool says
    and the seconds it takes."""
    out = []
    for at in range(conversations):
        rng = np.random.default_rng([seed, at])

        def ids(low, high, rng=rng):
            return rng.integers(1, V, rng.integers(low, high + 1)).tolist()

        said = np.clip(np.exp(rng.normal(np.log(40), 0.7, turns)), 10, 120).astype(int).tolist()
        tools = [(ids(50, 400), float(rng.uniform(0, 0.3))) for _ in range(turns)]
        out.append(dict(prompt=ids(200, 600), said=said, tools=tools))
    return out


def new_tokens(work: list[dict]) -> int:
    """Tokens that somebody has to compute keys and values of and nobody samples."""
    return sum(len(w["prompt"]) + sum(len(ids) for ids, _ in w["tools"][:-1]) for w in work)


def jaxdeep(work: list[dict]) -> dict:
    import jax

    from jaxdeep import mesh as meshes
    from jaxdeep.model import arch
    from jaxdeep.sample.engine import Engine, EngineConfig
    from jaxdeep.types import Sampling

    cfg = arch.Config(
        V=V, D=D, F=F, L=L, N=N, K=K, H=H, theta=1e6, eps=1e-6, tie=True, limit=LENGTH,
        dtype="float32", remat="dots", lora_scale=1.0,
    )  # fmt: skip
    mesh = meshes.make_mesh(devices=jax.devices()[:1])
    params = jax.jit(lambda: arch.init(jax.random.key(0), cfg))()
    engine = Engine(params, cfg, mesh, EngineConfig(len(work), LENGTH, cache_gb=1.0))
    engine.warm()
    warm = engine.metrics()["compilations"]

    async def talk(at: int, w: dict) -> None:
        tokens = w["prompt"]
        for turn, (n, (result, seconds)) in enumerate(zip(w["said"], w["tools"], strict=True)):
            said = await engine(tokens, seed=at * 99 + turn, max_new=n, sampling=Sampling(1.0))
            await asyncio.sleep(seconds)
            tokens = tokens + said.tokens + result

    async def main() -> None:
        await asyncio.gather(*(talk(at, w) for at, w in enumerate(work)))

    start = time.perf_counter()
    asyncio.run(main())
    seconds = time.perf_counter() - start
    found = engine.metrics()
    engine.close()
    return dict(
        seconds=seconds,
        prefilled=found["prefilled"],
        compiled=found["compilations"] - warm,
        sampled=found["sampled"],
    )


class Numbers:
    """A tokenizer whose texts are numbers."""

    def encode(self, text: str, **_) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids, **_) -> str:
        return " ".join(str(int(i)) for i in ids)

    def bos_id(self) -> int:
        return 0

    def pad_id(self) -> int:
        return 0

    def eos_id(self) -> int:
        return V - 1


def batched(work: list[dict], call) -> dict:
    """All conversations go from turn to turn together: `call(prompts, n, seed)` samples at least n
    tokens for each. Whoever wanted fewer gets what it wanted."""
    histories = [w["prompt"] for w in work]
    prefilled = sampled = 0
    start = time.perf_counter()
    for turn in range(len(work[0]["said"])):
        wanted = [w["said"][turn] for w in work]
        said = call(histories, max(wanted), turn)
        prefilled += sum(map(len, histories))
        sampled += max(wanted) * len(work)
        time.sleep(max(w["tools"][turn][1] for w in work))
        histories = [
            [*history, *tokens[:n], *w["tools"][turn][0]]
            for history, tokens, n, w in zip(histories, said, wanted, work, strict=True)
        ]
    return dict(seconds=time.perf_counter() - start, prefilled=prefilled, sampled=sampled)


def tunix_sampler():
    import flax.nnx as nnx
    from tunix.generate import sampler
    from tunix.models.qwen3 import model as qwen3

    config = qwen3.ModelConfig(
        num_layers=L, vocab_size=V, embed_dim=D, hidden_dim=F, num_heads=N, head_dim=H,
        num_kv_heads=K, rope_theta=1_000_000, norm_eps=1e-6, use_tied_embedding=True,
    )  # fmt: skip
    model = qwen3.Qwen3(config, rngs=nnx.Rngs(0))
    cache = sampler.CacheConfig(cache_size=LENGTH, num_layers=L, num_kv_heads=K, head_dim=H)
    made = sampler.Sampler(model, Numbers(), cache)

    def call(histories: list[list[int]], n: int, seed: int) -> list[list[int]]:
        texts = [" ".join(map(str, history)) for history in histories]
        # an id that is never drawn, so that no turn ends early
        out = made(
            texts, n, temperature=1.0, top_p=1.0, seed=seed, return_logprobs=True, eos_tokens=[-1]
        )
        return [[int(i) for i in tokens] for tokens in out.tokens]

    def compiled() -> int:
        return made._compiled_prefill_fn._cache_size() + made._compiled_decode_fn._cache_size()

    return call, compiled


def tunix_batched(work: list[dict]) -> dict:
    call, compiled = tunix_sampler()
    return batched(work, call) | dict(compiled=compiled())


def tunix(work: list[dict]) -> dict:
    call, compiled = tunix_sampler()
    found = dict(prefilled=0, sampled=0)

    async def main() -> None:
        model = asyncio.Lock()  # one call at a time, while others wait for their tools

        async def talk(at: int, w: dict) -> None:
            tokens = w["prompt"]
            for turn, (n, (result, seconds)) in enumerate(zip(w["said"], w["tools"], strict=True)):
                async with model:
                    said = (await asyncio.to_thread(call, [tokens], n, at * 99 + turn))[0]
                found["prefilled"] += len(tokens)
                found["sampled"] += n
                await asyncio.sleep(seconds)
                tokens = tokens + said[:n] + result

        await asyncio.gather(*(talk(at, w) for at, w in enumerate(work)))

    start = time.perf_counter()
    asyncio.run(main())
    return found | dict(seconds=time.perf_counter() - start, compiled=compiled())


def transformers(work: list[dict]) -> dict:
    import torch
    import transformers as peer

    config = peer.Qwen3Config(
        vocab_size=V, hidden_size=D, intermediate_size=F, num_hidden_layers=L,
        num_attention_heads=N, num_key_value_heads=K, head_dim=H, tie_word_embeddings=True,
        pad_token_id=0, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    model = peer.Qwen3ForCausalLM(config).float().eval()

    def call(histories: list[list[int]], n: int, seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        width = max(map(len, histories))
        tokens = torch.zeros(len(histories), width, dtype=torch.long)
        mask = torch.zeros_like(tokens)
        for i, history in enumerate(histories):
            tokens[i, width - len(history) :] = torch.tensor(history)
            mask[i, width - len(history) :] = 1
        with torch.inference_mode():
            out = model.generate(
                tokens, attention_mask=mask, max_new_tokens=n, min_new_tokens=n, do_sample=True,
                top_k=0, top_p=1.0, temperature=1.0,
            )  # fmt: skip
        return out[:, width:].tolist()

    return batched(work, call) | dict(compiled=0)


def peak() -> int:
    """Bytes that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def child(system: str, conversations: int, turns: int) -> None:
    run = dict(zip(SYSTEMS, (jaxdeep, tunix, tunix_batched, transformers), strict=True))[system]
    modules = {"jaxdeep": "jaxdeep.sample.engine", "transformers": "transformers"}
    importlib.import_module(modules.get(system, "tunix.generate.sampler"))
    if system == "transformers":
        importlib.import_module("torch")
    imports = peak()
    work = workload(conversations, turns)
    found = run(work)
    wanted = sum(sum(w["said"]) for w in work)
    print(
        json.dumps(
            found
            | dict(
                rate=wanted / found["seconds"],
                wasted=found["sampled"] / wanted,
                prefill=found["prefilled"] / new_tokens(work),
                peak=peak() - imports,
            )
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--conversations", type=int, default=64)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--single", type=int, default=4, help="conversations of the slowest")
    parser.add_argument("--system", choices=SYSTEMS)
    flags = parser.parse_args()
    if flags.system:
        return child(flags.system, flags.conversations, flags.turns)
    rows = {}
    for name in SYSTEMS:
        many = flags.single if name == "tunix" else flags.conversations
        command = [sys.executable, __file__, f"--system={name}"]
        command += [f"--conversations={many}", f"--turns={flags.turns}"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{name} failed:\n{done.stderr[-3000:]}")
        rows[name] = json.loads(done.stdout.strip().splitlines()[-1]) | dict(many=many)
    print(f"{flags.turns} turns with a tool after each; the lengths are the same for all")
    print(
        f"{'':15}{'conversations':>14}{'tokens/s':>10}{'jaxdeep x':>11}{'sampled':>9}"
        f"{'prefilled':>11}{'compiled':>10}{'peak MB':>9}"
    )
    for name, row in rows.items():
        print(
            f"{name:15}{row['many']:14}{row['rate']:10.0f}"
            f"{rows['jaxdeep']['rate'] / row['rate']:11.1f}{row['wasted']:9.2f}"
            f"{row['prefill']:11.2f}{row['compiled']:10.0f}{row['peak'] / 1e6:9.0f}"
        )
    print("sampled: for each token wanted; prefilled: for each new token of prompts and tools")


if __name__ == "__main__":
    main()
