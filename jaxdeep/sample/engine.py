"""A policy on devices: many conversations at once, one thread that owns the devices, keys and values in
pages.

Between two calls of a program the thread admits requests whose beginnings need pages, and delivers what
is done. A prompt leases the pages that already hold its beginning, so a conversation goes on after a tool
call, and a group shares its prompt, without computing anything twice. Prompts enter in tiles, several of
one prompt or of many in one call; then all rows draw a few tokens. When pages run out the youngest row
gives its own back and is computed again later.

Where the devices are those of several processes (`mesh.local`), each still has its own requests, rows and
pages; before a call they agree on which program it is, and on its size.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import contextlib
import itertools
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxdeep.errors import ConfigError
from jaxdeep.model import lora, paged
from jaxdeep.model.config import Config
from jaxdeep.parallel import hosts
from jaxdeep.parallel import mesh as meshes
from jaxdeep.sample import sampler, sizes
from jaxdeep.sample.pages import Pool
from jaxdeep.sample.request import AdapterMix, Request
from jaxdeep.sample.sizes import CALL_FRACTIONS, STOPS, WIDTH, EngineConfig
from jaxdeep.types import Completion, Sampling

PREFILLS = 8  # calls that take in prompts between two that draw, at most
PAUSE = 0.005  # seconds until processes that have nothing to do ask each other again
SAMPLING = Sampling()


class Engine:
    """`await engine(prompt, seed=..., max_new=...)` samples one turn. Close it when done.

    On a mesh rows are spread over `replica` and `data`, heads over `model`. Where it is over the devices
    of several processes, each has an engine like this one, and requests are served `together`.
    """

    def __init__(
        self, params: dict, cfg: Config, mesh: jax.sharding.Mesh, engine: EngineConfig
    ) -> None:
        pages, shards = sizes.pages(engine, cfg, mesh), sizes.shards_of(mesh)
        self.cfg, self.mesh, self.engine, self._shards = cfg, mesh, engine, shards
        self._pools = [
            Pool(pages // shards, engine.page, partial=not engine.exact) for _ in range(shards)
        ]
        self._params, self._bank = params, None
        self._policies = {"": AdapterMix(np.zeros(engine.adapters, np.float32))}
        self._waiting: collections.deque[Request] = collections.deque()
        self._prefilling: list[Request] = []  # both in the order of their admission
        self._decoding: list[Request] = []
        self._wake = threading.Condition()
        self._circle = hosts.Rounds("engine") if meshes.processes_of(mesh) > 1 else None
        self._open, self._left = self._circle is None, False  # see `together`
        self._closed = False
        self._error: BaseException | None = None
        self.stats: collections.Counter = collections.Counter()
        self._programs = sampler.compiled(cfg, engine.steps)
        self._compiled = sum(program._cache_size() for program in self._programs)
        with meshes.use(mesh):
            self._kv = paged.empty(cfg, mesh, pages * meshes.processes_of(mesh), engine.page)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        now = self.metrics()
        return (
            f"Engine(rows {now['rows']:.0f} of {self.engine.slots}, waiting {now['waiting']:.0f}, "
            f"pages {now['pages']:.0f} of {sum(pool.count for pool in self._pools)}, "
            f"sampled {now['sampled']:.0f}, prefilled {now['prefilled']:.0f}, "
            f"reused {now['reused']:.0f})"
        )

    def metrics(self) -> dict[str, float]:
        """Counts since the beginning (requests, tokens sampled, prefilled and reused, rows paused and
        cancelled, compilations, seconds requests waited and the devices worked), rates made of them,
        and what is in progress now."""
        names = ("requests", "sampled", "prefilled", "reused", "paused", "cancelled")
        seconds = ("queue_seconds", "busy_seconds")
        out = {name: float(self.stats[name]) for name in (*names, *seconds)}
        out["hit_rate"] = out["reused"] / max(out["reused"] + out["prefilled"], 1)
        out["tokens_per_second"] = out["sampled"] / max(out["busy_seconds"], 1e-9)
        out["compilations"] = float(
            sum(program._cache_size() for program in self._programs) - self._compiled
        )
        out["rows"] = float(len(self._prefilling) + len(self._decoding))
        out["waiting"] = float(len(self._waiting))
        out["pages"] = float(sum(pool.used for pool in self._pools))
        return out

    async def __call__(
        self,
        prompt: Sequence[int],
        *,
        seed: int,
        max_new: int,
        adapter: str = "",
        sampling: Sampling = SAMPLING,
    ) -> Completion:
        """Sample at most `max_new` tokens after `prompt`. Raises ValueError for a request that can
        never be served; other requests go on. Cancelling gives its pages back."""
        return await asyncio.wrap_future(
            self._submit(prompt, seed, max_new, adapter, sampling, None)
        )

    async def stream(
        self,
        prompt: Sequence[int],
        *,
        seed: int,
        max_new: int,
        adapter: str = "",
        sampling: Sampling = SAMPLING,
    ) -> AsyncIterator[Completion]:
        """The same turn in parts, as they are sampled; each part has the turn's `stop` or, while it
        goes on, "". Leaving early cancels the rest."""
        loop, parts = asyncio.get_running_loop(), asyncio.Queue()

        def sink(part: Completion | None) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(parts.put_nowait, part)

        future = self._submit(prompt, seed, max_new, adapter, sampling, sink)
        future.add_done_callback(lambda _: sink(None))
        try:
            while (part := await parts.get()) is not None:
                yield part
            if (error := future.exception()) is not None:
                raise error
        finally:
            future.cancel()

    def set_adapter(
        self,
        adapter: lora.Adapter | None,
        name: str = "",
        *,
        version: int = 0,
    ) -> None:
        """Let `name` stand for this adapter (None: the base) from now on; completions say its
        `version`. What the name's last one computed
        is forgotten; its requests in flight go on with it if there is room for both. All adapters have
        the same linears and rank.
        """
        with self._wake:
            mix_A = np.zeros(self.engine.adapters, np.float32)
            if adapter is not None:
                slot = self._slot(name)
                mix_A[slot] = adapter.scale
                self._bank = _put(self._bank, adapter.factors, slot, self.engine.adapters)
            self._replace(name, AdapterMix(mix_A, version))

    def compose(self, name: str, weights: Mapping[str, float]) -> None:
        """Let `name` stand for the weighted sum of adapters that are held under these names."""
        with self._wake:
            mixes = [weight * self._policy(other).mix_A for other, weight in weights.items()]
            self._replace(name, AdapterMix(np.sum(mixes, axis=0, dtype=np.float32)))

    def set_base(self, params: dict) -> None:
        """Sample from other weights of the same shapes. Only between requests."""
        with self._wake:
            if flying := len(self._waiting) + len(self._prefilling) + len(self._decoding):
                raise RuntimeError(f"{flying} requests are in flight")
            self._params = params
            for policy in self._policies.values():
                self._forget(policy)

    def follow(self, params: dict, adapter: lora.Adapter | None, version: int) -> None:
        """Sample from what `version` updates have made of the weights and the adapter. Other weights only
        between requests."""
        if params is not self._params:
            self.set_base(params)
        self.set_adapter(adapter, version=version)

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        """Serve requests while in this block. An engine on devices of this process alone always does.
        Where others' are among them, all processes enter the block and leave it together: one that is
        done serves on until the last one is. Between blocks requests wait, and the devices are free for
        what else all processes do."""
        if self._circle is None:
            yield
            return
        with self._wake:
            self._open, self._left = True, False
            self._wake.notify_all()
        yield  # an error ends this process: nothing to wait for
        with self._wake:
            self._left = True
            while self._open and not self._closed:
                self._wake.wait()
            if self._closed:
                raise RuntimeError("the engine is closed") from self._error

    def warm(self) -> None:
        """Compile every program that requests will need, with adapters where there are any by now."""
        with self._wake, meshes.use(self.mesh):
            nothing = [[] for _ in range(self._shards)]
            # twice: the first call sees pages that no program has returned
            for part in (*CALL_FRACTIONS, *CALL_FRACTIONS):
                tiles = self._size(self.engine.tiles, part)
                self._call_prefill(nothing, tiles)
                self._call_decode(nothing, self._size(self.engine.slots, part))

    def close(self) -> None:
        """End the thread and give the pages back; whoever still waits gets an error."""
        with self._wake:
            self._closed = True
            self._wake.notify_all()
        waits = self._circle is not None and self._open  # for others, who wait for this process
        if not waits:
            self._thread.join()
            self._kv = None

    def _submit(self, prompt, seed, max_new, adapter, sampling, sink) -> concurrent.futures.Future:
        prompt = [int(token) for token in prompt]
        length, V = self.engine.length, self.cfg.V
        if not prompt:
            raise ValueError("an empty prompt: there is no token to predict from")
        if max_new < 1 or len(prompt) + max_new > length:
            raise ValueError(
                f"{len(prompt)} prompt tokens + max_new={max_new} must be within length={length}"
            )
        if not 0 <= min(prompt) <= max(prompt) < V:
            raise ValueError(f"a prompt token is outside the vocabulary of {V}")
        need, have = -(-(len(prompt) + max_new) // self.engine.page), self._pools[0].count
        if need > have:
            raise ValueError(
                f"{len(prompt)} prompt tokens + max_new={max_new} take {need} pages, there are {have}: "
                "raise engine.cache_gb"
            )
        future = concurrent.futures.Future()
        with self._wake:
            if self._closed:
                raise RuntimeError("the engine is closed") from self._error
            policy = self._policy(adapter)
            row = Request(prompt, seed & 0xFFFFFFFF, max_new, sampling, policy, future, sink)
            if len(row.stops) > STOPS or not all(0 < len(stop) <= WIDTH for stop in row.stops):
                raise ValueError(
                    f"stops {sampling.stop}: at most {STOPS}, each of 1 to {WIDTH} tokens"
                )
            policy.users += 1
            self._waiting.append(row)
            self._wake.notify()
        return future

    def _policy(self, name: str) -> AdapterMix:
        if name not in self._policies:
            known = ", ".join(map(repr, self._policies))
            raise ValueError(f"there is no adapter {name!r}, only {known}")
        return self._policies[name]

    def _slot(self, name: str) -> int:
        """A place in the bank that nothing but an idle `name` uses, or requests nobody waits for."""
        held = [p for n, p in self._policies.items() if n != name]
        rows = (*self._waiting, *self._prefilling, *self._decoding)
        held += [row.policy for row in rows if not row.future.cancelled()]
        used = np.any([np.zeros(self.engine.adapters), *(p.mix_A for p in held)], axis=0)
        if self._circle is not None:  # one array is all processes': the same place in each
            used = np.any(self._circle(used.tolist()), axis=0)
        free = np.flatnonzero(~used)
        if not len(free):
            raise RuntimeError(
                f"no room for adapter {name!r} beside {len(self._policies)} names and what requests "
                f"in flight still use: engine.adapters={self.engine.adapters}"
            )
        return int(free[0])

    def _replace(self, name: str, policy: AdapterMix) -> None:
        if old := self._policies.get(name):
            self._forget(old)
        self._policies[name] = policy

    def _forget(self, policy: AdapterMix) -> None:
        for pool in self._pools:
            pool.forget(policy)

    def _run(self) -> None:
        in_turn = 0
        with meshes.use(self.mesh):
            try:
                while self._ready():
                    tiles, rows = self._agreed()
                    begun = time.perf_counter()
                    # a call costs as much with few rows: prompts first, but nobody waits for all of them
                    if tiles and (not rows or in_turn < PREFILLS):
                        self._prefill(tiles)
                        in_turn += 1
                    elif rows:
                        self._decode(rows)
                        in_turn = 0
                    self.stats["busy_seconds"] += time.perf_counter() - begun
            finally:
                self._error = sys.exception()
                with self._wake:
                    self._closed = True
                    left = [*self._waiting, *self._prefilling, *self._decoding]
                    self._wake.notify_all()
                for row in left:
                    if not row.future.done():
                        failed = RuntimeError("the engine closed before this request was served")
                        failed.__cause__ = self._error
                        row.future.set_exception(failed)

    def _ready(self) -> bool:
        """Wait for something to do and let requests in; False when the engine is closed."""
        with self._wake:
            while not (self._closed or (self._open and (self._circle or self._busy()))):
                self._wake.wait()
            if self._closed:
                return False
            self._drop_cancelled()
            self._admit()
            return True

    def _busy(self) -> bool:
        return bool(self._waiting or self._prefilling or self._decoding)

    def _agreed(self) -> tuple[int, int]:
        """How many tiles of prompts, and how many rows that draw, the fullest shard of all processes has.
        Nothing, too, when all have left."""
        tiles, rows = collections.Counter(), collections.Counter()
        for row in self._prefilling:
            tiles[row.shard] += -(
                -(len(row.prompt) + len(row.tokens) - row.fed) // self.engine.tile
            )
        for row in self._decoding:
            rows[row.shard] += 1
        most = [max(count.values(), default=0) for count in (tiles, rows)]
        if self._circle is None:
            return most[0], most[1]
        heard = self._circle([*most, self._left])
        with self._wake:
            if all(left for _, _, left in heard):
                self._open = False
                self._wake.notify_all()
                return 0, 0
            most = [max(said[i] for said in heard) for i in (0, 1)]
            if not any(most) and not self._waiting:
                self._wake.wait(PAUSE)
        return most[0], most[1]

    def _drop_cancelled(self) -> None:
        for row in [row for row in self._waiting if row.future.cancelled()]:
            self._waiting.remove(row)
            self._leave(row.policy)
            self.stats["cancelled"] += 1
        for rows in (self._prefilling, self._decoding):
            for row in [row for row in rows if row.future.cancelled()]:
                # others may count on a prompt that is still to be computed
                if self._pools[row.shard].withdraw(row.lease, row.fed):
                    rows.remove(row)
                    self._release(row)
                    self.stats["cancelled"] += 1

    def _release(self, row: Request) -> None:
        """The row's pages go back; its tokens stay findable."""
        self._pools[row.shard].release(row.lease, row.content[: row.fed])
        row.lease = None
        self._leave(row.policy)

    def _leave(self, policy: AdapterMix) -> None:
        """One request fewer samples from it. What it computed goes with its last one where no name
        stands for it any more: rows that waited while it was replaced computed it after that."""
        policy.users -= 1
        if not policy.users and policy not in self._policies.values():
            self._forget(policy)

    def _admit(self) -> None:
        """Let waiting requests in, in order, where there are a slot and pages for what they hold, and a
        page to spare for each row beside them."""
        busy = collections.Counter(row.shard for row in (*self._prefilling, *self._decoding))
        while self._waiting:
            row = self._waiting[0]
            content = row.content
            open_ = [i for i in range(self._shards) if busy[i] < self.engine.slots // self._shards]
            if not open_:
                return
            pools = self._pools
            row.shard = max(
                open_,
                key=lambda i: (pools[i].match(row.policy, content[:-1]), pools[i].available),
            )
            pool = pools[row.shard]
            # the last token is always computed again: the next one is predicted from it
            row.lease, row.fed = pool.lease(row.policy, content[:-1])
            if not pool.grow(row.lease, len(content), spare=busy[row.shard]):
                pool.release(row.lease, content[: row.fed])
                return
            pool.publish(row.lease, content)
            self._waiting.popleft()
            self._prefilling.append(row)
            busy[row.shard] += 1
            if not row.tokens:
                self.stats["requests"] += 1
                self.stats["queue_seconds"] += time.perf_counter() - row.since
            self.stats["reused"] += row.fed

    def _prefill(self, tiles: int) -> None:
        """One call: as many tiles of the first prompts as it holds. `tiles` wait in the fullest shard."""
        tile = self.engine.tile
        most = self._size(self.engine.tiles, 1) // self._shards
        work: list[list[tuple[Request, int, list[int]]]] = [[] for _ in range(self._shards)]
        for row in self._prefilling:
            content = row.content
            while row.fed < len(content) and len(work[row.shard]) < most:
                part = content[row.fed : row.fed + tile]
                work[row.shard].append((row, row.fed, part))
                row.fed += len(part)
        few = self._size(self.engine.tiles, 4)
        fits = tiles * self._shards <= few
        drawn = self._call_prefill(work, few if fits else most * self._shards)
        whole = []
        for at, (row, start, part) in self._places(work, len(drawn.token_B)):
            self.stats["prefilled"] += len(part)
            if start + len(part) == len(row.prompt) + len(row.tokens):
                self._take(row, drawn, at, 1)
                whole.append(row)
        with self._wake:  # none is ever seen in neither
            for row in whole:
                self._prefilling.remove(row)
                self._decoding.append(row)
        self._deliver(whole)

    def _decode(self, most: int) -> None:
        """One call: a few tokens for every row, of which the fullest shard has `most`."""
        with self._wake:
            for row in list(self._decoding):
                while row in self._decoding and not self._pools[row.shard].grow(
                    row.lease, row.fed + min(self.engine.steps, row.left)
                ):
                    self._pause(next(r for r in reversed(self._decoding) if r.shard == row.shard))
        if not self._decoding and self._circle is None:
            return
        work: list[list[Request]] = [[] for _ in range(self._shards)]
        for row in self._decoding:
            work[row.shard].append(row)
        for rows in work:
            rows.sort(key=lambda row: row.fed)  # see paged.plain
        choices = [self._size(self.engine.slots, part) for part in CALL_FRACTIONS]
        size = next(size for size in choices if most * self._shards <= size)
        drawn, count_B = self._call_decode(work, size)
        for at, row in self._places(work, size):
            row.fed += int(count_B[at])
            self._take(row, drawn, at, int(count_B[at]))
        self._deliver(list(self._decoding))

    def _pause(self, row: Request) -> None:
        """Give a row's pages to others; it will be computed again."""
        self._decoding.remove(row)
        self._pools[row.shard].release(row.lease, row.content[: row.fed])
        self._waiting.appendleft(row)
        self.stats["paused"] += 1

    def _take(self, row: Request, drawn: sampler.Draws, at: int, count: int) -> None:
        for kept, new in (
            (row.tokens, drawn.token_B),
            (row.logps, drawn.logp_B),
            (row.chosen, drawn.chosen_B),
        ):
            kept += np.reshape(new[at], -1)[:count].tolist()
        self.stats["sampled"] += count

    def _deliver(self, rows: Sequence[Request]) -> None:
        """Hand out what is done, and parts of it to those who asked for parts."""
        for row in rows:
            stop = "stop" if row.stopped else "" if row.left else "length"
            if row.sink:
                row.sink(row.said(stop, row.streamed))
                row.streamed = len(row.tokens)
            if not stop:
                continue
            with self._wake:
                self._decoding.remove(row)
                self._release(row)
            if row.future.set_running_or_notify_cancel():
                row.future.set_result(row.said(stop))

    def _size(self, most: int, part: int) -> int:
        return self.engine.rows(most, part, self._shards)

    def _places(self, work: Sequence[Sequence[Any]], size: int) -> Iterator[tuple[int, Any]]:
        """The rows of a call, shard by shard, with what is to be done in them."""
        for shard, items in enumerate(work):
            yield from zip(itertools.count(shard * size // self._shards), items)

    def _draw(self, rows: Sequence[tuple[int, Request]], size: int) -> sampler.DrawParams:
        how = sampler.idle(size, STOPS, WIDTH)
        for at, row in rows:
            sampling = row.sampling
            how.seed_B[at], how.temperature_B[at] = row.seed, sampling.temperature
            how.top_p_B[at], how.top_k_B[at] = sampling.top_p, sampling.top_k
            how.min_p_B[at] = sampling.min_p
            for i, stop in enumerate(row.stops):
                how.stop_BZW[at, i, -len(stop) :] = stop
            if tail := row.tokens[-WIDTH:]:
                how.tail_BW[at, -len(tail) :] = tail
            how.drawn_B[at], how.left_B[at] = len(row.tokens), row.left
        return how

    def _inputs(self, rows: Sequence[tuple[int, Request]], held: Sequence[int], size: int) -> tuple:
        """Table, tokens held and adapters of the rows of a call."""
        table_BX = np.zeros((size, self.engine.table), np.int32)
        held_B = np.zeros(size, np.int32)
        mix_BA = np.zeros((size, self.engine.adapters), np.float32)
        for (at, row), n in zip(rows, held, strict=True):
            pages = row.lease.pages
            table_BX[at, : len(pages)] = pages
            held_B[at] = n
            mix_BA[at] = row.policy.mix_A
        return table_BX, held_B, mix_BA

    def _call(self, program: Any, inputs: tuple, *rest: Any) -> tuple:
        table_BX, held_B, mix_BA, *rest = meshes.put_rows(self.mesh, (*inputs, *rest))
        adapters = self._bank and lora.Bank(self._bank, mix_BA)
        with meshes.dispatch_lock(self.mesh):
            self._kv, *out = program(self._params, adapters, self._kv, table_BX, held_B, *rest)
        return meshes.fetch_rows(out)

    def _call_prefill(self, work: Sequence, size: int) -> sampler.Draws:
        tokens_BT = np.zeros((size, self.engine.tile), np.int32)
        count_B = np.zeros(size, np.int32)
        places = list(self._places(work, size))
        for at, (_, _, part) in places:
            tokens_BT[at, : len(part)], count_B[at] = part, len(part)
        rows = [(at, row) for at, (row, _, _) in places]
        inputs = self._inputs(rows, [start for _, (_, start, _) in places], size)
        how = self._draw(rows, size)
        return self._call(self._programs[0], inputs, tokens_BT, count_B, how)[0]

    def _call_decode(self, work: Sequence, size: int) -> tuple[sampler.Draws, np.ndarray]:
        rows = list(self._places(work, size))
        token_B = np.zeros(size, np.int32)
        for at, row in rows:
            token_B[at] = row.tokens[-1]
        inputs = self._inputs(rows, [row.fed for _, row in rows], size)
        return self._call(self._programs[1], inputs, token_B, self._draw(rows, size))


def _put(bank: dict | None, adapter: dict, slot: int, count: int) -> dict:
    """The bank with an adapter in one of its `count` places."""

    def empty(x: jax.Array) -> jax.Array:
        where = None
        if isinstance(x.sharding, NamedSharding):
            layers, *rest = x.sharding.spec or (None,)
            where = NamedSharding(x.sharding.mesh, P(layers, None, *rest))
        return jnp.zeros((len(x), count, *x.shape[1:]), x.dtype, device=where)

    if bank is None:
        bank = jax.tree.map(empty, adapter)
    if jax.tree.map(lambda x: (len(x), count, *x.shape[1:]), adapter) != jax.tree.map(
        jnp.shape, bank
    ):
        raise ConfigError("adapters beside each other must have the same linears and rank")
    return jax.tree.map(lambda held, x: held.at[:, slot].set(x), bank, adapter)
