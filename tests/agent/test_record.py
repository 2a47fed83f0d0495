"""Trajectories survive the trip to a file and back, whole; what is not one is refused by line."""

import json

import numpy as np
import pytest

from jaxdeep.agent import record
from jaxdeep.errors import DataError
from jaxdeep.types import Branch, Message, Piece, Stop, Task, ToolCall, Trajectory


def trajectories():
    calls = (ToolCall("search", {"query": "é\u2028x", "k": [1, None]}), ToolCall("", error="torn"))
    full = Trajectory(
        Task("a/1", "who?", ("me", "I"), {"supporting": ["x"]}),
        seed=2**31 - 1,
        branches=[
            Branch(
                [
                    Piece([1, 2, 3], "world"),
                    Piece([4, 151_645], "policy", [-0.1, -1e-17], version=7),
                    Piece([5], "world", None, [0.5]),
                ]
            ),
            Branch([Piece([1, 6], "world")]),
        ],
        messages=[
            Message("user", "who?"),
            Message("assistant", "so", reasoning="hm", calls=calls),
            Message("tool", "a\nb", name="search"),
        ],
        stop=Stop.MAX_TOKENS,
        rewards={"answer": 1 / 3, "judge": None},
        reward=None,
        metrics={"turns": 2.0, "tool/search/calls": 1.0},
    )
    return [full, Trajectory(Task("b", "q"), failure="gone", reward=0.5)]


def test_read_gives_back_what_was_written(tmp_path):
    path = tmp_path / "new" / "rollouts.jsonl"
    record.write(path, trajectories())
    assert record.read(path) == trajectories()
    assert path.read_text().count("\n") == 2
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_with_a_tokenizer_pieces_can_be_read_by_people(tmp_path, chat):
    trajectory = Trajectory(
        Task("t", "q"), branches=[Branch([Piece(chat.opening([Message("user", "é!")]), "world")])]
    )
    path = tmp_path / "rollouts.jsonl"
    record.write(path, [trajectory], chat.tokenizer)
    shown = json.loads(path.read_text())["branches"][0]["pieces"][0]["text"]
    assert shown == "<|im_start|>user\né!<|im_end|>\n<|im_start|>assistant\n"
    assert record.read(path) == [trajectory]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    record.write(path, trajectories())
    broken = trajectories()[0]
    broken.metrics["turns"] = float("nan")
    for bad in (broken, Trajectory(Task("odd", "q", meta={"set": {1}}))):
        with pytest.raises(DataError, match=rf"trajectory 1, task '{bad.task.id}'"):
            record.write(path, [trajectories()[0], bad])
    assert record.read(path) == trajectories()
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "rollouts.jsonl"
    record.write(path, trajectories())

    def full(descriptor):
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space left"):
        record.write(path, trajectories()[:1])
    assert record.read(path) == trajectories()
    assert list(tmp_path.iterdir()) == [path]


def test_a_deeply_nested_call_is_no_trap(tmp_path):
    deep = []
    for _ in range(500):
        deep = [deep]
    call = Message("assistant", calls=(ToolCall("f", {"x": deep}),))
    record.write(tmp_path / "r.jsonl", [Trajectory(Task("t", "q"), messages=[call])])
    assert record.read(tmp_path / "r.jsonl")[0].messages == [call]


PIECE = {"tokens": [1], "author": "policy", "logps": [0.0]}
VERSION_1 = {  # as the first records were: one token sequence, and no word of a version
    "task": {"id": "t", "question": "q", "answers": [], "meta": {}},
    "seed": 0,
    "pieces": [PIECE],
    "messages": [{"role": "user", "content": "", "reasoning": "", "calls": [], "name": ""}],
    "stop": "finished",
    "failure": "",
    "rewards": {},
    "reward": None,
    "metrics": {},
}


