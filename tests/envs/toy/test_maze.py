"""Mazes: every walk that arrives is right, no wall is walked through, no test maze is in
training."""

import asyncio
import os
import pathlib
import random
import subprocess
import sys

import pytest

from jaxdeep.agent import rollout as loop
from jaxdeep.agent.rollout import Limits
from jaxdeep.agent.scripted import ScriptedPolicy
from jaxdeep.chat.qwen3 import Qwen3Chat
from jaxdeep.chat.tokenizer import Tokenizer
from jaxdeep.envs.toy import facts, maze
from jaxdeep.envs.toy.maze import BACK, MOVES, Demos, Maze, Mazes, MazeTaskset
from jaxdeep.errors import ConfigError, DataError
from jaxdeep.eval import harness
from jaxdeep.types import Message, Stop, Task, Trajectory

PLACE = facts.ASSETS / "maze"
SIZE = Mazes(rows=4, columns=3, loops=2, number=40, system="Go.")
GROWN = [maze.grow(random.Random(n), 2 + n % 3, 2 + n // 3, n % 3) for n in range(12)]
LIMITS = Limits(
    max_turns=1, max_calls=0, turn_tokens=40, max_tokens=200, result_tokens=1, seconds=9.0
)


@pytest.fixture(scope="module")
def chat():
    return Qwen3Chat(Tokenizer.load(PLACE), "none", tools_in_prompt=False)


def judged(grown, said):
    """Both rewards of an answer."""
    task = Task("m", grown.text)
    trajectory = Trajectory(task, messages=[Message("assistant", said)], stop=Stop.FINISHED)
    return maze.solved(task, trajectory), maze.nearer(task, trajectory)


def walked(grown, moves):
    return judged(grown, f"<answer>{maze.answer(moves)}</answer>")


def paths(grown, at, seen=()):
    """Every path to the target that visits no cell twice, by brute force over the text."""
    if at == grown.target:
        yield []
        return
    words = grown.text.split("\n")[at[0]].split("<|")[1:]
    walls = words[3 * at[1] + 1].removesuffix("_wall|>").split("_")
    for move, (down, right) in MOVES.items():
        to = at[0] + down, at[1] + right
        if move not in walls and to not in (*seen, at):
            yield from ([move, *rest] for rest in paths(grown, to, (*seen, at)))


def test_the_golden_maze():
    grown = Maze.read(
        "<|0-0|><|up_left_wall|><|origin|><|0-1|><|up_right_wall|><|blank|>\n"
        "<|1-0|><|down_left_right_wall|><|blank|><|1-1|><|down_left_right_wall|><|target|>"
    )
    right, down = "<|right|>", "<|down|>"
    assert grown.shortest() == ["right", "down"]
    for said, worth in {
        f"<answer>{right}{down}</answer>": (1.0, 1.0),
        f"I think <answer> {right} {down}\n</answer>": (1.0, 1.0),
        f"<answer>{down}<|up|>{right}{down}</answer>": (1.0, 1.0),  # a detour
        f"<answer>{right}{down}<|up|>{down}</answer>": (1.0, 1.0),
        f"<answer>{right}</answer>": (0.0, 0.5),
        f"<answer>{right}{down}<|up|></answer>": (0.0, 0.5),  # was there, and went on
        f"<answer>{down}{right}</answer>": (0.0, 0.0),  # through the wall between them
        f"<answer>{right}{right}{down}</answer>": (0.0, 0.5),
        f"<answer>{down}</answer>": (0.0, 0.0),
        "<answer></answer>": (0.0, 0.0),
        "<answer>right down</answer>": (0.0, 0.0),
        f"<answer>{right}{down}, there</answer>": (0.0, 0.0),
        f"<answer>{right}{down}": (0.0, 0.0),
        f"{right}{down}": (0.0, 0.0),
        "": (0.0, 0.0),
    }.items():
        assert judged(grown, said) == worth, said


@pytest.mark.parametrize("number", range(len(GROWN)))
def test_every_valid_path_is_right_and_none_through_a_wall(number):
    grown = GROWN[number]
    assert Maze.read(grown.text) == grown
    every = list(paths(grown, grown.origin))
    assert grown.shortest() in every and len(grown.shortest()) == min(map(len, every))
    assert all(walked(grown, path) == (1.0, 1.0) for path in every)
    if number % 3 == 0:
        assert len(every) == 1  # a maze without a loop
    for path in every:
        for n in range(len(path) + 1):
            at, whole = grown.walk(path[:n])
            assert whole
            open_ = grown.open[at[0]][at[1]]
            for move in MOVES:
                tried = [*path[:n], move, BACK[move], *path[n:]]  # a look to the side
                solved, near = walked(grown, tried)
                assert solved == (move in open_) and solved <= near + 1e-9
            if n < len(path):
                solved, near = walked(grown, path[:n])
                assert solved == 0 and 0 <= near < 1


def test_a_maze_is_read_once_for_all_its_rollouts_and_rewards(monkeypatch):
    grown, times, read = maze.grow(random.Random("once"), 5, 7, 1), [], Maze.read
    monkeypatch.setattr(Maze, "read", lambda text: times.append(1) or read(text))
    moves = grown.shortest()
    assert [walked(grown, moves[:n]) for n in range(len(moves) + 1)][-1] == (1.0, 1.0)
    assert len(times) == 1


def test_loops_open_several_ways():
    ways = [len(list(paths(grown, grown.origin))) for grown in GROWN]
    assert max(ways) > 2


def test_splits_share_no_walls_and_a_seed_gives_the_same_mazes():
    tasks = {split: Mazes(split, rows=4, columns=4, number=25).tasks() for split in maze.SPLITS}
    walls = {s: {Maze.read(t.question).digest for t in found} for s, found in tasks.items()}
    assert not walls["train"] & walls["dev"] and not walls["test"] & (walls["train"] | walls["dev"])
    for split, found in tasks.items():
        assert len({t.question for t in found}) == len({t.id for t in found}) == 25
        assert found == Mazes(split, rows=4, columns=4, number=25).tasks()
        assert found[:9] == Mazes(split, rows=4, columns=4, number=9).tasks()
        assert found != Mazes(split, rows=4, columns=4, number=25, seed=1).tasks()


def test_no_maze_depends_on_how_a_process_hashes():
    code = "from jaxdeep.envs.toy.maze import Mazes; print(Mazes(number=20, loops=2).tasks())"
    root = str(pathlib.Path(__file__).resolve().parents[3])
    run = [sys.executable, "-c", code]
    first, second = (
        subprocess.run(
            run,
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": root},
            check=True,
            capture_output=True,
        ).stdout
        for seed in "12"
    )
    assert first == second != b""


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="at least 2 and at most 10"):
        Mazes(rows=1)
    with pytest.raises(ConfigError, match=r"partial=1\.0 must be at least 0 and below 1"):
        Mazes(partial=1.0)
    with pytest.raises(ConfigError, match="of 2 x 2 only 48 mazes turn up in train"):
        Mazes("train", rows=2, columns=2, number=49).tasks()
    with pytest.raises(ConfigError, match="of 2 x 2 none is in test"):
        Mazes("test", rows=2, columns=2).tasks()
    good = GROWN[0].text
    for bad, why in (
        ("", "origin and a target"),
        (good.replace("0-0", "0-1"), "line 1"),
        (good.replace("origin", "blank"), "origin and a target"),
        (good + "\n<|2-0|><|up_wall|><|blank|>", "rectangle"),
        (good.replace("up_", "", 1), "open from one side only"),
    ):
        with pytest.raises(DataError, match=why):
            Maze.read(bad)


def test_gold_answers_score_the_maximum_in_a_rollout(chat):
    for partial in (0.0, 0.25):
        mazes = Mazes(rows=4, columns=3, loops=2, number=10, partial=partial, system="")
        taskset = MazeTaskset(mazes.tasks(), mazes)
        for n in range(len(taskset)):
            task = taskset[n]
            for said, worth in ((taskset.gold(task), 1.0), ([Message("assistant", "?")], 0.0)):
                policy = ScriptedPolicy(chat, said)
                env = taskset.env(task)
                run = asyncio.run(loop.rollout(env, task, policy, chat, limits=LIMITS, seed=0))
                asyncio.run(loop.score(taskset, run))
                assert run.stop is Stop.FINISHED and harness.correct(run) == (worth == 1)
                assert run.reward == worth * (1 + partial)
                assert set(run.rewards) == {"answer", "nearer"} if partial else {"answer"}


def test_another_way_than_the_shortest_is_correct_in_an_evaluation(chat):
    grown = GROWN[11]
    long = max(paths(grown, grown.origin), key=len)
    task = Task("m", grown.text, (maze.answer(grown.shortest()),))
    taskset = MazeTaskset([task], SIZE)
    policy = ScriptedPolicy(chat, [Message("assistant", f"<answer>{maze.answer(long)}</answer>")])
    run = asyncio.run(loop.rollout(taskset.env(task), task, policy, chat, limits=LIMITS, seed=0))
    asyncio.run(loop.score(taskset, run))
    assert len(long) > len(grown.shortest()) and harness.summarize([run])["em"] == 1


def test_a_demonstration_is_a_rollout_in_a_training_maze(chat):
    source, again, other = (Demos(chat, seed, SIZE) for seed in (0, 0, 1))
    test = {
        Maze.read(task.question).digest
        for task in Mazes("test", rows=4, columns=3, number=50).tasks()
    }
    for number in range(20):
        row = source[number]
        assert row == again[number] != other[number]
        world, said = row
        (_, question), *_ = _turns(chat, world)[1:]
        assert Maze.read(question).digest not in test
        task = Task("demo", question)
        policy = ScriptedPolicy(chat, [chat.parse(said.tokens)])
        env = MazeTaskset([task], SIZE).env(task)
        run = asyncio.run(loop.rollout(env, task, policy, chat, limits=LIMITS, seed=0))
        assert [(p.tokens, p.author) for p in run.pieces] == [(p.tokens, p.author) for p in row]


def _turns(chat, piece):
    """(role, content) of each turn of the world."""
    parts = chat.tokenizer.decode(piece.tokens).split("<|im_start|>")[1:]
    return [tuple(part.removesuffix("<|im_end|>\n").split("\n", 1)) for part in parts]


def test_a_word_of_a_maze_is_a_token_and_any_text_survives(chat):
    assert (PLACE / "tokenizer.json").read_text() == maze.tokenizer()
    text = maze.grow(random.Random(0), 10, 10, 5).text
    assert len(chat.tokenizer.encode(text)) == 3 * 100 + 9
    for said in (text, maze.SYSTEM, "<|im_end|> ünï <|nowhere|> <answer><|up|></answer>\n\n"):
        assert chat.tokenizer.decode(chat.tokenizer.encode(said)) == said
