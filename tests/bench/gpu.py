"""On one GPU, each in a process of its own: cuDNN's attention against the plain computation; a LoRA
SFT step of a published Qwen3's shape beside peft on torch; decoding beside transformers. Weights
are random and bfloat16.

    python tests/bench/gpu.py [--model=Qwen/Qwen3-8B] [--parts=attention,sft,decode] [--rows=1,4]

`sft` has rank 32 on every linear, recomputes everything in the backward pass, and takes rows of
4,096 tokens. `decode` has prompts of 512, 256 new tokens, temperature 1, and batches of 32 and 128.
Printed: tokens a second (best of three after those that compile), peak GB, and the share of the
card's published peak FLOP/s.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import toy

RANK, LENGTH = 32, 4096
PROMPT, NEW, BATCHES = 512, 256, (32, 128)


def best(call: Callable[[int], Any], warm: int = 2, times: int = 3) -> float:
    """Seconds of the fastest of a few calls."""
    seconds = []
    for at in range(warm + times):
        start = time.perf_counter()
        call(at)
        seconds.append(time.perf_counter() - start)
    return min(seconds[warm:])


def held_jax() -> float:
    import jax

    return jax.devices()[0].memory_stats()["peak_bytes_in_use"] / 1e9


def attention(flags: argparse.Namespace) -> dict:
    """For outputs and gradients the largest difference from float32 at full precision, as a share
    of the largest value; and milliseconds of both passes. Two packed segments, padding, grouped
    heads."""
    import jax
    import jax.numpy as jnp

    from jaxdeep.model import attention as lib

    found = {}
    for B, T, N, K, H in ((2, 512, 16, 8, 64), (1, LENGTH, 32, 8, 128)):
        keys = jax.random.split(jax.random.key(0), 4)
        q, k, v, along = (
            jax.random.normal(key, (B, T, heads, H))
            for key, heads in zip(keys, (N, K, K, N), strict=True)
        )
        segments = jnp.where(jnp.arange(T) < T // 3, 1, jnp.where(jnp.arange(T) < T - 37, 2, 0))
        segments = jnp.broadcast_to(segments, (B, T))
        along = along * (segments > 0)[..., None, None]  # outputs at padding are undefined

        def both(q, k, v, kind, segments=segments, along=along):
            def total(q, k, v):
                out = lib.attend(q, k, v, segments, kind=kind)
                return (out.astype(jnp.float32) * along).sum(), out * (segments > 0)[
                    ..., None, None
                ]

            (_, out), grads = jax.value_and_grad(total, (0, 1, 2), has_aux=True)(q, k, v)
            return out, *grads

        low = [x.astype(jnp.bfloat16) for x in (q, k, v)]
        with jax.default_matmul_precision("highest"):
            exact = jax.jit(both, static_argnums=3)(*(x.astype(jnp.float32) for x in low), "plain")
        for kind in ("plain", "cudnn"):
            run = jax.jit(both, static_argnums=3).lower(*low, kind).compile()
            got = run(*low)
            off = [
                float(jnp.abs(a.astype(jnp.float32) - b).max() / jnp.abs(b).max())
                for a, b in zip(got, exact, strict=True)
            ]
            seconds = best(lambda _, run=run, low=low: jax.block_until_ready(run(*low)))
            found[f"{T} {kind}"] = dict(out=off[0], grads=max(off[1:]), ms=1e3 * seconds)
    return found


def sft_jaxdeep(flags: argparse.Namespace) -> dict:
    import jax

    from jaxdeep.model import lora
    from jaxdeep.model import weights as model_weights
    from jaxdeep.model.config import Config
    from jaxdeep.parallel import mesh as meshes
    from jaxdeep.plan import published
    from jaxdeep.train import optim
    from jaxdeep.train import state as states
    from jaxdeep.types import Batch

    hf = published.CONFIGS[flags.model]
    cfg = Config.from_hf(hf, dtype="bfloat16", remat="full")
    mesh = meshes.make_mesh(devices=jax.devices()[:1])
    spec = states.Spec(cfg, lora.LoraConfig(RANK, RANK), optim.OptimConfig(lr=1e-3, steps=100))
    params = jax.jit(lambda: model_weights.init(jax.random.key(0), cfg))()
    step, held, found = states.Step(spec, mesh), states.init(jax.random.key(1), spec, mesh), {}
    for B in flags.rows:

        def run(at: int, B: int = B) -> None:
            nonlocal held
            tokens = np.random.default_rng(at).integers(0, cfg.V, (B, LENGTH), np.int32)
            ones = np.ones((B, LENGTH), np.float32)
            learn = ones * (np.arange(LENGTH) > 0)
            places = np.tile(np.arange(LENGTH, dtype=np.int32), (B, 1))
            batch = Batch(tokens, np.ones((B, LENGTH), np.int32), places, learn, learn * 0, learn)
            grads, told = step.gradients(held, states.Frozen(params), [batch])
            held, _ = step.update(held, grads)
            assert np.isfinite(float(told["loss"]))

        found[f"rows {B}"] = dict(rate=B * LENGTH / best(run), gb=held_jax())
    return found


def sft_peft(flags: argparse.Namespace) -> dict:
    import peft
    import torch
    import transformers

    model = torch_model(flags)
    model = peft.get_peft_model(
        model, peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear")
    )
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    found = {"transformers": transformers.__version__}
    for B in flags.rows:

        def run(at: int, B: int = B) -> None:
            tokens = torch.randint(0, model.config.vocab_size, (B, LENGTH), device="cuda")
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            assert np.isfinite(float(loss))

        try:
            found[f"rows {B}"] = dict(rate=B * LENGTH / best(run), gb=held_torch())
        except torch.cuda.OutOfMemoryError:
            found[f"rows {B}"] = dict(rate=0.0, gb=held_torch())
            torch.cuda.empty_cache()
    return found


def torch_model(flags: argparse.Namespace) -> Any:
    import torch
    import transformers

    from jaxdeep.plan import published

    config = transformers.Qwen3Config(
        **published.CONFIGS[flags.model], pad_token_id=0, eos_token_id=None, bos_token_id=None
    )
    with torch.device("cuda"):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def held_torch() -> float:
    import torch

    return torch.cuda.max_memory_allocated() / 1e9


def decode_jaxdeep(flags: argparse.Namespace) -> dict:
    import jax

    from jaxdeep.model import weights as model_weights
    from jaxdeep.model.config import Config
    from jaxdeep.parallel import mesh as meshes
    from jaxdeep.plan import published
    from jaxdeep.sample.engine import Engine, EngineConfig
    from jaxdeep.types import Sampling

    cfg = Config.from_hf(published.CONFIGS[flags.model], dtype="bfloat16")
    mesh, found = meshes.make_mesh(devices=jax.devices()[:1]), {}
    params = jax.jit(lambda: model_weights.init(jax.random.key(0), cfg))()
    for B in BATCHES:
        size = EngineConfig(slots=B, length=PROMPT + NEW, chunk=4096, tile=64, steps=32)
        engine = Engine(params, cfg, mesh, size)

        async def every(at: int, engine: Any = engine, B: int = B) -> list:
            prompts = np.random.default_rng([B, at]).integers(1, cfg.V - 1, (B, PROMPT))
            calls = (
                engine(prompt, seed=i, max_new=NEW, sampling=Sampling(1.0))
                for i, prompt in enumerate(prompts.tolist())
            )
            said = await asyncio.gather(*calls)
            assert [len(one.tokens) for one in said] == [NEW] * B
            return list(zip(prompts, said, strict=True))

        seconds = best(lambda at, every=every: asyncio.run(every(at)), 2, 2)
        off = logp_differences(params, cfg, asyncio.run(every(9))[:4])
        found[f"batch {B}"] = dict(rate=B * NEW / seconds, gb=held_jax(), apart=off)
        engine.close()
    return found


def logp_differences(params: dict, cfg: Any, said: list) -> list[float]:
    """Mean and maximum of the difference between the trainer's and the sampler's log-probabilities
    of the sampled tokens, in nats."""
    import jax

    from jaxdeep.train import losses
    from jaxdeep.types import Batch

    tokens = np.array([[*prompt, *one.tokens] for prompt, one in said], np.int32)
    ones = np.ones(tokens.shape, np.float32)
    places = np.tile(np.arange(tokens.shape[1], dtype=np.int32), (len(tokens), 1))
    batch = Batch(tokens, np.ones_like(tokens), places, ones, ones, ones)
    logps, _ = jax.jit(lambda p, b: losses.score(p, None, b, cfg=cfg))(params, batch)
    sampled = np.array([one.logps for _, one in said])
    off = np.abs(np.asarray(logps)[:, PROMPT:] - sampled)
    return [float(off.mean()), float(off.max())]


def decode_transformers(flags: argparse.Namespace) -> dict:
    import torch

    model, found = torch_model(flags).eval(), {}
    for B in BATCHES:

        def run(at: int, B: int = B) -> None:
            tokens = torch.randint(1, model.config.vocab_size - 1, (B, PROMPT), device="cuda")
            with torch.inference_mode():
                model.generate(
                    tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=NEW,
                    min_new_tokens=NEW, do_sample=True, top_k=0, top_p=1.0, temperature=1.0,
                )  # fmt: skip
            torch.cuda.synchronize()

        found[f"batch {B}"] = dict(rate=B * NEW / best(run, 1, 1), gb=held_torch())
    return found


PARTS = {
    "attention": (attention,),
    "sft": (sft_jaxdeep, sft_peft),
    "decode": (decode_jaxdeep, decode_transformers),
}
CALLS = {call.__name__: call for calls in PARTS.values() for call in calls}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="Qwen/Qwen3-8B")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument(
        "--rows", default="1,4", type=lambda text: [int(n) for n in text.split(",")]
    )
    parser.add_argument("--call", choices=CALLS)
    flags = parser.parse_args()
    if flags.call:
        print(json.dumps(CALLS[flags.call](flags)))
        return
    rows = ",".join(map(str, flags.rows))
    for part in flags.parts.split(","):
        for call in PARTS[part]:
            name = call.__name__
            start = time.perf_counter()
            found = toy.apart(
                __file__, f"--call={name}", f"--model={flags.model}", f"--rows={rows}"
            )
            print(f"{name} ({time.perf_counter() - start:.0f} s)")
            for key, row in found.items():
                print(f"    {key}: {json.dumps(row)}", flush=True)


if __name__ == "__main__":
    main()
