"""A mixture of experts in place of the mlp: a softmax router, the best `top_k` experts of each
token, and one ragged matmul per linear over tokens sorted by expert (on TPUs XLA compiles it to a
kernel that computes each row with its own expert alone). There is no capacity limit: no token is
dropped.

Experts are sharded over the mesh axis `model`. Each device computes its own experts for the tokens
of its rows, which in training it all-gathers first, and the results are summed over the axis, as
for a tensor-parallel mlp. In the worst case all of a device's tokens choose its experts, on average
few do: shapes are those of the worst case, cut into blocks, and blocks without a token of its own
are skipped.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from jaxdeep.model.config import Config
from jaxdeep.model.linear import Layer
from jaxdeep.model.weights import EXPERTS
from jaxdeep.parallel.mesh import ROWS

MIN_BLOCK_ROWS = 256  # a smaller block costs more in overhead than skipping it saves
LIVE_BLOCK_SCOPE = "live_block"  # plan/hlo.py finds the conditional around a block by this name


def route(x_BTD: jax.Array, router_DE: jax.Array, cfg: Config) -> tuple[jax.Array, jax.Array]:
    """The weight (a float32 softmax) and the number of each expert of a token, [B, T, top_k]."""
    scores_BTE = jnp.einsum("btd,de->bte", x_BTD, router_DE, preferred_element_type=jnp.float32)
    weight_BTk, expert_BTk = jax.lax.top_k(jax.nn.softmax(scores_BTE, axis=-1), cfg.top_k)
    if cfg.norm_top_k:
        weight_BTk /= weight_BTk.sum(-1, keepdims=True)
    return weight_BTk.astype(x_BTD.dtype), expert_BTk


def mlp(x_BTD: jax.Array, layer: Layer, cfg: Config) -> jax.Array:
    """The mixture's output for each token, [B, T, D]."""
    weight_BTk, expert_BTk = route(x_BTD, layer.weights["router"], cfg)
    weights = {name: layer.weights[name] for name in EXPERTS}
    factors = tuple({name: f[name] for name in EXPERTS if name in f} for f in layer.factors)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        tokens = (x_BTD, weight_BTk, expert_BTk)
        return _experts(*tokens, weights, factors, layer.scales, first=0)

    rows = mesh.shape["replica"] * mesh.shape["data"]
    # the engine's calls may have fewer rows than devices, and a single position
    axes = (
        ROWS if x_BTD.shape[0] % rows == 0 else None,
        "context" if x_BTD.shape[1] % mesh.shape["context"] == 0 else None,
    )
    over = (*(axes[0] or ()), *((axes[1],) if axes[1] else ()))
    tokens = P(axes[0], (axes[1], "model")) if layer.gathered else P(*axes)
    # numbers stay constants of the program; arrays must be handed into shard_map
    arrays = tuple(scale if isinstance(scale, jax.Array) else None for scale in layer.scales)
    banks = [jnp.ndim(scale) > 0 for scale in layer.scales]

    def local(x_btD, weight_btk, expert_btk, weights, factors, arrays):
        mine = (x_btD, weight_btk, expert_btk)
        if layer.gathered:
            gather = functools.partial(jax.lax.all_gather, axis_name="model", axis=1, tiled=True)
            mine = jax.tree.map(gather, mine)
        else:
            # without it a gather by an index that differs by device would lose its gradient's sum
            mine = jax.lax.pcast(mine, "model", to="varying")
        # Marked as varying here, outside of the blocks: the gradient's sum over devices belongs to
        # this place. Inside a block that one device computes and another skips it would be a
        # deadlock.
        weights, factors = jax.lax.pcast((weights, factors), over, to="varying")
        arrays = tuple(
            jax.lax.pcast(array, "model" if bank else (*over, "model"), to="varying")
            for array, bank in zip(arrays, banks, strict=True)
        )
        first = jax.lax.axis_index("model") * (cfg.E // mesh.shape["model"])
        blocks = blocks_of(mine[-1].size, mesh.shape["model"])
        scales = tuple(
            scale if array is None else array
            for scale, array in zip(layer.scales, arrays, strict=True)
        )
        out_bTD = _experts(*mine, weights, factors, scales, first=first, blocks=blocks)
        if layer.gathered:
            return jax.lax.psum_scatter(out_bTD, "model", scatter_dimension=1, tiled=True)
        return jax.lax.psum(out_bTD, "model")

    # experts come first in a layer's weights and factors; in those of a bank after its adapters
    in_specs = (
        *(tokens, tokens, tokens),
        jax.tree.map(lambda _: P("model"), weights),
        tuple(
            jax.tree.map(lambda _, bank=bank: P(None, "model") if bank else P("model"), f)
            for f, bank in zip(factors, banks, strict=True)
        ),
        tuple(
            None if array is None else P(axes[0]) if bank else P()
            for array, bank in zip(arrays, banks, strict=True)
        ),
    )
    shared = jax.shard_map(local, in_specs=in_specs, out_specs=tokens)
    return shared(x_BTD, weight_BTk, expert_BTk, weights, factors, arrays)


def blocks_of(n: int, shards: int) -> int:
    """How many blocks n (token, expert) pairs are cut into, where a device holds the experts of one
    of `shards` shards. With two blocks a shard, two or three have pairs on average."""
    blocks = 2 * shards if shards > 1 else 1
    return blocks if n % blocks == 0 and n // blocks >= MIN_BLOCK_ROWS else 1


def _ragged(x_ni: jax.Array, weight: Any, size_E: jax.Array, expert_n: jax.Array) -> jax.Array:
    """Rows sorted by expert, `size_E` of each, through the linear of their expert."""
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
    scales: tuple[float | jax.Array, ...],
    *,
    first: Any,
    blocks: int = 1,
) -> jax.Array:
    """What the experts held here (numbers `first` and up) add to each token, [B, T, D].

    A row of the ragged matmuls is one (token, expert) pair. They are sorted by expert, the pairs of
    experts held elsewhere last; of the `blocks` they are cut into, only those with experts held
    here are computed.
    """
    B, T, D = x_BTD.shape
    k, n = expert_BTk.shape[-1], expert_BTk.size
    held = jax.tree.leaves(weights)[0].shape[0]  # experts of this device
    expert_n = expert_BTk.reshape(-1) - first
    expert_n = jnp.where((expert_n >= 0) & (expert_n < held), expert_n, held)
    order_n = jnp.argsort(expert_n, stable=True)
    expert_n = expert_n[order_n]
    size_E = jnp.bincount(expert_n, length=held + 1)[:held].astype(jnp.int32)
    token_n = order_n // k

    def linear(x_mi: jax.Array, name: str, size_E, expert_m, token_m) -> jax.Array:
        y_mo = _ragged(x_mi, weights[name], size_E, expert_m)
        for adapter, scale in zip(factors, scales, strict=True):
            if name not in adapter:
                continue
            a, b = adapter[name]["a"], adapter[name]["b"]
            if jnp.ndim(scale) == 0:
                low = _ragged(x_mi, a, size_E, expert_m)
                y_mo += _ragged(low, b, size_E, expert_m) * jnp.asarray(scale, x_mi.dtype)
                continue
            mix_mA = jnp.repeat(scale, T, axis=0)[token_m].astype(x_mi.dtype)
            for i in range(a.shape[0]):
                low = _ragged(x_mi, a[i], size_E, expert_m) * mix_mA[:, i : i + 1]
                y_mo += _ragged(low, b[i], size_E, expert_m)
        return checkpoint_name(y_mo, "linear")

    def swiglu(size_E, expert_m, token_m) -> jax.Array:
        """The outputs of pairs sorted by expert, `size_E` of each; [m, D]."""
        sorted_by = (size_E, expert_m, token_m)
        held_m1 = (expert_m < held)[:, None]
        x_mD = jnp.where(held_m1, x_BTD.reshape(-1, D)[token_m], 0)
        h_mF = jax.nn.silu(linear(x_mD, "w_gate", *sorted_by)) * linear(x_mD, "w_up", *sorted_by)
        y_mD = linear(h_mF, "w_down", *sorted_by)
        # Pairs of experts held elsewhere are in no group of the ragged matmuls, which leave their
        # rows, and the rows of their gradient, undefined. Masked on both sides so that neither gets
        # out.
        return jnp.where(held_m1, y_mD, 0)

    if blocks == 1:
        y_nD = swiglu(size_E, expert_n, token_n)
        y_nD = y_nD[jnp.argsort(order_n)] * weight_BTk.reshape(-1, 1)
        return y_nD.reshape(B, T, k, D).sum(2)

    m, ends_E = n // blocks, jnp.cumsum(size_E)
    weight_n = weight_BTk.reshape(-1)[order_n]

    def block(index: jax.Array) -> jax.Array:
        expert_m, token_m, weight_m = (
            jax.lax.dynamic_slice_in_dim(x_n, index * m, m) for x_n in (expert_n, token_n, weight_n)
        )
        within = functools.partial(jnp.clip, min=index * m, max=(index + 1) * m)
        y_mD = swiglu(within(ends_E) - within(ends_E - size_E), expert_m, token_m)
        y_mD = (y_mD * weight_m[:, None]).astype(jnp.float32)
        return jnp.zeros((B * T, D), jnp.float32).at[token_m].add(y_mD)

    # The checkpoint is around the condition: inside, its residuals would be allocated for the
    # blocks that are skipped, too.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def step(total: jax.Array, index: jax.Array) -> tuple[jax.Array, None]:
        with jax.named_scope(LIVE_BLOCK_SCOPE):
            live = index * m < ends_E[-1]
            return jax.lax.cond(live, lambda: total + block(index), lambda: total), None

    total = jnp.zeros_like(x_BTD, jnp.float32).reshape(-1, D)
    total, _ = jax.lax.scan(step, total, jnp.arange(blocks))
    return total.astype(x_BTD.dtype).reshape(B, T, D)
