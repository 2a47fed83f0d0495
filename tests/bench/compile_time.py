"""Seconds until the first LoRA SFT step of a model of Qwen3-8B's shape is compiled, side by side:
jaxdeep, which scans its layers, and google-tunix, which unrolls them. Weights are bfloat16, rank 32
on all linears, AdamW, 4 x 1,024 tokens (jaxdeep recomputes all but matmuls, google-tunix nothing),
one CPU device. Programs are traced from shapes, nothing is allocated.

    make bench           (python tests/bench/compile_time.py [--layers=36] [--rounds=1])

Printed for each, in a process of its own: seconds to lower, to compile, and both; and the processor
time of both, which other programs on the machine disturb less. They are medians of the rounds, with
ratios to jaxdeep's. Then, for the programs of the quickstart's GRPO: seconds to compile them one
after another, several at a time as a run does, and again from the cache on disk that
JAX_COMPILATION_CACHE_DIR names.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping

RANK, B, T = 32, 4, 1024
SYSTEMS = ("jaxdeep", "tunix")


def jaxdeep(L: int):
    """Functions that lower the two programs of a step."""
    import ahead

    from jaxdeep import programs
    from jaxdeep.model import lora
    from jaxdeep.model.config import Config
    from jaxdeep.parallel import mesh as meshes
    from jaxdeep.train import optim
    from jaxdeep.train import state as states

    cfg = Config(**ahead.QWEN3_8B | dict(L=L), limit=T, remat="dots")
    spec = states.Spec(cfg, lora.LoraConfig(RANK, RANK), optim.OptimConfig(lr=1e-4, steps=100))
    mesh = meshes.make_mesh()
    traced = (programs.gradients, spec, mesh, B, T), (programs.update, spec, mesh)
    return [lambda make=make, args=args: make(*args).lower() for make, *args in traced]


def tunix(L: int):
    """A function that lowers its one program."""
    import ahead
    import flax.nnx as nnx
    import jax
    import jax.numpy as jnp
    import optax
    import qwix
    from tunix.models.qwen3 import model as qwen3
    from tunix.sft import peft_trainer

    sizes = ahead.QWEN3_8B
    config = qwen3.ModelConfig(
        num_layers=L, vocab_size=sizes["V"], embed_dim=sizes["D"], hidden_dim=sizes["F"],
        num_heads=sizes["N"], head_dim=sizes["H"], num_kv_heads=sizes["K"], rope_theta=1_000_000,
        norm_eps=sizes["eps"], dtype=jnp.bfloat16, param_dtype=jnp.bfloat16,
    )  # fmt: skip

    @nnx.eval_shape
    def model():
        base = qwen3.Qwen3(config, rngs=nnx.Rngs(0))
        names = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"
        provider = qwix.LoraProvider(module_path=f".*({names})", rank=RANK, alpha=RANK)
        return qwix.apply_lora_to_model(base, provider, **base.get_model_input())

    trainer = peft_trainer.PeftTrainer(
        model, optax.adamw(1e-4), peft_trainer.TrainingConfig(eval_every_n_steps=10**9)
    )
    step, _ = trainer.jit_train_and_eval_step()
    shape = jax.ShapeDtypeStruct
    batch = dict(
        input_tokens=shape((B, T), jnp.int32), input_mask=shape((B, T), jnp.float32),
        positions=shape((B, T), jnp.int32), attention_mask=shape((B, T, T), jnp.bool),
    )  # fmt: skip
    return [lambda: step.func.lower(*step.args, batch)]


def child(system: str, layers: int) -> None:
    lowerings = {"jaxdeep": jaxdeep, "tunix": tunix}[system](layers)
    start, busy = time.perf_counter(), time.process_time()
    lowered = [lower() for lower in lowerings]
    middle = time.perf_counter()
    for program in lowered:
        program.compile()
    end = time.perf_counter()
    found = dict(lower=middle - start, compile=end - middle, both=end - start)
    print(json.dumps(found | dict(cpu=time.process_time() - busy)))


def compile_run(way: str) -> None:
    """Compile the programs of a run of the quickstart's GRPO."""
    from jaxdeep import config as configs
    from jaxdeep import programs
    from jaxdeep.parallel import mesh as meshes
    from jaxdeep.sample import sizes
    from jaxdeep.setup.runs import GrpoRun
    from jaxdeep.setup.sections import load_run

    run = load_run(GrpoRun, configs.load("configs/search/quickstart.py", ()).grpo)
    mesh, work = meshes.make_mesh(run.mesh), run.workload(run.spec())
    start, busy = time.perf_counter(), time.process_time()
    if way == "singly":
        fractions = sizes.CALL_FRACTIONS
        for _, traced, place in programs.trace_all(work, mesh, mesh, fractions=fractions):
            programs.compile_traced(traced, place)
    else:
        programs.compile_all(work, mesh, mesh)
    print(json.dumps(dict(both=time.perf_counter() - start, cpu=time.process_time() - busy)))


def compare_ways(rounds: int) -> None:
    """Print the seconds of three ways to compile the programs of a run."""
    with tempfile.TemporaryDirectory() as folder:
        cached = dict(
            JAX_COMPILATION_CACHE_DIR=folder, JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0"
        )
        run_child("--run=together", env=cached)
        ways = {"singly": {}, "together": {}, "from the disk": cached}
        found = {way: [] for way in ways}
        for _ in range(rounds):
            for way, env in ways.items():
                flag = "singly" if way == "singly" else "together"
                found[way].append(run_child("--run=" + flag, env=env))
    print(f"\nthe programs of the quickstart's GRPO, median of {rounds} rounds")
    for way, rows in found.items():
        middle = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        print(f"{way:16}{middle['both']:8.1f} s, processors {middle['cpu']:8.1f} s")


def run_child(*flags: str, env: Mapping[str, str] | None = None) -> dict:
    """The JSON that this file prints when it runs in a process of its own."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("JAX_COMPILATION")}
    done = subprocess.run(
        [sys.executable, __file__, *flags],
        capture_output=True,
        text=True,
        env=clean | dict(env or {}),
    )
    if done.returncode:
        sys.exit(f"{' '.join(flags)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--system", choices=SYSTEMS)
    parser.add_argument("--run", choices=("singly", "together"))
    flags = parser.parse_args()
    if flags.system:
        return child(flags.system, flags.layers)
    if flags.run:
        return compile_run(flags.run)
    found: dict[str, list[dict]] = {name: [] for name in SYSTEMS}
    for _ in range(flags.rounds):
        for name in SYSTEMS:
            found[name].append(run_child(f"--system={name}", f"--layers={flags.layers}"))
    print(f"the first LoRA step of {flags.layers} layers, median of {flags.rounds} rounds")
    middle = {
        name: {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        for name, rows in found.items()
    }
    seconds = f"{'lower s':>10}{'compile s':>11}{'both s':>9}{'x jaxdeep':>11}"
    print(f"{'':10}{seconds}{'cpu s':>9}{'x jaxdeep':>11}")
    ours = middle["jaxdeep"]
    for name, row in middle.items():
        print(
            f"{name:10}{row['lower']:10.1f}{row['compile']:11.1f}{row['both']:9.1f}"
            f"{row['both'] / ours['both']:11.1f}{row['cpu']:9.1f}{row['cpu'] / ours['cpu']:11.1f}"
        )
    compare_ways(flags.rounds)


if __name__ == "__main__":
    main()
