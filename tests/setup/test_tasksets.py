"""A task set is a dataclass that the configuration names: its settings, its tasks, its rewards."""

import pathlib
import textwrap

import pytest

from jaxdeep import config as configs
from jaxdeep.agent.base import right_reward
from jaxdeep.envs.toy.facts import Facts
from jaxdeep.envs.toy.maze import Mazes
from jaxdeep.errors import ConfigError
from jaxdeep.setup.tasksets import EnvConfig, load_config
from jaxdeep.types import Message, Stop, Trajectory

OWN = """
    from __future__ import annotations

    import dataclasses

    from jaxdeep.agent.base import Env
    from jaxdeep.types import Message, Task


    class Add(Env):
        def __init__(self, task):
            self.task = task

        async def open(self):
            return [Message("user", self.task.question)]


    def right(task, trajectory):
        return float(trajectory.messages[-1].content == task.answers[0])


    def brief(task, trajectory):
        return 1 / len(trajectory.messages[-1].content)


    class Sums:
        rewards = {"right": (1.0, right)}

        def __init__(self, largest):
            self.largest = largest

        def __len__(self):
            return self.largest

        def __getitem__(self, n):
            return Task(str(n), f"{n} + {n}?", (str(2 * n),))

        def env(self, task):
            return Add(task)

        def gold(self, task):
            return [Message("assistant", task.answers[0])]


    @dataclasses.dataclass(frozen=True)
    class Adding:
        largest: int = 9

        def load(self):
            return Sums(self.largest)


    @dataclasses.dataclass
    class Thawed:
        largest: int = 9

        def load(self):
            return Sums(self.largest)


    def make(section):
        return Sums(9)
"""


