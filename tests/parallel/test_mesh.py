"""The way of a batch onto the devices: what arrives is what was packed, and what cannot be is
refused."""

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


def test_a_batch_is_checked_on_its_way():
    wrong = batch()
    wrong.learn_BT[0, 11] = 1.0
    with pytest.raises(ValueError, match="padding is learned: row 0, position 11 of a batch"):
        meshes.put(tiny.one_device(), wrong)


def test_a_batch_that_does_not_divide_is_refused_with_the_sizes():
    with pytest.raises(ConfigError, match="2 rows x 12 positions does not divide"):
        meshes.put(meshes.make_mesh(), batch())
    with pytest.raises(ConfigError, match="2 rows x 12 positions does not divide"):
        meshes.rows_here(meshes.make_mesh(), 2, 12)


def test_all_rows_are_here_where_there_is_one_process():
    assert meshes.rows_here(meshes.make_mesh(), 16, 4) == set(range(16))
