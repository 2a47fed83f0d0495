"""What quantizing the base costs in its predictions, on the trained tiny base that comes with the
package and texts that it was not trained on.

    make bench           (python tests/bench/int8_loss.py [--rows=400])

Printed for each precision: bytes of the base, and for each text the mean KL divergence, in nats a
token, of its next-token distribution from that in float32, and how often both have the same most
likely token. The texts are what the assistant says in practice rows of another seed, and the
passages about the real entities of `facts:test`.
"""

from __future__ import annotations

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxdeep.chat.qwen3 import Qwen3Chat
from jaxdeep.chat.tokenizer import Tokenizer
from jaxdeep.data.pack import pack, to_row
from jaxdeep.envs.toy import facts, practice
from jaxdeep.model import decoder, head, load
from jaxdeep.model import weights as model_weights
from jaxdeep.model.config import Config
from jaxdeep.parallel import mesh as meshes
from jaxdeep.types import Batch, Row

PLACE = facts.ASSETS / "tiny"
WAYS = [("float32", ""), ("bfloat16", ""), ("float32", "int8"), ("bfloat16", "int8")]
B, T = 16, 256


def texts(rows: int) -> dict[str, list[Batch]]:
    """Batches of each text; `learn_BT` marks the tokens whose prediction counts."""
    tokenizer = Tokenizer.load(PLACE)
    source = practice.Reading(
        Qwen3Chat(tokenizer, "none", tools_in_prompt=False), seed=1000, choosing=2
    )
    said = [to_row(source[index]) for index in range(rows)]
    read = []
    for passage in facts.passages(facts.entities_of("test")):
        tokens = np.asarray(tokenizer.encode(passage.text), np.int32)
        all_but_first = (np.arange(len(tokens)) > 0).astype(np.float32)
        read.append(Row(tokens, all_but_first, all_but_first, all_but_first))
    return {name: pack(found, B=B, T=T) for name, found in (("practice", said), ("passages", read))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=400)
    flags = parser.parse_args()
    mesh = meshes.make_mesh(devices=jax.devices()[:1])
    batches = texts(flags.rows)

    def model(dtype: str, quant: str):
        cfg = Config.from_hf(PLACE, dtype=dtype, quant=quant, remat="dots")
        return cfg, load.load(str(PLACE), cfg, mesh)

    def predictions(cfg: Config, params: dict, batch: Batch) -> jax.Array:
        """Log-probabilities of every next token, [B, T - 1, V]."""
        hidden_BTD, _ = decoder.forward(
            params,
            None,
            batch.tokens_BT,
            cfg=cfg,
            positions_BT=batch.positions_BT,
            segments_BT=batch.segments_BT,
        )
        return jax.nn.log_softmax(head.logits(params, hidden_BTD, cfg=cfg)[:, :-1])

    plain, exact = model(*WAYS[0])

    @functools.partial(jax.jit, static_argnums=3)
    def apart(exact: dict, params: dict, batch: Batch, cfg: Config):
        """Sums over the tokens that count: divergence, agreement, one."""
        want, got = predictions(plain, exact, batch), predictions(cfg, params, batch)
        divergence_BT = jnp.sum(jnp.exp(want) * (want - got), -1)
        agree_BT = want.argmax(-1) == got.argmax(-1)
        return [(x * batch.learn_BT[:, 1:]).sum() for x in (divergence_BT, agree_BT, 1.0)]

    counts = ", ".join(
        f"{sum(batch.learn_BT.sum() for batch in found):,.0f} tokens of {name}"
        for name, found in batches.items()
    )
    print(f"the tiny base, {model_weights.count(plain):,} parameters; {counts}")
    print(f"{'':16}{'base MB':>8}", *(f"{f'KL {n}':>14}{'same best':>11}" for n in batches), sep="")
    for dtype, quant in WAYS:
        cfg, params = model(dtype, quant)
        size = sum(x.nbytes for x in jax.tree.leaves(params))
        print(f"{f'{quant} + ' if quant else ''}{dtype}".ljust(16), f"{size / 1e6:7.2f}", end="")
        for found in batches.values():
            sums = np.sum([jax.device_get(apart(exact, params, batch, cfg)) for batch in found], 0)
            print(f"{sums[0] / sums[2]:14.6f}{sums[1] / sums[2]:11.4f}", end="")
        print()


if __name__ == "__main__":
    main()
