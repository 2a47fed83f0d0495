"""What a batch must be to be trained on, and what is said of one that is not."""

import numpy as np
import pytest

from jaxdeep.data.pack import check_batch, pack, to_row
from jaxdeep.types import Piece


def batch():
    """Two rows of 12: segments of 5 and 5 tokens, and of 5; the last three of each are learned."""
    pieces = [Piece([1, 2], "world"), Piece([3, 4, 5], "policy", [-1.0, -2.0, -3.0])]
    (packed,) = pack([to_row(pieces, advantage=0.5)] * 3, B=2, T=12)
    return packed


def test_what_was_packed_passes():
    check_batch(batch())


WRONG = {
    "padding is learned": ("learn_BT", (0, 11), 1.0),
    "the first token of a segment is learned": ("learn_BT", (0, 5), 1.0),
    "the mask is negative or not finite": ("learn_BT", (0, 2), np.nan),
    "the mask is negative": ("learn_BT", (0, 2), -1.0),
    "an advantage where nothing is learned": ("advantage_BT", (0, 1), 0.5),
    "an advantage where nothing is": ("advantage_BT", (1, 11), 0.5),
    "an advantage is not finite": ("advantage_BT", (0, 3), np.inf),
    "log-probability of a learned token is not": ("logp_BT", (0, 3), 0.7),  # a probability, say
    "log-probability of a learned token": ("logp_BT", (0, 3), np.nan),
    "log-probability of a learned": ("logp_BT", (0, 3), -np.inf),
    "positions do not count up": ("positions_BT", (0, 6), 6),
    "positions do not": ("positions_BT", (1, 0), 1),
    "segments do not count": ("segments_BT", (0, slice(5, 10)), 3),
    "segments do not": ("segments_BT", (0, slice(0, 2)), 0),  # padding on the left
    "segments do": ("segments_BT", (1, 11), 2),
}


@pytest.mark.parametrize("message", WRONG)
def test_a_batch_that_is_wrong_is_refused_with_the_place(message):
    name, place, value = WRONG[message]
    wrong = batch()
    getattr(wrong, name)[place] = value
    with pytest.raises(ValueError, match=f"{message}.*: row {place[0]}, position .* of a batch"):
        check_batch(wrong)


def test_arrays_of_different_shapes_are_refused():
    wrong = batch()._replace(learn_BT=np.zeros((2, 11), np.float32))
    with pytest.raises(ValueError, match=r"one shape.*'learn_BT': \(2, 11\)"):
        check_batch(wrong)
