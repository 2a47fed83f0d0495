"""The calls that the scheduler plans: building their arrays and running them on devices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxdeep.model import lora, paged
from jaxdeep.model.config import Config
from jaxdeep.parallel import mesh as meshes
from jaxdeep.sample import sampler
from jaxdeep.sample.request import Drawn, Request
from jaxdeep.sample.scheduler import DecodeCall, PrefillCall
from jaxdeep.sample.sizes import CALL_FRACTIONS, STOPS, WIDTH, EngineConfig, shards_of
from jaxdeep.types import Sampling


class ModelRunner:
    """The compiled programs of an engine, its weights, and its pages of keys and values, of which
    this process has `pages`. Calls are run under `mesh.use(mesh)`."""

    def __init__(
        self,
        params: dict,
        cfg: Config,
        mesh: jax.sharding.Mesh,
        engine: EngineConfig,
        pages: int,
    ) -> None:
        self.params, self.cfg, self.mesh, self.engine = params, cfg, mesh, engine
        self._pages = pages // shards_of(mesh)  # of a shard: no request can have more
        self._prefill, self._decode = sampler.compiled(cfg, engine.steps)
        self._compiled_before = self._cached()
        with meshes.use(mesh):
            self._kv = paged.empty(cfg, mesh, pages * meshes.process_count(mesh), engine.page)

    @property
    def compilations(self) -> int:
        """How often a program has been compiled since this runner began, by other runners of the
        same model too: they share the programs."""
        return self._cached() - self._compiled_before

    def _cached(self) -> int:
        return self._prefill._cache_size() + self._decode._cache_size()

    def check(self, prompt: Sequence[int], max_new: int, sampling: Sampling) -> None:
        """ValueError for a request that no calls could serve, with what to change."""
        length, V = self.engine.length, self.cfg.V
        if not prompt:
            raise ValueError("an empty prompt: there is no token to predict from")
        if max_new < 1 or len(prompt) + max_new > length:
            raise ValueError(
                f"{len(prompt)} prompt tokens + max_new={max_new}: max_new must be 1 or more, and "
                f"both together within length={length} (rollout.limits.max_tokens)"
            )
        if not 0 <= min(prompt) <= max(prompt) < V:
            raise ValueError(f"a prompt token is outside the vocabulary of {V}")
        need = -(-(len(prompt) + max_new) // self.engine.page)
        if need > self._pages:
            raise ValueError(
                f"{len(prompt)} prompt tokens + max_new={max_new} take {need} pages, there are "
                f"{self._pages}: raise rollout.cache_gb"
            )
        widths = [1 if isinstance(stop, int) else len(stop) for stop in sampling.stop]
        if len(widths) > STOPS or not all(0 < width <= WIDTH for width in widths):
            raise ValueError(f"stops {sampling.stop}: at most {STOPS}, each of 1 to {WIDTH} tokens")

    def run(self, call: PrefillCall | DecodeCall, factors: dict | None) -> list[Drawn]:
        """Run a call with a bank's factors (None: no adapters). Returns what each of `call.rows`
        drew. In a prefill call that means something only for a tile that ends its prompt."""
        if isinstance(call, PrefillCall):
            return self._run_prefill(call, factors)
        return self._run_decode(call, factors)

    def warm(self, factors: dict | None) -> None:
        """Compile both programs at every batch size, by calls without rows."""
        engine, shards = self.engine, shards_of(self.mesh)
        # twice, because the first call gets pages that no program has returned, and jax compiles
        # again for those that one has
        for _ in range(2):
            for fraction in CALL_FRACTIONS:
                self.run(PrefillCall(engine.rows(engine.tiles, fraction, shards)), factors)
                self.run(DecodeCall(engine.rows(engine.slots, fraction, shards)), factors)

    def free(self) -> None:
        """Let the pages go. No call can be run any more."""
        self._kv = None

    def _run_prefill(self, call: PrefillCall, factors: dict | None) -> list[Drawn]:
        tokens_BT = np.zeros((call.size, self.engine.tile), np.int32)
        held_B, count_B = np.zeros((2, call.size), np.int32)
        for b, tile in call.rows:
            count_B[b], held_B[b] = len(tile.tokens), tile.start
            tokens_BT[b, : len(tile.tokens)] = tile.tokens
        rows = [(b, tile.request) for b, tile in call.rows]
        (draws,) = self._call(self._prefill, rows, held_B, factors, tokens_BT, count_B)
        return _drawn(draws, rows, np.ones(call.size, np.int32))

    def _run_decode(self, call: DecodeCall, factors: dict | None) -> list[Drawn]:
        held_B, token_B = np.zeros((2, call.size), np.int32)
        for b, request in call.rows:
            held_B[b], token_B[b] = request.computed, request.tokens[-1]
        draws, count_B = self._call(self._decode, call.rows, held_B, factors, token_B)
        return _drawn(draws, call.rows, count_B)

    def _call(
        self,
        program: Any,
        rows: Sequence[tuple[int, Request]],
        held_B: np.ndarray,
        factors: dict | None,
        *inputs: np.ndarray,
    ) -> tuple:
        """Run a program and return what it returns beside the pages, on the host: the rows of this
        process. `held_B` is how many tokens each row has in its pages already."""
        engine, size = self.engine, len(held_B)
        table_BX = np.zeros((size, engine.table), np.int32)
        mix_BA = np.zeros((size, engine.adapters), np.float32)
        for b, request in rows:
            pages = request.lease.pages
            table_BX[b, : len(pages)] = pages
            mix_BA[b] = request.mix.mix_A
        arrays = (table_BX, held_B, mix_BA, *inputs, draw_params(rows, size))
        table_BX, held_B, mix_BA, *inputs = meshes.put_rows(self.mesh, arrays)
        adapters = factors and lora.Bank(factors, mix_BA)
        with meshes.dispatch_lock(self.mesh):
            # the old pages are donated: the program writes to them in place
            self._kv, *out = program(self.params, adapters, self._kv, table_BX, held_B, *inputs)
        return meshes.fetch_rows(out)


def draw_params(rows: Sequence[tuple[int, Request]], size: int) -> sampler.DrawParams:
    """How each of `size` rows draws; the rows that are not in use draw nothing."""
    params = sampler.idle(size, STOPS, WIDTH)
    for b, request in rows:
        sampling = request.sampling
        params.seed_B[b], params.temperature_B[b] = request.seed, sampling.temperature
        params.top_p_B[b], params.top_k_B[b] = sampling.top_p, sampling.top_k
        params.min_p_B[b] = sampling.min_p
        for i, stop in enumerate(request.stops):
            params.stop_BZW[b, i, -len(stop) :] = stop
        if tail := request.tokens[-WIDTH:]:
            params.tail_BW[b, -len(tail) :] = tail
        params.index_B[b], params.left_B[b] = len(request.tokens), request.left
    return params


def _drawn(
    draws: sampler.Draws, rows: Sequence[tuple[int, Any]], count_B: np.ndarray
) -> list[Drawn]:
    """The first `count_B` draws of the rows in use, as lists."""
    # all rows are converted at once, which is much cheaper than row by row
    arrays = (draws.token_B, draws.logp_B, draws.drawn_logp_B)
    lists = [x.reshape(len(count_B), -1).tolist() for x in arrays]
    counts = count_B.tolist()
    return [Drawn(*(values[b][: counts[b]] for values in lists)) for b, _ in rows]
