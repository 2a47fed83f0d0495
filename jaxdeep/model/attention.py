"""Causal attention of a sequence to itself inside its segments, and the kernels that compute it.

    plain    XLA on any device: short sequences at once, longer ones in blocks of queries and keys
             with an online softmax (arXiv 2205.14135), recomputed in the backward pass
    splash   the Pallas kernel for TPUs that comes with JAX; elsewhere it is interpreted, for tests
    cudnn    cuDNN's kernel on GPUs, in half precision; its mask takes memory quadratic in T
    auto     splash on TPUs, cudnn on GPUs, plain elsewhere and for shapes that the kernel refuses

Scores and softmax are float32. A query without any key to see (padding) gets a finite value that no
loss reads.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

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
MASKED = -1e30  # finite: with -inf the softmax of a row without any key would be NaN
LANES = 128  # a TPU's vector width, and the smallest block of splash


class Window(NamedTuple):
    """A sliding window: a query sees itself and the `width - 1` positions before it. Where layers
    with and without one share a program, `on` says whether this one has it, [] bool (None: yes)."""

    width: int
    on: jax.Array | None = None

    @classmethod
    def of(cls, width: int, on: jax.Array | None) -> Window | None:
        """The window; None for a width of 0."""
        return cls(width, on) if width else None

    def reach(self) -> jax.Array:
        """How many positions back a query sees, its own among them, [] int32."""
        width = jnp.int32(self.width)
        return width if self.on is None else jnp.where(self.on, width, jnp.iinfo(jnp.int32).max)


def attend(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments_BT: jax.Array,
    *,
    kind: str = "auto",
    block: int = 128,
    window: Window | None = None,
) -> jax.Array:
    """Causal attention of a sequence to itself, inside each segment and, if there is one, the
    window; returns BTNH.

    On a mesh, rows are sharded over `replica` and `data`, heads over `model`, and positions over
    `context`, in the order of `context.order`. Each device all-gathers the keys and values of its
    rows and kv heads over `context` for its own queries. Where training shards positions over
    `model`, too (`context.sequence_parallel`), an all-to-all exchanges them for heads, and back.

    `block` is the number of queries and of keys in a block of the plain computation. ConfigError
    for heads or positions that do not divide over the mesh, and for a kind (other than auto) that
    cannot compute these shapes here.
    """
    T, N = q_BTNH.shape[1:3]
    K = k_BTKH.shape[2]
    kind = choose(kind, q_BTNH.shape, q_BTNH.dtype)
    # what decides the mask: splash has it inside the kernel, the others take the queries' indices
    mask = _splash_kernels(T, window) if kind == "splash" else jnp.asarray(context.order(T))
    # whether, or how far, this layer is windowed, as data
    reach = window and (window.on if kind == "splash" else window.reach())
    run = {"plain": functools.partial(plain, block=block), "splash": splash, "cudnn": cudnn}[kind]
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return run(q_BTNH, k_BTKH, v_BTKH, segments_BT, segments_BT, mask, reach)
    if N % mesh.shape["model"]:
        raise ConfigError(
            f"{N} attention heads do not divide over model={mesh.shape['model']} devices: choose a "
            "mesh.model that divides them"
        )
    # as in mesh.sharding: kv heads that do not divide over `model` are whole on every device
    divides = K % mesh.shape["model"] == 0

    def local(q_btnH, k_btkH, v_btkH, segments_bt, mask, reach):
        if not divides:
            heads = kv_heads(N, K, mesh.shape["model"], jax.lax.axis_index("model"))
            k_btkH, v_btkH = (jnp.take(x, heads, axis=2) for x in (k_btkH, v_btkH))
        k_bTkH, v_bTkH, segments_bT = map(context.gather, (k_btkH, v_btkH, segments_bt))
        return run(q_btnH, k_bTkH, v_bTkH, segments_bt, segments_bT, mask, reach)

    heads, tokens = P(ROWS, "context", "model"), P(ROWS, "context")
    keys = heads if divides else tokens
    mask_spec = P("context")
    if kind == "splash":
        over = NamedSharding(mesh, P(None, "context"))
        mask_spec = tuple(kernel.manual_sharding_spec(over) for kernel in mask)
    # check_vma is off: the kernels do not declare over which axes their results vary
    shared = jax.shard_map(
        local,
        in_specs=(heads, keys, keys, tokens, mask_spec, P()),
        out_specs=heads,
        check_vma=False,
    )
    if not context.sequence_parallel(T):
        return shared(q_BTNH, k_BTKH, v_BTKH, segments_BT, mask, reach)
    # Constrained on both sides: without it XLA propagates the sharding by heads outwards, into the
    # linears, where every device has positions of its own.
    return context.constrain_activations(
        shared(
            *map(context.constrain_activations, (q_BTNH, k_BTKH, v_BTKH)), segments_BT, mask, reach
        )
    )


def kv_heads(N: int, K: int, model: int, index: int | jax.Array) -> np.ndarray | jax.Array:
    """The kv heads that the query heads of device `index` of `model` devices read, where K kv heads
    do not divide over them: one if all its query heads share it, else one for each query head."""
    heads, group = N // model, N // K  # query heads of a device, and of a kv head
    return (index * heads + np.arange(heads if group % heads else 1)) // group


def choose(kind: str, shape_BTNH: tuple[int, ...], dtype: Any) -> str:
    """The kernel that `kind` stands for, for queries of this shape on the devices in use.
    ConfigError for one that cannot run here."""
    if kind not in KINDS:
        raise ConfigError(f"model.attention={kind!r}: choose one of {', '.join(KINDS)}")
    T, H, device = shape_BTNH[1], shape_BTNH[3], platform()
    shard = T // context.shards()
    refusals = {
        "plain": "",
        "splash": (
            shard % LANES
            and f"splash needs a multiple of {LANES} positions on each device, there are {shard}"
        )
        or (
            device == "tpu"
            and H % LANES
            and f"splash on TPUs needs heads of a multiple of {LANES} numbers, not {H}"
        ),
        "cudnn": (device != "gpu" and f"cudnn runs on GPUs, not on {device}")
        or (jnp.dtype(dtype).itemsize != 2 and f"cudnn needs bfloat16 or float16, not {dtype}"),
    }
    if kind == "auto":
        best = {"tpu": "splash", "gpu": "cudnn"}.get(device, "plain")
        return "plain" if refusals[best] else best
    if refusals[kind]:
        raise ConfigError(f"model.attention={kind!r}: {refusals[kind]}; choose auto or plain")
    return kind


def platform() -> str:
    """The platform that the program is traced for ("cpu", "gpu", "tpu"): that of the mesh in use,
    which need not be of this machine when a program is compiled ahead of time."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def plain(
    q_BQNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segments_BQ: jax.Array,
    segments_BS: jax.Array,
    index_Q: jax.Array,
    reach: jax.Array | None = None,
    *,
    block: int = 128,
) -> jax.Array:
    """Attention of queries at the indices `index_Q` of a sequence to its keys 0..S-1; returns BQNH.
    A query sees `reach` keys, its own the last of them (None: all before it).

    Each kv head is repeated for its query heads: on XLA's CPU backend a grouped einsum costs twice
    as much in training.
    """
    args = (q_BQNH, k_BSKH, v_BSKH, segments_BQ, segments_BS, index_Q, reach)
    if max(q_BQNH.shape[1], k_BSKH.shape[1]) > block:
        return _blocked(*args, block)
    q_BNQH, k_BKSH, v_BKSH = (jnp.swapaxes(x, 1, 2) for x in (q_BQNH, k_BSKH, v_BSKH))
    index_S = jnp.arange(k_BSKH.shape[1])
    scores_BNQS = _scores(q_BNQH, k_BKSH, segments_BQ, segments_BS, index_Q, index_S, reach)
    weights_BNQS = jax.nn.softmax(scores_BNQS, axis=-1).astype(v_BSKH.dtype)
    v_BNSH = _repeat(v_BKSH, q_BQNH.shape[2])
    return jnp.einsum("bnqs,bnsh->bqnh", weights_BNQS, v_BNSH)


