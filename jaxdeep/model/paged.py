"""Keys and values in pages, and attention to them: what a sampler keeps between calls.

All layers share one array of pages; a table says which pages hold a row's tokens, in order. Several
rows of one call may be consecutive parts of one sequence, and several sequences may share pages: a
layer first writes the keys and values of all rows, then attends.

    plain    XLA on any device: blocks of pages with a running softmax, as many as the longest row needs
    ragged   the ragged paged attention kernel that comes with JAX for TPUs

On a mesh rows are spread over `replica` and `data`, each with pages of its own to which its table
refers, and heads over `model`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxdeep.model import attention
from jaxdeep.model.config import Config
from jaxdeep.parallel.mesh import ROWS

BLOCK = 64  # slots that the plain computation looks at together
GROUP = 16  # rows that it takes as many blocks for as the longest of them needs
GPU_BLOCK = 512  # slots there, for all rows: launching small steps takes longer than computing them
TPU_BLOCK = 512  # and the kernel


@struct.dataclass
class Pages:
    """`kv_LPSJH` holds P pages of S slots for each layer; J alternates keys and values of the kv heads.
    `table_BX` are the pages of each row, in order, and `held_B` the tokens it has. Slots after those
    hold nothing that is read."""

    kv_LPSJH: jax.Array
    table_BX: jax.Array
    held_B: jax.Array


def held_heads(cfg: Config, model: int) -> int:
    """Kv heads in a page over all devices of the `model` axis: where they do not divide over it, each
    device holds those that its query heads need."""
    if cfg.K % model == 0:
        return cfg.K
    return model * len(attention.kv_heads(cfg.N, cfg.K, model, 0))


def page_bytes(cfg: Config, mesh: Mesh, S: int) -> int:
    """Bytes of one page of S slots, over all its devices."""
    per_slot = 2 * held_heads(cfg, mesh.shape["model"]) * cfg.H * jnp.dtype(cfg.dtype).itemsize
    return cfg.L * S * per_slot


def shape(cfg: Config, mesh: Mesh, pages: int, S: int) -> jax.ShapeDtypeStruct:
    """`pages` pages of S slots, spread over the mesh; [L, P, S, J, H]."""
    sizes = (cfg.L, pages, S, 2 * held_heads(cfg, mesh.shape["model"]), cfg.H)
    where = NamedSharding(mesh, P(None, ROWS, None, "model"))
    return jax.ShapeDtypeStruct(sizes, jnp.dtype(cfg.dtype), sharding=where)


def empty(cfg: Config, mesh: Mesh, pages: int, S: int) -> jax.Array:
    """The pages of `shape`, nothing in them."""
    what = shape(cfg, mesh, pages, S)
    return jax.jit(lambda: jnp.zeros(what.shape, what.dtype), out_shardings=what.sharding)()


def extend(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    pages: Pages,
    layer: jax.Array,
    count_B: jax.Array,
    *,
    kind: str,
) -> tuple[jax.Array, jax.Array]:
    """Write the first `count_B` keys and values of each row after those it holds, and attend: query t
    of a row sees its first held + t + 1 tokens. Returns BTNH and the pages' new array.

    `kind` is as in `attention.attend`: anything but "plain" takes the kernel where it can run.
    """
    N, K = q_BTNH.shape[2], k_BTKH.shape[2]
    used = jax.sharding.get_abstract_mesh()
    model = 1 if used.empty else used.shape["model"]

    def local(q_btnh, k_btkh, v_btkh, kv_LpSjH, table_bX, held_b, count_b, layer):
        if K % model:
            need = attention.kv_heads(N, K, model, jax.lax.axis_index("model"))
            k_btkh, v_btkh = (jnp.take(x, need, axis=2) for x in (k_btkh, v_btkh))
        kv_LpSjH = write(kv_LpSjH, k_btkh, v_btkh, table_bX, held_b, count_b, layer)
        L, p, S, j, H = kv_LpSjH.shape
        flat, table_bX = kv_LpSjH.reshape(L * p, S, j, H), table_bX + layer * p
        ragged = kind != "plain" and attention.platform() == "tpu" and H % attention.LANES == 0
        attend = kernel if ragged else plain
        return attend(q_btnh, flat, table_bX, held_b), kv_LpSjH

    args = (q_BTNH, k_BTKH, v_BTKH, pages.kv_LPSJH, pages.table_BX, pages.held_B, count_B, layer)
    if used.empty or used.size == 1:
        return local(*args)
    heads = P(ROWS, None, "model")
    kv, rows, held = heads if K % model == 0 else P(ROWS), P(ROWS), P(None, ROWS, None, "model")
    return jax.shard_map(
        local,
        in_specs=(heads, kv, kv, held, rows, rows, rows, P()),
        out_specs=(heads, held),
        check_vma=False,
    )(*args)


def write(kv_LPSJH, k_BTKH, v_BTKH, table_BX, held_B, count_B, layer) -> jax.Array:
    """The pages with new keys and values in them."""
    B, T, K, H = k_BTKH.shape
    S = kv_LPSJH.shape[2]
    new_BTJH = jnp.stack((k_BTKH, v_BTKH), axis=3).reshape(B, T, 2 * K, H)
    if B * T == 1:
        # XLA would copy all pages for a scatter of one update that may be dropped (seen on CPUs)
        page = jnp.take(table_BX[0], held_B[0] // S, mode="clip")
        at = (layer, page, held_B[0] % S, 0, 0)
        old = jax.lax.dynamic_slice(kv_LPSJH, at, (1, 1, 1, 2 * K, H))
        new = jnp.where(count_B[0] > 0, new_BTJH[None], old)
        return jax.lax.dynamic_update_slice(kv_LPSJH, new, at)
    at_BT = held_B[:, None] + jnp.arange(T)
    page_BT = jnp.take_along_axis(table_BX, at_BT // S, axis=1, mode="clip")
    # what is out of range is dropped by the scatter: padding is never written
    page_BT = jnp.where(jnp.arange(T) < count_B[:, None], page_BT, kv_LPSJH.shape[1])
    return kv_LPSJH.at[layer, page_BT, at_BT % S].set(new_BTJH, mode="drop")


def plain(
    q_BTNH: jax.Array, kv_PSJH: jax.Array, table_BX: jax.Array, held_B: jax.Array
) -> jax.Array:
    """Attention of new queries to pages that already hold their keys; returns BTNH.

    What a query sees is summed up block by block, in the same order however long other rows are. Rows
    of similar length are best next to each other.
    """
    B = len(held_B)
    if attention.platform() == "gpu":
        return _blocks(q_BTNH, kv_PSJH, table_BX, held_B, GPU_BLOCK)
    if B <= GROUP or B % GROUP:
        return _blocks(q_BTNH, kv_PSJH, table_BX, held_B, BLOCK)
    rows = (x.reshape(B // GROUP, GROUP, *x.shape[1:]) for x in (q_BTNH, table_BX, held_B))
    out = jax.lax.map(lambda row: _blocks(row[0], kv_PSJH, *row[1:], BLOCK), tuple(rows))
    return out.reshape(q_BTNH.shape)


def _blocks(
    q_BTNH: jax.Array, kv_PSJH: jax.Array, table_BX: jax.Array, held_B: jax.Array, size: int
) -> jax.Array:
    B, T, N, H = q_BTNH.shape
    _, S, J, _ = kv_PSJH.shape
    K, M = J // 2, N // (J // 2)
    X = table_BX.shape[1]
    n = min(max(size // S, 1), X)  # pages of a block
    table_BX = jnp.pad(table_BX, ((0, 0), (0, -X % n)))
    at_BT = held_B[:, None] + jnp.arange(T)
    at_BQ = jnp.tile(at_BT, (1, M))
    q_BKQH = q_BTNH.reshape(B, T, K, M, H).transpose(0, 2, 3, 1, 4).reshape(B, K, M * T, H)

    def block(i, carry):
        top_BKQ, total_BKQ, out_BKQH = carry
        page_Bn = jax.lax.dynamic_slice_in_dim(table_BX, i * n, n, axis=1)
        # head by head, so that the products need no copy; a key and its value in one read
        slot_BC = (page_Bn[:, :, None] * S + jnp.arange(S)).reshape(B, n * S)
        both = kv_PSJH.reshape(-1, 2 * H)[slot_BC[:, None] * K + jnp.arange(K)[:, None]]
        scores_BKQC = jnp.einsum(
            "bkqh,bkch->bkqc", q_BKQH, both[..., :H], preferred_element_type=jnp.float32
        ) * (H**-0.5)
        seen_BQC = i * n * S + jnp.arange(n * S) <= at_BQ[:, :, None]
        scores_BKQC = jnp.where(seen_BQC[:, None], scores_BKQC, attention.MASKED)
        new_BKQ = jnp.maximum(top_BKQ, jnp.max(scores_BKQC, axis=-1))
        shrink_BKQ = jnp.exp(top_BKQ - new_BKQ)
        weights_BKQC = jnp.exp(scores_BKQC - new_BKQ[..., None])
        part_BKQH = jnp.einsum(
            "bkqc,bkch->bkqh",
            weights_BKQC.astype(kv_PSJH.dtype),
            both[..., H:],
            preferred_element_type=jnp.float32,
        )
        total_BKQ = total_BKQ * shrink_BKQ + jnp.sum(weights_BKQC, axis=-1)
        return new_BKQ, total_BKQ, out_BKQH * shrink_BKQ[..., None] + part_BKQH

    start = (
        jnp.full((B, K, M * T), attention.MASKED, jnp.float32),
        jnp.zeros((B, K, M * T), jnp.float32),
        jnp.zeros((B, K, M * T, H), jnp.float32),
    )
    blocks = jnp.minimum((jnp.max(held_B) + T - 1) // (n * S) + 1, table_BX.shape[1] // n)
    _, total_BKQ, out_BKQH = jax.lax.fori_loop(0, blocks, block, start)
    out_BKQH = (out_BKQH / total_BKQ[..., None]).astype(q_BTNH.dtype)
    return out_BKQH.reshape(B, K, M, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def kernel(
    q_BTNH: jax.Array, kv_PSJH: jax.Array, table_BX: jax.Array, held_B: jax.Array
) -> jax.Array:
    """As `plain`, by the kernel for TPUs; each row is a sequence whose last T tokens are its queries."""
    B, T, N, H = q_BTNH.shape
    S, X = kv_PSJH.shape[1], table_BX.shape[1]
    out = ragged_paged_attention(
        q_BTNH.reshape(B * T, N, H),
        kv_PSJH,
        held_B + T,
        table_BX,
        jnp.arange(B + 1, dtype=jnp.int32) * T,
        jnp.array([B], jnp.int32),
        sm_scale=H**-0.5,
        num_kv_pages_per_block=min(max(TPU_BLOCK // S, 1), X),
        num_queries_per_block=min(B * T, 32),
    )
    return out.reshape(B, T, N, H)
