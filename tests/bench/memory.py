"""The memory of a training step on one device, as the compiler plans it; nothing is allocated.

    make bench           (python tests/bench/memory.py)

First a row of 32,768 tokens through one small layer, over 1, 2, 4 and 8 virtual CPU devices along
`context`. Then, if libtpu is installed (the extra `tpu`; no TPU is needed), Qwen3-8B with an
adapter of rank 32 and 4 x 131,072 tokens on a v5e of 8 x 8 chips.
"""

from __future__ import annotations

import importlib.util
import math
import os

import ahead
import jax

from jaxdeep import programs
from jaxdeep.model import lora
from jaxdeep.model.config import Config
from jaxdeep.parallel import mesh as meshes
from jaxdeep.train import optim
from jaxdeep.train import state as states


def small() -> None:
    """How temporary memory falls along `context`."""
    print("one layer, width 64, 1 x 32,768 tokens, float32, CPU")
    print(f"{'context':>8}{'temporary MB a device':>24}{'of the one before':>20}")
    before = None
    for C in (1, 2, 4, 8):
        mesh = meshes.make_mesh(meshes.MeshConfig(data=1, context=C), jax.devices()[:C])
        program = programs.compile_traced(programs.gradients(ahead.LONG, mesh, 1, 1 << 15), mesh)
        found = program.memory_analysis().temp_size_in_bytes
        part = f"{found / before:20.2f}" if before else ""
        print(f"{C:8}{found / 1e6:24.1f}{part}")
        before = found


def pod() -> None:
    """Whether a long-context step of an 8B model fits into the 16 GB of a v5e chip."""
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:8x8").devices
    axes, rank, B, T = dict(data=4, context=16), 32, 4, 1 << 17
    mesh = meshes.make_mesh(meshes.MeshConfig(**axes), devices)
    cfg = Config(**ahead.QWEN3_8B, limit=T, remat="full")
    spec = states.Spec(cfg, lora.LoraConfig(rank, rank), optim.OptimConfig(lr=1e-4, steps=100))
    found = programs.compile_traced(programs.gradients(spec, mesh, B, T), mesh).memory_analysis()
    moments = sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(programs.state_shapes(spec, mesh).opt)
    )
    parts = {
        "arguments of the gradient": found.argument_size_in_bytes,
        "its temporary memory": found.temp_size_in_bytes,
        "the optimizer's state": moments,
    }
    print(
        f"\nQwen3-8B, rank {rank}, {B} x {T:,} tokens, bfloat16, v5e 8x8 as {axes}, GB a chip of 16"
    )
    for name, size in (parts | {"together": sum(parts.values())}).items():
        print(f"{name:26}{size / 1e9:6.2f}")


def main() -> None:
    # libtpu would ask a TPU machine for these, and wait for an answer
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-64")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    small()
    if importlib.util.find_spec("libtpu"):
        pod()
    else:
        print("\nlibtpu is not installed, so nothing is compiled for TPUs: pip install -e '.[tpu]'")


if __name__ == "__main__":
    main()
