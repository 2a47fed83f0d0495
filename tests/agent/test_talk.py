"""A conversation with a person: what is told while it happens, remembered and saved."""

import asyncio
import json

import pytest

from jaxdeep.agent.base import Env
from jaxdeep.agent.rollout import Limits
from jaxdeep.agent.scripted import EchoTool, ScriptedPolicy
from jaxdeep.agent.talk import Conversation, Plain, Result
from jaxdeep.chat.format import CallEnd, ContentText
from jaxdeep.chat.formats import read
from jaxdeep.chat.learn import LearnConfig
from jaxdeep.chat.qwen3 import Qwen3Chat
from jaxdeep.errors import DataError
from jaxdeep.types import Message, Sampling, Stop, ToolCall

LIMITS = Limits(
    max_turns=3, max_calls=2, turn_tokens=200, max_tokens=2000, result_tokens=99, seconds=600.0
)


@pytest.fixture(scope="module")
def chat(chat):
    """Without a block of reasoning, so that nothing is held back until the turn ends."""
    return Qwen3Chat(chat.tokenizer, "none")


class Echoing(Env):
    """Asks with a prompt of the system and has one tool."""

    def __init__(self, task):
        self.task, self.tools = task, [EchoTool().echo]

    async def open(self):
        return [Message("system", "Echo."), Message("user", self.task.question)]


class Parts:
    """A scripted policy whose turns come a few tokens at a time; `stop_at`: it hangs after that
    many parts, as one that writes on and on."""

    def __init__(self, chat, turns, stop_at=None):
        self.policy, self.stop_at = ScriptedPolicy(chat, turns), stop_at

    async def stream(self, prompt, *, seed, max_new, sampling):
        whole = await self.policy(prompt, seed=seed, max_new=max_new, sampling=sampling)
        for n, at in enumerate(range(0, len(whole.tokens), 3)):
            if n == self.stop_at:
                await asyncio.sleep(10**6)
            tokens = whole.tokens[at : at + 3]
            last = at + 3 >= len(whole.tokens)
            yield whole._replace(
                tokens=tokens, logps=[0.0] * len(tokens), stop=whole.stop if last else ""
            )


def talk(chat, turns, env=Echoing, memory=True, limits=LIMITS, **more):
    told = []
    parts = Parts(chat, turns, **more)
    conversation = Conversation(
        env, parts.stream, chat, limits, Sampling(0.0), told.append, memory=memory
    )
    return conversation, told, parts.policy


CALL = Message("assistant", calls=(ToolCall("echo", {"text": "one\ntwo"}),))


def test_everything_is_told_while_it_happens(chat):
    conversation, told, _ = talk(chat, [CALL, Message("assistant", "It said one.")])
    trajectory = asyncio.run(conversation.ask("Say it."))
    assert trajectory.stop is Stop.FINISHED
    (end,) = (e for e in told if isinstance(e, CallEnd))
    (result,) = (e for e in told if isinstance(e, Result))
    assert end.call == result.call == CALL.calls[0] and result.text == "one\ntwo"
    assert "".join(e.text for e in told if isinstance(e, ContentText)) == "It said one."
    assert told.index(end) < told.index(result)
    assert sum(isinstance(e, ContentText) for e in told) > 2  # in parts


def test_with_memory_a_line_goes_on_from_those_before(chat):
    turns = [CALL, Message("assistant", "Yes."), Message("assistant", "Again.")]
    conversation, _, policy = talk(chat, turns)
    asyncio.run(conversation.ask("Say it."))
    policy._next_turn.clear()
    policy.turns = policy.turns[2:]
    trajectory = asyncio.run(conversation.ask("And now?"))
    roles = [m.role for m in trajectory.messages]
    assert roles == ["system", "user", "assistant", "tool", "assistant", "user", "assistant"]
    prompt = chat.tokenizer.decode(policy.prompts[-1])
    order = [prompt.index(text) for text in ("Echo.", "Say it.", "\none\ntwo", "Yes.", "And now?")]
    assert order == sorted(order) and prompt.count("Echo.") == 1
    conversation.reset()
    policy._next_turn.clear()
    asyncio.run(conversation.ask("Anew?"))
    assert "Say it." not in chat.tokenizer.decode(policy.prompts[-1])


