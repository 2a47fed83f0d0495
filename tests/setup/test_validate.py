"""A task set is tried without a model: each thing that is wrong with one is a sentence that says
how to write it."""

import dataclasses
import math
import sys
import textwrap
import types

import numpy as np
import pytest

from jaxdeep.agent.base import Env
from jaxdeep.agent.rollout import Limits
from jaxdeep.agent.tool import tool
from jaxdeep.errors import ConfigError
from jaxdeep.setup import validate, weights
from jaxdeep.setup.sections import ModelConfig, check_extras
from jaxdeep.setup.tasksets import EnvConfig, check_shape
from jaxdeep.types import Message, Task, ToolCall

LIMITS = Limits(
    max_turns=4, max_calls=3, turn_tokens=60, max_tokens=400, result_tokens=40, seconds=20.0
)


@pytest.fixture(scope="module")
def chat():
    return weights.chat_of(ModelConfig("tiny", thinking="none"))


class Say(Env):
    """Asks, and has a tool that says something back."""

    def __init__(self, task, opening=None, tools=None):
        self.task, self.opening = task, opening
        self.tools = (self.echo,) if tools is None else tools

    async def open(self):
        if isinstance(self.opening, Exception):
            raise self.opening
        return [Message("user", self.task.question)] if self.opening is None else self.opening

    @tool
    def echo(self, text: str) -> str:
        """Say a text back."""
        return text


class Sync(Say):
    def open(self):
        return [Message("user", "hi")]


class Nothing(Say):
    async def open(self):
        pass


class Breaks(Say):
    @tool
    def echo(self, text: str) -> str:
        """Say a text back."""
        raise OSError("the disk of the tool is gone")


class Talkative(Say):
    async def reply(self, message):
        return [Message("user", "Really?")]


def right(task, trajectory):
    return float(trajectory.messages[-1].content == task.answers[0])


def plain(text):
    return text


class Tasks:
    """A right task set of `size` tasks, of which arguments change a part."""

    def __init__(self, **changes):
        self.rewards = {"answer": (1.0, right)}
        self.size, self.ids, self.make, self.task, self.golden = 3, str, Say, None, None
        for name, value in changes.items():
            setattr(self, name, value)

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return self.task or Task(self.ids(index), f"Say {index}.", (str(index),))

    def env(self, task):
        return self.make(task)

    def gold(self, task):
        if self.golden is not None:
            return self.golden(task)
        call = ToolCall("echo", {"text": task.answers[0]})
        return [Message("assistant", calls=(call,)), Message("assistant", task.answers[0])]


def judged(value):
    def reward(task, trajectory):
        if isinstance(value, Exception):
            raise value
        return value

    return {"rewards": {"answer": (1.0, right), "odd": (0.5, reward)}}


def opens(opening, tools=None):
    return {"make": lambda task: Say(task, opening, tools)}


def answers(*turns):
    return {"golden": lambda task: [Message("assistant", turn) for turn in turns]}


def test_a_right_task_set_has_nothing_wrong(chat):
    found = validate.try_out(Tasks(size=100), chat, LIMITS, count=5)
    assert found.wrong() == found.notes() == []
    assert str(found).startswith("5 of 100 tasks tried, prompts of ")
    assert str(found).endswith("perfect episodes earn 1, silence earns 0")
    assert len(validate.try_out(Tasks(size=100), chat, LIMITS, count=None).tasks) == 100
    again = validate.try_out(Tasks(size=100), chat, LIMITS, count=5)
    assert again.tasks == found.tasks  # the same ones


@pytest.mark.parametrize("value", [1, 0.5, True, np.float32(0.5), np.bool_(True), np.array(0.5)])
def test_what_a_reward_may_return(chat, value):
    assert validate.try_out(Tasks(**judged(value)), chat, LIMITS).wrong() == []