def _repeat(x_BKSH: jax.Array, N: int) -> jax.Array:
    """Each kv head once for every query head that reads it."""
    return jnp.repeat(x_BKSH, N // x_BKSH.shape[1], axis=1)


def _scores(q_BNQH, k_BKSH, segments_BQ, segments_BS, index_Q, index_S, reach) -> jax.Array:
    """The masked scores, before softmax: [B, N, Q, S] float32."""
    N, H = q_BNQH.shape[1], q_BNQH.shape[3]
    scores_BNQS = jnp.einsum(
        "bnqh,bnsh->bnqs", q_BNQH, _repeat(k_BKSH, N), preferred_element_type=jnp.float32
    ) * (H**-0.5)
    seen_BQS = segments_BQ[:, :, None] == segments_BS[:, None, :]
    seen_BQS &= _visible(index_Q, index_S, reach)
    return jnp.where(seen_BQS[:, None], scores_BNQS, MASKED)


def _visible(index_Q: jax.Array, index_S: jax.Array, reach: jax.Array | None) -> jax.Array:
    """Which keys are at or before each query, and within its reach; [Q, S]."""
    back_QS = index_Q[:, None] - index_S
    return back_QS >= 0 if reach is None else (back_QS >= 0) & (back_QS < reach)


def _split(x: jax.Array, axis: int, block: int) -> jax.Array:
    """`x` with a dimension cut into blocks, which come first: [z, ..., block, ...]. The last block
    is padded with zeros; a segment of 0 is padding."""
    x = jnp.pad(x, [(0, -n % block if i == axis else 0) for i, n in enumerate(x.shape)])
    return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, block, *x.shape[axis + 1 :]), axis, 0)


