"""The loss on held-out rows: the weighted mean of what a plain forward pass says, however it is
packed."""

import numpy as np
import tiny

from jaxdeep.data.pack import pack, pack_bins, to_row
from jaxdeep.train import optim
from jaxdeep.train import state as states
from jaxdeep.train.measure import Measure
from jaxdeep.types import Piece

SPEC = states.Spec(tiny.CFG, tiny.SPEC, optim.OptimConfig(lr=1e-3, steps=10))


def rows():
    """Conversations of unequal length whose tokens weigh 0, 1/2, 1 or 2."""
    rng, out = np.random.default_rng(3), []
    for n in (5, 9, 14, 20, 7, 11):
        tokens = rng.integers(0, tiny.CFG.V, n).tolist()
        weights = rng.choice([0.0, 0.5, 1.0, 2.0], n - 1).tolist()
        out.append(to_row([Piece(tokens[:1], "world"), Piece(tokens[1:], "policy", None, weights)]))
    return out


def test_the_measured_loss_is_the_weighted_mean_and_packing_changes_nothing():
    mesh, every = tiny.one_device(), rows()
    measure = Measure(SPEC, mesh)
    state = states.State(tiny.adapter(), None, None)
    total = weight = count = 0
    for row in every:
        total -= float((tiny.logps(row.tokens.tolist(), tiny.scaled_adapter()) * row.learn).sum())
        weight += float(row.learn.sum())
        count += int((row.learn > 0).sum())
    packed = pack(every, B=2, T=24)
    assert len(packed) < 3 and (packed[0].segments_BT > 1).any()
    apart = [pack_bins([[row], []], 2, 24) for row in every]
    for batches in (packed, apart):
        found = measure(state, states.Frozen(tiny.params()), batches)
        np.testing.assert_allclose(found["loss"], total / weight, rtol=1e-5)
        assert found["tokens"] == count