WRONG = {
    "an id that is a number": (dict(ids=int), "id of its task 0 is 0, a int: .* Task('0', ...)"),
    "an id that is empty": (dict(ids=lambda n: " "), "id of its task 0 is ' ', a str: an id is a"),
    "an id that comes twice": (dict(ids=lambda n: "x"), "tasks 0 and 1 both have the id 'x'"),
    "a task that is none": (dict(task={"id": "1"}), "task 0 is {'id': '1'}, a dict: return Task("),
    "a task that raises": (dict(ids=lambda n: [][n]), "making its task 0 raised IndexError"),
    "no environment": (dict(make=lambda task: None), "env(task) gave None: return a fresh env"),
    "env that raises": (dict(make=lambda task: {}["x"]), "of the task '0' raised KeyError: 'x'"),
    "open gives None": (dict(make=Nothing), "Nothing.open gave None: return a list such as [Mess"),
    "open gives a text": (opens("hi"), "Say.open gave 'hi', a str: return a list such as [Message"),
    "open gives nothing": (opens([]), "Say.open gave [], a list: return a list such as [Message"),
    "open gives dicts": (opens([{"role": "user"}]), "a list with {'role': 'user'}, a dict in it"),
    "open is plain": (dict(make=Sync), "Sync.open is no coroutine: write async def open(self)"),
    "open raises": (opens(OSError("no")), "opening and closing Say raised OSError: no"),
    "a tool that is none": (
        opens(None, (plain,)),
        "<function plain.* below the decorator @tool, .*",
    ),
    "a tool of the class": (
        opens(None, (Say.echo,)),
        "has echo from the class: write self.echo, in",
    ),
    "tools that are one": (
        opens(None, Say.echo),
        "Say.tools is Tool(.* write a tuple, (self.search",
    ),
    "a long prompt": (
        opens([Message("user", "word " * 500)]),
        "and rollout.limits.max_tokens=400 ",
    ),
    "gold is a text": (
        dict(golden=lambda task: "1"),
        "gold(task) gave '1', a str: write def gold(",
    ),
    "gold is empty": (
        dict(golden=lambda task: []),
        "gold(task) gave [], a list: write def gold(se",
    ),
    "gold raises": (dict(golden=lambda task: 1 / 0), "gold of the task '0' raised ZeroDivisionEr"),
    "gold is wrong": (
        answers("no"),
        "the perfect episode of the task '0' gets 0 from the reward 'answer'",
    ),
    "gold goes on": (dict(make=Talkative), "gold of the task '0' ends before the episode does: th"),
    "gold is long": (
        answers("word " * 200),
        "does not fit rollout.limits: it was ended by turn_to",
    ),
    "a tool that breaks": (dict(make=Breaks), "episode to the task '0' failed: .*echo: OSError: "),
    "silence is right": (
        dict(rewards={"answer": (0.0, right), "any": (1.0, lambda task, trajectory: 1.0)}),
        "an empty answer to the task '0' earns 1 and its perfect episode 1: nothing could be l",
    ),
    "a text as reward": (judged("yes"), "reward 'odd': TypeError: it gave 'yes', not a number, or"),
    "a number as text": (
        judged("1"),
        "reward 'odd': TypeError: it gave '1', not a number, or None",
    ),
    "NaN as reward": (judged(math.nan), "reward 'odd': ValueError: it gave nan, not a finite numb"),
    "an array as reward": (judged(np.ones(2, bool)), "reward 'odd': TypeError: it gave array(.*"),
    "no reward ever": (judged(None), "episode to the task '0' is not judged: odd gave None"),
    "a reward that raises": (judged(KeyError("k")), "has no reward: .*reward 'odd': KeyError: 'k'"),
}


