"""Mazes as text, solved by naming moves: the task of AlphaMaze (arXiv 2502.14669), with a reward
that simulates the moves.

The text of a maze has one line per row of cells, and three words per cell: its place, its walls,
and whether it is the origin or the target.

    <|0-0|><|up_left_wall|><|origin|><|0-1|><|up_right_wall|><|blank|>
    <|1-0|><|down_left_right_wall|><|blank|><|1-1|><|down_left_right_wall|><|target|>

The answer is a run of moves, <answer><|right|><|down|></answer>. Every walk that ends at the target
and goes through no wall is right, the shortest or not (AlphaMaze compares with one path). Mazes are
made by depth-first search; `loops` opens more walls, so that there are several paths. The split of
a maze follows from its walls alone: no maze has the walls of a test maze in training.
"""

from __future__ import annotations

import dataclasses
import functools
import random
import re
import sys
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Annotated, Literal

from jaxdeep.agent.base import Env, Reward
from jaxdeep.chat.families import control_names
from jaxdeep.chat.format import ChatFormat
from jaxdeep.errors import ConfigError, DataError
from jaxdeep.rewards import answers
from jaxdeep.settings import SEED, AtLeast, AtMost, Below, section
from jaxdeep.types import Message, Piece, Task, Trajectory

Cell = tuple[int, int]

SYSTEM = """\
The lines are a maze, row by row. A cell says where it is, which walls it has, and whether it is \
the origin or the target. Give the moves from the origin to the target, each <|up|>, <|down|>, \
<|left|> or <|right|>, between <answer> and </answer>."""

MOVES: dict[str, Cell] = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}
BACK = {"up": "down", "down": "up", "left": "right", "right": "left"}
SPLITS = {"train": range(8), "dev": range(8, 9), "test": range(9, 10)}
"""The digests of the walls modulo 10 that are in each split."""
TRIES = 300  # mazes drawn without a new one before there seem to be no more
LARGEST = 10  # rows and columns for which the tokenizer has words

_CELL = re.compile(r"<\|(\d+)-(\d+)\|><\|([a-z_]+)_wall\|><\|(origin|target|blank)\|>")
_ANSWER = re.compile(r"(\s*<\|(up|down|left|right)\|>)+\s*")


@dataclasses.dataclass(frozen=True)
class Maze:
    """A maze: the moves that are open in each cell, by row and column; the cell to start from, and
    the one to reach."""

    open: tuple[tuple[frozenset[str], ...], ...]
    origin: Cell
    target: Cell

    @property
    def text(self) -> str:
        """The maze as a model reads it."""
        marks = {self.origin: "origin", self.target: "target"}
        return "\n".join(
            "".join(
                f"<|{r}-{c}|><|{_walls(open_)}_wall|><|{marks.get((r, c), 'blank')}|>"
                for c, open_ in enumerate(row)
            )
            for r, row in enumerate(self.open)
        )

    @property
    def digest(self) -> int:
        """A checksum of the walls alone, by which mazes are split."""
        walls = "\n".join(" ".join(map(_walls, row)) for row in self.open)
        return zlib.crc32(walls.encode())

    @classmethod
    def read(cls, text: str) -> Maze:
        """The maze of a text; DataError where it is not a maze or the target cannot be reached."""
        rows, places = [], {}
        for r, line in enumerate(text.strip().split("\n")):
            cells = _CELL.findall(line)
            numbered = [(int(row), int(column)) for row, column, *_ in cells]
            if _CELL.sub("", line) or numbered != [(r, c) for c in range(len(cells))]:
                raise DataError(f"line {r + 1} of a maze is not a row of cells: {line!r:.120}")
            rows.append(tuple(frozenset(MOVES.keys() - w.split("_")) for *_, w, _ in cells))
            places |= {what: (r, c) for c, (*_, what) in enumerate(cells)}
        if not {"origin", "target"} <= places.keys() or len(set(map(len, rows))) > 1:
            raise DataError(f"a maze is a rectangle with an origin and a target: {text!r:.120}")
        maze = cls(tuple(rows), places["origin"], places["target"])
        doors = {(cell, move) for cell in maze.cells for move in maze.open[cell[0]][cell[1]]}
        if one_way := {door for door in doors if (_moved(*door), BACK[door[1]]) not in doors}:
            raise DataError(f"cell and move {min(one_way)} of a maze is open from one side only")
        if maze.origin not in maze.distances():
            raise DataError(f"no path leads from the origin to the target: {text!r:.120}")
        return maze

    @property
    def cells(self) -> list[Cell]:
        """All cells, row by row."""
        return [(r, c) for r, row in enumerate(self.open) for c in range(len(row))]

    def walk(self, moves: Iterable[str]) -> tuple[Cell, bool]:
        """The cell where the moves end, and whether all were made: the first into a wall ends the
        walk."""
        at = self.origin
        for move in moves:
            if move not in self.open[at[0]][at[1]]:
                return at, False
            at = _moved(at, move)
        return at, True

    def distances(self) -> dict[Cell, int]:
        """The fewest moves from each cell to the target, for the cells that it can be reached
        from."""
        distances, queue = {self.target: 0}, [self.target]
        for at in queue:  # grows meanwhile: breadth-first search
            for move in self.open[at[0]][at[1]]:
                if (cell := _moved(at, move)) not in distances:
                    distances[cell] = distances[at] + 1
                    queue.append(cell)
        return distances

    def shortest(self) -> list[str]:
        """The moves of a shortest path; of several paths, the first in the order of `MOVES`."""
        distances, at, out = self.distances(), self.origin, []
        while at != self.target:
            open_ = self.open[at[0]][at[1]]
            move = next(m for m in MOVES if m in open_ and distances[_moved(at, m)] < distances[at])
            at = _moved(at, move)
            out.append(move)
        return out