@pytest.fixture
def own(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(textwrap.dedent(OWN))
    return str(path)


def test_its_fields_are_the_settings_of_the_section(own):
    taskset = EnvConfig.build({"taskset": f"{own}:Adding", "largest": 5}).load()
    assert len(taskset) == 5 and taskset[4].answers == ("8",)
    assert len(EnvConfig.build({"taskset": f"{own}:Adding"}).load()) == 9
    with pytest.raises(
        ConfigError, match=r'env.largets is not a setting. Did you mean "env.largest"'
    ):
        EnvConfig.build({"taskset": f"{own}:Adding", "largets": 5})
    with pytest.raises(ConfigError, match=r"dev.largest is '5', a str; expected int"):
        EnvConfig.build({"taskset": f"{own}:Adding", "largest": "5"}, "dev")


def test_some_of_its_tasks(own):
    taskset = EnvConfig.build({"taskset": f"{own}:Adding", "first": 2, "count": 3}).load()
    assert [task.id for task in taskset] == ["2", "3", "4"] and len(taskset) == 3
    rest = EnvConfig.build({"taskset": f"{own}:Adding", "first": 7}).load()
    assert [rest[i].id for i in range(len(rest))] == ["7", "8"]
    with pytest.raises(ConfigError, match=r"env.first=9 is beyond the 9 tasks"):
        EnvConfig.build({"taskset": f"{own}:Adding", "first": 9}).load()
    with pytest.raises(ConfigError, match=r"env.first=-1"):
        EnvConfig.build({"taskset": f"{own}:Adding", "first": -1})


def score(taskset, text):
    trajectory = Trajectory(taskset[3], messages=[Message("assistant", text)], stop=Stop.FINISHED)
    return {
        name: weight * judge(trajectory.task, trajectory)
        for name, (weight, judge) in taskset.rewards.items()
    }


def test_rewards_are_weighted_left_out_and_joined(own):
    def with_rewards(**rewards):
        return EnvConfig.build({"taskset": f"{own}:Adding", "rewards": rewards}).load()

    assert score(with_rewards(right=0.5), "6") == {"right": 0.5}
    own_one = {"function": f"{own}:brief", "weight": 0.1}
    both = with_rewards(right=2.0, brief=own_one)
    assert score(both, "6") == {"right": 2.0, "brief": 0.1}
    assert score(both, "12") == {"right": 0.0, "brief": 0.05}
    assert list(with_rewards(right=None, brief=own_one).rewards) == ["brief"]
    with pytest.raises(
        ConfigError, match=r'env.rewards.rihgt is not a reward.*Did you mean "right"'
    ):
        with_rewards(rihgt=1.0)
    with pytest.raises(ConfigError, match="leaves no reward"):
        with_rewards(right=None)
    with pytest.raises(ConfigError, match="no_such"):
        with_rewards(mine={"function": f"{own}:no_such"})


REWARDS = """
import functools


class Callable:
    def __call__(self, task, trajectory):
        return 1.0


fine = [
    functools.partial(lambda k, task, trajectory: k, 1.0),
    lambda *both: 1.0,
    Callable(),
    lambda task, trajectory, k=1: k,
]
wrong = [lambda task: 1.0, lambda task, trajectory, *, k: 1.0, lambda: 1.0, 1.0, Callable]
"""


def test_a_reward_that_cannot_be_called_is_refused_at_once(own):
    path = pathlib.Path(own)
    path.write_text(path.read_text() + REWARDS)
    names = {}
    exec(REWARDS, names)

    def load(judge):
        path.write_text(f"{textwrap.dedent(OWN)}{REWARDS}\n\nmine = {judge}\n")
        rewards = {"mine": {"function": f"{own}:mine", "weight": 0.1}}
        return EnvConfig.build({"taskset": f"{own}:Adding", "rewards": rewards}).load()

    for n in range(len(names["fine"])):
        assert "mine" in load(f"fine[{n}]").rewards
    for n in range(len(names["wrong"])):
        with pytest.raises(ConfigError, match=r"the reward 'mine'.*\(task, trajectory\)"):
            load(f"wrong[{n}]")


def test_which_reward_is_right_stays_known(own):
    path = pathlib.Path(own)
    text = path.read_text().replace("(1.0, right)}", "(1.0, right)}\n    right = 'right'")
    path.write_text(text)
    some = EnvConfig.build({"taskset": f"{own}:Adding", "first": 1}).load()
    assert right_reward(some) == "right"
    rewards = {"right": None, "brief": {"function": f"{own}:brief"}}
    with pytest.raises(ConfigError, match=r"'right' says which rollouts are right.*right=0"):
        EnvConfig.build({"taskset": f"{own}:Adding", "rewards": rewards}).load()


def test_the_built_in_ones_keep_a_right_answer_worth_most():
    config = {"taskset": "facts", "rewards": {"format": 0.0, "retry": 0.0}}
    weights = {name: w for name, (w, _) in EnvConfig.build(config).load().rewards.items()}
    assert weights == {"answer": 1.0, "format": 0.0, "retry": 0.0}
    with pytest.raises(ConfigError, match="answer must count more"):
        EnvConfig.build({"taskset": "facts", "rewards": {"format": 2.0}}).load()


def test_names():
    assert EnvConfig.build({"taskset": "facts", "corpus": "dev"}).settings == Facts(corpus="dev")
    assert EnvConfig.build({"taskset": "maze", "rows": 3}).settings == Mazes(rows=3)
    with pytest.raises(ConfigError, match=r"env.corpus='' and env.questions=''"):
        EnvConfig.build({})


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("faqts", "none of search, facts, maze"),
        ("{own}:make", "must be a frozen dataclass with a method load"),
        ("{own}:Thawed", "must be a frozen dataclass"),
        ("{own}:Nothing", "has no .Nothing."),
        ("no/such.py:Adding", "there is no file no/such.py in"),
        ("json:loads", "must be a frozen dataclass"),
    ],
)
def test_what_is_no_task_set_is_refused(name, said, own):
    with pytest.raises(ConfigError, match=said):
        EnvConfig.build({"taskset": name.format(own=own)})


def test_a_file_can_hold_a_task_set_and_the_configuration_that_names_it(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        textwrap.dedent(OWN)
        + textwrap.dedent("""
            def get_config():
                from ml_collections import ConfigDict

                return ConfigDict(dict(env=dict(taskset=__file__ + ":Adding", largest=4,
                    rewards=dict(brief=dict(function=__file__ + ":brief", weight=0.5)))))
        """)
    )
    config = configs.load(str(path), ["--config.env.largest=3", "--config.env.rewards.right=2.0"])
    taskset = EnvConfig.build(config.env).load()
    assert len(taskset) == 3
    assert {name: weight for name, (weight, _) in taskset.rewards.items()} == {
        "right": 2.0,
        "brief": 0.5,
    }


def test_an_override_can_name_another_task_set_than_the_file(own, capsys):
    overrides = [f"--config.env.taskset={own}:Adding", "--config.env.largest=4"]
    config = load_config("configs/search/grpo.py", overrides)
    assert EnvConfig.build(config.env).load()[3].answers == ("6",)
    said = capsys.readouterr().err
    assert (
        "chunk, corpus, k, questions, rewards of the configuration's own task set left out" in said
    )
    nested = [f"--config.grpo.{override.removeprefix('--config.')}" for override in overrides]
    config = load_config("configs/search/quickstart.py", nested)
    assert EnvConfig.build(config.grpo.env).settings.largest == 4
    assert EnvConfig.build(config.sft.env).settings.corpus == "train"
    same = load_config("configs/search/quickstart.py", ["--config.grpo.env.taskset=facts"])
    assert same.grpo.env.rewards.format == 0.0
