"""The pool of pages against a plain account of what each page holds."""

import random
import sys

import pytest

from jaxdeep.sample import sizes
from jaxdeep.sample.pages import Pool


def account(lease, tokens, size):
    """What each page of a sequence holds."""
    return {page: tuple(tokens[i * size : (i + 1) * size]) for i, page in enumerate(lease.pages)}


def test_a_beginning_is_found_until_its_room_is_needed():
    pool = Pool(4, 2)
    lease, held = pool.lease("p", [1, 2, 3, 4, 5])
    assert held == 0 and pool.grow(lease, 5) and pool.used == 3
    pool.publish(lease, [1, 2, 3, 4, 5])
    other, held = pool.lease("p", [1, 2, 3, 4, 9])
    assert held == 4 and other.pages == lease.pages[:2]
    assert pool.lease("q", [1, 2, 3, 4])[1] == 0  # another policy's
    first = lease.pages
    pool.release(other, [1, 2, 3, 4])
    pool.release(lease, [1, 2, 3, 4, 5])
    assert pool.used == 0 and pool.available == 4
    again, held = pool.lease("p", [1, 2, 3, 4, 5, 6])
    assert held == 5 and again.pages == first  # the last page, not full, goes on too
    twin, held = pool.lease("p", [1, 2, 3, 4, 5, 6])
    assert held == 4  # and belongs to one sequence at a time
    assert not pool.grow(twin, 9) and len(twin.own) == 0
    assert pool.grow(twin, 5)
    pool.release(twin, [1, 2, 3, 4, 5])
    pool.release(again, [1, 2, 3, 4, 5, 6])
    fresh, held = pool.lease("p", [7] * 8)
    assert held == 0 and pool.grow(fresh, 8) and pool.available == 0
    pool.release(fresh, [7] * 8)
    assert pool.match("p", [1, 2]) == (0, 0) and pool.match("p", [7] * 9) == (8, 0)


def test_what_will_not_be_computed_is_taken_back_unless_others_count_on_it():
    pool = Pool(8, 2)
    tokens = [1, 2, 3, 4, 5, 6]
    lease, _ = pool.lease("p", tokens)
    pool.grow(lease, 6)
    pool.publish(lease, tokens)
    other, held = pool.lease("p", [1, 2, 3, 4, 0])
    assert held == 4 and not pool.withdraw(lease, 2)
    pool.release(other, tokens[:4])
    assert pool.withdraw(lease, 3) and pool.match("p", tokens) == (2, 1)
    pool.release(lease, tokens[:3])
    assert pool.lease("p", tokens)[1] == 3


def test_a_policy_that_is_forgotten_leaves_nothing_behind():
    pool = Pool(6, 2)
    idle, _ = pool.lease("p", [1, 2, 3])
    pool.grow(idle, 3)
    pool.release(idle, [1, 2, 3])
    flying, held = pool.lease("p", [1, 2, 5])
    pool.grow(flying, 3)
    assert held == 2
    pool.forget("p")
    assert pool.match("p", [1, 2, 3]) == (0, 0) and pool.used == 2
    pool.release(flying, [1, 2, 5])
    assert pool.used == 0 and pool.match("p", [1, 2]) == (0, 0) and len(pool._free) == 6


@pytest.mark.parametrize("depth", [4, 64])
def test_forgetting_visits_each_page_once_however_deep_it_lies(depth):
    """As many pages in a few long conversations as in many short ones, and one in progress."""
    pages, size = 512, 2
    pool = Pool(pages + depth, size)
    for number in range(pages // depth):
        tokens = [number, *range(depth * size - 1)]
        lease, _ = pool.lease("p", tokens)
        assert pool.grow(lease, len(tokens))
        pool.release(lease, tokens)
    live, held = pool.lease("p", [0, *range(size), 7, 7, 7])
    assert held == size and pool.grow(live, size + 4)
    lines = 0

    def count(frame, event, _):
        nonlocal lines
        lines += event == "line"
        return count

    before = sys.gettrace()
    sys.settrace(count)
    try:
        pool.forget("p")
    finally:
        sys.settrace(before)
    assert lines < 20 * pages
    assert pool.used == 3 and pool.match("p", [0, 0, 1]) == (0, 0)
    pool.release(live, [0, *range(size), 7, 7, 7])
    assert pool.used == 0 and sorted(pool._free) == list(range(pages + depth))


def test_no_page_is_two_things_at_once():
    """Random sequences that come, grow, end and are dropped: a page in use always holds what was
    last written to it by whoever shares it, and none is lost."""
    for seed in range(30):
        rng = random.Random(seed)
        pool, size = Pool(24, 4), 4
        written: dict[int, tuple] = {}
        live: list[tuple] = []
        for _ in range(400):
            policy = rng.choice("pq")
            act = rng.random()
            if act < 0.45:
                tokens = [rng.randrange(2) for _ in range(rng.randint(1, 30))]
                lease, held = pool.lease(policy, tokens)
                assert held <= len(tokens)
                for page, content in account(lease, tokens[:held], size).items():
                    assert written[page][: len(content)] == content
                if not pool.grow(lease, len(tokens)):
                    pool.release(lease, tokens[:held])
                    continue
                pool.publish(lease, tokens)
                shared_pages = {n.page for n in lease.path if n.users > 1}
                for page, content in account(lease, tokens, size).items():
                    if page in shared_pages:
                        assert written[page] == content
                    written[page] = content
                live.append((lease, tokens))
            elif live and act < 0.7:
                lease, tokens = live[rng.randrange(len(live))]
                if pool.grow(lease, len(tokens) + 1):
                    tokens.append(rng.randrange(2))
                    page = lease.pages[(len(tokens) - 1) // size]
                    assert page in lease.own
                    written[page] = account(lease, tokens, size)[page]
            elif live and act < 0.98:
                lease, tokens = live.pop(rng.randrange(len(live)))
                pool.release(lease, tokens)
            else:
                pool.forget(policy)
            for lease, tokens in live:
                held = account(lease, tokens, size)
                assert all(written[page] == content for page, content in held.items())
            own = [page for lease, _ in live for page in lease.own]
            shared = {n.page for lease, _ in live for n in lease.path}
            assert len(own) == len(set(own)) and not shared & set(own)
            assert pool.used == len(own) + len(shared)
        for lease, tokens in live:
            pool.release(lease, tokens)
        assert pool.used == 0 and pool.available == 24


@pytest.mark.parametrize(
    ("slots", "length", "page"),
    [(64, 240, 16), (64, 32_768, 16), (4, 131_072, 32), (256, 32_768, 64)],
)
def test_a_page_is_as_small_as_the_table_of_a_call_allows(slots, length, page):
    engine = sizes.EngineConfig(slots=slots, length=length, chunk=512)
    assert engine.page == page
    assert 4 * engine.table * max(slots, engine.tiles) < sizes.TABLE_BYTES < 2**20
    assert page == 16 or 8 * engine.table * max(slots, engine.tiles) > sizes.TABLE_BYTES
