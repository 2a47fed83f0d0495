"""A Qwen3 of a few thousand parameters, shared by the tests of the device half."""

import functools

import jax
import numpy as np

from jaxdeep.model import decoder, head, lora, paged
from jaxdeep.model import weights as model_weights
from jaxdeep.model.config import Config
from jaxdeep.parallel import mesh as meshes

HOW = dict(dtype="float32", remat="dots", chunk=16)
CFG = Config(
    **dict(V=96, D=32, F=48, L=2, N=8, K=2, H=16, theta=1e4, eps=1e-6, tie=True, limit=512), **HOW
)
SPEC = lora.LoraConfig(rank=4, alpha=8.0)


def one_device() -> jax.sharding.Mesh:
    return meshes.make_mesh(devices=jax.devices()[:1])


@functools.cache
def params() -> dict:
    return jax.jit(lambda: model_weights.init(jax.random.key(0), CFG))()


@functools.cache
def adapter() -> dict:
    """The factors of an adapter, far from zero, so that forgetting it shows."""

    @jax.jit
    def build():
        fresh = lora.init(jax.random.key(1), CFG, SPEC)
        keys = iter(jax.random.split(jax.random.key(2), 100))
        return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), fresh)

    return build()


SCALE = SPEC.scale  # of the adapter: alpha / rank


def scaled_adapter() -> lora.Adapter:
    """The same with its scale, as it is handed to a model or an engine."""
    return lora.Adapter(adapter(), SCALE)


def pages(cfg: Config, B: int, length: int, *, S: int = 4, seed: int = 0) -> paged.Pages:
    """Room for B rows of `length` tokens in pages of S, whose order is random. They are full of
    numbers that must not be read."""
    X = -(-length // S)
    shape = (cfg.L, B * X, S, 2 * cfg.K, cfg.H)
    table = np.random.default_rng(seed).permutation(B * X).reshape(B, X).astype(np.int32)
    return paged.Pages(np.full(shape, 1e3, np.float32), table, np.zeros(B, np.int32))


@functools.cache
def _score():
    def score(params, adapter, tokens_BT):
        hidden, _ = decoder.forward(params, adapter, tokens_BT, cfg=CFG)
        return head.token_logps(params, hidden, tokens_BT, cfg=CFG)[0]

    return jax.jit(score)


def logps(tokens: list[int], adapter: lora.Adapter | tuple | None) -> np.ndarray:
    """The log-probability of each token by one plain forward pass, [T]."""
    padded = np.zeros((1, -(-len(tokens) // 64) * 64), np.int32)
    padded[0, : len(tokens)] = tokens
    return np.asarray(_score()(params(), adapter, padded))[0, : len(tokens)]
