"""Attention: which key each query may see, and the kernels that compute it.

    plain    XLA on any device: at once where the sequence is short, else in blocks of queries and keys
             with a running softmax (arXiv 2205.14135), recomputed in the backward pass
    splash   the Pallas kernel that comes with JAX for TPUs; elsewhere it is interpreted, for tests
    cudnn    cuDNN's kernel on GPUs, in half precision; its mask takes memory with T squared
    auto     splash on TPUs, cudnn on GPUs, plain elsewhere and where the kernel refuses the shapes

Scores and softmax are float32. A query that may see nothing (padding) gets a finite value that
nothing reads.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash_lib
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as mask_lib
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxdeep.errors import ConfigError
from jaxdeep.model import context
from jaxdeep.parallel.mesh import ROWS

KINDS = ("auto", "plain", "splash", "cudnn")
MASKED = -1e30  # finite, so that a row that is masked whole stays free of NaN
LANES = 128  # a TPU's vector width: what splash cuts sequences by


def attend(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments_BT: jax.Array,
    *,
    kind: str = "auto",
    block: int = 128,
) -> jax.Array:
    """Causal attention of a sequence to itself, inside each segment; returns BTNH.

    On a mesh, rows go over `replica` and `data`, heads over `model`, and positions over `context`, in
    the order of `context.order`: each device gathers all keys and values of its rows and kv heads for
    its own queries. Where devices along `model` have positions of their own (`context.owned`), they
    exchange them for heads and back. `block` is the plain computation's.

    Raises ConfigError for heads or positions that do not divide over the mesh, and for a kind (other
    than auto) that cannot compute these shapes here.
    """
    T, N = q_BTNH.shape[1:3]
    K = k_BTKH.shape[2]
    kind = choose(kind, q_BTNH.shape, q_BTNH.dtype)
    seen = _splash_kernel(T) if kind == "splash" else jnp.asarray(context.order(T))
    run = {"plain": functools.partial(plain, block=block), "splash": splash, "cudnn": cudnn}[kind]
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return run(q_BTNH, k_BTKH, v_BTKH, segments_BT, segments_BT, seen)
    if N % mesh.shape["model"]:
        raise ConfigError(
            f"{N} attention heads do not divide over model={mesh.shape['model']} devices: choose a "
            "mesh whose model axis divides them"
        )
    whole = K % mesh.shape["model"] == 0  # as in mesh.sharding: else kv heads are on every device

    def local(q_BQNH, k_BQKH, v_BQKH, segments_BQ, seen):
        if not whole:
            need = kv_heads(N, K, mesh.shape["model"], jax.lax.axis_index("model"))
            k_BQKH, v_BQKH = (jnp.take(x, need, axis=2) for x in (k_BQKH, v_BQKH))
        k_BSKH, v_BSKH, segments_BS = map(context.gather, (k_BQKH, v_BQKH, segments_BQ))
        return run(q_BQNH, k_BSKH, v_BSKH, segments_BQ, segments_BS, seen)

    heads, tokens = P(ROWS, "context", "model"), P(ROWS, "context")
    keys = heads if whole else tokens
    where = P("context")
    if kind == "splash":
        where = seen.manual_sharding_spec(NamedSharding(mesh, P(None, "context")))
    # the kernels do not say over which axes their results vary
    shared = jax.shard_map(
        local, in_specs=(heads, keys, keys, tokens, where), out_specs=heads, check_vma=False
    )
    if not context.sequence_parallel(T):
        return shared(q_BTNH, k_BTKH, v_BTKH, segments_BT, seen)
    # said aloud: else XLA would have heads spread before and after, where devices have positions
    return context.constrain_activations(
        shared(*map(context.constrain_activations, (q_BTNH, k_BTKH, v_BTKH)), segments_BT, seen)
    )


def kv_heads(N: int, K: int, model: int, index: int | jax.Array) -> np.ndarray | jax.Array:
    """Which kv heads the query heads of device `index` of `model` devices use, where K kv heads do not
    divide over them."""
    held, per = N // model, N // K
    return (index * held + np.arange(held if per % held else 1)) // per


def choose(kind: str, shape_BTNH: tuple[int, ...], dtype: Any) -> str:
    """The kernel that `kind` stands for, for queries of this shape on the devices in use."""
    if kind not in KINDS:
        raise ConfigError(f"attention={kind!r}: choose one of {', '.join(KINDS)}")
    T, H, there = shape_BTNH[1], shape_BTNH[3], platform()
    shard = T // context.shards()
    refusals = {
        "plain": "",
        "splash": (
            shard % LANES
            and f"splash needs a multiple of {LANES} positions on each device, there are {shard}"
        )
        or (
            there == "tpu"
            and H % LANES
            and f"splash on TPUs needs heads of a multiple of {LANES} numbers, not {H}"
        ),
        "cudnn": (there != "gpu" and f"cudnn runs on GPUs, not on {there}")
        or (jnp.dtype(dtype).itemsize != 2 and f"cudnn needs bfloat16 or float16, not {dtype}"),
    }
    if kind == "auto":
        best = {"tpu": "splash", "gpu": "cudnn"}.get(there, "plain")
        return "plain" if refusals[best] else best
    if refusals[kind]:
        raise ConfigError(f"attention={kind!r}: {refusals[kind]}; choose auto or plain")
    return kind


def platform() -> str:
    """What the program is traced for: the mesh's devices, which ahead of time need not be here."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def plain(
    q_BQNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segments_BQ: jax.Array,
    segments_BS: jax.Array,
    index_Q: jax.Array,
    *,
    block: int = 128,
) -> jax.Array:
    """Attention of queries at `index_Q` of a sequence to its keys 0..S-1; returns BQNH.

    Grouped keys and values are repeated: on XLA's CPU backend that halves the cost of the grouped
    einsum in training.
    """
    args = (q_BQNH, k_BSKH, v_BSKH, segments_BQ, segments_BS, index_Q)
    if max(q_BQNH.shape[1], k_BSKH.shape[1]) > block:
        return _blocked(*args, block)
    q_BNQH, k_BKSH, v_BKSH = (jnp.swapaxes(x, 1, 2) for x in (q_BQNH, k_BSKH, v_BSKH))
    at_S = jnp.arange(k_BSKH.shape[1])
    scores_BNQS = _scores(q_BNQH, k_BKSH, segments_BQ, segments_BS, index_Q, at_S)
    weights_BNQS = jax.nn.softmax(scores_BNQS, axis=-1).astype(v_BSKH.dtype)
    v_BNSH = _repeat(v_BKSH, q_BQNH.shape[2])
    return jnp.einsum("bnqs,bnsh->bqnh", weights_BNQS, v_BNSH)


