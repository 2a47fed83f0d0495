"""The life of a token: append what is new to the pages, draw from the last position, feed it back.

    prefill   rows take in new tokens; where a prompt ends, the first token of its answer is drawn
    decode    rows go on for a fixed number of steps, or until none is active

Both are pure. Seeds, temperatures, cut-offs, stops, budgets and adapters are arrays: none of them is a
shape. Every row has its own key for every token, so what it draws does not depend on the rows beside it.
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
    """How each row draws: `seed_B` uint32, `temperature_B` (0: the most likely token), `top_p_B` (1:
    all), `top_k_B` (0: all), `min_p_B` (0: all); `stop_BZW` are runs of up to W ids that end a turn, at
    the end of their W places with -1 before them, and all -1 where there is none; `tail_BW` the last W
    tokens that the row drew in this turn (-1 before them), `drawn_B` how many it drew, `left_B` how
    many it may still draw."""

    seed_B: jax.Array
    temperature_B: jax.Array
    top_p_B: jax.Array
    top_k_B: jax.Array
    min_p_B: jax.Array
    stop_BZW: jax.Array
    tail_BW: jax.Array
    drawn_B: jax.Array
    left_B: jax.Array


def idle(B: int, Z: int, W: int) -> DrawParams:
    """Rows that draw nothing, to be filled in on the host: room for Z stops of W tokens each."""
    return DrawParams(
        seed_B=np.zeros(B, np.uint32),
        temperature_B=np.zeros(B, np.float32),
        top_p_B=np.ones(B, np.float32),
        top_k_B=np.zeros(B, np.int32),
        min_p_B=np.zeros(B, np.float32),
        stop_BZW=np.full((B, Z, W), -1, np.int32),
        tail_BW=np.full((B, W), -1, np.int32),
        drawn_B=np.zeros(B, np.int32),
        left_B=np.zeros(B, np.int32),
    )


@struct.dataclass
class Draws:
    """A token for each row with its log-probability in nats under the policy at temperature 1,
    `logp_B`, and under the distribution it was drawn from, `chosen_B`."""

    token_B: jax.Array
    logp_B: jax.Array
    chosen_B: jax.Array


def cut(scaled_BV: jax.Array, how: DrawParams) -> jax.Array:
    """`scaled_BV` with what top-k, top-p or min-p leave out at minus infinity. The most likely token
    always stays; of equal scores at the edge all stay."""
    V = scaled_BV.shape[1]
    down_BV = -jnp.sort(-scaled_BV, axis=-1)
    share_BV = jax.nn.softmax(down_BV, axis=-1)
    before_BV = jnp.cumsum(share_BV, axis=-1) - share_BV
    top_k_B = jnp.where(how.top_k_B > 0, how.top_k_B, V)
    kept_BV = (jnp.arange(V) < top_k_B[:, None]) & (before_BV < how.top_p_B[:, None])
    kept_BV &= share_BV >= how.min_p_B[:, None] * share_BV[:, :1]
    last_B = jnp.maximum(jnp.sum(kept_BV, axis=-1) - 1, 0)
    least_B1 = jnp.take_along_axis(down_BV, last_B[:, None], axis=-1)
    return jnp.where(scaled_BV >= least_B1, scaled_BV, -jnp.inf)


def sample_token(
    seed: jax.Array, index: jax.Array, mass_V: jax.Array, best: jax.Array
) -> jax.Array:
    """An id with probability in proportion to `mass_V`, by inverting its distribution twice: first a
    block of ids, then an id in it. It takes two random numbers, not V, and each has the resolution of a
    float32. `best` is the most likely id."""
    # a key's two words are as random as what would be drawn with it, and cost a third
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
    # rounding may have led to an id without any
    return jnp.where(mass_V[jnp.minimum(token, V - 1)] > 0, token, best)


def draw(logits_BV: jax.Array, how: DrawParams) -> Draws:
    """One token for each row."""
    warm_B = how.temperature_B > 0
    scaled_BV = logits_BV / jnp.where(warm_B, how.temperature_B, 1.0)[:, None]
    cuts = jnp.any((how.top_p_B < 1) | (how.top_k_B > 0) | (how.min_p_B > 0))
    # sorting the vocabulary costs more than a small model: only where a row asks for it
    scaled_BV = jax.lax.cond(cuts, lambda: cut(scaled_BV, how), lambda: scaled_BV)
    top_B1 = jnp.max(scaled_BV, axis=-1, keepdims=True)
    mass_BV = jnp.exp(scaled_BV - top_B1)
    # the first of the highest: XLA's argmax is several times slower on CPUs
    V = scaled_BV.shape[1]
    best_B = jnp.min(jnp.where(scaled_BV == top_B1, jnp.arange(V), V - 1), axis=-1)
    drawn_B = jax.vmap(sample_token)(how.seed_B, how.drawn_B, mass_BV, best_B)
    token_B = jnp.where(warm_B, drawn_B, best_B)

    def of_token(x_BV: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x_BV, token_B[:, None], axis=-1)[:, 0]

    logp_B = of_token(logits_BV) - jax.nn.logsumexp(logits_BV, axis=-1)
    chosen_B = of_token(scaled_BV) - top_B1[:, 0] - jnp.log(jnp.sum(mass_BV, axis=-1))
    return Draws(token_B, logp_B, jnp.where(warm_B, chosen_B, 0.0))


def prefill(
    params: dict,
    lora: Any,
    pages: paged.Pages,
    tokens_BT: jax.Array,
    count_B: jax.Array,
    how: DrawParams,
    *,
    cfg: Config,
) -> tuple[jax.Array, Draws]:
    """Append the first `count_B` of `tokens_BT` to each row and draw a token after its last one.
    Returns the pages' array, whose old one is used up where the caller donates it, and what was drawn:
    of no use in rows that do not end a prompt."""
    hidden_BTD, pages = decoder.forward(
        params, lora, tokens_BT, cfg=cfg, cache=pages, count_B=count_B
    )
    last_BD = jnp.take_along_axis(hidden_BTD, (count_B - 1)[:, None, None], axis=1)[:, 0]
    return pages.kv_LPSJH, draw(head.logits(params, last_BD, cfg=cfg), how)


def decode(
    params: dict,
    lora: Any,
    pages: paged.Pages,
    token_B: jax.Array,
    how: DrawParams,
    *,
    cfg: Config,
    steps: int,
) -> tuple[jax.Array, Draws, jax.Array]:
    """Feed each row its last token and draw the next, at most `steps` times.

    A row draws until it drew a stop or `left_B` tokens. Returns the pages' array, what was drawn with
    a dimension of `steps` after B, and how many of them each row drew.
    """

    def go(carry: tuple) -> jax.Array:
        step, _, _, _, active_B, _ = carry
        return (step < steps) & jnp.any(active_B)

    def one(carry: tuple) -> tuple:
        step, pages, token_B, how, active_B, out = carry
        moved_B = active_B.astype(jnp.int32)
        hidden_B1D, pages = decoder.forward(
            params, lora, token_B[:, None], cfg=cfg, cache=pages, count_B=moved_B
        )
        new = draw(head.logits(params, hidden_B1D[:, 0], cfg=cfg), how)
        token_B = jnp.where(active_B, new.token_B, token_B)
        out = jax.tree.map(lambda every, now: every.at[:, step].set(now), out, new)
        tail_BW = jnp.concatenate((how.tail_BW[:, 1:], token_B[:, None]), axis=1)
        how = how.replace(
            tail_BW=jnp.where(active_B[:, None], tail_BW, how.tail_BW),
            left_B=how.left_B - moved_B,
            drawn_B=how.drawn_B + moved_B,
        )
        active_B = active_B & ~stopped(how) & (how.left_B > 0)
        return step + 1, pages, token_B, how, active_B, out

    B, before_B = len(token_B), how.drawn_B
    none_BS = jnp.zeros((B, steps), jnp.float32)
    out = Draws(none_BS.astype(token_B.dtype), none_BS, none_BS)
    start = (jnp.int32(0), pages, token_B, how, how.left_B > 0, out)
    _, pages, _, how, _, out = jax.lax.while_loop(go, one, start)
    return pages.kv_LPSJH, out, how.drawn_B - before_B


def stopped(how: DrawParams) -> jax.Array:
    """Whether the last tokens of each row are one of its stops, [B]."""
    same_BZW = (how.stop_BZW == how.tail_BW[:, None]) | (how.stop_BZW < 0)
    return jnp.any(jnp.all(same_BZW, axis=-1) & (how.stop_BZW[..., -1] >= 0), axis=-1)


@functools.lru_cache(maxsize=16)
def compiled(cfg: Config, steps: int) -> tuple[Any, Any]:
    """Jitted prefill and decode, to be called with the pages' array apart, which is donated: prefill(
    params, lora, kv_LPSJH, table_BX, held_B, ...)."""

    def apart(function: Any) -> Any:
        def run(params, lora, kv_LPSJH, table_BX, held_B, *rest):
            pages = paged.Pages(kv_LPSJH, table_BX, held_B)
            with model_weights.matmul_precision(cfg):
                kv_LPSJH, *out = function(params, lora, pages, *rest)
            # each process reads the rows that are its own
            return kv_LPSJH, *jax.tree.map(lambda x: meshes.constrain(x, meshes.ROWS), out)

        return jax.jit(run, donate_argnames="kv_LPSJH")

    return (
        apart(functools.partial(prefill, cfg=cfg)),
        apart(functools.partial(decode, cfg=cfg, steps=steps)),
    )
