"""The engine: a policy on devices that serves many requests at once, from one thread.

The thread repeats four steps: the scheduler admits requests; processes that share the devices agree
on a call; the model runner makes it; what was drawn is handed out. Callers in other threads only
queue requests, change adapters and read counts.

A request gets the pages that already hold a prefix of its prompt. So a conversation goes on after a
tool call, and a group shares its prompt, without computing anything twice.

    scheduler   which requests a call is of, and their pages (no jax)
    calls       the arrays of a call, and running it
    adapters    the adapters that are held, and their names

If the devices belong to several processes (`mesh.sampling_mesh`), each process still has its own
requests, rows and pages. Before each call they agree on its kind and size.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence

import jax

from jaxdeep.model import lora
from jaxdeep.model.config import Config
from jaxdeep.parallel import mesh as meshes
from jaxdeep.parallel.rounds import Rounds
from jaxdeep.sample import sizes
from jaxdeep.sample.adapters import AdapterBank
from jaxdeep.sample.calls import ModelRunner
from jaxdeep.sample.request import AdapterMix, Request
from jaxdeep.sample.scheduler import Delivery, Demand, Scheduler
from jaxdeep.sample.sizes import EngineConfig
from jaxdeep.types import Completion, Sampling

PAUSE = 0.005  # seconds until processes that have nothing to do ask each other again
SAMPLING = Sampling()


class Engine:
    """`await engine(prompt, seed=..., max_new=...)` samples one turn. Close it when done.

    On a mesh, rows are sharded over `replica` and `data`, heads over `model`. If the mesh has
    devices of several processes, each has an engine like this one, and they serve requests while
    all are `serving`.
    """

    def __init__(
        self, params: dict, cfg: Config, mesh: jax.sharding.Mesh, engine: EngineConfig
    ) -> None:
        pages, shards = sizes.pages(engine, cfg, mesh), sizes.shards_of(mesh)
        self.cfg, self.mesh, self.config = cfg, mesh, engine
        self._rounds = Rounds("engine") if meshes.process_count(mesh) > 1 else None
        self._scheduler = Scheduler(engine, pages, shards)
        self._bank = AdapterBank(cfg, engine.adapters, self._rounds)
        self._runner = ModelRunner(params, cfg, mesh, engine, pages)
        # The lock of the scheduler and the bank. Its holder never runs a call, except in `warm`.
        self._wake = threading.Condition()
        self._open, self._left = self._rounds is None, False  # see `serving`
        self._closed = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        now = self.metrics()
        return (
            f"Engine(rows {now['rows']:.0f} of {self.config.slots}, waiting {now['waiting']:.0f}, "
            f"pages {now['pages']:.0f} of {sum(pool.count for pool in self._scheduler.pools)}, "
            f"sampled {now['sampled']:.0f}, prefilled {now['prefilled']:.0f}, "
            f"reused {now['reused']:.0f})"
        )

    def metrics(self) -> dict[str, float]:
        """Totals since the engine began: requests admitted, paused and cancelled; tokens sampled,
        prefilled and reused; compilations; seconds that requests waited and that devices were busy.
        Rates made of them. What is in progress: rows, waiting requests, pages in use."""
        scheduler = self._scheduler
        totals = "requests sampled prefilled reused paused cancelled queue_seconds busy_seconds"
        out = {name: float(scheduler.counts[name]) for name in totals.split()}
        out["hit_rate"] = out["reused"] / max(out["reused"] + out["prefilled"], 1)
        out["tokens_per_second"] = out["sampled"] / max(out["busy_seconds"], 1e-9)
        out["compilations"] = float(self._runner.compilations)
        out["rows"] = float(len(scheduler.prefilling) + len(scheduler.decoding))
        out["waiting"] = float(len(scheduler.waiting))
        out["pages"] = float(sum(pool.used for pool in scheduler.pools))
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
        """Sample at most `max_new` tokens after `prompt`. ValueError for a request that can never
        be served; other requests go on. Cancelling it returns its pages."""
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
        """The same turn in parts, as they are sampled. Each part has its own tokens; `stop` is ""
        in all but the last. Leaving the loop early cancels the rest."""
        loop, parts = asyncio.get_running_loop(), asyncio.Queue()

        def on_part(part: Completion | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
                loop.call_soon_threadsafe(parts.put_nowait, part)

        future = self._submit(prompt, seed, max_new, adapter, sampling, on_part)
        future.add_done_callback(lambda _: on_part(None))
        try:
            while (part := await parts.get()) is not None:
                yield part
            if (error := future.exception()) is not None:
                raise error
        finally:
            future.cancel()

    def set_adapter(
        self, adapter: lora.Adapter | None, name: str = "", *, version: int = 0
    ) -> None:
        """Let `name` stand for this adapter (None: the base); completions carry `version`.

        Its factors may have any rank and linears; those larger than any before make each program
        compile once more. What was computed with the adapter that had the name is forgotten.
        Requests in flight go on with that one, so there must be room for both, else RuntimeError.
        """
        with self._wake:
            requests = self._scheduler.in_flight
            in_flight = [r.mix for r in requests if not r.future.cancelled()]
            self._forget(self._bank.put(name, adapter, version, in_flight))

    def compose(self, name: str, weights: Mapping[str, float]) -> None:
        """Let `name` stand for the weighted sum of the adapters that have these names now."""
        with self._wake:
            self._forget(self._bank.compose(name, weights))

    def remove_adapter(self, name: str) -> None:
        """Let `name` stand for nothing any more: new requests for it are refused, and its pages and
        its place are free once those in flight have ended. ValueError for an unknown name, and for
        "", which stands for the base (`set_adapter(None)`)."""
        with self._wake:
            self._forget(self._bank.remove(name))

    def set_base(self, params: dict) -> None:
        """Sample from other weights of the same shapes. RuntimeError if requests are in flight."""
        with self._wake:
            if count := len(self._scheduler.in_flight):
                raise RuntimeError(f"{count} requests are in flight")
            self._runner.params = params
            for mix in self._bank.mixes.values():
                self._forget(mix)

    def follow(self, params: dict, adapter: lora.Adapter | None, version: int) -> None:
        """Sample from the weights, as `set_base`, and the adapter that `version` updates made."""
        if params is not self._runner.params:
            self.set_base(params)
        self.set_adapter(adapter, version=version)

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        """Serve requests inside this block. An engine on devices of this process alone always does.

        With devices of other processes, all processes enter the block and leave it together: one
        that is done goes on making calls until the last one is done. Between blocks requests wait,
        and the devices are free for other programs of all processes.
        """
        if self._rounds is None:
            yield
            return
        with self._wake:
            self._open, self._left = True, False
            self._wake.notify_all()
        yield  # an error here ends the process: it does not wait for the others
        with self._wake:
            self._left = True
            self._wake.wait_for(lambda: self._closed or not self._open)
            if self._closed:
                raise RuntimeError("the engine is closed") from self._error

    def warm(self) -> None:
        """Compile all programs, with adapters if one has been set. Only between requests."""
        with self._wake, meshes.use(self.mesh):
            self._runner.warm(self._bank.factors)

    def close(self) -> None:
        """End the thread and free the pages. Requests in flight get a RuntimeError."""
        with self._wake:
            self._closed = True
            self._wake.notify_all()
        # a thread that waits for other processes ends when this process does
        if self._rounds is None or not self._open:
            self._thread.join()
            self._runner.free()

    def _submit(
        self,
        prompt: Sequence[int],
        seed: int,
        max_new: int,
        adapter: str,
        sampling: Sampling,
        on_part: Callable[[Completion], None] | None,
    ) -> concurrent.futures.Future:
        prompt = [int(token) for token in prompt]
        self._runner.check(prompt, max_new, sampling)
        future = concurrent.futures.Future()
        with self._wake:
            if self._closed:
                raise RuntimeError("the engine is closed") from self._error
            mix = self._bank[adapter]
            seed &= 0xFFFFFFFF  # a uint32 on devices
            request = Request(prompt, seed, max_new, sampling, mix, future, on_part)
            self._scheduler.submit(request)
            self._wake.notify()
        return future

    def _forget(self, mix: AdapterMix | None) -> None:
        if mix is not None:
            self._scheduler.forget(mix)

    def _run(self) -> None:
        with meshes.use(self.mesh):
            try:
                while self._ready():
                    demand = self._agreed_demand()
                    begun = time.perf_counter()
                    self._make_call(demand)
                    self._scheduler.counts["busy_seconds"] += time.perf_counter() - begun
            finally:
                self._error = sys.exception()
                with self._wake:
                    self._closed = True
                    requests = self._scheduler.in_flight
                    self._wake.notify_all()
                for request in requests:
                    error = RuntimeError("the engine closed before this request was served")
                    error.__cause__ = self._error
                    # whoever waits may cancel at any moment: to ask first would not help
                    with contextlib.suppress(concurrent.futures.InvalidStateError):
                        request.future.set_exception(error)

    def _ready(self) -> bool:
        """Wait for something to do and admit requests; False once the engine is closed."""
        with self._wake:
            # other processes may have requests when this one has none: it goes on asking them
            self._wake.wait_for(
                lambda: self._closed or (self._open and (self._rounds or self._scheduler.in_flight))
            )
            if self._closed:
                return False
            self._scheduler.admit()
            return True

    def _agreed_demand(self) -> Demand:
        """The largest demand of all processes; none once all have left `serving`."""
        demand = self._scheduler.demand()  # no lock: only this thread moves requests between queues
        if self._rounds is None:
            return demand
        answers = self._rounds([*demand, self._left])
        with self._wake:
            if all(left for _, _, left in answers):
                self._open = False
                self._wake.notify_all()
                return Demand(0, 0)
            demand = Demand(*(max(answer[i] for answer in answers) for i in (0, 1)))
            if not any(demand) and not self._scheduler.waiting:
                self._wake.wait(PAUSE)
        return demand

    def _make_call(self, demand: Demand) -> None:
        with self._wake:
            call = self._scheduler.next_call(demand)
        # a process without rows of its own still takes part in a call of all processes
        if call is None or not (call.rows or self._rounds):
            return
        drawn = self._runner.run(call, self._bank.factors)
        with self._wake:
            deliveries = self._scheduler.finish(call, drawn)
        # not under the lock: it wakes threads that will submit their next requests
        for delivery in deliveries:
            _hand_out(delivery)


def _hand_out(delivery: Delivery) -> None:
    request, part, completion = delivery
    if part is not None:
        request.on_part(part)
    if completion is not None and request.future.set_running_or_notify_cancel():
        request.future.set_result(completion)