def _repeat(x_BKSH: jax.Array, N: int) -> jax.Array:
    """Each kv head once for every query head that reads it."""
    return jnp.repeat(x_BKSH, N // x_BKSH.shape[1], axis=1)


def _scores(q_BNQH, k_BKSH, segments_BQ, segments_BS, index_Q, index_S) -> jax.Array:
    """What softmax is taken of, [B, N, Q, S] float32."""
    N, H = q_BNQH.shape[1], q_BNQH.shape[3]
    scores_BNQS = jnp.einsum(
        "bnqh,bnsh->bnqs", q_BNQH, _repeat(k_BKSH, N), preferred_element_type=jnp.float32
    ) * (H**-0.5)
    seen_BQS = segments_BQ[:, :, None] == segments_BS[:, None, :]
    seen_BQS &= index_S <= index_Q[:, None]
    return jnp.where(seen_BQS[:, None], scores_BNQS, MASKED)


def _split(x: jax.Array, axis: int, block: int) -> jax.Array:
    """Blocks of a dimension in front, padded with zeros to whole ones: [n, ..., block, ...]."""
    x = jnp.pad(x, [(0, -n % block if i == axis else 0) for i, n in enumerate(x.shape)])
    return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, block, *x.shape[axis + 1 :]), axis, 0)


def _keys(k_BSKH, v_BSKH, segments_BS, block: int):
    """Keys, values, segments as blocks in front, head-major; and the index of each block's keys."""
    k_nBKsH, v_nBKsH = (_split(jnp.swapaxes(x, 1, 2), 2, block) for x in (k_BSKH, v_BSKH))
    n = len(k_nBKsH)
    return k_nBKsH, v_nBKsH, _split(segments_BS, 1, block), jnp.arange(n * block).reshape(n, block)


def _reach(segments_Bq, index_q, segments_nBs) -> tuple[jax.Array, jax.Array]:
    """The first block of keys that may share a segment with these queries, and the first after them."""
    low_nB, high_nB = segments_nBs.min(2), segments_nBs.max(2)
    shared_nB = (low_nB <= segments_Bq.max(1)) & (high_nB >= segments_Bq.min(1))
    return jnp.argmax(shared_nB.any(1)), index_q.max() // segments_nBs.shape[2] + 1


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _blocked(q_BQNH, k_BSKH, v_BSKH, segments_BQ, segments_BS, index_Q, block):
    return _blocked_forward(q_BQNH, k_BSKH, v_BSKH, segments_BQ, segments_BS, index_Q, block)[0]


