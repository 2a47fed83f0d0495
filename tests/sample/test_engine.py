"""The engine against the trainer's forward pass, against itself in a crowd, and on a mesh."""

import asyncio
import contextlib

import jax
import numpy as np
import pytest
import tiny

from jaxdeep import mesh as meshes
from jaxdeep.errors import ConfigError
from jaxdeep.sample.engine import Engine, EngineConfig
from jaxdeep.types import Sampling

NEVER = Sampling(1.0)


@contextlib.contextmanager
def running(mesh=None, adapter=None, **sizes):
    engine = Engine(
        tiny.params(),
        tiny.CFG,
        mesh or tiny.one_device(),
        EngineConfig(**(dict(slots=8, length=128, chunk=16, steps=4) | sizes)),
    )
    engine.set_adapter(adapter)
    try:
        yield engine
    finally:
        engine.close()


def prompts(n, low=3, high=40, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(1, tiny.CFG.V, rng.integers(low, high)).tolist() for _ in range(n)]


async def together(*works):
    return await asyncio.gather(*works)


def run(*works):
    return asyncio.run(together(*works))


def test_log_probabilities_are_the_trainers_over_a_conversation():
    rng = np.random.default_rng(0)
    with running(adapter=tiny.adapter()) as engine:

        async def talk():
            tokens, known = prompts(1)[0], []
            for turn in range(8):
                said = await engine(tokens, seed=turn, max_new=6, sampling=NEVER)
                known += [(len(tokens) + i, logp) for i, logp in enumerate(said.logps)]
                tokens = tokens + said.tokens + rng.integers(1, tiny.CFG.V, 5).tolist()
            return tokens, known

        tokens, known = asyncio.run(talk())
        stats = dict(engine.stats)
    want = tiny.logps(tokens, tiny.adapter())
    assert len(known) == 48
    np.testing.assert_allclose(
        [want[at] for at, _ in known], [logp for _, logp in known], atol=1e-5
    )
    assert np.abs(want - tiny.logps(tokens, None)).max() > 0.1  # the adapter was in it
    # each turn computed its own 5 new tokens and the last sampled one, never the history
    assert stats["prefilled"] == len(prompts(1)[0]) + 7 * 6


def test_a_row_draws_the_same_alone_and_in_a_crowd():
    asked = prompts(12, seed=1)
    with running() as engine:
        alone = [run(engine(p, seed=7, max_new=12, sampling=NEVER))[0] for p in asked[:4]]
    with running(slots=16, steps=3, chunk=8) as engine:
        crowd = run(*(engine(p, seed=7, max_new=12, sampling=NEVER) for p in asked))
    assert [c.tokens for c in crowd[:4]] == [c.tokens for c in alone]
    assert len({tuple(c.tokens) for c in crowd}) == 12


def test_more_requests_than_rows_are_all_served():
    asked = prompts(30, seed=2)
    with running(slots=8) as engine:
        said = run(
            *(engine(p, seed=i, max_new=3 + i % 9, sampling=NEVER) for i, p in enumerate(asked))
        )
        assert "active=0, waiting=0" in repr(engine)
    assert [len(c.tokens) for c in said] == [3 + i % 9 for i in range(30)]
    assert {c.stop for c in said} == {"length"}


def test_temperature_zero_takes_the_most_likely_and_seeds_matter_above_it():
    prompt = prompts(1)[0]
    with running() as engine:
        cold = run(*(engine(prompt, seed=s, max_new=8, sampling=Sampling(0.0)) for s in range(3)))
        warm = run(*(engine(prompt, seed=s, max_new=8, sampling=NEVER) for s in range(3)))
    assert len({tuple(c.tokens) for c in cold}) == 1 and len({tuple(c.tokens) for c in warm}) == 3
    np.testing.assert_allclose(  # of the policy at temperature 1, whatever the draw was
        cold[0].logps, tiny.logps(prompt + cold[0].tokens, None)[len(prompt) :], atol=1e-5
    )