@functools.lru_cache(maxsize=256)
def _read_once(text: str) -> Maze:
    """The maze of a task, read once for all rollouts and rewards of it. A task has the text alone,
    since records of rollouts have to be JSON."""
    return Maze.read(text)


def grow(rng: random.Random, rows: int, columns: int, loops: int) -> Maze:
    """A maze made by depth-first search with `loops` more walls opened; its origin and target are
    drawn from all cells."""
    open_ = [[set() for _ in range(columns)] for _ in range(rows)]

    def connect(cell: Cell, move: str) -> None:
        other = _moved(cell, move)
        open_[cell[0]][cell[1]].add(move)
        open_[other[0]][other[1]].add(BACK[move])

    def inside(cell: Cell) -> bool:
        return 0 <= cell[0] < rows and 0 <= cell[1] < columns

    stack = [(rng.randrange(rows), rng.randrange(columns))]
    seen = set(stack)
    while stack:
        # A list in the order of MOVES: that of a set would differ from process to process.
        moves = [m for m in MOVES if inside(to := _moved(stack[-1], m)) and to not in seen]
        if not moves:
            stack.pop()
            continue
        move = rng.choice(moves)
        connect(stack[-1], move)
        stack.append(_moved(stack[-1], move))
        seen.add(stack[-1])
    cells = [(r, c) for r in range(rows) for c in range(columns)]
    closed = [
        (cell, move)
        for cell in cells
        for move in ("down", "right")
        if inside(_moved(cell, move)) and move not in open_[cell[0]][cell[1]]
    ]
    for cell, move in rng.sample(closed, min(loops, len(closed))):
        connect(cell, move)
    origin, target = rng.sample(cells, 2)
    return Maze(tuple(tuple(map(frozenset, row)) for row in open_), origin, target)


@section
class Mazes:
    """The task set `maze`: mazes of one size. Sets of one seed and split are the same everywhere,
    and a smaller one begins a larger one."""

    split: Annotated[Literal["train", "dev", "test"], "which mazes; none is in two"] = "train"
    rows: Annotated[int, AtLeast(2), AtMost(LARGEST), "rows of cells"] = 5
    columns: Annotated[int, AtLeast(2), AtMost(LARGEST), "columns of cells"] = 5
    loops: Annotated[int, AtLeast(0), "walls open beyond those of a maze without a loop"] = 0
    number: Annotated[int, AtLeast(1), "how many mazes"] = 2000
    seed: Annotated[int, *SEED, "of the mazes"] = 0
    partial: Annotated[
        float, AtLeast(0), Below(1), "the weight of the reward `nearer`, beside 1 for a solution"
    ] = 0.0
    system: Annotated[str, "the system prompt; empty: none"] = SYSTEM

    def draw(self, rng: random.Random) -> Maze:
        """A maze of the split; ConfigError where there seems to be none of this size."""
        for _ in range(TRIES):
            maze = grow(rng, self.rows, self.columns, self.loops)
            if maze.digest % 10 in SPLITS[self.split]:
                return maze
        raise ConfigError(
            f"of {TRIES} mazes of {self.rows} x {self.columns} none is in {self.split}: larger "
            "ones differ more"
        )

    def tasks(self) -> list[Task]:
        """`number` different mazes; ConfigError where there are fewer."""
        rng = random.Random(f"maze {self.seed} {self.split}")
        mazes: dict[str, Maze] = {}  # by their text
        repeats = 0  # mazes in a row that were there before
        while len(mazes) < self.number:
            maze = self.draw(rng)
            repeats = repeats + 1 if maze.text in mazes else 0
            if repeats == TRIES:
                raise ConfigError(
                    f"env.number={self.number}, but of {self.rows} x {self.columns} only "
                    f"{len(mazes)} mazes turn up in {self.split}: ask for fewer, or larger ones"
                )
            mazes[maze.text] = maze
        return [
            Task(f"{self.split}-{n}", question, (answer(maze.shortest()),))
            for n, (question, maze) in enumerate(mazes.items())
        ]

    def load(self) -> MazeTaskset:
        """The task set of these mazes."""
        return MazeTaskset(self.tasks(), self)


