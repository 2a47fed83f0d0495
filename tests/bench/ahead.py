"""Models whose programs are traced from shapes (`jaxdeep.programs`), for benchmarks and tests."""

from __future__ import annotations

from jaxdeep.model import lora
from jaxdeep.model.config import Config
from jaxdeep.train import optim
from jaxdeep.train import state as states

QWEN3_8B = dict(V=151_936, D=4096, F=12_288, L=36, N=32, K=8, H=128, theta=1e6, eps=1e-6, tie=False)
LONG = states.Spec(  # one layer, for many tokens
    Config(
        **dict(V=32, D=64, F=128, L=1, N=4, K=1, H=16, theta=1e4, eps=1e-6, tie=True),
        **dict(limit=1 << 17, dtype="float32", remat="full", chunk=1024),
    ),
    lora.LoraConfig(rank=4, alpha=8.0),
    optim.OptimConfig(lr=1e-3, steps=100),
)
