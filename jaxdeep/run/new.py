"""Write a task set to begin from: tasks, an environment with a tool, a reward, and its test.

It works as it is: its test passes, `jaxdeep validate` finds nothing wrong, and `jaxdeep grpo`
trains on it. No file is overwritten."""

from __future__ import annotations

import keyword
import re
from pathlib import Path

from jaxdeep.errors import ConfigError
from jaxdeep.settings import suggest

ARGUMENTS = "taskset FILE.py"
DEFAULT_CONFIG = None
EXAMPLE = "python -m jaxdeep new taskset mine.py"
KINDS = ("taskset",)

TASKSET = '''"""A task set: find a secret number by comparing guesses with it."""

import dataclasses
from typing import Annotated

from jaxdeep.agent.base import Env
from jaxdeep.agent.tool import tool
from jaxdeep.settings import AtLeast
from jaxdeep.types import Message, Task, ToolCall


class {name}Env(Env):
    def __init__(self, task):
        self.task, self.tools = task, (self.compare,)

    async def open(self):
        return [Message("user", self.task.question)]

    @tool
    def compare(self, number: Annotated[int, "the guess"]) -> str:
        """Compare a guess with the secret number."""
        secret = int(self.task.answers[0])
        return "right" if number == secret else "too low" if number < secret else "too high"


def found(task, trajectory):
    """1 if the last message is the number."""
    return float(trajectory.messages[-1].content.strip() == task.answers[0])


@dataclasses.dataclass(frozen=True)
class {name}:
    """Secret numbers from 1 on."""

    largest: Annotated[int, AtLeast(2), "the largest secret number"] = 9
    rewards = {{"answer": (1.0, found)}}  # name: (weight, function)

    def load(self):
        return self  # this dataclass is its own task set

    def __len__(self):
        return self.largest

    def __getitem__(self, index):
        question = f"Find my number from 1 to {{self.largest}}. Compare, then say only the number."
        return Task(str(index), question, (str(index + 1),))

    def env(self, task):
        return {name}Env(task)  # a fresh one for every rollout

    def gold(self, task):  # a perfect episode
        call = ToolCall("compare", {{"number": int(task.answers[0])}})
        return [Message("assistant", calls=(call,)), Message("assistant", task.answers[0])]
'''

TEST = '''"""The task set of {file}, played by a script in the place of a model."""

import asyncio
import pathlib

from jaxdeep.agent.rollout import Limits, rollout, score
from jaxdeep.agent.scripted import ScriptedPolicy
from jaxdeep.setup import validate, weights
from jaxdeep.setup.sections import ModelConfig
from jaxdeep.setup.tasksets import EnvConfig
from jaxdeep.types import Message, ToolCall

FILE = pathlib.Path(__file__).with_name("{file}")
TASKSET = EnvConfig.build({{"taskset": f"{{FILE}}:{name}"}}).load()
CHAT = weights.chat_of(ModelConfig("tiny", thinking="none"))
LIMITS = Limits(
    max_turns=8, max_calls=8, turn_tokens=256, max_tokens=2048, result_tokens=256, seconds=60.0
)


def play(index, *turns):
    """A scored rollout of one task."""
    task, policy = TASKSET[index], ScriptedPolicy(CHAT, turns)
    work = rollout(TASKSET.env(task), task, policy, CHAT, limits=LIMITS, seed=0)
    played = asyncio.run(work)
    asyncio.run(score(TASKSET, played))
    return played


def compare(number):
    return Message("assistant", calls=(ToolCall("compare", {{"number": number}}),))


def test_every_task_can_be_solved_and_silence_does_not():
    assert validate.try_out(TASKSET, CHAT, LIMITS, count=None).wrong() == []


def test_the_tool_answers_and_the_last_word_counts():
    played = play(6, compare(3), compare(9), compare(7), Message("assistant", "7"))
    answers = [message.content for message in played.messages if message.role == "tool"]
    assert answers == ["too low", "too high", "right"] and played.reward == 1.0
    assert play(6, compare(7), Message("assistant", "8")).reward == 0.0
'''

NEXT = """{file} and {test} are written. Next:
  python -m pytest {test}        (pip install pytest)
  python -m jaxdeep validate --config=configs/search/grpo.py \\
      --config.env.taskset={file}:{name} --config.model.path=tiny
  python -m jaxdeep grpo --config=configs/search/grpo.py --workdir=runs/{stem} \\
      --config.env.taskset={file}:{name} --config.model.path=Qwen/Qwen3-0.6B
The last one is for a machine with an accelerator."""


def main(*words: str) -> int:
    """Write the files that the words name, and print what to do next."""
    if len(words) != 2 or words[0] not in KINDS:
        hint = suggest(words[0], KINDS) if words else ""
        raise ConfigError(f"new takes two words, as in\n  {EXAMPLE}{hint}")
    path = Path(words[1])
    name = class_name(path)
    test = path.with_name(f"{path.stem}_test.py")
    for place in (path, test):
        if place.exists():
            raise ConfigError(f"{place} exists, and nothing is overwritten: choose another name")
    if not path.parent.is_dir():
        raise ConfigError(f"{path}: there is no folder {path.parent}")
    for place, text in ((path, TASKSET), (test, TEST)):
        with place.open("x", encoding="utf-8") as file:
            file.write(text.format(name=name, file=path.name))
    print(NEXT.format(file=path, test=test, name=name, stem=path.stem))
    return 0


def class_name(path: Path) -> str:
    """The name of the task set in a file: `Mine` in mine.py. ConfigError for a file that Python
    could not import."""
    if path.suffix != ".py" or not path.stem.isidentifier() or keyword.iskeyword(path.stem):
        raise ConfigError(f"{path} is not the name of a Python file, such as mine.py")
    return "".join(part[:1].upper() + part[1:] for part in re.split("_+", path.stem)) or "Mine"
