"""The toy Qwen3 that samplers are compared on (4 layers, width 256, fp32), as each system builds
it, and the comparison: each system in a process of its own that prints one line of JSON.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

V, D, F, L, N, K, H = 4096, 256, 768, 4, 4, 2, 64
FULL = range(1, V - 1)  # ids that conversations are made of


def jaxdeep(length: int) -> tuple[dict, Any, Any]:
    """Weights, configuration and mesh."""
    import jax

    from jaxdeep.model import weights as model_weights
    from jaxdeep.model.config import Config
    from jaxdeep.parallel import mesh as meshes

    cfg = Config(
        V=V, D=D, F=F, L=L, N=N, K=K, H=H, theta=1e6, eps=1e-6, tie=True, limit=length,
        dtype="float32",
    )  # fmt: skip
    params = jax.jit(lambda: model_weights.init(jax.random.key(0), cfg))()
    return params, cfg, meshes.make_mesh(devices=jax.devices()[:1])


class Numbers:
    """A tokenizer of `size` ids whose texts are their numbers."""

    def __init__(self, size: int = V) -> None:
        self.size = size

    def encode(self, text: str, **_) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids, **_) -> str:
        return " ".join(str(int(i)) for i in ids)

    def bos_id(self) -> int:
        return 0

    def pad_id(self) -> int:
        return 0

    def eos_id(self) -> int:
        return self.size - 1


def tunix(length: int) -> tuple[Callable, Callable[[], int]]:
    """`call(prompts, n, seed)`, which samples n tokens for each prompt, and a function that counts
    the programs it has compiled."""
    import flax.nnx as nnx
    from tunix.generate import sampler
    from tunix.models.qwen3 import model as qwen3

    config = qwen3.ModelConfig(
        num_layers=L, vocab_size=V, embed_dim=D, hidden_dim=F, num_heads=N, head_dim=H,
        num_kv_heads=K, rope_theta=1_000_000, norm_eps=1e-6, use_tied_embedding=True,
    )  # fmt: skip
    model = qwen3.Qwen3(config, rngs=nnx.Rngs(0))
    cache = sampler.CacheConfig(cache_size=length, num_layers=L, num_kv_heads=K, head_dim=H)
    made = sampler.Sampler(model, Numbers(), cache)

    def call(prompts: list[list[int]], n: int, seed: int) -> list[list[int]]:
        texts = [" ".join(map(str, prompt)) for prompt in prompts]
        # an id that is never sampled, so that no turn ends early
        out = made(
            texts, n, temperature=1.0, top_p=1.0, seed=seed, return_logprobs=True, eos_tokens=[-1]
        )
        return [[int(i) for i in tokens] for tokens in out.tokens]

    def compiled() -> int:
        return made._compiled_prefill_fn._cache_size() + made._compiled_decode_fn._cache_size()

    return call, compiled


def skyrl() -> Callable:
    """`call` as in `tunix`; the model is called directly, without its server, which always has an
    adapter."""
    import typing

    import typing_extensions

    typing.TypedDict = typing_extensions.TypedDict  # Python 3.11's own lacks what it uses
    import jax
    import jax.numpy as jnp
    import numpy as np
    import transformers
    from flax import nnx
    from skyrl.tinker import types
    from skyrl.tx.models.configs import Qwen3Config
    from skyrl.tx.models.qwen3 import Qwen3ForCausalLM

    config = Qwen3Config(
        transformers_config(transformers),
        max_lora_adapters=1, max_lora_rank=1, shard_attention_heads=True,
    )  # fmt: skip
    mesh = jax.make_mesh(
        (1, 1, 1), ("fsdp", "ep", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 3
    )
    with jax.set_mesh(mesh):
        model = Qwen3ForCausalLM(config, dtype=jnp.float32, rngs=nnx.Rngs(0))

    def call(prompts: list[list[int]], n: int, seed: int) -> list[list[int]]:
        tokens = np.array(prompts, np.int32)
        params = [
            types.SamplingParams(temperature=1.0, max_tokens=n, seed=seed + i)
            for i in range(len(prompts))
        ]
        with jax.set_mesh(mesh):
            return model.generate(
                tokens, np.ones_like(tokens), sampling_params=params
            ).generated_ids

    return call


def transformers_config(peer: Any) -> Any:
    """The toy as a configuration of transformers."""
    return peer.Qwen3Config(
        vocab_size=V, hidden_size=D, intermediate_size=F, num_hidden_layers=L,
        num_attention_heads=N, num_key_value_heads=K, head_dim=H, tie_word_embeddings=True,
        pad_token_id=0, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip


def transformers() -> Callable:
    """`call` as in `tunix`; prompts of unequal length are padded on the left."""
    import torch
    import transformers as peer

    model = peer.Qwen3ForCausalLM(transformers_config(peer)).float().eval()

    def call(prompts: list[list[int]], n: int, seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        width = max(map(len, prompts))
        tokens = torch.zeros(len(prompts), width, dtype=torch.long)
        mask = torch.zeros_like(tokens)
        for i, prompt in enumerate(prompts):
            tokens[i, width - len(prompt) :] = torch.tensor(prompt)
            mask[i, width - len(prompt) :] = 1
        with torch.inference_mode():
            out = model.generate(
                tokens, attention_mask=mask, max_new_tokens=n, min_new_tokens=n, do_sample=True,
                top_k=0, top_p=1.0, temperature=1.0,
            )  # fmt: skip
        return out[:, width:].tolist()

    return call


def peak() -> int:
    """Peak memory of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def apart(file: str, *flags: str, python: str = sys.executable) -> dict:
    """Run a file as a process of its own; returns the JSON in the last line it prints."""
    done = subprocess.run([python, file, *flags], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(flags)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def table(columns: Sequence[str], rows: dict[str, Sequence[str]]) -> None:
    """Print rows under their columns, each as wide as it needs."""
    lines = [("", *columns), *((name, *cells) for name, cells in rows.items())]
    widths = [max(map(len, column)) + 2 for column in zip(*lines, strict=True)]
    for name, *cells in lines:
        shown = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        print(name.ljust(widths[0]) + "".join(shown))
