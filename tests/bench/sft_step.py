"""A LoRA SFT step, side by side: jaxdeep, google-tunix, peft on torch. All train the same toy Qwen3
(4 layers, width 256, fp32, rank 8 on all linears, 8 x 512 tokens), each in a process of its own, in
rounds.

    make bench           (python tests/bench/sft_step.py [--vocab=4096] [--rounds=3] [--steps=5])

Printed for each: trained tokens/s (median of the rounds), peak memory above that of the imports,
seconds to the end of the first step, and ratios to the fastest and to the leanest peer.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

D, F, L, N, K, H = 256, 768, 4, 4, 2, 64
RANK, B, T = 8, 8, 512
SYSTEMS = ("jaxdeep", "tunix", "peft")


def jaxdeep(V: int):
    import jax
    import numpy as np

    from jaxdeep.model import lora
    from jaxdeep.model import weights as model_weights
    from jaxdeep.model.config import Config
    from jaxdeep.parallel import mesh as meshes
    from jaxdeep.train import optim
    from jaxdeep.train import state as states
    from jaxdeep.types import Batch

    def build():
        cfg = Config(
            V=V, D=D, F=F, L=L, N=N, K=K, H=H, theta=1e6, eps=1e-6, tie=True, limit=4096,
            dtype="float32", remat="dots",
        )  # fmt: skip
        mesh = meshes.make_mesh(devices=jax.devices()[:1])
        spec = states.Spec(cfg, lora.LoraConfig(RANK, RANK), optim.OptimConfig(lr=1e-3, steps=100))
        params = jax.jit(lambda: model_weights.init(jax.random.key(0), cfg))()
        step, held = states.Step(spec, mesh), states.init(jax.random.key(1), spec, mesh)
        ones = np.ones((B, T), np.float32)
        learn = ones.copy()
        learn[:, 0] = 0
        places = np.tile(np.arange(T, dtype=np.int32), (B, 1))

        def run(tokens):
            nonlocal held
            batch = Batch(tokens, np.ones((B, T), np.int32), places, learn, learn * 0, learn)
            grads, found = step.gradients(held, states.Frozen(params), [batch])
            held, _ = step.update(held, grads)
            return float(found["loss"])

        return run

    return build


def tunix(V: int):
    import flax.nnx as nnx
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    import qwix
    from tunix.models.qwen3 import model as qwen3
    from tunix.sft import peft_trainer

    def build():
        config = qwen3.ModelConfig(
            num_layers=L, vocab_size=V, embed_dim=D, hidden_dim=F, num_heads=N, head_dim=H,
            num_kv_heads=K, rope_theta=1_000_000, norm_eps=1e-6, use_tied_embedding=True,
        )  # fmt: skip
        model = qwen3.Qwen3(config, rngs=nnx.Rngs(0))
        names = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"
        provider = qwix.LoraProvider(module_path=f".*({names})", rank=RANK, alpha=RANK)
        model = qwix.apply_lora_to_model(model, provider, **model.get_model_input())
        count = sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.LoRAParam)))
        assert count == factors(), (count, factors())
        trainer = peft_trainer.PeftTrainer(
            model, optax.adamw(1e-3), peft_trainer.TrainingConfig(eval_every_n_steps=10**9)
        )
        step, _ = trainer.jit_train_and_eval_step()
        places = jnp.tile(jnp.arange(T), (B, 1))
        causal = jnp.tile(jnp.tril(jnp.ones((T, T), bool)), (B, 1, 1))
        mask = jnp.ones((B, T))

        def run(tokens):
            batch = dict(
                input_tokens=jnp.asarray(tokens), input_mask=mask, positions=places,
                attention_mask=causal,
            )  # fmt: skip
            loss, *_ = step(batch)
            return float(np.asarray(loss))

        return run

    return build


def peft(V: int):
    import peft as peer
    import torch
    import transformers

    def build():
        config = transformers.Qwen3Config(
            vocab_size=V, hidden_size=D, intermediate_size=F, num_hidden_layers=L,
            num_attention_heads=N, num_key_value_heads=K, head_dim=H, tie_word_embeddings=True,
        )  # fmt: skip
        model = transformers.Qwen3ForCausalLM(config).float()
        model = peer.get_peft_model(
            model, peer.LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear")
        )
        trained = [p for p in model.parameters() if p.requires_grad]
        assert sum(p.numel() for p in trained) == factors()
        optimizer = torch.optim.AdamW(trained, lr=1e-3)

        def run(tokens):
            tokens = torch.as_tensor(tokens, dtype=torch.long)
            loss = model(input_ids=tokens, labels=tokens).loss
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            return float(loss.detach())

        return run

    return build


def factors() -> int:
    """Numbers in the adapter: all systems train the same."""
    shapes = [(D, N * H), (D, K * H), (D, K * H), (N * H, D), (D, F), (D, F), (F, D)]
    return L * RANK * sum(i + o for i, o in shapes)


def peak() -> int:
    """Peak memory of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def child(system: str, vocab: int, steps: int) -> None:
    import numpy as np

    build = {"jaxdeep": jaxdeep, "tunix": tunix, "peft": peft}[system](vocab)
    imports = peak()
    batches = np.random.default_rng(0).integers(0, vocab, (steps + 2, B, T), dtype=np.int32)
    start = time.perf_counter()
    run = build()
    losses = [run(batches[0])]
    first = time.perf_counter() - start
    losses.append(run(batches[1]))
    start = time.perf_counter()
    losses += [run(batch) for batch in batches[2:]]
    seconds = time.perf_counter() - start
    assert np.isfinite(losses).all()
    rate = steps * B * T / seconds
    print(json.dumps(dict(rate=rate, peak=peak() - imports, first=first, loss=losses[0])))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--system", choices=SYSTEMS)
    flags = parser.parse_args()
    if flags.system:
        return child(flags.system, flags.vocab, flags.steps)
    found: dict[str, list[dict]] = {name: [] for name in SYSTEMS}
    for _ in range(flags.rounds):
        for name in SYSTEMS:
            command = [sys.executable, __file__, f"--system={name}"]
            command += [f"--vocab={flags.vocab}", f"--steps={flags.steps}"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{name} failed:\n{done.stderr[-3000:]}")
            found[name].append(json.loads(done.stdout.strip().splitlines()[-1]))
    middle = {
        name: {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        for name, rows in found.items()
    }
    rate = max(middle[name]["rate"] for name in SYSTEMS[1:])
    lean = min(middle[name]["peak"] for name in SYSTEMS[1:])
    print(f"LoRA SFT step, V = {flags.vocab}, {B} x {T} tokens, median of {flags.rounds} rounds")
    print(
        f"{'':10}{'tokens/s':>10}{'x best peer':>13}{'peak MB':>10}{'x best peer':>13}"
        f"{'first s':>9}"
    )
    for name, row in middle.items():
        print(
            f"{name:10}{row['rate']:10.0f}{row['rate'] / rate:13.2f}"
            f"{row['peak'] / 1e6:10.0f}{row['peak'] / lean:13.2f}{row['first']:9.1f}"
        )


if __name__ == "__main__":
    main()