def test_draws_follow_the_distribution():
    prompt = prompts(1, seed=5)[0]
    draws = 2000
    with running(slots=64, length=64) as engine:
        said = run(*(engine(prompt, seed=s, max_new=1, sampling=NEVER) for s in range(draws)))
    counts = np.bincount([c.tokens[0] for c in said], minlength=tiny.CFG.V)
    every = np.array([tiny.logps([*prompt, v], None)[-1] for v in range(tiny.CFG.V)])
    expected = draws * np.exp(every)
    assert abs(np.exp(every).sum() - 1) < 1e-3
    # chi-square over 95 degrees of freedom: mean 95, standard deviation 13.8
    assert ((counts - expected) ** 2 / expected).sum() < 95 + 5 * 13.8


def test_a_stop_id_ends_the_turn_and_is_part_of_it():
    prompt = prompts(1)[0]
    with running() as engine:
        free = run(engine(prompt, seed=3, max_new=20, sampling=NEVER))[0]
        stop = free.tokens[9]
        until = free.tokens.index(stop) + 1
        cut = run(engine(prompt, seed=3, max_new=20, sampling=Sampling(1.0, (95, stop))))[0]
    assert free.stop == "length" and cut.stop == "stop"
    assert cut.tokens == free.tokens[:until]


def test_a_new_adapter_forgets_what_the_old_one_computed():
    prompt = prompts(1)[0]
    with running() as engine:
        run(engine(prompt, seed=0, max_new=4, sampling=NEVER))
        engine.set_adapter(tiny.adapter())
        said = run(engine(prompt, seed=0, max_new=4, sampling=NEVER))[0]
    want = tiny.logps(prompt + said.tokens, tiny.adapter())[len(prompt) :]
    np.testing.assert_allclose(said.logps, want, atol=1e-5)


@pytest.mark.parametrize("shape", [dict(data=8), dict(model=2, data=4), dict(replica=2, model=4)])
def test_a_mesh_samples_what_one_device_does(shape):
    mesh = meshes.make_mesh(meshes.MeshConfig(**({"data": -1} | shape)))
    asked = prompts(5, seed=3)
    with running(adapter=tiny.adapter()) as engine:
        want = run(*(engine(p, seed=1, max_new=6, sampling=NEVER) for p in asked))
    with running(mesh, adapter=tiny.adapter()) as engine:
        got = run(*(engine(p, seed=1, max_new=6, sampling=NEVER) for p in asked))
    assert [c.tokens for c in got] == [c.tokens for c in want]
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a.logps, b.logps, atol=1e-5)


def test_a_bad_request_fails_alone():
    good = prompts(1)[0]
    with running() as engine:

        async def ask(prompt, **kwargs):
            try:
                return await engine(prompt, **(dict(seed=0, max_new=4, sampling=NEVER) | kwargs))
            except ValueError as error:
                return str(error)

        bad = [([], {}), ([96], {}), ([-1], {}), (good, {"max_new": 200}), (good, {"max_new": 0})]
        said = run(ask(good), *(ask(prompt, **kwargs) for prompt, kwargs in bad), ask(good))
    assert said[0].tokens == said[-1].tokens
    for message, word in zip(
        said[1:-1], ("empty", "vocabulary", "vocabulary", "length=128", "max_new=0"), strict=True
    ):
        assert word in message


def test_closing_answers_whoever_still_waits():
    async def main():
        with running() as engine:
            works = [engine(p, seed=0, max_new=80, sampling=NEVER) for p in prompts(200)]
            waiting = asyncio.gather(*works, return_exceptions=True)
            await asyncio.sleep(0.05)
            await asyncio.to_thread(engine.close)
            said = await waiting
            assert isinstance(said[-1], RuntimeError) and "closed" in str(said[-1])
            with pytest.raises(RuntimeError, match="closed"):
                await engine([1, 2], seed=0, max_new=1)

    asyncio.run(main())


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="slots=6"):
        Engine(tiny.params(), tiny.CFG, meshes.make_mesh(), EngineConfig(slots=6, length=64))
    with pytest.raises(ConfigError, match="length=1024"):
        Engine(tiny.params(), tiny.CFG, tiny.one_device(), EngineConfig(slots=8, length=1024))
    with pytest.raises(ConfigError, match="there are 8"):
        meshes.make_mesh(meshes.MeshConfig(data=3, model=2), jax.devices())