@pytest.mark.parametrize(("changes", "says"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_a_sentence_that_says_how_to_write_it(chat, changes, says):
    tasks = Tasks(**changes)
    found = validate.try_out(tasks, chat, LIMITS)
    parts = [part.strip() for part in says.split(".*")]
    said = next((s for s in found.wrong() if all(part in s for part in parts)), None)
    assert said, found.wrong()
    if "does not fit rollout.limits" in said:  # a run may still learn from less
        assert said in validate.require(tasks, chat, LIMITS, "env")[1]
        return
    with pytest.raises(ConfigError, match=r"^env: .*`jaxdeep validate` says all"):
        validate.require(tasks, chat, LIMITS, "env")


def test_a_problem_of_some_tasks_is_only_noted_by_a_run(chat):
    def make(task):
        return Say(task, [Message("user", "word " * 500)] if task.id == "1" else None)

    tasks = Tasks(make=make)
    found = validate.try_out(tasks, chat, LIMITS)
    (said,) = found.wrong()
    assert "prompt of the task '1'" in said and said.endswith("(1 of the 3 tasks tried)")
    seen, note = validate.require(tasks, chat, LIMITS, "dev")
    assert seen.startswith("dev: 3 of 3 tasks tried") and note == f"dev: {said}"


def test_a_reward_that_is_never_1_is_noted_by_a_run(chat):
    tasks = Tasks(rewards={"answer": (1.0, lambda task, trajectory: 0.5 * right(task, trajectory))})
    (said,) = validate.try_out(tasks, chat, LIMITS).wrong()
    assert "gets 0.5 from the reward 'answer', which decides what is right" in said
    assert validate.require(tasks, chat, LIMITS, "env")[1] == f"env: {said}"


def test_a_task_that_takes_more_than_the_limits_is_a_hard_one(chat):
    tasks = Tasks(golden=lambda task: [Message("assistant", task.answers[0] * 300 ** int(task.id))])
    found = validate.try_out(tasks, chat, LIMITS)
    assert found.wrong() == [] and "ended by turn_tokens (2 of the 3 tasks" in found.notes()[0]


def test_a_perfect_episode_need_not_be_known(chat):
    found = validate.try_out(Tasks(golden=lambda task: None), chat, LIMITS)
    assert found.wrong() == [] and "no perfect episode was played" in str(found)


# What the parts of a task set are is checked when it is loaded.


def without(name):
    kept = {k: v for k, v in vars(Tasks).items() if k != name and not k.startswith("__dict")}
    return type("Part", (), kept | {"__len__": Tasks.__len__} if name != "__len__" else kept)()


SHAPES = {
    "nothing": (lambda: None, "load() gave nothing, which has no __len__: write def __len__"),
    "no length": (lambda: without("__len__"), "which has no __len__: write def __len__"),
    "no tasks": (lambda: without("__getitem__"), "which has no __getitem__: write def __getitem__"),
    "no env": (lambda: without("env"), "which has no env: write def env(self, task) that returns"),
    "no gold": (
        lambda: without("gold"),
        "has no gold: write def gold(self, task) that returns the",
    ),
    "no rewards": (lambda: Tasks(rewards=None), 'rewards are None: write rewards = {"NAME": (1.0,'),
    "rewards without weights": (
        lambda: Tasks(rewards={"right": right}),
        "its reward 'right' is <function right",
    ),
    "rewards without functions": (
        lambda: Tasks(rewards={"right": 1.0}),
        "its reward 'right' is 1.0, a float: write rewards = {",
    ),
    "a weight that is no number": (
        lambda: Tasks(rewards={"right": ("1", right)}),
        "the weight of 'right' is '1', a str; expected float",
    ),
    "a weight that is not finite": (
        lambda: Tasks(rewards={"right": (math.nan, right)}),
        "the weight of 'right'=nan must be a finite number",
    ),
    "no task": (lambda: Tasks(size=0), "it has no tasks, len(taskset) is 0"),
}


@pytest.mark.parametrize(("make", "says"), SHAPES.values(), ids=SHAPES)
def test_what_is_no_task_set_is_refused_when_it_is_loaded(make, says):
    with pytest.raises(ConfigError) as caught:
        check_shape(make(), "env.taskset=mine.py:Mine")
    assert says in str(caught.value)


def test_errors_of_a_file_of_ones_own_are_told_with_their_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = """
        import dataclasses

        @dataclasses.dataclass(frozen=True)
        class Mine:
            fail: str = "load"

            def load(self):
                return {}[self.fail]
    """
    (tmp_path / "mine.py").write_text(textwrap.dedent(source))
    with pytest.raises(ConfigError, match=r"load\(\) raised KeyError: 'load', at .*mine\.py:9"):
        EnvConfig.build({"taskset": "mine.py:Mine"}).load()
    (tmp_path / "wrong.py").write_text("x = 1\ny = x +\n")
    (tmp_path / "names.py").write_text("\n\nundefined()\n")
    for name, says in {
        "gone.py:Mine": "there is no file gone.py in ",
        "wrong.py:Mine": "cannot be imported: SyntaxError",
        "names.py:Mine": r"NameError: name 'undefined' is not defined, at .*names\.py:3",
        "mine.py:": "is not like FILE.py:NAME or module:NAME",
        "mine.py:Mnie": "has no 'Mnie'. Did you mean \"Mine\"",
    }.items():
        with pytest.raises(ConfigError, match=rf"env\.taskset='{name}'.*{says}"):
            EnvConfig.build({"taskset": name})
    reward = {"function": "gone.py:mine", "weight": 1.0}
    with pytest.raises(
        ConfigError, match=r"env\.rewards\.x\.function='gone\.py:mine': there is no"
    ):
        EnvConfig.build({"taskset": "facts", "rewards": {"x": reward}}).load()
    (tmp_path / "rewards.py").write_text("def short(trajectory):\n    return 1.0\n")
    reward["function"] = "rewards.py:short"
    with pytest.raises(
        ConfigError, match=r"reward 'x' is called with a task .* takes \(trajectory\)"
    ):
        EnvConfig.build({"taskset": "facts", "rewards": {"x": reward}}).load()


@dataclasses.dataclass
class Wants:
    """The sections of a run that name packages."""

    start: str = ""
    checkpoints: str = ""
    wandb: str = ""

    @property
    def train(self):
        return types.SimpleNamespace(start=self.start, checkpoints=self.checkpoints)

    @property
    def log(self):
        return types.SimpleNamespace(wandb=self.wandb)


def test_a_package_that_is_missing_is_told_before_anything_is_loaded(monkeypatch):
    check_extras(Wants())
    for module in ("wandb", "gcsfs"):
        monkeypatch.setitem(sys.modules, module, None)
    for wants, says in (
        (Wants(wandb="agents"), "log.wandb=agents needs .* pip install wandb"),
        (Wants(start="gs://b/run"), r"train\.start=gs://b/run .* pip install 'jaxdeep\[gs\]'"),
        (Wants(checkpoints="gs://b/run"), r"train\.checkpoints=gs://b/run needs"),
    ):
        with pytest.raises(ConfigError, match=says):
            check_extras(wants)
