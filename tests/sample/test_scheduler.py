"""The scheduler against a device that only keeps account: random requests, cancellations and
replaced adapters, few pages. What each page holds is checked at every call, and no model is run."""

import concurrent.futures
import random
import subprocess
import sys

import numpy as np
import pytest

from jaxdeep.sample.request import AdapterMix, Drawn, Request
from jaxdeep.sample.scheduler import (
    MAX_PREFILLS,
    DecodeCall,
    Demand,
    PrefillCall,
    Scheduler,
)
from jaxdeep.sample.sizes import EngineConfig
from jaxdeep.types import Sampling

V = 5  # few enough that prompts share prefixes and stops are drawn


def token(seed, index):
    """What a request with this seed draws at this place of its turn."""
    return (seed * 7919 + index * 104729) % 1009 % V


def answer(request):
    """The whole turn of a request, whatever it shares its calls with."""
    tokens = []
    while len(tokens) < request.max_new and not any(
        tokens[-len(stop) :] == stop for stop in request.stops
    ):
        tokens.append(token(request.seed, len(tokens)))
    return tokens


class Device:
    """Runs calls for one scheduler: keeps what was written to every page, and fails where a call
    would read something else than the request's own tokens under its own adapters."""

    def __init__(self, scheduler):
        self.scheduler, self.engine = scheduler, scheduler.engine
        self.written = {}

    def slot(self, request, position):
        page = request.lease.pages[position // self.engine.page]
        return request.shard, page, position % self.engine.page

    def write(self, request, position):
        slot = self.slot(request, position)
        self.written[slot] = (request.mix, request.content[position])

    def check(self, request, count):
        for position in range(count):
            want = (request.mix, request.content[position])
            assert self.written[self.slot(request, position)] == want

    def run(self, call):
        prefill = isinstance(call, PrefillCall)
        shards, engine = self.scheduler.shards, self.engine
        limit = engine.tiles if prefill else engine.slots
        assert call.size in engine.call_sizes(limit, shards)
        places = [at for at, _ in call.rows]
        assert len(set(places)) == len(places) <= call.size
        for at, row in call.rows:
            shard = (row.request if prefill else row).shard
            assert at * shards // call.size == shard
        return self.prefill(call) if prefill else self.decode(call)

    def prefill(self, call):
        for _, tile in call.rows:
            assert 0 < len(tile.tokens) <= self.engine.tile
            for i, written in enumerate(tile.tokens):
                assert tile.request.content[tile.start + i] == written
                self.write(tile.request, tile.start + i)
        for _, tile in call.rows:
            self.check(tile.request, tile.start + len(tile.tokens))
        return [self.draw(tile.request, 1) for _, tile in call.rows]

    def decode(self, call):
        # a request that draws never sits a call out
        assert {id(r) for _, r in call.rows} == {id(r) for r in self.scheduler.decoding}
        out = []
        for _, request in call.rows:
            assert request.computed == len(request.content) - 1
            new = self.draw(request, self.engine.steps)
            held = request.computed + len(new.tokens)
            assert held <= len(request.lease.pages) * self.engine.page
            for i, at in enumerate(range(request.computed, held)):
                value = ([request.tokens[-1], *new.tokens])[i]
                self.written[self.slot(request, at)] = (request.mix, value)
            self.check(request, request.computed + 1)
            out.append(new)
        return out

    def draw(self, request, steps):
        rest = answer(request)[len(request.tokens) :][:steps]
        return Drawn(rest, [-1.0] * len(rest), [-2.0] * len(rest))


class Crowd:
    """Random requests to one scheduler, and what became of each."""

    def __init__(self, engine, pages, shards, seed, *, cancel=0.0, names=2):
        self.rng = random.Random(seed)
        self.scheduler = Scheduler(engine, pages, shards)
        self.device = Device(self.scheduler)
        self.cancel, self.ended = cancel, {}
        self.submitted, self.admitted, self.parts = [], [], {}
        self.names = {name: AdapterMix(np.zeros(1)) for name in range(names)}
        self.prefills_in_a_row = 0

    def submit(self):
        rng, engine = self.rng, self.scheduler.engine
        room = min(engine.length, self.scheduler.pools[0].count * engine.page)
        prompt = [rng.randrange(V) for _ in range(rng.randint(1, room - 1))]
        if (
            self.submitted and rng.random() < 0.5
        ):  # a conversation that goes on, or another of a group
            prompt = rng.choice(self.submitted).content[: room - 1]
        stop = tuple(tuple(rng.randrange(V) for _ in range(2)) for _ in range(rng.randrange(2)))
        request = Request(
            list(prompt),
            rng.randrange(10**6),
            rng.randint(1, room - len(prompt)),
            Sampling(stop=stop),
            rng.choice(list(self.names.values())),
            concurrent.futures.Future(),
        )
        if rng.random() < 0.3:
            self.parts[id(request)] = []
            request.on_part = self.parts[id(request)].append
        self.submitted.append(request)
        self.scheduler.submit(request)

    def disturb(self):
        """Cancel a request, or let a name stand for another adapter."""
        flying = self.scheduler.in_flight
        if flying and self.rng.random() < self.cancel:
            self.rng.choice(flying).future.cancel()
        if self.rng.random() < 0.02:
            name = self.rng.choice(list(self.names))
            old, self.names[name] = self.names[name], AdapterMix(np.zeros(1))
            old.named = False
            self.scheduler.forget(old)

    def admit(self):
        queue = [r for r in self.scheduler.waiting if not r.future.cancelled()]
        before = {id(r) for r in (*self.scheduler.prefilling, *self.scheduler.decoding)}
        self.scheduler.admit()
        new = [r for r in self.scheduler.prefilling if id(r) not in before]
        assert [id(r) for r in new] == [id(r) for r in queue[: len(new)]]  # nobody overtakes
        self.admitted += [r for r in new if not r.tokens]

    def call(self, demand):
        """Make the call, and hand out what it drew as an engine does."""
        call = self.scheduler.next_call(demand)
        if call is None:
            return call
        self.prefills_in_a_row = self.prefills_in_a_row + 1 if demand.rows else 0
        if isinstance(call, DecodeCall):
            self.prefills_in_a_row = 0
        assert self.prefills_in_a_row <= MAX_PREFILLS
        drawn = self.device.run(call)
        for request, part, completion in self.scheduler.finish(call, drawn):
            if part is not None:
                request.on_part(part)
            if completion is not None:
                assert id(request) not in self.ended
                self.ended[id(request)] = completion
                if request.future.set_running_or_notify_cancel():
                    request.future.set_result(completion)
        self.check_queues()
        return call

    def check_queues(self):
        s = self.scheduler
        flying = [id(r) for r in s.in_flight]
        assert len(set(flying)) == len(flying)
        assert all(r.lease is None for r in s.waiting)
        active = [*s.prefilling, *s.decoding]
        for shard, pool in enumerate(s.pools):
            mine = [r for r in active if r.shard == shard]
            assert len(mine) <= s.engine.slots // s.shards
            assert pool.used == len({page for r in mine for page in r.lease.pages})

    def check_end(self):
        s = self.scheduler
        assert not s.in_flight
        for request in self.submitted:
            assert request.future.done() and request.mix.users == 0
            if request.future.cancelled():
                continue
            completion = request.future.result()
            assert completion is self.ended[id(request)]
            assert completion.tokens == answer(request) and completion.tokens
            assert len(completion.logps) == len(completion.drawn_logps) == len(completion.tokens)
            stopped = any(completion.tokens[-len(x) :] == x for x in request.stops)
            assert completion.stop == ("stop" if stopped else "length")
            if id(request) in self.parts:
                *first, last = self.parts[id(request)]
                assert [t for p in (*first, last) for t in p.tokens] == completion.tokens
                assert {p.stop for p in first} <= {""} and last.stop == completion.stop
        cancelled = sum(r.future.cancelled() for r in self.submitted)
        delivered_late = sum(r.future.cancelled() and id(r) in self.ended for r in self.submitted)
        assert s.counts["cancelled"] == cancelled - delivered_late
        order = {id(r): i for i, r in enumerate(self.submitted)}
        places = [order[id(r)] for r in self.admitted if not r.future.cancelled()]
        assert places == sorted(places)
        for pool in s.pools:
            assert pool.used == 0 and pool.available == pool.count
            assert set(pool._roots) <= set(self.names.values())  # nothing of replaced adapters


SIZES = [
    dict(slots=8, length=60, page=4, chunk=16, tile=4, steps=4),
    dict(slots=4, length=40, page=2, chunk=4, tile=4, steps=3),
    dict(slots=16, length=60, page=8, chunk=32, tile=8, steps=8, exact=True),
    dict(slots=1, length=30, page=4, chunk=8, tile=8, steps=1),
]


@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: f"{sizes['slots']} slots")
@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("few", [True, False])
def test_every_request_ends_once_in_order_and_every_page_comes_back(sizes, shards, few):
    engine = EngineConfig(
        **sizes | dict(slots=sizes["slots"] * shards, chunk=sizes["chunk"] * shards)
    )
    longest = -(-engine.length // engine.page)
    paused = 0
    for seed in range(4):
        pages = (longest + 2 if few else longest * engine.slots) * shards
        crowd = Crowd(engine, pages, shards, seed, cancel=0.1)
        for step in range(10_000):
            if step < 100:
                for _ in range(crowd.rng.choice((0, 0, 1, 4))):
                    crowd.submit()
            crowd.disturb()
            crowd.admit()
            if crowd.call(crowd.scheduler.demand()) is None and step >= 100:
                break
        # the work there was: a request that starves would go on beyond all of it
        tiles = sum(-(-len(r.content) // engine.tile) for r in crowd.submitted)
        assert step <= 100 + tiles + sum(r.max_new for r in crowd.submitted)
        crowd.admit()
        crowd.check_end()
        paused += crowd.scheduler.counts["paused"]
        assert crowd.scheduler.counts["reused"] > 0
    assert (paused > 0) == (few and engine.slots > shards)


def test_processes_that_agree_on_the_demand_make_the_same_calls():
    engine = EngineConfig(**SIZES[0])
    crowds = [Crowd(engine, 40, 1, seed, cancel=0.05) for seed in range(3)]
    for step in range(10_000):
        for crowd in crowds:
            # one has little to do, and takes part all the same
            if step < 60 and crowd.rng.random() < (0.1 if crowd is crowds[0] else 0.7):
                crowd.submit()
            crowd.disturb()
            crowd.admit()
        demand = Demand(*map(max, zip(*(c.scheduler.demand() for c in crowds), strict=True)))
        calls = [crowd.call(demand) for crowd in crowds]
        assert len({(type(call), getattr(call, "size", 0)) for call in calls}) == 1
        if step >= 60 and calls[0] is None:
            break
    for crowd in crowds:
        crowd.admit()
        crowd.check_end()


def test_a_long_request_is_not_starved_by_short_ones():
    engine = EngineConfig(**SIZES[0])
    pages = 20  # the long one takes 15 of them
    crowd = Crowd(engine, pages, 1, 0, names=1)

    def submit(n, max_new):
        (mix,) = crowd.names.values()
        prompt = [crowd.rng.randrange(V) for _ in range(n)]
        future = concurrent.futures.Future()
        request = Request(prompt, 1, max_new, Sampling(), mix, future)
        crowd.submitted.append(request)
        crowd.scheduler.submit(request)
        return request

    for _ in range(8):
        submit(8, 8)
    long = submit(50, 10)
    for _ in range(60):
        submit(8, 8)  # there is always a short one that would fit at once
        crowd.admit()
        crowd.call(crowd.scheduler.demand())
    assert long.future.done()


def test_a_paused_request_is_the_next_to_be_admitted_and_goes_on_where_it_was():
    engine = EngineConfig(slots=2, length=24, page=4, chunk=8, tile=8, steps=4)
    crowd = Crowd(engine, 7, 1, 0, names=1)
    (mix,) = crowd.names.values()
    asked = [
        Request([at] * 4, at, 20, Sampling(), mix, concurrent.futures.Future()) for at in range(3)
    ]
    for request in asked:
        crowd.submitted.append(request)
        crowd.scheduler.submit(request)
    while not crowd.scheduler.counts["paused"]:
        crowd.admit()
        crowd.call(crowd.scheduler.demand())
    first, second, third = asked
    assert list(crowd.scheduler.waiting) == [second, third] and second.tokens
    while not first.future.done():
        crowd.admit()
        crowd.call(crowd.scheduler.demand())
    crowd.admit()
    assert second in crowd.scheduler.prefilling and second.computed > 0  # from its old pages
    while crowd.scheduler.in_flight:
        crowd.admit()
        crowd.call(crowd.scheduler.demand())
    crowd.check_end()


def test_a_cancelled_request_goes_on_while_others_share_what_it_is_computing():
    engine = EngineConfig(slots=4, length=40, page=4, chunk=4, tile=4, steps=4)
    crowd = Crowd(engine, 40, 1, 0, names=1)
    (mix,) = crowd.names.values()
    first, second = (
        Request([1] * 30, at, 4, Sampling(), mix, concurrent.futures.Future()) for at in range(2)
    )
    for request in (first, second):
        crowd.submitted.append(request)
        crowd.scheduler.submit(request)
    crowd.admit()
    assert second.computed == 28 and first.computed == 0  # it counts on pages that are to come
    first.future.cancel()
    crowd.admit()
    assert first in crowd.scheduler.prefilling
    while crowd.scheduler.in_flight:
        crowd.admit()
        crowd.call(crowd.scheduler.demand())
    assert second.future.result().tokens == answer(second)
    crowd.check_end()


def place(pages, asked, *, known=(), slots=32, max_new=16, shards=4):
    """How many of the requests that come at once each shard takes, the sizes of the decode calls
    they need, and how many are paused; the tokens `known` were prompted before."""
    engine = EngineConfig(slots=slots, length=128, page=4, chunk=64, tile=4, steps=4)
    crowd = Crowd(engine, pages * shards, shards, 0, names=1)
    (mix,) = crowd.names.values()

    def submit(prompt, seed, max_new):
        request = Request(list(prompt), seed, max_new, Sampling(), mix, concurrent.futures.Future())
        crowd.submitted.append(request)
        crowd.scheduler.submit(request)
        return request

    def run():
        sizes = set()
        while crowd.scheduler.in_flight:
            crowd.admit()
            call = crowd.call(crowd.scheduler.demand())
            sizes |= {call.size} if isinstance(call, DecodeCall) else set()
        return sizes

    if known:
        submit(known, 1, 1)
        run()
    requests = [submit(prompt, seed, max_new) for seed, prompt in enumerate(asked)]
    crowd.admit()
    taken = sorted((r.shard for r in requests if r.lease), key=int)
    sizes = run()
    crowd.check_end()
    counts = [taken.count(shard) for shard in range(shards)]
    return counts, sizes, crowd.scheduler.counts["paused"]


SYSTEM = [1, 2, 3, 4] * 10
ALIKE = [[*SYSTEM, n % V, n // V, 0, 0, 0, 0] for n in range(8)]
APART = [[n] * 46 for n in range(8)]


@pytest.mark.parametrize("known", [(), SYSTEM], ids=["new", "seen before"])
@pytest.mark.parametrize("asked", [ALIKE, APART], ids=["a common beginning", "nothing in common"])
@pytest.mark.parametrize("pages", [32, 300], ids=["few pages", "many pages"])
def test_requests_spread_over_the_shards_whatever_they_share(pages, asked, known):
    """Two on each fill the small decode call; with eight on one, each call would have 32 rows."""
    counts, sizes, paused = place(pages, asked, known=known)
    assert counts == [2, 2, 2, 2] and sizes == {8} and paused == 0


def test_a_long_beginning_is_worth_a_larger_call_and_a_full_shard_is_not():
    long = [1, 2, 3, 4] * 28
    counts, sizes, _ = place(300, [[*long, n] for n in range(8)], known=long, max_new=4)
    # 112 tokens for each row that moves, against 6 more rows for 4 tokens
    assert sorted(counts) == [0, 0, 0, 8] and sizes == {32}
    # 28 of the 32 pages of a shard hold the beginning, and two requests fill the rest
    counts, _, paused = place(32, [[*long, n] for n in range(8)], known=long, max_new=4)
    assert sorted(counts) == [2, 2, 2, 2] and paused == 0


def test_the_scheduler_needs_no_jax():
    program = (
        "import sys\n"
        "for name in ('jax', 'flax'): sys.modules[name] = None\n"
        "import jaxdeep.sample.scheduler\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