def _blocked_forward(q_BQNH, k_BSKH, v_BSKH, segments_BQ, segments_BS, index_Q, block):
    B, Q, N, H = q_BQNH.shape
    keys = _keys(k_BSKH, v_BSKH, segments_BS, block)

    def some(part):
        q_BqNH, segments_Bq, index_q = part
        q_BNqH = jnp.swapaxes(q_BqNH, 1, 2)

        def step(i, carry):
            top_BNq, total_BNq, sum_BNqH = carry
            k_BKsH, v_BKsH, segments_Bs, index_s = (x[i] for x in keys)
            scores_BNqs = _scores(q_BNqH, k_BKsH, segments_Bq, segments_Bs, index_q, index_s)
            new_BNq = jnp.maximum(top_BNq, scores_BNqs.max(-1))
            shrink_BNq = jnp.exp(top_BNq - new_BNq)
            weights_BNqs = jnp.exp(scores_BNqs - new_BNq[..., None])
            part_BNqH = jnp.einsum(
                "bnqs,bnsh->bnqh",
                weights_BNqs.astype(v_BKsH.dtype),
                _repeat(v_BKsH, N),
                preferred_element_type=jnp.float32,
            )
            total_BNq = total_BNq * shrink_BNq + weights_BNqs.sum(-1)
            return new_BNq, total_BNq, sum_BNqH * shrink_BNq[..., None] + part_BNqH

        zero_BNq = jnp.zeros((B, N, block), jnp.float32)
        start = (zero_BNq + MASKED, zero_BNq, jnp.zeros((B, N, block, H), jnp.float32))
        reach = _reach(segments_Bq, index_q, keys[2])
        top_BNq, total_BNq, sum_BNqH = jax.lax.fori_loop(*reach, step, start)
        out_BNqH = (sum_BNqH / total_BNq[..., None]).astype(q_BQNH.dtype)
        return jnp.swapaxes(out_BNqH, 1, 2), top_BNq + jnp.log(total_BNq)

    parts = (_split(q_BQNH, 1, block), _split(segments_BQ, 1, block), _split(index_Q, 0, block))
    out_nBqNH, lse_nBNq = jax.lax.map(some, parts)
    out_BQNH = jnp.moveaxis(out_nBqNH, 0, 1).reshape(B, -1, N, H)[:, :Q]
    out_BQNH, lse_nBNq = (checkpoint_name(x, "attention") for x in (out_BQNH, lse_nBNq))
    return out_BQNH, (q_BQNH, k_BSKH, v_BSKH, segments_BQ, segments_BS, index_Q, out_BQNH, lse_nBNq)


def _blocked_backward(block, saved, grad_BQNH):
    q_BQNH, k_BSKH, v_BSKH, segments_BQ, segments_BS, index_Q, out_BQNH, lse_nBNq = saved
    B, Q, N, H = q_BQNH.shape
    S, K = k_BSKH.shape[1:3]
    keys = _keys(k_BSKH, v_BSKH, segments_BS, block)
    dot_BQN = (grad_BQNH.astype(jnp.float32) * out_BQNH.astype(jnp.float32)).sum(-1)
    einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    def some(carry, part):
        q_BqNH, grad_BqNH, dot_BqN, segments_Bq, index_q, lse_BNq = part
        q_BNqH, grad_BNqH, dot_BNq = (jnp.swapaxes(x, 1, 2) for x in (q_BqNH, grad_BqNH, dot_BqN))

        def step(i, carry):
            dq_BNqH, dk_nBKsH, dv_nBKsH = carry
            k_BKsH, v_BKsH, segments_Bs, index_s = (x[i] for x in keys)
            scores_BNqs = _scores(q_BNqH, k_BKsH, segments_Bq, segments_Bs, index_q, index_s)
            weights_BNqs = jnp.exp(scores_BNqs - lse_BNq[..., None])
            back_BNqs = einsum("bnqh,bnsh->bnqs", grad_BNqH, _repeat(v_BKsH, N))
            back_BNqs = weights_BNqs * (back_BNqs - dot_BNq[..., None]) * (H**-0.5)
            back_BNqs = back_BNqs.astype(q_BQNH.dtype)
            dq_BNqH += einsum("bnqs,bnsh->bnqh", back_BNqs, _repeat(k_BKsH, N))
            dk_BNsH = einsum("bnqs,bnqh->bnsh", back_BNqs, q_BNqH)
            dv_BNsH = einsum("bnqs,bnqh->bnsh", weights_BNqs.astype(q_BQNH.dtype), grad_BNqH)
            dk_nBKsH = dk_nBKsH.at[i].add(dk_BNsH.reshape(B, K, -1, block, H).sum(2))
            dv_nBKsH = dv_nBKsH.at[i].add(dv_BNsH.reshape(B, K, -1, block, H).sum(2))
            return dq_BNqH, dk_nBKsH, dv_nBKsH

        start = (jnp.zeros(q_BNqH.shape, jnp.float32), *carry)
        dq_BNqH, *carry = jax.lax.fori_loop(*_reach(segments_Bq, index_q, keys[2]), step, start)
        return tuple(carry), jnp.swapaxes(dq_BNqH, 1, 2).astype(q_BQNH.dtype)

    parts = [_split(x, 1, block) for x in (q_BQNH, grad_BQNH, dot_BQN, segments_BQ)]
    parts += [_split(index_Q, 0, block), lse_nBNq]
    zero_nBKsH = jnp.zeros(keys[0].shape, jnp.float32)
    (dk_nBKsH, dv_nBKsH), dq_nBqNH = jax.lax.scan(some, (zero_nBKsH, zero_nBKsH), tuple(parts))

    def join(x_nBKsH, dtype):
        x_BnsKH = x_nBKsH.transpose(1, 0, 3, 2, 4)
        return x_BnsKH.reshape(B, -1, K, H)[:, :S].astype(dtype)

    dq_BQNH = jnp.moveaxis(dq_nBqNH, 0, 1).reshape(B, -1, N, H)[:, :Q]
    return dq_BQNH, join(dk_nBKsH, k_BSKH.dtype), join(dv_nBKsH, v_BSKH.dtype), None, None, None


