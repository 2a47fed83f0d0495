"""Rewards by likeness: the corrected one pays for a gain, the original ones are as they were."""

import pytest

from jaxdeep.envs.repair.diff import Block, between, parse
from jaxdeep.envs.repair.similarity import (
    block_similarity,
    file_match,
    original_similarity,
    similar,
)

OLD = '''\
def position(items, wanted):
    """Index of the first item that is wanted, or -1."""
    for index, item in enumerate(items):
        if item != wanted:
            return index
    return -1


def total(items):
    return sum(items)
'''
RIGHT = OLD.replace("item != wanted", "item == wanted")


def one(new):
    return similar({"a.py": OLD}, {"a.py": new}, {"a.py": RIGHT})


@pytest.mark.parametrize(
    ("new", "low", "high"),
    [
        (RIGHT, 1, 1),
        (RIGHT.replace("Index of", "The index of"), 1, 1),
        (RIGHT + "\n# done\n", 1, 1),
        (OLD, 0, 0),
        (OLD.replace("wanted:", "wanted:  # fixed"), 0, 0),
        (OLD.replace("        if", "        # item == wanted\n        if"), 0, 0),
        (OLD.replace('"""Index', '"""item == wanted'), 0, 0),
        (OLD.replace("if item != wanted:", "return k"), 0, 0.1),
        (OLD.replace("item != wanted", "item is wanted"), 0, 0.6),
        (None, 0, 0),
    ],
)
def test_similar_pays_for_the_gain_over_doing_nothing(new, low, high):
    assert low <= one(new) <= high


def test_a_comment_in_the_right_file_is_worth_nothing_here_and_much_in_the_original():
    def diff(new):
        return between({"a.py": OLD}, {"a.py": new}, "unified").text()

    comment = OLD.replace("if item != wanted:", "if item != wanted:  # compare")
    assert original_similarity(diff(comment), diff(RIGHT)) > 0.6
    assert one(comment) < 0.1
    assert original_similarity(diff(RIGHT), diff(RIGHT)) == 1
    assert original_similarity("", diff(RIGHT)) == original_similarity("", "") == 0


def test_a_file_too_many_halves_it():
    right = between({"a.py": OLD}, {"a.py": RIGHT}, "unified").text()
    extra = right + between({}, {"b.py": "x = 1\n"}, "unified").text()
    assert original_similarity(extra, right) == file_match(extra, right) == 0.5
    assert file_match("", "") == 1
    before, after = {"a.py": OLD}, {"a.py": RIGHT, "b.py": "x = 1\n"}
    assert similar(before, after, {"a.py": RIGHT}) == 0.5
    assert similar(before, before, before) == 1


def test_block_similarity_as_it_was():
    assert block_similarity([Block(None, "a", "b")], [Block(None, "a", "c")]) == 0.5
    first, second = Block(None, "a\nb", "c\nd"), Block(None, "a\nb", "c\ne")
    assert block_similarity([first], [second]) == 0.75
    assert block_similarity([first, first], [first]) == 0.5
    assert block_similarity([], [first]) == 0
    # an oracle with a blank line has its block, so garbage is not equal to it
    oracle = between({"a.py": "a\n\nb\n"}, {"a.py": "a\n\nc\n"}, "blocks")
    assert parse(oracle.text(), "blocks").blocks == oracle.blocks
    assert block_similarity([], oracle.blocks) == 0


def test_long_files_are_compared_in_time():
    lines = [f"x{n} = {n * 7919 % 1000}\n" for n in range(20_000)]
    old, new = "".join(lines), "".join(lines[::-1])
    right = old.replace("x9 ", "y9 ").replace("x19000 ", "y19000 ")
    assert similar({"a.txt": old}, {"a.txt": new}, {"a.txt": right}) == 0
    assert (
        0.4 < similar({"a.txt": old}, {"a.txt": old.replace("x9 ", "y9 ")}, {"a.txt": right}) < 0.6
    )