class MazeTaskset:
    """Mazes to solve in one turn."""

    right = "answer"

    def __init__(self, tasks: Sequence[Task], mazes: Mazes) -> None:
        self.tasks, self.system = tasks, mazes.system
        self.rewards: Mapping[str, tuple[float, Reward]] = {"answer": (1.0, solved)}
        if mazes.partial:
            self.rewards = {**self.rewards, "nearer": (mazes.partial, nearer)}

    def __len__(self) -> int:
        return len(self.tasks)

    def __getitem__(self, index: int) -> Task:
        return self.tasks[index]

    def env(self, task: Task) -> MazeEnv:
        return MazeEnv(task, self.system)

    def gold(self, task: Task) -> list[Message]:
        return [Message("assistant", f"<answer>{task.answers[0]}</answer>")]


class MazeEnv(Env):
    """One maze and one turn: no reply comes, so the first answer is final."""

    def __init__(self, task: Task, system: str) -> None:
        self.task, self.system = task, system

    async def open(self) -> list[Message]:
        return opening(self.system, self.task.question)


def opening(system: str, question: str) -> list[Message]:
    """The messages before the answer."""
    return [*([Message("system", system)] if system else []), Message("user", question)]


def answer(moves: Iterable[str]) -> str:
    """The text of moves."""
    return "".join(f"<|{move}|>" for move in moves)


def moves_of(trajectory: Trajectory) -> list[str] | None:
    """The moves of the final answer; None where it says anything else, or nothing."""
    text = answers.final_answer(trajectory) or ""
    return re.findall("[a-z]+", text) if _ANSWER.fullmatch(text) else None


def solved(task: Task, trajectory: Trajectory) -> float:
    """1 where the moves lead to the target and none into a wall, however many they are; else 0."""
    moves, maze = moves_of(trajectory), _read_once(task.question)
    return float(moves is not None and maze.walk(moves) == (maze.target, True))


def nearer(task: Task, trajectory: Trajectory) -> float:
    """How much of the distance to the target is gone when the moves end or run into a wall, in [0,
    1]; 0 for a malformed answer, and for one that ends farther away."""
    moves, maze = moves_of(trajectory), _read_once(task.question)
    if moves is None:
        return 0.0
    distances = maze.distances()
    return max(0.0, 1 - distances[maze.walk(moves)[0]] / distances[maze.origin])


class Demos:
    """Rows for SFT: a demonstrator who knows the shortest path in mazes of the training split, but
    three times in five gives only its first two moves. To go all the way is left to rewards."""

    def __init__(self, chat: ChatFormat, seed: int, mazes: Mazes) -> None:
        self.chat, self.seed = chat, seed
        self.mazes = dataclasses.replace(mazes, split="train")

    def __getitem__(self, index: int) -> list[Piece]:
        rng = random.Random(f"maze demo {self.seed} {index}")
        maze = self.mazes.draw(rng)
        moves = maze.shortest()[: 2 if rng.random() < 0.6 else None]
        turn = Message("assistant", f"<answer>{answer(moves)}</answer>")
        return self.chat.pieces([*opening(self.mazes.system, maze.text), turn])


def tokenizer() -> str:
    """A tokenizer.json in which each word of a maze is one token and all else is bytes, with the
    control tokens of Qwen3."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    walls = {_walls([m for n, m in enumerate(MOVES) if bits >> n & 1]) for bits in range(16)}
    words = ["system", "user", "assistant", "<answer>", "</answer>"]
    words += [f"<|{word}|>" for word in (*MOVES, "origin", "target", "blank")]
    words += [f"<|{word}_wall|>" for word in sorted(walls)]
    words += [f"<|{r}-{c}|>" for r in range(LARGEST) for c in range(LARGEST)]
    ids = {w: n for n, w in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), *words])}
    bpe = Tokenizer(models.BPE(ids, [], ignore_merges=True))
    pattern = Regex(r"<\|[a-z0-9_-]+\|>|</?answer>|[a-z]+|[^a-z<]+|<")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.add_tokens([AddedToken(name, special=True) for name in control_names("qwen3")])
    return bpe.to_str(pretty=False)


def _moved(cell: Cell, move: str) -> Cell:
    return cell[0] + MOVES[move][0], cell[1] + MOVES[move][1]


def _walls(open_: Collection[str]) -> str:
    return "_".join(move for move in MOVES if move not in open_) or "no"


if __name__ == "__main__":
    sys.stdout.write(tokenizer())
