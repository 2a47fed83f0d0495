"""Conversations that fork: what each branch begins with, which limits are whose, and how they
stop."""

import asyncio
import dataclasses

import pytest

from jaxdeep.agent import rollout as loop
from jaxdeep.agent.base import Env
from jaxdeep.agent.rollout import Limits
from jaxdeep.agent.tool import tool
from jaxdeep.types import Completion, Message, Piece, Stop, Task, ToolCall

LIMITS = Limits(
    max_turns=9, max_calls=9, turn_tokens=400, max_tokens=1500, result_tokens=500, seconds=5.0
)
QUESTION = Message("user", "what do the pages say?")


class Reader(Env):
    """Pages to read. A new branch begins with notes wherever `fork_at` says so of the tokens
    left."""

    def __init__(self, fork_at=lambda room: room < 400):
        self.tools, self.fork_at, self.asked = [self.read], fork_at, []

    async def open(self):
        return [QUESTION]

    async def fork(self, messages, room):
        self.asked.append((list(messages), room))
        if not self.fork_at(room):
            return None
        return [QUESTION, Message("user", f"notes: {messages[-2].content}")]

    @tool(inline=True)
    def read(self, page: int) -> str:
        """Read a page."""
        return f"page {page} " + "x" * 200


def script(chat, *turns):
    """A policy that says the turns one after the other, whatever the prompt, and what it was
    asked."""
    prompts, left = [], list(turns)

    async def policy(prompt, *, seed, max_new, sampling):
        prompts.append(list(prompt))
        tokens = chat.pieces([QUESTION, left.pop(0)])[-1].tokens
        cut = tokens[:max_new]
        return Completion(
            cut,
            [-0.25 * len(prompts)] * len(cut),
            "stop" if cut == tokens else "length",
            version=len(prompts),
        )

    return policy, prompts


def reads(page):
    return Message("assistant", f"I read {page}", calls=(ToolCall("read", {"page": page}),))


def run(chat, env, policy, **limits):
    limits = dataclasses.replace(LIMITS, **limits)
    return asyncio.run(loop.rollout(env, Task("t", "q"), policy, chat, limits=limits, seed=7))


SAYS = Message("assistant", "x")


def test_a_branch_begins_with_the_environments_messages_and_goes_on_append_only(chat):
    env = Reader()
    policy, prompts = script(chat, *map(reads, range(3)), SAYS)
    trajectory = run(chat, env, policy)
    assert trajectory.stop is Stop.FINISHED and len(trajectory.branches) == 2
    first, second = trajectory.branches
    for branch, asked in ((first, prompts[:2]), (second, prompts[2:])):
        for prompt in asked:  # every prompt is a prefix of what is recorded of its branch
            assert branch.tokens[: len(prompt)] == prompt
    schemas = [env.read.schema]
    notes = [QUESTION, Message("user", "notes: I read 1")]
    assert second.pieces[0] == Piece(chat.opening(notes, schemas), "world")
    # Whatever happened is in the messages once: nothing of what the branch begins with.
    assert [m.content for m in trajectory.messages if m.role != "tool"] == [
        *(QUESTION.content, "I read 0", "I read 1", "I read 2", "x")
    ]
    results = [m.content for m in trajectory.messages if m.role == "tool"]
    assert [text.split()[1] for text in results] == list("012")
    # Each sampled token is the policy's in one place, the version of its turn with it.
    assert [p.version for p in trajectory.pieces if p.author == "policy"] == [1, 2, 3, 4]
    assert trajectory.metrics["turns"] == 4 and trajectory.metrics["calls"] == 3
    assert (
        trajectory.metrics["sampled_tokens"]
        == trajectory.sampled
        == sum(branch.sampled for branch in trajectory.branches)
    )
    assert trajectory.tokens == first.tokens + second.tokens


