"""The optimizer does what its settings say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdeep.errors import ConfigError
from jaxdeep.train import optim

GRADIENTS = np.asarray([3.0, 4.0], np.float32)  # of norm 5


def moved(**settings):
    """What the first update does to two weights of 1, without decay of the rate."""
    chain = optim.chain(optim.OptimConfig(lr=1e-2, steps=10, decay="constant", **settings))
    weights = {"w": jnp.ones(2)}
    state = chain.init(weights)
    updates, _ = chain.update({"w": jnp.asarray(GRADIENTS)}, state, weights)
    return np.asarray(updates["w"])


def test_a_clip_of_0_leaves_gradients_as_they_are():
    whole = moved(clip=1e6)
    assert (whole < 0).all()  # against the gradient
    np.testing.assert_array_equal(moved(clip=0.0), whole)
    # AdamW's first update forgets the size of a gradient, so small ones tell clipping apart by eps
    assert not np.array_equal(moved(clip=1e-7), whole)


@pytest.mark.parametrize("warmup", [1000, 11])
def test_a_warmup_longer_than_the_run_is_refused(warmup):
    with pytest.raises(ConfigError, match=rf"optim\.warmup={warmup} .* optim\.steps=10"):
        optim.OptimConfig(lr=1e-2, steps=10, warmup=warmup)
    assert optim.OptimConfig(lr=1e-2, steps=10, warmup=10).in_updates(3).warmup == 30


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_weight_decay_shrinks_what_multiplies_and_nothing_else(name):
    cfg = optim.OptimConfig(
        lr=1e-2, steps=4, decay="constant", name=name, muon_lr=1e-2, weight_decay=0.5
    )
    linear = jnp.ones((2, 4, 4))
    trained = {
        "embed": jnp.ones((8, 4)),
        "layers": {"wq": linear, "attn_norm": jnp.ones((2, 4)), "w_up": jnp.ones((2, 3, 4, 4))},
        "norm": jnp.ones(4),
        "head": jnp.ones((4, 8)),
    }
    chain = optim.chain(cfg)
    still = jax.tree.map(jnp.zeros_like, trained)
    updates, _ = chain.update(still, chain.init(trained), trained)
    shrunk = {"embed": 0, "norm": 0, "head": 1} | {"layers": {"wq": 1, "attn_norm": 0, "w_up": 1}}
    for update, shrinks in zip(jax.tree.leaves(updates), jax.tree.leaves(shrunk), strict=True):
        np.testing.assert_allclose(update, -1e-2 * 0.5 * shrinks, rtol=1e-6)
    pair = {"wq": {"a": linear, "b": linear}}
    assert jax.tree.leaves(optim.decayed(pair)) == [True, True]
