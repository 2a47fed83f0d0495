"""Prefill and decode: append new tokens to the pages, draw after the last one, feed it back.

    prefill   rows take in new tokens; one token is drawn after the last of each
    decode    rows draw for a fixed number of steps, or until none is active

Both are pure functions. Seeds, temperatures, cut-offs, stops, budgets and adapters are arrays, so
other values compile nothing. Every row has a random key of its own for every token, so that what it
draws does not depend on the rows beside it.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxdeep.model import decoder, head, paged
from jaxdeep.model import weights as model_weights
from jaxdeep.model.config import Config
from jaxdeep.parallel import mesh as meshes


@struct.dataclass
class DrawParams:
    """How each row draws.

    `seed_B` uint32; `temperature_B`, 0 for the most likely token; the cut-offs of `types.Sampling`:
    `top_p_B` (1: all), `top_k_B` (0: all), `min_p_B` (0: all). `stop_BZW` are up to Z sequences of
    up to W ids that end a turn, right-aligned with -1 before them, all -1 if there is none.
    `tail_BW` are the last W tokens that the row drew in this turn, right-aligned in the same way;
    `index_B` is how many it has drawn, `left_B` how many it may still draw.
    """

    seed_B: jax.Array
    temperature_B: jax.Array
    top_p_B: jax.Array
    top_k_B: jax.Array
    min_p_B: jax.Array
    stop_BZW: jax.Array
    tail_BW: jax.Array
    index_B: jax.Array
    left_B: jax.Array


def idle(B: int, Z: int, W: int) -> DrawParams:
    """Parameters of B rows that draw nothing, with room for Z stops of W tokens. They are numpy
    arrays, to be filled in."""
    return DrawParams(
        seed_B=np.zeros(B, np.uint32),
        temperature_B=np.zeros(B, np.float32),
        top_p_B=np.ones(B, np.float32),
        top_k_B=np.zeros(B, np.int32),
        min_p_B=np.zeros(B, np.float32),
        stop_BZW=np.full((B, Z, W), -1, np.int32),
        tail_BW=np.full((B, W), -1, np.int32),
        index_B=np.zeros(B, np.int32),
        left_B=np.zeros(B, np.int32),
    )


@struct.dataclass
class Draws:
    """A token for each row, and its log-probability in nats: `logp_B` under the policy at
    temperature 1, `drawn_logp_B` under the distribution it was drawn from."""

    token_B: jax.Array
    logp_B: jax.Array
    drawn_logp_B: jax.Array


def cut(scaled_BV: jax.Array, params: DrawParams) -> jax.Array:
    """Scores [B, V] with minus infinity in place of those that top-k, top-p or min-p exclude; top-p
    is of the probability that top-k left, as in transformers and vLLM. The most likely token always
    stays, and all whose score equals the lowest that stays."""
    V = scaled_BV.shape[1]
    down_BV = -jnp.sort(-scaled_BV, axis=-1)
    top_k_B = jnp.where(params.top_k_B > 0, jnp.minimum(params.top_k_B, V), V)
    lowest_B1 = jnp.take_along_axis(down_BV, top_k_B[:, None] - 1, axis=-1)
    kept_BV = down_BV >= lowest_B1
    prob_BV = jax.nn.softmax(jnp.where(kept_BV, down_BV, -jnp.inf), axis=-1)
    before_BV = jnp.cumsum(prob_BV, axis=-1) - prob_BV
    kept_BV &= before_BV < params.top_p_B[:, None]
    kept_BV &= prob_BV >= params.min_p_B[:, None] * prob_BV[:, :1]
    last_B = jnp.maximum(jnp.sum(kept_BV, axis=-1) - 1, 0)
    least_B1 = jnp.take_along_axis(down_BV, last_B[:, None], axis=-1)
    return jnp.where(scaled_BV >= least_B1, scaled_BV, -jnp.inf)


def sample_token(
    seed: jax.Array, index: jax.Array, mass_V: jax.Array, best: jax.Array
) -> jax.Array:
    """An id drawn with probability proportional to `mass_V`. `best` is the most likely id.

    It inverts the cumulative distribution twice: first for a block of about sqrt(V) ids, then for
    an id in the block. That takes two random numbers, where Gumbel noise takes V, and resolves
    rare ids better than one float32 for the whole vocabulary would.
    """
    # the two words of a key are as random as numbers drawn with it, and cost a third
    bits_2 = jax.random.key_data(jax.random.fold_in(jax.random.key(seed), index))
    u, w = (bits_2 >> 8).astype(jnp.float32) * 2.0**-24
    V = len(mass_V)
    width = max(int(V**0.5), 1)
    mass_XW = jnp.pad(mass_V, (0, -V % width)).reshape(-1, width)

    def first(mass: jax.Array, u: jax.Array) -> jax.Array:
        total = jnp.cumsum(mass)
        return jnp.argmax(total > u * total[-1])

    block = first(jnp.sum(mass_XW, axis=1), u)
    token = block * width + first(mass_XW[block], w)
    # the two sums round differently, so the id may be one without mass, or beyond the vocabulary
    return jnp.where(mass_V[jnp.minimum(token, V - 1)] > 0, token, best)


def draw(logits_BV: jax.Array, params: DrawParams) -> Draws:
    """One token for each row."""
    warm_B = params.temperature_B > 0
    scaled_BV = logits_BV / jnp.where(warm_B, params.temperature_B, 1.0)[:, None]
    cuts = jnp.any((params.top_p_B < 1) | (params.top_k_B > 0) | (params.min_p_B > 0))
    # sorting the vocabulary costs more than a small model: only if a row asks for it
    scaled_BV = jax.lax.cond(cuts, lambda: cut(scaled_BV, params), lambda: scaled_BV)
    top_B1 = jnp.max(scaled_BV, axis=-1, keepdims=True)
    mass_BV = jnp.exp(scaled_BV - top_B1)
    # the first id of the highest score; not argmax, which is several times slower in XLA on CPUs
    V = scaled_BV.shape[1]
    best_B = jnp.min(jnp.where(scaled_BV == top_B1, jnp.arange(V), V - 1), axis=-1)
    drawn_B = jax.vmap(sample_token)(params.seed_B, params.index_B, mass_BV, best_B)
    token_B = jnp.where(warm_B, drawn_B, best_B)

    def of_token(x_BV: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x_BV, token_B[:, None], axis=-1)[:, 0]

    logp_B = of_token(logits_BV) - jax.nn.logsumexp(logits_BV, axis=-1)
    drawn_logp_B = of_token(scaled_BV) - top_B1[:, 0] - jnp.log(jnp.sum(mass_BV, axis=-1))
    return Draws(token_B, logp_B, jnp.where(warm_B, drawn_logp_B, 0.0))


def prefill(
    params: dict,
    lora: Any,
    pages: paged.Pages,
    tokens_BT: jax.Array,
    count_B: jax.Array,
    draw_params: DrawParams,
    *,
    cfg: Config,
) -> tuple[jax.Array, Draws]:
    """Append the first `count_B` tokens of each row to its pages and draw one after the last.

    Returns the new array of all pages and the draws. A draw means something only in a row that
    reaches the end of its prompt.
    """
    hidden_BTD, pages = decoder.forward(
        params, lora, tokens_BT, cfg=cfg, cache=pages, count_B=count_B
    )
    last_BD = jnp.take_along_axis(hidden_BTD, (count_B - 1)[:, None, None], axis=1)[:, 0]
    return pages.kv_LPSJH, draw(head.logits(params, last_BD, cfg=cfg), draw_params)


def decode(
    params: dict,
    lora: Any,
    pages: paged.Pages,
    token_B: jax.Array,
    draw_params: DrawParams,
    *,
    cfg: Config,
    steps: int,
) -> tuple[jax.Array, Draws, jax.Array]:
    """Append each row's last token to its pages and draw the next, up to `steps` times.

    A row draws until it has drawn a stop or `left_B` tokens. Returns the array of all pages, the
    draws with a dimension of `steps` after B, and how many of them each row drew.
    """

    def go(carry: tuple) -> jax.Array:
        step, _, _, _, active_B, _ = carry
        return (step < steps) & jnp.any(active_B)

    def one(carry: tuple) -> tuple:
        step, pages, token_B, draw_params, active_B, out = carry
        moved_B = active_B.astype(jnp.int32)
        hidden_B1D, pages = decoder.forward(
            params, lora, token_B[:, None], cfg=cfg, cache=pages, count_B=moved_B
        )
        new = draw(head.logits(params, hidden_B1D[:, 0], cfg=cfg), draw_params)
        token_B = jnp.where(active_B, new.token_B, token_B)
        out = jax.tree.map(lambda every, now: every.at[:, step].set(now), out, new)
        tail_BW = jnp.concatenate((draw_params.tail_BW[:, 1:], token_B[:, None]), axis=1)
        draw_params = draw_params.replace(
            tail_BW=jnp.where(active_B[:, None], tail_BW, draw_params.tail_BW),
            left_B=draw_params.left_B - moved_B,
            index_B=draw_params.index_B + moved_B,
        )
        active_B = active_B & ~stopped(draw_params) & (draw_params.left_B > 0)
        return step + 1, pages, token_B, draw_params, active_B, out

    B, before_B = len(token_B), draw_params.index_B
    none_BS = jnp.zeros((B, steps), jnp.float32)
    out = Draws(none_BS.astype(token_B.dtype), none_BS, none_BS)
    start = (jnp.int32(0), pages, token_B, draw_params, draw_params.left_B > 0, out)
    _, pages, _, draw_params, _, out = jax.lax.while_loop(go, one, start)
    return pages.kv_LPSJH, out, draw_params.index_B - before_B


def stopped(params: DrawParams) -> jax.Array:
    """Whether the last tokens of each row are one of its stops, [B]."""
    same_BZW = (params.stop_BZW == params.tail_BW[:, None]) | (params.stop_BZW < 0)
    # a stop that is all -1 is none
    return jnp.any(jnp.all(same_BZW, axis=-1) & (params.stop_BZW[..., -1] >= 0), axis=-1)


@functools.lru_cache(maxsize=16)
def compiled(cfg: Config, steps: int) -> tuple[Any, Any]:
    """Jitted prefill and decode, called as run(params, lora, kv_LPSJH, table_BX, held_B, ...).

    `Pages` is passed in its parts because only `kv_LPSJH` is donated. All engines of a model share
    the two functions, so that a new one compiles nothing.
    """

    def jitted(function: Any) -> Any:
        def run(params, lora, kv_LPSJH, table_BX, held_B, *rest):
            pages = paged.Pages(kv_LPSJH, table_BX, held_B)
            with model_weights.matmul_precision(cfg):
                kv_LPSJH, *out = function(params, lora, pages, *rest)
            # sharded by rows, so that each process reads those that are its own
            return kv_LPSJH, *jax.tree.map(lambda x: meshes.constrain(x, meshes.ROWS), out)

        return jax.jit(run, donate_argnames="kv_LPSJH")

    return (
        jitted(functools.partial(prefill, cfg=cfg)),
        jitted(functools.partial(decode, cfg=cfg, steps=steps)),
    )
