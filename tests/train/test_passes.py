"""The updates of a step, where one of them goes wrong."""

import types

import numpy as np
import pytest

from jaxdeep.train import losses, passes


class Step:
    """A step whose `bad`-th update makes weights that are not finite."""

    def __init__(self, bad):
        self.bad, self.made = bad, 0

    def reference_logps(self, state, frozen, batches, old):
        return []

    def gradients(self, state, frozen, batches, references, logps=None, sequences=None):
        return {}, {"loss": 1.0, "grad_norm": 1.0, **dict.fromkeys(losses.MISMATCH, 0.0)}

    def update(self, state, grads):
        self.made += 1
        return state + 1, {"lr": np.float32(0.5), "finite": self.made != self.bad}

    def flops(self, batches, passes):
        return 1.0


@pytest.mark.parametrize(("bad", "trouble"), [(0, False), (1, True), (2, True)])
def test_no_state_is_left_where_an_update_made_it_useless(bad, trouble):
    batch = types.SimpleNamespace(learn_BT=np.ones((1, 1)))
    state, metrics, said = passes.learn(Step(bad), 7, None, [batch], 1.0, 2)
    assert (state is None) == trouble == bool(said) and "finite" not in metrics
    assert state is None or state == 9
    if trouble:
        assert "not finite, with a learning rate of 0.5" in said