def _keys(k_BSKH, v_BSKH, segments_BS, block: int):
    """Keys, values and segments in blocks, head-major, and the indices of each block's keys."""
    k_zBKsH, v_zBKsH = (_split(jnp.swapaxes(x, 1, 2), 2, block) for x in (k_BSKH, v_BSKH))
    z = len(k_zBKsH)
    return k_zBKsH, v_zBKsH, _split(segments_BS, 1, block), jnp.arange(z * block).reshape(z, block)


def _range(segments_Bq, index_q, segments_zBs, reach) -> tuple[jax.Array, jax.Array]:
    """The range of blocks of keys that these queries may see, from the first that may hold one of
    their segments, within reach, to the one of the last query. In rows of several sequences these
    are few."""
    s = segments_zBs.shape[2]
    low_zB, high_zB = segments_zBs.min(2), segments_zBs.max(2)
    shared_zB = (low_zB <= segments_Bq.max(1)) & (high_zB >= segments_Bq.min(1))
    first = jnp.argmax(shared_zB.any(1))
    if reach is not None:
        first = jnp.maximum(first, jnp.maximum(index_q.min() - (reach - 1), 0) // s)
    return first, index_q.max() // s + 1


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def _blocked(q_BQNH, k_BSKH, v_BSKH, segments_BQ, segments_BS, index_Q, reach, block):
    """As `plain`, block by block: [Q, S] scores never exist whole."""
    args = (q_BQNH, k_BSKH, v_BSKH, segments_BQ, segments_BS, index_Q, reach)
    return _blocked_forward(*args, block)[0]


def _blocked_forward(q_BQNH, k_BSKH, v_BSKH, segments_BQ, segments_BS, index_Q, reach, block):
    B, Q, N, H = q_BQNH.shape
    keys = _keys(k_BSKH, v_BSKH, segments_BS, block)

    def attend_block(queries):
        q_BqNH, segments_Bq, index_q = queries
        q_BNqH = jnp.swapaxes(q_BqNH, 1, 2)

        def step(i, carry):
            # of the keys so far: the largest score, the softmax's denominator and its numerator,
            # both relative to that score
            top_BNq, total_BNq, sum_BNqH = carry
            k_BKsH, v_BKsH, segments_Bs, index_s = (x[i] for x in keys)
            scores_BNqs = _scores(q_BNqH, k_BKsH, segments_Bq, segments_Bs, index_q, index_s, reach)
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
        blocks = _range(segments_Bq, index_q, keys[2], reach)
        top_BNq, total_BNq, sum_BNqH = jax.lax.fori_loop(*blocks, step, start)
        out_BNqH = (sum_BNqH / total_BNq[..., None]).astype(q_BQNH.dtype)
        return jnp.swapaxes(out_BNqH, 1, 2), top_BNq + jnp.log(total_BNq)

    blocks = (_split(q_BQNH, 1, block), _split(segments_BQ, 1, block), _split(index_Q, 0, block))
    out_yBqNH, lse_yBNq = jax.lax.map(attend_block, blocks)
    out_BQNH = jnp.moveaxis(out_yBqNH, 0, 1).reshape(B, -1, N, H)[:, :Q]
    # named for config.REMAT: with both saved, the backward pass does not run this again
    out_BQNH, lse_yBNq = (checkpoint_name(x, "attention") for x in (out_BQNH, lse_yBNq))
    saved = (q_BQNH, k_BSKH, v_BSKH, segments_BQ, segments_BS, index_Q, reach, out_BQNH, lse_yBNq)
    return out_BQNH, saved


def _blocked_backward(block, saved, grad_BQNH):
    """Softmax weights are recomputed from the saved log-sum-exp of each query's scores."""
    q_BQNH, k_BSKH, v_BSKH, segments_BQ, segments_BS, index_Q, reach, out_BQNH, lse_yBNq = saved
    B, Q, N, H = q_BQNH.shape
    S, K = k_BSKH.shape[1:3]
    keys = _keys(k_BSKH, v_BSKH, segments_BS, block)
    dot_BQN = (grad_BQNH.astype(jnp.float32) * out_BQNH.astype(jnp.float32)).sum(-1)
    einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    def attend_block(carry, queries):
        q_BqNH, grad_BqNH, dot_BqN, segments_Bq, index_q, lse_BNq = queries
        q_BNqH, grad_BNqH, dot_BNq = (jnp.swapaxes(x, 1, 2) for x in (q_BqNH, grad_BqNH, dot_BqN))

        def step(i, carry):
            dq_BNqH, dk_zBKsH, dv_zBKsH = carry
            k_BKsH, v_BKsH, segments_Bs, index_s = (x[i] for x in keys)
            scores_BNqs = _scores(q_BNqH, k_BKsH, segments_Bq, segments_Bs, index_q, index_s, reach)
            weights_BNqs = jnp.exp(scores_BNqs - lse_BNq[..., None])
            back_BNqs = einsum("bnqh,bnsh->bnqs", grad_BNqH, _repeat(v_BKsH, N))
            # softmax's gradient: weight * (own gradient - the weighted mean of all)
            back_BNqs = weights_BNqs * (back_BNqs - dot_BNq[..., None]) * (H**-0.5)
            back_BNqs = back_BNqs.astype(q_BQNH.dtype)
            dq_BNqH += einsum("bnqs,bnsh->bnqh", back_BNqs, _repeat(k_BKsH, N))
            dk_BNsH = einsum("bnqs,bnqh->bnsh", back_BNqs, q_BNqH)
            dv_BNsH = einsum("bnqs,bnqh->bnsh", weights_BNqs.astype(q_BQNH.dtype), grad_BNqH)
            dk_zBKsH = dk_zBKsH.at[i].add(dk_BNsH.reshape(B, K, -1, block, H).sum(2))
            dv_zBKsH = dv_zBKsH.at[i].add(dv_BNsH.reshape(B, K, -1, block, H).sum(2))
            return dq_BNqH, dk_zBKsH, dv_zBKsH

        start = (jnp.zeros(q_BNqH.shape, jnp.float32), *carry)
        blocks = _range(segments_Bq, index_q, keys[2], reach)
        dq_BNqH, *carry = jax.lax.fori_loop(*blocks, step, start)
        return tuple(carry), jnp.swapaxes(dq_BNqH, 1, 2).astype(q_BQNH.dtype)

    blocks = [_split(x, 1, block) for x in (q_BQNH, grad_BQNH, dot_BQN, segments_BQ)]
    blocks = (*blocks, _split(index_Q, 0, block), lse_yBNq)
    zero_zBKsH = jnp.zeros(keys[0].shape, jnp.float32)
    (dk_zBKsH, dv_zBKsH), dq_yBqNH = jax.lax.scan(attend_block, (zero_zBKsH, zero_zBKsH), blocks)

    def join(x_zBKsH, dtype):
        x_BzsKH = x_zBKsH.transpose(1, 0, 3, 2, 4)
        return x_BzsKH.reshape(B, -1, K, H)[:, :S].astype(dtype)

    dq_BQNH = jnp.moveaxis(dq_yBqNH, 0, 1).reshape(B, -1, N, H)[:, :Q]
    dk_BSKH, dv_BSKH = join(dk_zBKsH, k_BSKH.dtype), join(dv_zBKsH, v_BSKH.dtype)
    return dq_BQNH, dk_BSKH, dv_BSKH, None, None, None, None


_blocked.defvjp(_blocked_forward, _blocked_backward)


@functools.cache  # one function for a width: the kernel is compiled for each
def _within(width: int) -> Callable[[jax.Array, jax.Array], jax.Array]:
    return lambda q, k: (q >= k) & (q - k < width)


@dataclasses.dataclass(frozen=True)
class _CausalMask(mask_lib.Mask):
    """The causal mask of queries in the order of `context.order`, keys in natural order, for
    splash; with a `window` its last keys alone.

    The kernel computes the mask itself from the index of each query. From here it only learns
    whether a block is full, empty or neither, by any() and all(), so a block is represented by two
    numbers with the same any() and all(): to write out all blocks takes minutes at 131,072
    positions.
    """

    index: bytes
    window: int = 0  # 0: none

    @property
    def q_sequence(self) -> np.ndarray:
        return np.frombuffer(self.index, np.int32)

    @property
    def mask_function(self):
        if not self.window:
            return operator.ge
        return _within(self.window)

    @property
    def shape(self) -> tuple[int, int]:
        T = len(self.index) // 4
        return T, T

    def __getitem__(self, block: tuple[slice, slice]) -> np.ndarray:
        queries, keys = self.q_sequence[block[0]], block[1]
        some, every = queries.max() >= keys.start, queries.min() >= keys.stop - 1
        if self.window:
            # the last key within reach of the first query, and the first of the last query
            some &= queries.min() - self.window < keys.stop - 1
            every &= queries.max() - self.window < keys.start
        return np.array([some, every])


def _splash_kernels(T: int, window: Window | None) -> tuple:
    """The kernels for all queries of T positions, to be sharded over `context`: one, or where some
    layers are windowed the one with the window, and the one without."""
    if window is None or window.on is None:
        return (_splash_kernel(T, window.width if window else 0),)
    return _splash_kernel(T, window.width), _splash_kernel(T, 0)


def _splash_kernel(T: int, window: int) -> splash_lib.SplashAttentionKernel:
    C = context.shards()
    # A block of one chunk (see context.order) has consecutive queries, so that more blocks are
    # empty and skipped than if it held some of an early and some of a late chunk.
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
        # the same for all heads
        mask_lib.MultiHeadMask([_CausalMask(context.order(T).tobytes(), window)]),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=C,
        residual_checkpoint_name="attention",
        interpret=platform() != "tpu",
    )