_blocked.defvjp(_blocked_forward, _blocked_backward)


@dataclasses.dataclass(frozen=True)
class _Seen(mask_lib.Mask):
    """The causal mask of queries in the order of `context.order`, keys in natural order, for splash.

    The kernel computes it from the index of each query. Only which blocks are full, empty or neither
    is read from here, so a block is stood for by the least array of which any() and all() say so: to
    write blocks out takes minutes at 131,072 positions.
    """

    index: bytes

    @property
    def q_sequence(self) -> np.ndarray:
        return np.frombuffer(self.index, np.int32)

    @property
    def mask_function(self):
        return operator.ge

    @property
    def shape(self) -> tuple[int, int]:
        T = len(self.index) // 4
        return T, T

    def __getitem__(self, at: tuple[slice, slice]) -> np.ndarray:
        queries, keys = self.q_sequence[at[0]], at[1]
        return np.array([queries.max() >= keys.start, queries.min() >= keys.stop - 1])


def _splash_kernel(T: int) -> splash_lib.SplashAttentionKernel:
    """The kernel for all queries of T positions, to be cut over `context`."""
    C = context.shards()
    # blocks that lie in one chunk can be skipped whole
    chunk = T // (2 * C) if C > 1 and T // C % (2 * LANES) == 0 else T // C
    large, small = (
        next(n for n in (top, 512, 256, LANES) if chunk % n == 0) for top in (1024, 512)
    )
    sizes = splash_lib.BlockSizes(
        block_q=large,
        block_kv=large,
        block_kv_compute=small,
        block_q_dkv=large,
        block_kv_dkv=large,
        block_kv_dkv_compute=small,
        block_q_dq=large,
        block_kv_dq=large,
    )
    return splash_lib.make_splash_mha(
        mask_lib.MultiHeadMask([_Seen(context.order(T).tobytes())]),  # the same for all heads
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=C,
        residual_checkpoint_name="attention",
        interpret=platform() != "tpu",
    )


def splash(q_BQNH, k_BSKH, v_BSKH, segments_BQ, segments_BS, kernel) -> jax.Array:
    """As `plain`, by the kernel for these queries."""
    q_BNQH, k_BKSH, v_BKSH = (jnp.swapaxes(x, 1, 2) for x in (q_BQNH, k_BSKH, v_BSKH))
    q_BNQH = q_BNQH * jnp.asarray(q_BQNH.shape[3] ** -0.5, q_BQNH.dtype)
    segments = splash_lib.SegmentIds(segments_BQ, segments_BS)
    return jnp.swapaxes(jax.vmap(kernel)(q_BNQH, k_BKSH, v_BKSH, segments), 1, 2)


def cudnn(q_BQNH, k_BSKH, v_BSKH, segments_BQ, segments_BS, index_Q) -> jax.Array:
    """As `plain`, by cuDNN."""
    seen_BQS = segments_BQ[:, :, None] == segments_BS[:, None, :]
    seen_BQS &= jnp.arange(k_BSKH.shape[1]) <= index_Q[:, None]
    return jax.nn.dot_product_attention(
        q_BQNH, k_BSKH, v_BSKH, mask=seen_BQS[:, None], implementation="cudnn"
    )
