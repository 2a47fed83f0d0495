"""A mixture of experts in the place of the mlp: a softmax router, the best `top_k` experts of each
token, and one ragged matmul per linear over tokens sorted by expert. No token is dropped. On TPUs XLA
compiles the ragged matmul to a kernel that computes each row with its own expert alone.

Experts are spread over the mesh axis `model`: each device computes its own experts for the tokens of
its rows (in training it gathers them), and the results are summed over the axis, as for a tensor-parallel
mlp. All of a device's tokens may want its experts, few do: it works through them block by block, and ends
after the last that has any.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from jaxdeep.model.config import Config
from jaxdeep.model.lora import Layer
from jaxdeep.model.weights import EXPERTS
from jaxdeep.parallel.mesh import ROWS

MIN_BLOCK_ROWS = 256  # rows of a block
LIVE_BLOCK_SCOPE = (
    "live_block"  # names the choice to compute a block, for who counts what that costs
)


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
    blocks: int = 1,
) -> jax.Array:
    """What the experts held here (from number `first` on) add for tokens held here; [B, T, D]. Of all
    tokens' choices, sorted, only those `blocks` are computed that hold some of these experts."""
    B, T, D = x_BTD.shape
    k, n = expert_BTk.shape[-1], expert_BTk.size
    held = jax.tree.leaves(weights)[0].shape[0]
    expert_n = expert_BTk.reshape(-1) - first
    expert_n = jnp.where((expert_n >= 0) & (expert_n < held), expert_n, held)  # elsewhere: last
    order_n = jnp.argsort(expert_n, stable=True)
    expert_n = expert_n[order_n]
    size_E = jnp.bincount(expert_n, length=held + 1)[:held].astype(jnp.int32)
    token_n = order_n // k

    def through(x_mi: jax.Array, name: str, size_E, expert_m, token_m) -> jax.Array:
        y_mo = _ragged(x_mi, weights[name], size_E, expert_m)
        for adapter, mix_BA in zip(factors, mixes, strict=True):
            if name not in adapter:
                continue
            a, b = adapter[name]["a"], adapter[name]["b"]
            if mix_BA is None:
                low = _ragged(x_mi, a, size_E, expert_m)
                y_mo += _ragged(low, b, size_E, expert_m) * jnp.asarray(scale, x_mi.dtype)
                continue
            mix_mA = jnp.repeat(mix_BA, T, axis=0)[token_m].astype(x_mi.dtype)
            for i in range(a.shape[0]):
                low = _ragged(x_mi, a[i], size_E, expert_m) * mix_mA[:, i : i + 1]
                y_mo += _ragged(low, b[i], size_E, expert_m)
        return checkpoint_name(y_mo, "linear")

    def some(size_E, expert_m, token_m) -> jax.Array:
        """Of so many rows of each expert, one after the other."""
        at, held_m1 = (size_E, expert_m, token_m), (expert_m < held)[:, None]
        x_mD = jnp.where(held_m1, x_BTD.reshape(-1, D)[token_m], 0)
        h_mF = jax.nn.silu(through(x_mD, "w_gate", *at)) * through(x_mD, "w_up", *at)
        y_mD = through(h_mF, "w_down", *at)
        # rows of experts held elsewhere are in no group: what a ragged matmul leaves there, or in their
        # gradient, is not defined
        return jnp.where(held_m1, y_mD, 0)

    if blocks == 1:
        y_nD = some(size_E, expert_n, token_n)
        y_nD = y_nD[jnp.argsort(order_n)] * weight_BTk.reshape(-1, 1)
        return y_nD.reshape(B, T, k, D).sum(2)

    m, ends_E = n // blocks, jnp.cumsum(size_E)
    weight_n = weight_BTk.reshape(-1)[order_n]

    def block(z: jax.Array) -> jax.Array:
        expert_m, token_m, weight_m = (
            jax.lax.dynamic_slice_in_dim(x_n, z * m, m) for x_n in (expert_n, token_n, weight_n)
        )
        within = functools.partial(jnp.clip, min=z * m, max=(z + 1) * m)
        y_mD = some(within(ends_E) - within(ends_E - size_E), expert_m, token_m)
        y_mD = (y_mD * weight_m[:, None]).astype(jnp.float32)
        return jnp.zeros((B * T, D), jnp.float32).at[token_m].add(y_mD)

    # around the choice: what is inside would be kept for the blocks that are not computed, too
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def step(out_nD: jax.Array, z: jax.Array) -> tuple[jax.Array, None]:
        with jax.named_scope(LIVE_BLOCK_SCOPE):
            return jax.lax.cond(z * m < ends_E[-1], lambda: out_nD + block(z), lambda: out_nD), None

    start = jnp.zeros_like(x_BTD, jnp.float32).reshape(-1, D)
    out_nD, _ = jax.lax.scan(step, start, jnp.arange(blocks))
    return out_nD.astype(x_BTD.dtype).reshape(B, T, D)


def blocks_of(n: int, shares: int) -> int:
    """Into how many parts n choices of experts, of which a device holds one of so many shares, are cut:
    on average two or three of them have any. Few are not worth it."""
    blocks = 2 * shares if shares > 1 else 1
    return blocks if n % blocks == 0 and n // blocks >= MIN_BLOCK_ROWS else 1


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

    spread = (*(tokens[0] or ()), *((tokens[1],) if tokens[1] else ()))
    held = P(tokens[0], (tokens[1], "model")) if layer.whole else tokens

    def local(x_BTD, weight_BTk, expert_BTk, weights, factors, mixes):
        here = (x_BTD, weight_BTk, expert_BTk)
        if layer.whole:
            gather = functools.partial(jax.lax.all_gather, axis_name="model", axis=1, tiled=True)
            here = jax.tree.map(gather, here)
        else:
            # said aloud: a gather by a varying index would lose the sum over devices of its gradient
            here = jax.lax.pcast(here, "model", to="varying")
        mixes = jax.lax.pcast(mixes, "model", to="varying")
        # and before blocks that one device computes and another does not: a sum would wait in there
        weights, factors = jax.lax.pcast((weights, factors), spread, to="varying")
        first = jax.lax.axis_index("model") * (cfg.E // mesh.shape["model"])
        blocks = blocks_of(here[-1].size, mesh.shape["model"])
        how = dict(first=first, scale=layer.scale, blocks=blocks)
        out_BTD = _experts(*here, weights, factors, mixes, **how)
        if layer.whole:
            return jax.lax.psum_scatter(out_BTD, "model", scatter_dimension=1, tiled=True)
        return jax.lax.psum(out_BTD, "model")

    in_specs = (
        *(held, held, held),
        jax.tree.map(lambda _: P("model"), weights),
        tuple(
            jax.tree.map(
                lambda _, mixed=mix is not None: P(None, "model") if mixed else P("model"), f
            )
            for f, mix in zip(factors, layer.mixes, strict=True)
        ),
        tuple(mix if mix is None else P(tokens[0]) for mix in layer.mixes),
    )
    return jax.shard_map(local, in_specs=in_specs, out_specs=held)(*args)
