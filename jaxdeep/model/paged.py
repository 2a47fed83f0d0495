"""Keys and values in pages, and attention to them: what an engine keeps between calls.

All layers share one array of pages; a row's table lists the pages that hold its tokens, in order.
Sequences may share pages, and several rows of one call may be consecutive parts of one prompt.
Therefore a layer first writes the keys and values of all rows, and only then attends.

    plain    XLA on any device: blocks of pages with an online softmax, as many as the longest row
             needs
    ragged   the ragged paged attention kernel for TPUs that comes with JAX

On a mesh rows are sharded over `replica` and `data`, and heads over `model`. Each shard of rows has
pages of its own, and its tables hold their local numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxdeep.model import attention
from jaxdeep.model.config import Config
from jaxdeep.parallel.mesh import ROWS

BLOCK = 64  # slots that the plain computation reads together
GROUP = 16  # rows that go through as many blocks as the longest of them needs
GPU_BLOCK = 512  # on GPUs, for all rows at once: many small steps take longer to launch than to run
TPU_BLOCK = 512  # slots that the TPU kernel reads together


@struct.dataclass
class Pages:
    """The cache of a call. `kv_LPSJH` holds P pages of S slots for each layer; J alternates the
    keys and values of the kv heads, as the TPU kernel wants it. `table_BX` lists the pages of each
    row, in order, and `held_B` counts its tokens. Slots after those are never read."""

    kv_LPSJH: jax.Array
    table_BX: jax.Array
    held_B: jax.Array


def held_heads(cfg: Config, model: int) -> int:
    """The kv heads in a page, over all devices of the `model` axis. Where they do not divide over
    it, each device has a copy of those that its query heads read (`attention.kv_heads`)."""
    if cfg.K % model == 0:
        return cfg.K
    return model * len(attention.kv_heads(cfg.N, cfg.K, model, 0))


def page_bytes(cfg: Config, mesh: Mesh, S: int) -> int:
    """Bytes of one page of S slots, over all its devices."""
    per_slot = 2 * held_heads(cfg, mesh.shape["model"]) * cfg.H * jnp.dtype(cfg.dtype).itemsize
    return cfg.L * S * per_slot


def shape(cfg: Config, mesh: Mesh, pages: int, S: int) -> jax.ShapeDtypeStruct:
    """The shape and sharding of `pages` pages of S slots, [L, P, S, J, H]."""
    sizes = (cfg.L, pages, S, 2 * held_heads(cfg, mesh.shape["model"]), cfg.H)
    sharding = NamedSharding(mesh, P(None, ROWS, None, "model"))
    return jax.ShapeDtypeStruct(sizes, jnp.dtype(cfg.dtype), sharding=sharding)


def empty(cfg: Config, mesh: Mesh, pages: int, S: int) -> jax.Array:
    """The pages of `shape`, empty."""
    like = shape(cfg, mesh, pages, S)
    return jax.jit(lambda: jnp.zeros(like.shape, like.dtype), out_shardings=like.sharding)()


def extend(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    pages: Pages,
    layer: jax.Array,
    count_B: jax.Array,
    *,
    kind: str,
    window: attention.Window | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Append the first `count_B` keys and values of each row to the row's tokens, and attend: query
    t of a row sees its first held + t + 1 tokens, or the last of them in the window. Returns the
    output BTNH and the pages' new array.

    `kind` is as in `attention.attend`: all but "plain" choose the kernel on TPUs, where the width
    of a head allows it.
    """
    N, K = q_BTNH.shape[2], k_BTKH.shape[2]
    mesh = jax.sharding.get_abstract_mesh()
    model = 1 if mesh.empty else mesh.shape["model"]

    def local(q_bTnH, k_bTkH, v_bTkH, kv_LpSjH, table_bX, held_b, count_b, layer, on):
        if K % model:
            heads = attention.kv_heads(N, K, model, jax.lax.axis_index("model"))
            k_bTkH, v_bTkH = (jnp.take(x, heads, axis=2) for x in (k_bTkH, v_bTkH))
        kv_LpSjH = write(kv_LpSjH, k_bTkH, v_bTkH, table_bX, held_b, count_b, layer)
        # All layers' pages as one list, and the table moved to this layer's: to slice them out
        # would copy them.
        L, p, S, j, H = kv_LpSjH.shape
        pages, table_bX = kv_LpSjH.reshape(L * p, S, j, H), table_bX + layer * p
        ragged = kind != "plain" and attention.platform() == "tpu" and H % attention.LANES == 0
        attend = kernel if ragged else plain
        if window is None:
            return attend(q_bTnH, pages, table_bX, held_b), kv_LpSjH
        # rows that are not in use must not look as if they needed the oldest pages
        held_b = jnp.where(count_b > 0, held_b, jnp.max(held_b))
        here = attention.Window(window.width, on)
        return attend(q_bTnH, pages, table_bX, held_b, here), kv_LpSjH

    args = (q_BTNH, k_BTKH, v_BTKH, pages.kv_LPSJH, pages.table_BX, pages.held_B, count_B, layer)
    args = (*args, window and window.on)
    if mesh.empty or mesh.size == 1:
        return local(*args)
    heads, rows, paged = P(ROWS, None, "model"), P(ROWS), P(None, ROWS, None, "model")
    kv = heads if K % model == 0 else rows
    # check_vma is off: the kernel does not declare over which axes its results vary
    return jax.shard_map(
        local,
        in_specs=(heads, kv, kv, paged, rows, rows, rows, P(), P()),
        out_specs=(heads, paged),
        check_vma=False,
    )(*args)