def splash(q_BQNH, k_BSKH, v_BSKH, segments_BQ, segments_BS, kernels, windowed) -> jax.Array:
    """As `plain`, by the splash kernel for these queries: the first of two if they are
    `windowed`."""
    q_BNQH, k_BKSH, v_BKSH = (jnp.swapaxes(x, 1, 2) for x in (q_BQNH, k_BSKH, v_BSKH))
    q_BNQH = q_BNQH * jnp.asarray(q_BQNH.shape[3] ** -0.5, q_BQNH.dtype)
    args = (q_BNQH, k_BKSH, v_BKSH, splash_lib.SegmentIds(segments_BQ, segments_BS))
    run = [jax.vmap(kernel) for kernel in kernels]
    out_BNQH = run[0](*args) if windowed is None else jax.lax.cond(windowed, *run, *args)
    return jnp.swapaxes(out_BNQH, 1, 2)


def cudnn(q_BQNH, k_BSKH, v_BSKH, segments_BQ, segments_BS, index_Q, reach=None) -> jax.Array:
    """As `plain`, by cuDNN's kernel."""
    seen_BQS = segments_BQ[:, :, None] == segments_BS[:, None, :]
    seen_BQS &= _visible(index_Q, jnp.arange(k_BSKH.shape[1]), reach)
    return jax.nn.dot_product_attention(
        q_BQNH, k_BSKH, v_BSKH, mask=seen_BQS[:, None], implementation="cudnn"
    )
