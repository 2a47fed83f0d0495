"""A mixture of experts in the place of the mlp: a softmax router, the best `top_k` experts of each
token, and one ragged matmul per linear over tokens sorted by expert. No token is dropped. On TPUs XLA
compiles the ragged matmul to a kernel that computes each row with its own expert alone.

Experts are spread over the mesh axis `model`: each device computes its own experts for the tokens of
its rows, and the results are summed over the axis, as for a tensor-parallel mlp.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from jaxdeep.mesh import ROWS
from jaxdeep.model.arch import EXPERTS, Config
from jaxdeep.model.lora import Layer


def route(x_BTD: jax.Array, router_DE: jax.Array, cfg: Config) -> tuple[jax.Array, jax.Array]:
    """Weight and number of the experts of each token, both [B, T, top_k]; softmax in float32."""
    scores_BTE = jnp.einsum("btd,de->bte", x_BTD, router_DE, preferred_element_type=jnp.float32)
    weight_BTk, expert_BTk = jax.lax.top_k(jax.nn.softmax(scores_BTE, axis=-1), cfg.top_k)
    if cfg.norm_top_k:
        weight_BTk /= weight_BTk.sum(-1, keepdims=True)
    return weight_BTk.astype(x_BTD.dtype), expert_BTk


def _ragged(x_ni: jax.Array, weight: Any, size_E: jax.Array, expert_n: jax.Array) -> jax.Array:
    """Rows sorted by expert through the linear of their expert."""
    if not isinstance(weight, dict):
        return jax.lax.ragged_dot(x_ni, weight.astype(x_ni.dtype), size_E)
    y_no = jax.lax.ragged_dot(x_ni, weight["q"].astype(x_ni.dtype), size_E)
    return y_no * jnp.take(weight["scale"], expert_n, axis=0, mode="clip").astype(x_ni.dtype)


def _experts(
    x_BTD: jax.Array,
    weight_BTk: jax.Array,
    expert_BTk: jax.Array,
    weights: dict[str, Any],
    factors: tuple[dict, ...],
    mixes: tuple[jax.Array | None, ...],
    *,
    first: Any,
    scale: float,
) -> jax.Array:
    """What the experts held here (from number `first` on) add for tokens held here; [B, T, D]."""
    B, T, D = x_BTD.shape
    k = expert_BTk.shape[-1]
    held = jax.tree.leaves(weights)[0].shape[0]
    expert_n = expert_BTk.reshape(-1) - first
    expert_n = jnp.where((expert_n >= 0) & (expert_n < held), expert_n, held)  # elsewhere: last
    order_n = jnp.argsort(expert_n, stable=True)
    expert_n = expert_n[order_n]
    size_E = jnp.bincount(expert_n, length=held + 1)[:held].astype(jnp.int32)
    token_n = order_n // k

    def through(x_ni: jax.Array, name: str) -> jax.Array:
        y_no = _ragged(x_ni, weights[name], size_E, expert_n)
        for adapter, mix_BA in zip(factors, mixes, strict=True):
            if name not in adapter:
                continue
            a, b = adapter[name]["a"], adapter[name]["b"]
            if mix_BA is None:
                low = _ragged(x_ni, a, size_E, expert_n)
                y_no += _ragged(low, b, size_E, expert_n) * jnp.asarray(scale, x_ni.dtype)
                continue
            mix_nA = jnp.repeat(mix_BA, T, axis=0)[token_n].astype(x_ni.dtype)
            for i in range(a.shape[0]):
                low = _ragged(x_ni, a[i], size_E, expert_n) * mix_nA[:, i : i + 1]
                y_no += _ragged(low, b[i], size_E, expert_n)
        return checkpoint_name(y_no, "linear")

    x_nD = x_BTD.reshape(-1, D)[token_n]
    h_nF = jax.nn.silu(through(x_nD, "w_gate")) * through(x_nD, "w_up")
    y_nD = through(h_nF, "w_down")
    # rows of experts held elsewhere are in no group: what a ragged matmul leaves there is not defined
    y_nD = jnp.where((expert_n < held)[:, None], y_nD, 0)
    y_nD = y_nD[jnp.argsort(order_n)] * weight_BTk.reshape(-1, 1)
    return y_nD.reshape(B, T, k, D).sum(2)


def mlp(x_BTD: jax.Array, layer: Layer, cfg: Config) -> jax.Array:
    """The mixture's output for each token, [B, T, D]."""
    weight_BTk, expert_BTk = route(x_BTD, layer.weights["router"], cfg)
    weights = {name: layer.weights[name] for name in EXPERTS}
    factors = tuple({n: f[n] for n in EXPERTS if n in f} for f in layer.factors)
    args = (x_BTD, weight_BTk, expert_BTk, weights, factors, layer.mixes)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return _experts(*args, first=0, scale=layer.scale)

    rows = mesh.shape["replica"] * mesh.shape["data"]
    tokens = P(
        ROWS if x_BTD.shape[0] % rows == 0 else None,
        "context" if x_BTD.shape[1] % mesh.shape["context"] == 0 else None,
    )

    def local(x_BTD, weight_BTk, expert_BTk, weights, factors, mixes):
        # said aloud: a gather by a varying index would lose the sum over devices of its gradient
        tokens = (x_BTD, weight_BTk, expert_BTk)
        tokens, mixes = jax.lax.pcast((tokens, mixes), "model", to="varying")
        first = jax.lax.axis_index("model") * (cfg.E // mesh.shape["model"])
        out_BTD = _experts(*tokens, weights, factors, mixes, first=first, scale=layer.scale)
        return jax.lax.psum(out_BTD, "model")

    in_specs = (
        *(tokens, tokens, tokens),
        jax.tree.map(lambda _: P("model"), weights),
        tuple(
            jax.tree.map(
                lambda _, mixed=mix is not None: P(None, "model") if mixed else P("model"), f
            )
            for f, mix in zip(factors, layer.mixes, strict=True)
        ),
        tuple(mix if mix is None else P(tokens[0]) for mix in layer.mixes),
    )
    return jax.shard_map(local, in_specs=in_specs, out_specs=tokens)(*args)