def write(kv_LPSJH, k_BTKH, v_BTKH, table_BX, held_B, count_B, layer) -> jax.Array:
    """The pages, the first `count_B` keys and values of each row written after its tokens."""
    B, T, K, H = k_BTKH.shape
    S = kv_LPSJH.shape[2]
    new_BTJH = jnp.stack((k_BTKH, v_BTKH), axis=3).reshape(B, T, 2 * K, H)
    if B * T == 1:
        # for a scatter of a single update that may be dropped XLA copies all pages (seen on CPUs)
        page = jnp.take(table_BX[0], held_B[0] // S, mode="clip")
        start = (layer, page, held_B[0] % S, 0, 0)
        old = jax.lax.dynamic_slice(kv_LPSJH, start, (1, 1, 1, 2 * K, H))
        new = jnp.where(count_B[0] > 0, new_BTJH[None], old)
        return jax.lax.dynamic_update_slice(kv_LPSJH, new, start)
    index_BT = held_B[:, None] + jnp.arange(T)
    page_BT = jnp.take_along_axis(table_BX, index_BT // S, axis=1, mode="clip")
    # padding gets a page out of range, and the scatter drops it
    page_BT = jnp.where(jnp.arange(T) < count_B[:, None], page_BT, kv_LPSJH.shape[1])
    return kv_LPSJH.at[layer, page_BT, index_BT % S].set(new_BTJH, mode="drop")


def plain(
    q_BTNH: jax.Array,
    kv_PSJH: jax.Array,
    table_BX: jax.Array,
    held_B: jax.Array,
    window: attention.Window | None = None,
) -> jax.Array:
    """Attention of new queries to pages that already hold their keys; returns BTNH.

    A row's keys are added up block by block in one order, whatever the other rows are, so its
    result does not depend on them. The cost of a group is that of its longest row: rows of similar
    length belong next to each other.
    """
    B, reach = len(held_B), window and window.reach()
    if attention.platform() == "gpu":
        return _blocks(q_BTNH, kv_PSJH, table_BX, held_B, reach, GPU_BLOCK)
    if B <= GROUP or B % GROUP:
        return _blocks(q_BTNH, kv_PSJH, table_BX, held_B, reach, BLOCK)
    rows = (x.reshape(B // GROUP, GROUP, *x.shape[1:]) for x in (q_BTNH, table_BX, held_B))
    out = jax.lax.map(lambda row: _blocks(row[0], kv_PSJH, *row[1:], reach, BLOCK), tuple(rows))
    return out.reshape(q_BTNH.shape)


def _blocks(
    q_BTNH: jax.Array,
    kv_PSJH: jax.Array,
    table_BX: jax.Array,
    held_B: jax.Array,
    reach: jax.Array | None,
    size: int,
) -> jax.Array:
    """As `plain` for one group of rows, in blocks of about `size` slots. A query sees the last
    `reach` keys (None: all)."""
    B, T, N, H = q_BTNH.shape
    _, S, J, _ = kv_PSJH.shape
    K, M = J // 2, N // (J // 2)
    X = table_BX.shape[1]
    x = min(max(size // S, 1), X)  # pages of a block
    table_BX = jnp.pad(table_BX, ((0, 0), (0, -X % x)))
    # the M query heads of a kv head as if they were M times as many queries of it: one batched
    # matmul per kv head
    index_BT = held_B[:, None] + jnp.arange(T)
    index_BQ = jnp.tile(index_BT, (1, M))
    q_BKQH = q_BTNH.reshape(B, T, K, M, H).transpose(0, 2, 3, 1, 4).reshape(B, K, M * T, H)

    def block(i, carry):
        # of the keys so far: the largest score, the softmax's denominator and its numerator
        top_BKQ, total_BKQ, out_BKQH = carry
        page_Bx = jax.lax.dynamic_slice_in_dim(table_BX, i * x, x, axis=1)
        slot_BY = (page_Bx[:, :, None] * S + jnp.arange(S)).reshape(B, x * S)
        # A key and its value lie side by side and are read at once. By head first, so that the
        # products need no transposed copy.
        kv = kv_PSJH.reshape(-1, 2 * H)[slot_BY[:, None] * K + jnp.arange(K)[:, None]]
        scores_BKQY = jnp.einsum(
            "bkqh,bkyh->bkqy", q_BKQH, kv[..., :H], preferred_element_type=jnp.float32
        ) * (H**-0.5)
        back_BQY = index_BQ[:, :, None] - (i * x * S + jnp.arange(x * S))
        seen_BQY = back_BQY >= 0 if reach is None else (back_BQY >= 0) & (back_BQY < reach)
        scores_BKQY = jnp.where(seen_BQY[:, None], scores_BKQY, attention.MASKED)
        new_BKQ = jnp.maximum(top_BKQ, jnp.max(scores_BKQY, axis=-1))
        shrink_BKQ = jnp.exp(top_BKQ - new_BKQ)
        weights_BKQY = jnp.exp(scores_BKQY - new_BKQ[..., None])
        part_BKQH = jnp.einsum(
            "bkqy,bkyh->bkqh",
            weights_BKQY.astype(kv_PSJH.dtype),
            kv[..., H:],
            preferred_element_type=jnp.float32,
        )
        total_BKQ = total_BKQ * shrink_BKQ + jnp.sum(weights_BKQY, axis=-1)
        return new_BKQ, total_BKQ, out_BKQH * shrink_BKQ[..., None] + part_BKQH

    start = (
        jnp.full((B, K, M * T), attention.MASKED, jnp.float32),
        jnp.zeros((B, K, M * T), jnp.float32),
        jnp.zeros((B, K, M * T, H), jnp.float32),
    )
    blocks = jnp.minimum((jnp.max(held_B) + T - 1) // (x * S) + 1, table_BX.shape[1] // x)
    first = 0
    if reach is not None:
        # Blocks before the window of every row. What others before a row's own window leave is
        # shrunk to nothing by its first key.
        first = jnp.minimum(jnp.maximum(jnp.min(held_B) - (reach - 1), 0) // (x * S), blocks - 1)
    _, total_BKQ, out_BKQH = jax.lax.fori_loop(first, blocks, block, start)
    out_BKQH = (out_BKQH / total_BKQ[..., None]).astype(q_BTNH.dtype)
    return out_BKQH.reshape(B, K, M, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def kernel(
    q_BTNH: jax.Array,
    kv_PSJH: jax.Array,
    table_BX: jax.Array,
    held_B: jax.Array,
    window: attention.Window | None = None,
) -> jax.Array:
    """As `plain`, by the kernel for TPUs, to which a row's last T tokens are its queries."""
    B, T, N, H = q_BTNH.shape
    S, X = kv_PSJH.shape[1], table_BX.shape[1]
    arrays = (
        q_BTNH.reshape(B * T, N, H),
        kv_PSJH,
        held_B + T,
        table_BX,
        jnp.arange(B + 1, dtype=jnp.int32) * T,
        jnp.array([B], jnp.int32),
    )

    def run(width: int | None) -> Callable[..., jax.Array]:
        return functools.partial(
            ragged_paged_attention,
            sm_scale=H**-0.5,
            sliding_window=width,
            # explicit: its own choice asks which chip it runs on, which ahead of time there is none
            num_kv_pages_per_block=min(max(TPU_BLOCK // S, 1), X),
            num_queries_per_block=min(B * T, 32),
        )

    if window is None or window.on is None:
        out = run(window and window.width)(*arrays)
    else:
        out = jax.lax.cond(window.on, run(window.width), run(None), *arrays)
    return out.reshape(B, T, N, H)
