"""The optimizer does what its settings say."""

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
