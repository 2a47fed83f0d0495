"""The door for data: what a batch must be to pass, and what is said of one that is not."""

import numpy as np
import pytest
import tiny

from jaxdeep.data.pack import pack, to_row
from jaxdeep.errors import ConfigError
from jaxdeep.parallel import mesh as meshes
from jaxdeep.types import Piece


def batch():
    """Two rows of 12: segments of 5 and 5 tokens, and of 5; the last three of each are learned."""
    pieces = [Piece([1, 2], "world"), Piece([3, 4, 5], "policy", [-1.0, -2.0, -3.0])]
    (packed,) = pack([to_row(pieces, advantage=0.5)] * 3, B=2, T=12)
    return packed


def test_what_was_packed_passes():
    packed = batch()
    put = meshes.put(tiny.one_device(), packed)
    for ours, there in zip(packed, put, strict=True):
        np.testing.assert_array_equal(ours, there)


WRONG = {
    "padding is learned": ("learn_BT", (0, 11), 1.0),
    "the first token of a segment is learned": ("learn_BT", (0, 5), 1.0),
    "the mask is negative or no number": ("learn_BT", (0, 2), np.nan),
    "the mask is negative": ("learn_BT", (0, 2), -1.0),
    "an advantage where nothing is learned": ("advantage_BT", (0, 1), 0.5),
    "an advantage where nothing is": ("advantage_BT", (1, 11), 0.5),
    "an advantage is no number": ("advantage_BT", (0, 3), np.inf),
    "log-probability of a learned token is none": ("logp_BT", (0, 3), 0.7),  # a probability, say
    "log-probability of a learned token": ("logp_BT", (0, 3), np.nan),
    "log-probability of a learned": ("logp_BT", (0, 3), -np.inf),
    "positions do not count up": ("positions_BT", (0, 6), 6),
    "positions do not": ("positions_BT", (1, 0), 1),
    "segments do not count": ("segments_BT", (0, slice(5, 10)), 3),
    "segments do not": ("segments_BT", (0, slice(0, 2)), 0),  # padding on the left
    "segments do": ("segments_BT", (1, 11), 2),
}


@pytest.mark.parametrize("said", WRONG)
def test_a_batch_that_is_wrong_is_refused_with_the_place(said):
    name, place, value = WRONG[said]
    wrong = batch()
    getattr(wrong, name)[place] = value
    with pytest.raises(ValueError, match=f"{said}.*: row {place[0]}, position .* of a batch"):
        meshes.put(tiny.one_device(), wrong)


def test_parts_of_different_shapes_are_refused():
    wrong = batch()._replace(learn_BT=np.zeros((2, 11), np.float32))
    with pytest.raises(ValueError, match=r"one shape.*'learn_BT': \(2, 11\)"):
        meshes.put(tiny.one_device(), wrong)


def test_a_batch_that_does_not_divide_is_refused_with_the_sizes():
    with pytest.raises(ConfigError, match="2 rows x 12 positions does not divide"):
        meshes.put(meshes.make_mesh(), batch())
    with pytest.raises(ConfigError, match="2 rows x 12 positions does not divide"):
        meshes.rows_here(meshes.make_mesh(), 2, 12)


def test_all_rows_are_here_where_there_is_one_process():
    assert meshes.rows_here(meshes.make_mesh(), 16, 4) == set(range(16))
