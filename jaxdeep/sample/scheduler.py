"""What an engine computes next: its queues of requests, their pages, and the rows of each call.

    waiting      submitted, or paused: no pages
    prefilling   admitted: has pages for all its tokens, which enter them a tile at a time
    decoding     draws a few tokens in every decode call

Requests are admitted in the order of their submission. If pages run out while requests grow, the
youngest one is paused: it returns its pages and goes back to the front of the waiting ones.

Nothing here imports jax or touches a device. Nothing is thread-safe: the engine holds a lock.
"""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxdeep.sample.pages import Pool
from jaxdeep.sample.request import AdapterMix, Drawn, Request
from jaxdeep.types import Completion

if TYPE_CHECKING:
    from jaxdeep.sample.sizes import EngineConfig

MAX_PREFILLS = 8  # prefill calls in a row while other requests wait for their next tokens


class Demand(NamedTuple):
    """What the fullest shard has to do: tiles of prompts to enter, and rows that draw."""

    tiles: int
    rows: int


class Tile(NamedTuple):
    """Consecutive tokens of a request's content, of which `start` come before them."""

    request: Request
    start: int
    tokens: Sequence[int]


@dataclasses.dataclass(frozen=True)
class PrefillCall:
    """A call of `size` rows that takes in tiles, and draws one token after each. `rows` are the
    rows in use, by their index in the call; a shard has its part of the indices."""

    size: int
    rows: Sequence[tuple[int, Tile]] = ()


@dataclasses.dataclass(frozen=True)
class DecodeCall:
    """A call of `size` rows that draws a few tokens for each request, `rows` as above."""

    size: int
    rows: Sequence[tuple[int, Request]] = ()


class Delivery(NamedTuple):
    """News for whoever submitted a request: the next part of its turn, if it is streamed, and the
    whole turn, once it has ended."""

    request: Request
    part: Completion | None
    completion: Completion | None