def test_it_is_asked_before_each_turn_but_the_first_with_the_branchs_messages_and_room(chat):
    env = Reader()
    policy, prompts = script(chat, *map(reads, range(3)), SAYS)
    trajectory = run(chat, env, policy)
    assert len(env.asked) == len(prompts) - 1
    assert [messages[0] for messages, _ in env.asked] == [QUESTION] * 3
    assert [len(messages) for messages, _ in env.asked] == [3, 5, 4]  # they begin with 1, then 2
    # Where it went on in the branch, the room is what the next prompt left of it.
    for i in (0, 2):
        assert env.asked[i][1] == LIMITS.max_tokens - len(prompts[i + 1])
    assert all(len(branch.tokens) <= LIMITS.max_tokens for branch in trajectory.branches)


def test_a_full_branch_is_left_or_ends_the_rollout(chat):
    full = Reader(lambda room: room < 1)
    policy, _ = script(chat, *map(reads, range(4)), SAYS)
    trajectory = run(chat, full, policy, max_tokens=1400)
    assert trajectory.stop is Stop.FINISHED and len(trajectory.branches) == 2
    assert min(room for _, room in full.asked) < 1
    never = Reader(lambda room: False)
    policy, _ = script(chat, *map(reads, range(4)), SAYS)
    trajectory = run(chat, never, policy, max_tokens=1400)
    assert trajectory.stop is Stop.MAX_TOKENS and len(trajectory.branches) == 1
    assert trajectory.pieces[-1].author == "policy" and never.asked[-1][1] < 1
    # What did not fit happened all the same, and the environment was told of it.
    assert trajectory.messages[-1].role == "tool" and never.asked[-1][0] == trajectory.messages


def test_a_branch_that_begins_too_long_is_never_sampled(chat):
    class Long(Reader):
        async def fork(self, messages, room):
            return [Message("user", "x" * 2000)]

    policy, prompts = script(chat, reads(0), SAYS)
    trajectory = run(chat, Long(), policy)
    assert trajectory.stop is Stop.MAX_TOKENS and len(prompts) == 1
    assert [branch.sampled > 0 for branch in trajectory.branches] == [True, False]


def test_turns_and_calls_are_those_of_the_whole_rollout(chat):
    always = Reader(lambda room: True)
    policy, _ = script(chat, *map(reads, range(9)))
    trajectory = run(chat, always, policy, max_turns=4)
    assert trajectory.stop is Stop.MAX_TURNS and len(trajectory.branches) == 4
    assert len(always.asked) == 3  # nothing comes after the last turn
    policy, _ = script(chat, *map(reads, range(9)))
    trajectory = run(chat, Reader(lambda room: True), policy, max_calls=2)
    assert trajectory.stop is Stop.MAX_CALLS and trajectory.metrics["calls"] == 2
    results = [m.content for m in trajectory.messages if m.role == "tool"]
    assert len(results) == 3 and results[-1] == loop.NO_CALLS_LEFT


def test_a_turn_that_the_budget_cuts_ends_the_rollout(chat):
    env = Reader()
    policy, _ = script(chat, reads(0), Message("assistant", "y" * 2000))
    trajectory = run(chat, env, policy, turn_tokens=2000)
    assert trajectory.stop is Stop.MAX_TOKENS and len(env.asked) == 1


@pytest.mark.parametrize("how", ["raises", "repeats a call that cannot be read"])
def test_a_fork_that_fails_voids_the_rollout(chat, how):
    class Broken(Reader):
        async def fork(self, messages, room):
            if how == "raises":
                raise KeyError("notes")
            return messages

    broken = Message("assistant", "<tool_call>")

    async def policy(prompt, **_):
        tokens = chat.tokenizer.encode_control(f"{broken.content}<|im_end|>")
        return Completion(tokens, [0.0] * len(tokens), "stop")

    trajectory = run(chat, Broken(), policy)
    assert trajectory.stop is Stop.FAILED and "env.fork" in trajectory.failure
    assert len(trajectory.branches) == 1
