"""What the loop tells an environment and what it takes from a policy: seeds, results, forced
tokens."""

import asyncio
import dataclasses
import math

import pytest

from jaxdeep.agent import rollout as loop
from jaxdeep.agent.base import Env
from jaxdeep.agent.rollout import Limits
from jaxdeep.agent.scripted import EchoTool, ScriptedPolicy
from jaxdeep.agent.tool import tool
from jaxdeep.data.pack import to_row
from jaxdeep.types import Completion, Message, Stop, Task, ToolCall

LIMITS = Limits(
    max_turns=6, max_calls=6, turn_tokens=400, max_tokens=6000, result_tokens=80, seconds=5.0
)
SAYS = Message("assistant", "done")


class World(Env):
    """Notes what it is told, and the seed it had when it opened."""

    def __init__(self):
        self.tools, self.heard, self.opened = [EchoTool().echo, self.double], [], None

    async def open(self):
        self.opened = self.seed
        return [Message("user", "go")]

    async def shown(self, call, text):
        self.heard.append((call, text))

    @tool(inline=True)
    def double(self, number: int) -> int:
        """Twice a number."""
        return 2 * number


def run(chat, env, policy, seed=7, **limits):
    limits = dataclasses.replace(LIMITS, **limits)
    return asyncio.run(loop.rollout(env, Task("t", "q"), policy, chat, limits=limits, seed=seed))


def asks(*calls):
    return Message("assistant", calls=calls)


def test_an_environments_seed_follows_from_the_rollouts(chat):
    def seeds(seed):
        drawn = []

        async def policy(prompt, *, seed, **_):
            drawn.append(seed)
            return Completion([65], [0.0], "stop")

        env = World()
        run(chat, env, policy, seed)
        return [env.opened, *drawn]

    assert World.seed == 0
    assert seeds(7) == seeds(7) and len({*seeds(7), *seeds(8)}) == 4


def test_an_environment_knows_what_was_shown_of_each_call(chat):
    calls = [
        ToolCall("echo", {"text": "é" * 100}),
        ToolCall("double", {"number": 4}),
        ToolCall("echo", {}),
        ToolCall("look", {}),
    ]
    broken = "<tool_call>\nnonsense\n</tool_call>"
    last = asks(ToolCall("echo", {"text": "a"}), ToolCall("echo", {"text": "b"}))
    env = World()
    policy = ScriptedPolicy(chat, [asks(*calls), broken, last, SAYS])
    trajectory = run(chat, env, policy, turn_tokens=2000)
    assert trajectory.stop is Stop.FINISHED
    results = [m for m in trajectory.messages if m.role == "tool"]
    assert [(call.name, text) for call, text in env.heard] == [(m.name, m.content) for m in results]
    assert [call for call, _ in env.heard[:4]] == calls
    texts = [text for _, text in env.heard]
    assert texts[0] == "é" * 40 + "\n[cut here: 80 of 200 tokens shown]" and texts[1] == "8"
    for text, begin in zip(texts[2:5], ("echo needs", "There is no", "This call"), strict=True):
        assert text.startswith(begin)
    assert env.heard[4][0].error and texts[5:] == ["a", loop.NO_CALLS_LEFT]


def test_what_was_shown_is_in_the_prompt_as_it_was_told(chat):
    env = World()
    policy = ScriptedPolicy(chat, [asks(ToolCall("echo", {"text": "long " * 50})), SAYS])
    run(chat, env, policy, turn_tokens=2000)
    ((_, text),) = env.heard
    assert text in chat.tokenizer.decode(policy.prompts[-1]) and "[cut here" in text


def test_an_environment_that_cannot_hear_voids_the_rollout(chat):
    class Deaf(World):
        async def shown(self, call, text):
            raise ZeroDivisionError("oops")

    policy = ScriptedPolicy(chat, [asks(ToolCall("double", {"number": 1})), SAYS])
    trajectory = run(chat, Deaf(), policy)
    assert trajectory.stop is Stop.FAILED and "env.shown: ZeroDivisionError" in trajectory.failure


def forcing(chat, *marks):
    """A policy that says one turn, of which it was forced to say what `marks` say."""
    (*_, turn) = chat.pieces([Message("user", "go"), Message("assistant", "yes", reasoning="hm")])
    forced = [any(start <= at < end for start, end in marks) for at in range(len(turn.tokens))]

    async def policy(prompt, **_):
        logps = [math.nan if f else -0.5 - at for at, f in enumerate(forced)]
        return Completion(turn.tokens, logps, "stop", version=3, forced=forced)

    return policy, turn.tokens, forced


@pytest.mark.parametrize(
    ("marks", "authors"),
    [
        ([], ["policy"]),
        ([(0, 2)], ["world", "policy"]),
        ([(3, 5)], ["policy", "world", "policy"]),
        ([(0, 1), (4, 99)], ["world", "policy", "world"]),
        ([(0, 99)], ["world"]),
    ],
)
def test_forced_tokens_are_read_and_never_learned(chat, marks, authors):
    policy, tokens, forced = forcing(chat, *marks)
    trajectory = run(chat, World(), policy)
    assert trajectory.stop is Stop.FINISHED
    assert trajectory.messages[-1] == Message("assistant", "yes", reasoning="hm")  # the whole turn
    opening, *pieces = trajectory.branches[0].pieces
    assert [piece.author for piece in pieces] == authors
    assert [token for piece in pieces for token in piece.tokens] == tokens
    assert trajectory.sampled == trajectory.metrics["sampled_tokens"] == forced.count(False)
    row = to_row(trajectory.branches[0].pieces, advantage=2.0)
    start = len(opening.tokens)
    assert row.learn[start:].tolist() == [float(not f) for f in forced]
    assert row.logp[start:].tolist() == [0.0 if f else -0.5 - at for at, f in enumerate(forced)]
    assert not row.learn[:start].any()
    assert all(piece.version == 3 for piece in pieces if piece.author == "policy")


def test_marks_of_forced_tokens_that_are_not_one_a_token_are_ours(chat):
    async def policy(prompt, **_):
        return Completion([65, 66], [0.0, 0.0], "stop", forced=[True])

    with pytest.raises(ValueError, match="1 marks of forced tokens"):
        run(chat, World(), policy)