class Scheduler:
    """Requests on `shards` shards, each of which has its share of the slots and of the `pages`.

    `counts` are running totals: requests admitted, tokens sampled, prefilled and reused from pages,
    requests paused and cancelled, and the seconds that requests waited to be admitted.
    """

    def __init__(self, engine: EngineConfig, pages: int, shards: int) -> None:
        self.engine, self.shards = engine, shards
        self.pools = [
            Pool(pages // shards, engine.page, partial=not engine.exact) for _ in range(shards)
        ]
        self.waiting: collections.deque[Request] = collections.deque()
        self.prefilling: list[Request] = []  # oldest admission first, as is `decoding`
        self.decoding: list[Request] = []
        self.counts: collections.Counter[str] = collections.Counter()
        self._prefills_in_a_row = 0

    @property
    def in_flight(self) -> list[Request]:
        """All requests that have not ended."""
        return [*self.waiting, *self.prefilling, *self.decoding]

    def submit(self, request: Request) -> None:
        """Queue a request. One shard must have enough pages for all of it."""
        request.mix.users += 1
        self.waiting.append(request)

    def forget(self, mix: AdapterMix) -> None:
        """Drop the pages that were computed with this mix, those in use once they are released."""
        for pool in self.pools:
            pool.forget(mix)

    def admit(self) -> None:
        """Drop cancelled requests, then admit waiting ones, in order, while there is a free slot,
        pages for what they hold, and a page to spare for each request that would be beside them.

        Without the spare pages a request would be paused, and computed again, as soon as another
        grows.
        """
        self._drop_cancelled()
        busy = collections.Counter(r.shard for r in (*self.prefilling, *self.decoding))
        while self.waiting:
            request = self.waiting[0]
            shard = self._best_shard(request, busy)
            if shard is None:
                # nobody overtakes it: a long request would wait forever behind short ones
                return
            pool = self.pools[shard]
            # the last token is always computed again: the next one is predicted from it
            lease, computed = pool.lease(request.mix, request.content[:-1])
            pool.grow(lease, len(request.content))
            # Others can share its pages before they are computed: tiles enter in the order of
            # admission, and a call writes the keys of all its tiles before any of them attends.
            pool.publish(lease, request.content)
            request.shard, request.lease, request.computed = shard, lease, computed
            self.waiting.popleft()
            self.prefilling.append(request)
            busy[shard] += 1
            if not request.tokens:  # it was not paused
                self.counts["requests"] += 1
                self.counts["queue_seconds"] += time.perf_counter() - request.submitted_at
            self.counts["reused"] += computed

    def _best_shard(self, request: Request, busy: Mapping[int, int]) -> int | None:
        """The shard on which a request costs least, of those with a free slot and room for what it
        holds; None if there is none. `busy` counts the requests in progress on each shard.

        The cost is in tokens that a shard computes: those that are not in its pages yet; those of
        decode calls, which have a row for each slot of their size whether it is used or not, and
        become larger for all shards if one has more requests than a small call holds; and those
        that are computed again because pages run out before everybody has ended. Where it is equal,
        the shard with the fewest requests takes it, then the one with the most pages.
        """
        engine, page = self.engine, self.engine.page
        most = engine.slots // self.shards
        growth = self._promised_pages()

        def cost(shard: int) -> tuple[bool, int, int, int]:
            pool = self.pools[shard]
            matched, used = pool.match(request.mix, request.content[:-1])
            now, later = (
                -(-n // page) - used
                for n in (len(request.content), len(request.content) + request.left)
            )
            beside = busy[shard]
            rows = self._call_size(engine.slots, beside + 1) // self.shards
            lacking = max(later + growth[shard] - pool.available, 0)
            tokens = len(request.content) - matched + rows * request.left + lacking * page
            return now + beside > pool.available, tokens, beside, -pool.available

        costs = {shard: cost(shard) for shard in range(self.shards) if busy[shard] < most}
        best = min(costs, key=lambda shard: costs[shard], default=None)
        return None if best is None or costs[best][0] else best

    def _promised_pages(self) -> collections.Counter[int]:
        """The pages of each shard that requests in progress will still ask for, if none ends before
        its budget does."""
        growth: collections.Counter[int] = collections.Counter()
        for request in (*self.prefilling, *self.decoding):
            whole = -(-(len(request.content) + request.left) // self.engine.page)
            growth[request.shard] += whole - len(request.lease.path) - len(request.lease.own)
        return growth

    def demand(self) -> Demand:
        """What there is to do. Processes that make calls together take the maximum over all."""
        tiles, rows = collections.Counter(), collections.Counter()
        for request in self.prefilling:
            new = len(request.content) - request.computed
            tiles[request.shard] += -(-new // self.engine.tile)
        for request in self.decoding:
            rows[request.shard] += 1
        return Demand(max(tiles.values(), default=0), max(rows.values(), default=0))

    def next_call(self, demand: Demand) -> PrefillCall | DecodeCall | None:
        """The call to make now; None if there is nothing to do. Its kind and size depend on
        `demand` alone, so that all processes make the same call.

        Prompts come first, because a decode call takes nearly as long with few rows as with many;
        but requests that draw wait for `MAX_PREFILLS` calls at most.
        """
        if demand.tiles and (not demand.rows or self._prefills_in_a_row < MAX_PREFILLS):
            self._prefills_in_a_row += 1
            return self._prefill_call(demand.tiles)
        if demand.rows:
            self._prefills_in_a_row = 0
            return self._decode_call(demand.rows)
        return None

    def finish(self, call: PrefillCall | DecodeCall, drawn: Sequence[Drawn]) -> Sequence[Delivery]:
        """Take what a call drew, for each of its rows in their order. Requests that have ended
        release their pages. Returns what is to be handed out."""
        if isinstance(call, DecodeCall):
            for (_, request), new in zip(call.rows, drawn, strict=True):
                # a step computes the keys of one token and draws the next one
                request.computed += len(new.tokens)
                self._take(request, new)
            return self._deliver(list(self.decoding))
        ready = []
        for (_, tile), new in zip(call.rows, drawn, strict=True):
            request = tile.request
            self.counts["prefilled"] += len(tile.tokens)
            if tile.start + len(tile.tokens) == len(request.content):
                self._take(request, new)
                self.prefilling.remove(request)
                self.decoding.append(request)
                ready.append(request)
        return self._deliver(ready)

    def _drop_cancelled(self) -> None:
        for request in [r for r in self.waiting if r.future.cancelled()]:
            self.waiting.remove(request)
            self._leave(request.mix)
            self.counts["cancelled"] += 1
        for queue in (self.prefilling, self.decoding):
            for request in [r for r in queue if r.future.cancelled()]:
                # others may share pages that it has yet to compute: then it goes on until it has
                if self.pools[request.shard].withdraw(request.lease, request.computed):
                    queue.remove(request)
                    self._end(request)
                    self.counts["cancelled"] += 1

    def _prefill_call(self, tiles: int) -> PrefillCall:
        """As many tiles of the oldest prompts as a call holds. The fullest shard has `tiles`."""
        size = self._call_size(self.engine.tiles, tiles)
        room = size // self.shards
        shards: list[list[Tile]] = [[] for _ in range(self.shards)]
        for request in self.prefilling:
            while request.computed < len(request.content) and len(shards[request.shard]) < room:
                start = request.computed
                tokens = request.content[start : start + self.engine.tile]
                shards[request.shard].append(Tile(request, start, tokens))
                request.computed += len(tokens)
        return PrefillCall(size, _placed(shards, size))

    def _decode_call(self, rows: int) -> DecodeCall:
        """All requests that draw, after pausing some if pages run out. The fullest shard had `rows`
        before that."""
        for request in list(self.decoding):
            while request.lease and not self._grow(request):
                youngest = next(r for r in reversed(self.decoding) if r.shard == request.shard)
                self._pause(youngest)
        size = self._call_size(self.engine.slots, rows)
        shards: list[list[Request]] = [[] for _ in range(self.shards)]
        # `paged.plain` reads as many blocks for neighbouring rows as the longest of them has
        for request in sorted(self.decoding, key=lambda r: r.computed):
            shards[request.shard].append(request)
        return DecodeCall(size, _placed(shards, size))

    def _call_size(self, limit: int, rows: int) -> int:
        """The smallest batch size that holds `rows` on every shard, or else the largest."""
        sizes = self.engine.call_sizes(limit, self.shards)
        return next((size for size in sizes if rows * self.shards <= size), sizes[-1])

    def _grow(self, request: Request) -> bool:
        """Pages for the tokens of the next decode call; False if they are lacking."""
        tokens = request.computed + min(self.engine.steps, request.left)
        return self.pools[request.shard].grow(request.lease, tokens)

    def _pause(self, request: Request) -> None:
        """Return a request's pages; it will be computed again."""
        self.decoding.remove(request)
        self._release(request)
        self.waiting.appendleft(request)
        self.counts["paused"] += 1

    def _take(self, request: Request, drawn: Drawn) -> None:
        request.append(drawn)
        self.counts["sampled"] += len(drawn.tokens)

    def _deliver(self, requests: Sequence[Request]) -> list[Delivery]:
        """What those who submitted these requests, all decoding, are told."""
        deliveries = []
        for request in requests:
            part = None
            if request.on_part:
                part = request.completion(request.streamed)
                request.streamed = len(request.tokens)
            ended = bool(request.stop)
            if ended:
                self.decoding.remove(request)
                self._end(request)
            if part is not None or ended:
                completion = request.completion() if ended else None
                deliveries.append(Delivery(request, part, completion))
        return deliveries

    def _end(self, request: Request) -> None:
        self._release(request)
        self._leave(request.mix)

    def _release(self, request: Request) -> None:
        """Return the pages; what they hold can be found by others while there is room."""
        computed = request.content[: request.computed]
        self.pools[request.shard].release(request.lease, computed)
        request.lease = None

    def _leave(self, mix: AdapterMix) -> None:
        """Count one request fewer of this mix. The last one of a mix without a name drops its
        pages: requests that waited while the name was replaced have computed them since."""
        mix.users -= 1
        if not mix.users and not mix.named:
            self.forget(mix)


def _placed(shards: Sequence[Sequence[Any]], size: int) -> list[tuple[int, Any]]:
    """The rows of each shard with their indices in a call of `size` rows."""
    return [
        (shard * size // len(shards) + i, row)
        for shard, rows in enumerate(shards)
        for i, row in enumerate(rows)
    ]