def test_without_memory_each_line_is_a_question_of_its_own(chat):
    conversation, _, policy = talk(chat, [Message("assistant", "Yes.")], memory=False)
    for question in ("First?", "Second?"):
        policy._next_turn.clear()
        asyncio.run(conversation.ask(question))
    assert "First?" not in chat.tokenizer.decode(policy.prompts[-1])
    assert [len(messages) for messages, _ in conversation.said] == [3, 3]


def test_a_turn_with_an_unreadable_call_is_not_repeated(chat):
    turns = ["<tool_call>\n{nonsense\n</tool_call>", Message("assistant", "Sorry.")]
    conversation, _, policy = talk(chat, turns)
    asyncio.run(conversation.ask("Say it."))
    policy._next_turn.clear()
    policy.turns = policy.turns[1:]
    trajectory = asyncio.run(conversation.ask("And now?"))
    assert [m.role for m in trajectory.messages] == [
        *("system", "user", "assistant", "user", "assistant")
    ]


def test_an_answer_that_is_stopped_is_kept_as_far_as_it_came(chat):
    conversation, told, policy = talk(
        chat, [Message("assistant", "This goes on and on.")], stop_at=4
    )

    async def stopped():
        work = asyncio.ensure_future(conversation.ask("Go."))
        while sum(isinstance(e, ContentText) for e in told) < 3:
            await asyncio.sleep(0)
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)

    asyncio.run(stopped())
    (messages, _) = conversation.said[0]
    assert [m.role for m in messages] == ["system", "user", "assistant"]
    assert "This goes on and on.".startswith(messages[-1].content) and messages[-1].content
    policy._next_turn.clear()
    policy.turns = [chat.encode_turn("Fine.")]
    trajectory = asyncio.run(conversation.ask("Go on."))
    assert trajectory.messages[-1].content == "Fine."
    assert messages[-1].content in chat.tokenizer.decode(policy.prompts[-1])


def test_a_conversation_that_is_full_says_so(chat):
    conversation, _, _ = talk(
        chat, [Message("assistant", "Yes.")], limits=LIMITS.__class__(3, 2, 200, 40, 99, 600.0)
    )
    trajectory = asyncio.run(conversation.ask("A question that is too long for it."))
    assert trajectory.stop is Stop.MAX_TOKENS and not trajectory.sampled


@pytest.mark.parametrize("memory", [True, False])
def test_what_is_saved_is_read_as_conversations(memory, chat, tmp_path):
    conversation, _, policy = talk(chat, [CALL, Message("assistant", "Yes.")], memory=memory)
    with pytest.raises(DataError, match="nothing was said"):
        conversation.save(tmp_path / "a.jsonl")
    asyncio.run(conversation.ask("Say it."))
    policy._next_turn.clear()
    policy.turns = policy.turns[1:]
    trajectory = asyncio.run(conversation.ask("And now?"))
    assert conversation.save(tmp_path / "a.jsonl") == (1 if memory else 2)
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    messages, tools = read(rows[0], LearnConfig())
    assert [tool["function"]["name"] for tool in tools] == ["echo"]
    want = trajectory.messages if memory else conversation.said[0][0]
    assert [(m.role, m.content) for m in messages] == [(m.role, m.content) for m in want]
    assert [dict(c.arguments) for m in messages for c in m.calls] == [{"text": "one\ntwo"}]
    with pytest.raises(DataError, match="cannot be written: File exists"):
        conversation.save(tmp_path / "a.jsonl")


def test_a_person_can_be_answered_without_a_task_set(chat):
    conversation, _, _ = talk(chat, [Message("assistant", "Hello.")], env=Plain)
    trajectory = asyncio.run(conversation.ask("Hi."))
    assert [m.role for m in trajectory.messages] == ["user", "assistant"]
    assert conversation.said[0][1] == []