def bad_lines():
    rows = {
        "not json": "{",
        "not an object": "[1]",
        "foreign": '{"prompt": "x"}',
    }
    new = {name: value for name, value in VERSION_1.items() if name != "pieces"}
    new |= {"version": 2, "branches": [{"pieces": [PIECE]}], "advantage": 0.5}
    changes = {
        "no such stop": {"stop": "tired"},
        "no such role": {"messages": [{**VERSION_1["messages"][0], "role": "robot"}]},
        "a task without id": {"task": {"question": "q", "answers": []}},
    }
    pieces = {
        "no such author": {"tokens": [1], "author": "me", "logps": None},
        "logps too short": {"tokens": [1], "author": "policy", "logps": []},
        "weights too long": {"tokens": [1], "author": "world", "logps": None, "weights": [1, 1]},
        "tokens that are text": {"tokens": ["a"], "author": "world", "logps": None},
    }
    yield "whole", json.dumps(VERSION_1)
    yield "whole", json.dumps(new)
    yield from rows.items()
    yield "of a version to come", json.dumps(new | {"version": 3})
    yield "no version it could be", json.dumps(new | {"version": "new"})
    yield "branches before their version", json.dumps({**new, "version": 1})
    for name, change in changes.items():
        yield name, json.dumps(VERSION_1 | change)
        yield name, json.dumps(new | change)
    for name, piece in pieces.items():
        yield name, json.dumps(VERSION_1 | {"pieces": [piece]})
        yield name, json.dumps(new | {"branches": [{"pieces": [PIECE]}, {"pieces": [piece]}]})


@pytest.mark.parametrize(("name", "line"), list(bad_lines()), ids=lambda value: value[:20])
def test_torn_and_foreign_lines_are_named(tmp_path, name, line):
    path = tmp_path / "rollouts.jsonl"
    record.write(path, trajectories())
    with path.open("a") as file:
        file.write(line)
    if name == "whole":
        assert len(record.read(path)) == 3
        return
    with pytest.raises(DataError, match=r"rollouts\.jsonl:3 "):
        record.read(path)


def test_records_of_before_branches_are_read(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    rows = [VERSION_1, VERSION_1 | {"advantage": 0.5}, VERSION_1 | {"pieces": []}]
    path.write_text("\n".join(map(json.dumps, rows)))
    old, learned, nothing = record.read(path)
    assert old.branches == [Branch([Piece([1], "policy", [0.0])])] and old.advantage is None
    assert learned == Trajectory(**{f: getattr(old, f) for f in record.FIELDS} | {"advantage": 0.5})
    assert nothing.branches == []
    record.write(path, [old, learned, nothing])
    assert record.read(path) == [old, learned, nothing]
    assert [json.loads(line)["version"] for line in path.read_text().splitlines()] == [2, 2, 2]


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"none\.jsonl"):
        record.read(tmp_path / "none.jsonl")


def test_what_training_found_out_lies_beside_the_record(tmp_path):
    full, none = trajectories()
    full.advantage = -0.5
    again = Trajectory(full.task, branches=full.branches)
    path = tmp_path / "gaps" / "1.npy"
    gaps = [np.array([1e-6, -2.5], np.float32), None, None]
    record.write_gaps(path, [full, none, again], gaps)
    found = [gap for _, gap in record.with_gaps([full, none, again], path)]
    assert found[0] == pytest.approx([1e-6, -2.5], rel=0.05) and found[1:] == [None, None]
    assert list(record.with_gaps([full], tmp_path / "none.npy")) == [(full, None)]
    with pytest.raises(DataError, match="holds 4 tokens and its record more"):
        list(record.with_gaps([full, again, again], path))
    record.write(tmp_path / "r.jsonl", [full])
    assert record.read(tmp_path / "r.jsonl")[0].advantage == -0.5


def test_a_file_is_read_one_trajectory_at_a_time(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    record.write(path, trajectories())
    with path.open("a") as file:
        file.write("torn")
    rows = record.stream(path)
    assert [next(rows), next(rows)] == trajectories()
    with pytest.raises(DataError, match=r"rollouts\.jsonl:3 "):
        next(rows)


def test_numpy_values_in_meta_and_answers_are_written_as_numbers(tmp_path):
    meta = {"hops": np.int64(2), "scores": np.arange(2.0)}
    task = Task("t", "?", np.array([1, 2]), meta)
    record.write(tmp_path / "a.jsonl", [Trajectory(task, stop=Stop.FINISHED)])
    (again,) = record.read(tmp_path / "a.jsonl")
    assert again.task == Task("t", "?", ("1", "2"), {"hops": 2, "scores": [0.0, 1.0]})


@pytest.mark.parametrize(
    "given, answers", [("Paris", ("Paris",)), (0, ("0",)), (["a", 1.5], ("a", "1.5"))]
)
def test_a_single_answer_is_one_answer(given, answers):
    assert Task("t", "?", given).answers == answers
    for wrong in (None, {"a": 1}, [None], float("nan")):
        with pytest.raises(DataError, match="an answer must be"):
            Task("t", "?", wrong)
