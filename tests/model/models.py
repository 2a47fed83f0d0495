"""Small models of three kinds, their weights, adapters and logits, computed once for several
tests."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdeep.model import decoder, families, head, lora, rope
from jaxdeep.model import weights as model_weights
from jaxdeep.model.config import Config
from jaxdeep.parallel import mesh as meshes

DENSE = Config(
    **dict(V=96, D=32, F=48, L=2, N=4, K=2, H=16, theta=1e4, eps=1e-6, tie=True),
    limit=512,
    dtype="float32",
    remat="dots",
)
MIXTURE = dataclasses.replace(DENSE, F=24, tie=False, E=4, top_k=2)
# norms after attention and mlp, over the whole width of queries and keys; a window in one layer
OLMO = dataclasses.replace(
    DENSE,
    family="olmo3",
    tie=False,
    biases=families.ATTENTION,
    window=6,
    windowed=(True, False),
    scaling=rope.Yarn(4.0, 128),
)
CONFIGS = {"dense": DENSE, "mixture": MIXTURE, "olmo": OLMO}
LORA = lora.LoraConfig(rank=3, alpha=6.0)
TOKENS = np.random.default_rng(0).integers(0, 96, (2, 19))


def one_device():
    return meshes.make_mesh(devices=jax.devices()[:1])


def four_devices():
    return meshes.make_mesh(meshes.MeshConfig(data=2, model=2), jax.devices()[:4])


def _random(tree, seed, scale):
    """Arrays for declared weights, by numpy: nothing to compile."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(
            (leaf.fan_in is None) + scale * rng.standard_normal(leaf.shape), jnp.float32
        ),
        tree,
        is_leaf=model_weights.is_leaf,
    )


@functools.cache
def params(name):
    """Weights of which each matters; norms are away from one, so that a swapped norm would show."""
    return _random(model_weights.leaves(CONFIGS[name]), 1, 0.4)


@functools.cache
def adapter(name):
    """An adapter far from zero."""
    return lora.Adapter(_random(lora.leaves(CONFIGS[name], LORA), 2, 0.15), LORA.scale)


@functools.cache
def _logits(cfg):
    def run(params, adapter):
        hidden, _ = decoder.forward(params, adapter, TOKENS, cfg=cfg)
        return head.logits(params, hidden, cfg=cfg)

    return jax.jit(run)


def logits(name, adapter):
    return np.asarray(_logits(CONFIGS[name])(params(name), adapter))


def transformers_model(path, **options):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **options)


def their_logits(model):
    import torch

    with torch.no_grad():
        return model.eval()(torch.tensor(TOKENS)).logits.numpy()
