"""The life of a token: append what is new to the cache, draw from the last position, feed it back.

    prefill   a few rows of the cache take in new tokens; the first token of each answer is drawn
    decode    the same rows go on for a fixed number of steps, or until none is active

Both are pure and work on some rows of a larger cache, chosen by index. Seeds, temperatures, stop ids
and budgets are arrays: none of them is a shape. Every row has its own key for every token, so what it
draws does not depend on the rows beside it.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxdeep.model import arch, qwen3


@struct.dataclass
class Draw:
    """How each of b rows draws: `seed_b` uint32, `temperature_b` (0: the most likely token),
    `stop_bX` ids that end a turn (-1 fills up), `left_b` tokens the row may still draw, `drawn_b`
    tokens it has drawn in this turn."""

    seed_b: jax.Array
    temperature_b: jax.Array
    stop_bX: jax.Array
    left_b: jax.Array
    drawn_b: jax.Array


def take(cache: qwen3.Cache, slot_b: jax.Array | None) -> qwen3.Cache:
    """Some rows of a cache; None is all of them, in place."""
    if slot_b is None:
        return cache
    return qwen3.Cache(cache.k_LBKSH[:, slot_b], cache.v_LBKSH[:, slot_b], cache.length_B[slot_b])


def put_back(cache: qwen3.Cache, slot_b: jax.Array | None, rows: qwen3.Cache) -> qwen3.Cache:
    """The cache with those rows replaced; a slot out of range is dropped."""
    if slot_b is None:
        return rows
    return qwen3.Cache(
        cache.k_LBKSH.at[:, slot_b].set(rows.k_LBKSH, mode="drop"),
        cache.v_LBKSH.at[:, slot_b].set(rows.v_LBKSH, mode="drop"),
        cache.length_B.at[slot_b].set(rows.length_B, mode="drop"),
    )


def draw(logits_bV: jax.Array, how: Draw) -> tuple[jax.Array, jax.Array]:
    """One token for each row and its log-probability at temperature 1, in nats."""

    def one(seed: jax.Array, index: jax.Array, logits_V: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), seed), index)
        return jax.random.categorical(key, logits_V)

    warm_b = how.temperature_b > 0
    scaled_bV = logits_bV / jnp.where(warm_b, how.temperature_b, 1.0)[:, None]
    drawn_b = jax.vmap(one)(how.seed_b, how.drawn_b, scaled_bV)
    token_b = jnp.where(warm_b, drawn_b, jnp.argmax(logits_bV, axis=-1))
    picked_b = jnp.take_along_axis(logits_bV, token_b[:, None], axis=-1)[:, 0]
    return token_b, picked_b - jax.nn.logsumexp(logits_bV, axis=-1)


def prefill(
    params: dict,
    lora: dict | None,
    cache: qwen3.Cache,
    slot_b: jax.Array | None,
    held_b: jax.Array,
    tokens_bT: jax.Array,
    count_b: jax.Array,
    how: Draw,
    *,
    cfg: arch.Config,
) -> tuple[qwen3.Cache, jax.Array, jax.Array]:
    """Append the first `count_b` of `tokens_bT` to rows `slot_b`, of which the first `held_b` slots
    are kept, and draw a token after each row's last one. Returns the cache, tokens and
    log-probabilities. The cache is used up where the caller donates it."""
    rows = take(cache, slot_b).replace(length_B=held_b)
    hidden_bTD, rows = qwen3.forward(params, lora, tokens_bT, cfg=cfg, cache=rows, count_B=count_b)
    last_bD = jnp.take_along_axis(hidden_bTD, (count_b - 1)[:, None, None], axis=1)[:, 0]
    token_b, logp_b = draw(qwen3.logits(params, last_bD, cfg=cfg), how)
    return put_back(cache, slot_b, rows), token_b, logp_b


def decode(
    params: dict,
    lora: dict | None,
    cache: qwen3.Cache,
    slot_b: jax.Array | None,
    token_b: jax.Array,
    how: Draw,
    *,
    cfg: arch.Config,
    steps: int,
) -> tuple[qwen3.Cache, jax.Array, jax.Array, jax.Array]:
    """Feed each row its last token and draw the next, at most `steps` times.

    A row draws until it drew a stop id or `left_b` tokens. Returns the cache, tokens [b, steps],
    log-probabilities [b, steps] and how many of them each row drew.
    """
    rows, b = take(cache, slot_b), token_b.shape[0]

    def go(carry: tuple) -> Any:
        step, _, _, _, active_b, *_ = carry
        return (step < steps) & jnp.any(active_b)

    def one(carry: tuple) -> tuple:
        step, rows, token_b, how, active_b, tokens_bS, logps_bS = carry
        hidden_b1D, rows = qwen3.forward(
            params, lora, token_b[:, None], cfg=cfg, cache=rows, count_B=active_b.astype(jnp.int32)
        )
        new_b, logp_b = draw(qwen3.logits(params, hidden_b1D[:, 0], cfg=cfg), how)
        new_b = jnp.where(active_b, new_b, token_b)
        tokens_bS = tokens_bS.at[:, step].set(new_b)
        logps_bS = logps_bS.at[:, step].set(logp_b)
        moved_b = active_b.astype(jnp.int32)
        how = how.replace(left_b=how.left_b - moved_b, drawn_b=how.drawn_b + moved_b)
        stopped_b = jnp.any(new_b[:, None] == how.stop_bX, axis=-1)
        active_b = active_b & ~stopped_b & (how.left_b > 0)
        return step + 1, rows, new_b, how, active_b, tokens_bS, logps_bS

    before_b = how.drawn_b
    start = (
        jnp.int32(0),
        rows,
        token_b,
        how,
        how.left_b > 0,
        jnp.zeros((b, steps), token_b.dtype),
        jnp.zeros((b, steps), jnp.float32),
    )
    _, rows, _, how, _, tokens_bS, logps_bS = jax.lax.while_loop(go, one, start)
    return put_back(cache, slot_b, rows), tokens_bS, logps_bS, how.drawn_b - before_b


@functools.lru_cache(maxsize=16)
def compiled(cfg: arch.Config, steps: int) -> tuple[Any, Any]:
    """Jitted prefill and decode; the cache is donated."""
    return (
        jax.jit(functools.partial(prefill, cfg=cfg), donate_argnames="cache"),
        jax.jit(functools.partial(decode, cfg=cfg, steps=steps), donate_argnames="cache"),
    )
