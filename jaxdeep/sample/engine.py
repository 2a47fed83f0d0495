"""A policy on devices: many conversations share one cache, and one thread owns it.

Each row of the cache keeps the tokens it holds. A prompt goes to the free row that holds its longest
beginning and only the rest is computed: after a tool call a conversation goes on where it was. Rows
are admitted and delivered between short decodes, so conversations of any length run side by side.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import dataclasses
import threading
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxdeep import mesh as meshes
from jaxdeep.errors import ConfigError
from jaxdeep.model import arch, qwen3
from jaxdeep.sample import sampler
from jaxdeep.types import Completion, Sampling

STOPS = 4  # stop ids a request may name
SAMPLING = Sampling()


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """`slots` conversations at a time, of at most `length` tokens each; prompts enter `chunk` tokens
    at a time, answers leave every `steps` tokens."""

    slots: int
    length: int
    chunk: int = 256
    steps: int = 8


@dataclasses.dataclass(eq=False)
class _Request:
    prompt: list[int]
    seed: int
    max_new: int
    sampling: Sampling
    future: concurrent.futures.Future
    slot: int = -1
    fed: int = 0  # prompt tokens in the cache
    tokens: list[int] = dataclasses.field(default_factory=list)
    logps: list[float] = dataclasses.field(default_factory=list)

    @property
    def stopped(self) -> bool:
        return bool(self.tokens) and self.tokens[-1] in self.sampling.stop

    @property
    def done(self) -> bool:
        return self.stopped or len(self.tokens) >= self.max_new


class Engine:
    """`await engine(prompt, seed=..., max_new=...)` samples one turn. Close it when done."""

    def __init__(
        self, params: dict, cfg: arch.Config, mesh: jax.sharding.Mesh, engine: EngineConfig
    ) -> None:
        rows = mesh.shape["replica"] * mesh.shape["data"]
        if engine.slots % rows:
            raise ConfigError(
                f"engine.slots={engine.slots} must divide over replica*data={rows} devices"
            )
        if engine.length > cfg.limit:
            raise ConfigError(
                f"engine.length={engine.length} is beyond the model's {cfg.limit} positions"
            )
        self.cfg, self.mesh, self.engine, self._unit = cfg, mesh, engine, rows
        self._params, self._lora = params, None
        kv = "model" if cfg.K % mesh.shape["model"] == 0 else None
        where = qwen3.Cache(
            NamedSharding(mesh, P(None, meshes.ROWS, kv)),
            NamedSharding(mesh, P(None, meshes.ROWS, kv)),
            NamedSharding(mesh, P(meshes.ROWS)),
        )
        build = jax.jit(
            lambda: qwen3.empty_cache(cfg, engine.slots, engine.length), out_shardings=where
        )
        self._cache = build()
        self._held: list[list[int]] = [[] for _ in range(engine.slots)]
        self._used = [0] * engine.slots  # when a row was last given out, for choosing the oldest
        self._rows: dict[int, _Request] = {}
        self._waiting: collections.deque[_Request] = collections.deque()
        self._wake = threading.Condition()
        self._closed = False
        self._error: BaseException | None = None
        self.stats = collections.Counter()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        return (
            f"Engine(slots={self.engine.slots}, length={self.engine.length}, "
            f"active={len(self._rows)}, waiting={len(self._waiting)}, "
            f"sampled={self.stats['sampled']}, prefilled={self.stats['prefilled']}, "
            f"reused={self.stats['reused']})"
        )

    async def __call__(
        self, prompt: Sequence[int], *, seed: int, max_new: int, sampling: Sampling = SAMPLING
    ) -> Completion:
        """Sample at most `max_new` tokens after `prompt`. Raises ValueError for a request that can
        never be served; other requests go on."""
        prompt = [int(token) for token in prompt]
        if not prompt:
            raise ValueError("an empty prompt: there is no token to predict from")
        if max_new < 1 or len(prompt) + max_new > self.engine.length:
            raise ValueError(
                f"{len(prompt)} prompt tokens + max_new={max_new} must be within "
                f"length={self.engine.length}"
            )
        if not 0 <= min(prompt) <= max(prompt) < self.cfg.V:
            raise ValueError(f"a prompt token is outside the vocabulary of {self.cfg.V}")
        if len(sampling.stop) > STOPS:
            raise ValueError(f"{len(sampling.stop)} stop ids, at most {STOPS} are supported")
        request = _Request(
            prompt, seed & 0xFFFFFFFF, max_new, sampling, concurrent.futures.Future()
        )
        with self._wake:
            if self._closed:
                raise RuntimeError("the engine is closed") from self._error
            self._waiting.append(request)
            self._wake.notify()
        return await asyncio.wrap_future(request.future)

    def set_adapter(self, lora: dict | None, params: dict | None = None) -> None:
        """Sample from another adapter (and base) from now on; what the cache holds is forgotten.
        Only between rollouts: a request in flight would be of two policies."""
        with self._wake:
            if self._rows or self._waiting:
                raise RuntimeError(f"{len(self._rows) + len(self._waiting)} requests are in flight")
            self._lora = lora
            self._params = self._params if params is None else params
            self._held = [[] for _ in range(self.engine.slots)]

    def close(self) -> None:
        """End the thread and give the cache back; whoever still waits gets an error."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()
        self._cache = None

    def _run(self) -> None:
        with meshes.use(self.mesh):
            try:
                while True:
                    with self._wake:
                        while not (self._waiting or self._rows or self._closed):
                            self._wake.wait()
                        if self._closed:
                            break
                        new = self._admit()
                    if new:
                        self._prefill(new)
                    self._deliver()
                    if self._rows:
                        self._decode()
                        self._deliver()
            except BaseException as error:
                self._error = error
                raise
            finally:
                with self._wake:
                    self._closed = True
                    left = [*self._rows.values(), *self._waiting]
                for request in left:
                    if not request.future.done():
                        failed = RuntimeError("the engine closed before this request was served")
                        failed.__cause__ = self._error
                        request.future.set_exception(failed)

    def _admit(self) -> list[_Request]:
        """Give waiting requests free rows: the longest held beginning first, else the oldest row."""
        new = []
        free = [slot for slot in range(self.engine.slots) if slot not in self._rows]
        while self._waiting and free:
            request = self._waiting.popleft()
            if request.future.cancelled():
                continue
            shared = {slot: _shared(self._held[slot], request.prompt) for slot in free}
            slot = max(free, key=lambda s: (shared[s], -self._used[s]))
            free.remove(slot)
            self.stats["reused"] += shared[slot]
            self._used[slot] = self.stats["requests"] = self.stats["requests"] + 1
            request.slot, request.fed = slot, shared[slot]
            self._rows[slot] = request
            new.append(request)
        return new

    def _lay(self, requests: Sequence[_Request]) -> tuple[list[int], np.ndarray, np.ndarray | None]:
        """Where each request stands in the rows to compute, what every one of those rows holds, and
        which slots they are: a quarter of all where that is enough, else all of them in place."""
        few = self.engine.slots // 4
        if few and few % self._unit == 0 and len(requests) <= few:
            slot_b = np.full(few, self.engine.slots, np.int32)  # out of range: a row of padding
            slot_b[: len(requests)] = [request.slot for request in requests]
            return list(range(len(requests))), np.zeros(few, np.int32), slot_b
        held_b = np.array([len(held) for held in self._held], np.int32)
        return [request.slot for request in requests], held_b, None

    def _draw(self, requests: Sequence[_Request], at: Sequence[int], size: int) -> sampler.Draw:
        how = sampler.Draw(
            np.zeros(size, np.uint32),
            np.zeros(size, np.float32),
            np.full((size, STOPS), -1, np.int32),
            np.zeros(size, np.int32),
            np.zeros(size, np.int32),
        )
        for i, request in zip(at, requests, strict=True):
            how.seed_b[i] = request.seed
            how.temperature_b[i] = request.sampling.temperature
            how.stop_bX[i, : len(request.sampling.stop)] = request.sampling.stop
            how.left_b[i] = request.max_new - len(request.tokens)
            how.drawn_b[i] = len(request.tokens)
        return how

    def _device(self, tree: Any) -> Any:
        return jax.device_put(tree, meshes.replicated(self.mesh))

    def _prefill(self, requests: list[_Request]) -> None:
        prefill, _ = sampler.compiled(self.cfg, self.engine.steps)
        while requests:
            at, held_b, slot_b = self._lay(requests)
            left = max(len(request.prompt) - request.fed for request in requests)
            T = min(self.engine.chunk, max(16, 1 << (left - 1).bit_length()))
            tokens_bT = np.zeros((len(held_b), T), np.int32)
            count_b = np.zeros(len(held_b), np.int32)
            for i, request in zip(at, requests, strict=True):
                part = request.prompt[request.fed : request.fed + T]
                tokens_bT[i, : len(part)] = part
                held_b[i], count_b[i] = request.fed, len(part)
                request.fed += len(part)
                self._held[request.slot] = request.prompt[: request.fed]
            self.stats["prefilled"] += int(count_b.sum())
            how = self._draw(requests, at, len(held_b))
            self._cache, token_b, logp_b = prefill(
                self._params,
                self._lora,
                self._cache,
                *self._device((slot_b, held_b, tokens_bT, count_b, how)),
            )
            token_b, logp_b = jax.device_get((token_b, logp_b))
            for i, request in zip(at, requests, strict=True):
                if request.fed == len(request.prompt):
                    request.tokens.append(int(token_b[i]))
                    request.logps.append(float(logp_b[i]))
                    self.stats["sampled"] += 1
            requests = [request for request in requests if request.fed < len(request.prompt)]

    def _decode(self) -> None:
        _, decode = sampler.compiled(self.cfg, self.engine.steps)
        requests = [self._rows[slot] for slot in sorted(self._rows)]
        at, held_b, slot_b = self._lay(requests)
        token_b = np.zeros(len(held_b), np.int32)
        token_b[at] = [request.tokens[-1] for request in requests]
        how = self._draw(requests, at, len(held_b))
        self._cache, *out = decode(
            self._params, self._lora, self._cache, *self._device((slot_b, token_b, how))
        )
        tokens_bS, logps_bS, count_b = jax.device_get(out)
        for i, request in zip(at, requests, strict=True):
            n = int(count_b[i])
            # the cache took in the token before each drawn one, never the last drawn
            self._held[request.slot] += [request.tokens[-1], *tokens_bS[i, : n - 1].tolist()]
            request.tokens += tokens_bS[i, :n].tolist()
            request.logps += logps_bS[i, :n].tolist()
            self.stats["sampled"] += n

    def _deliver(self) -> None:
        for slot, request in list(self._rows.items()):
            if request.done or request.future.cancelled():
                with self._wake:
                    del self._rows[slot]
                stop = "stop" if request.stopped else "length"
                if not request.future.cancelled():
                    request.future.set_result(Completion(request.tokens, request.logps, stop))


def _shared(held: Sequence[int], prompt: Sequence[int]) -> int:
    """How many tokens of `prompt` a row already holds; the last is always computed again, because
    the next token is predicted from it."""
    n = min(len(held), len(prompt) - 1)
    if list(held[:n]) == list(prompt[:n]):
        return n
    return next(i for i in range(n) if held[i] != prompt[i])
