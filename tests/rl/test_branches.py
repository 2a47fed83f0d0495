"""A conversation that starts over from its own summaries, from the rollout to the page: every
sampled token is learned once, wherever it was said."""

import asyncio
import collections
import json
import re

import numpy as np
import pytest
from agent.conftest import chat as _chat  # noqa: F401 - a fixture

from jaxdeep.agent import record
from jaxdeep.agent import rollout as loop
from jaxdeep.agent.base import Env
from jaxdeep.agent.rollout import Limits
from jaxdeep.agent.tool import tool
from jaxdeep.chat.tokenizer import FILE
from jaxdeep.data.pack import pack
from jaxdeep.errors import DataError
from jaxdeep.pages import view
from jaxdeep.rl import summary
from jaxdeep.rl.advantages import Rules, assign_advantages, learned, to_rows
from jaxdeep.rl.objective import Kl, Objective
from jaxdeep.rl.shaping import Shaping, shaped
from jaxdeep.train import losses
from jaxdeep.train.losses import ReferenceLogps
from jaxdeep.types import Branch, Completion, Message, Piece, Stop, Task, Trajectory

LIMITS = Limits(
    max_turns=9, max_calls=9, turn_tokens=400, max_tokens=1800, result_tokens=500, seconds=9.0
)
QUESTION = Message("user", "sum up the pages")


@pytest.fixture(scope="session")
def chat(_chat):  # noqa: F811
    return _chat


class Summaries(Env):
    """Pages to read. A turn that says a summary is where the next branch begins, with it alone."""

    def __init__(self, task):
        self.tools, self.summary = [self.read], ""

    async def open(self):
        return [QUESTION]

    async def reply(self, message):
        self.summary = message.content if message.content.startswith("so far") else ""
        return [Message("user", "go on")] if self.summary else []

    async def fork(self, messages, room):
        summary, self.summary = self.summary, ""
        return [QUESTION, Message("user", f"You noted: {summary}")] if summary else None

    @tool(inline=True)
    def read(self, page: int) -> str:
        """Read a page."""
        return f"page {page}"


class Tasks:
    """One task. The reward is the share of its pages that were read, in whichever branch."""

    def __init__(self):
        self.rewards = {"read": (1.0, self.pages_read)}

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return Task("t", QUESTION.content)

    def env(self, task):
        return Summaries(task)

    def gold(self, task):
        pages = [Message("tool", f"page {n}", name="read") for n in range(3)]
        return [*pages, Message("assistant", "done")]

    def pages_read(self, task, trajectory):
        read = {m.content for m in trajectory.messages if m.role == "tool"}
        return len(read & {f"page {n}" for n in range(3)}) / 3


def read(page):
    text = json.dumps({"name": "read", "arguments": {"page": page}})
    return f"<tool_call>\n{text}\n</tool_call>"


LONG = [read(0), "so far: 0", read(1), "so far: 0, 1", read(2), "done"]  # three branches
SHORT = [read(0), "done"]


def rollouts(chat):
    """Two rollouts of the task, the first of three branches, by a policy that gives every token a
    log-probability of its own."""
    numbers = iter(range(1, 10**6))

    def one(turns):
        left = list(turns)

        async def policy(prompt, **_):
            tokens = chat.tokenizer.encode_control(f"{left.pop(0)}<|im_end|>")
            return Completion(tokens, [-next(numbers) / 1024 for _ in tokens], "stop", version=2)

        return policy

    async def every():
        tasks = Tasks()
        made = []
        for seed, turns in enumerate((LONG, SHORT)):
            task = tasks[0]
            made.append(
                await loop.rollout(
                    tasks.env(task), task, one(turns), chat, limits=LIMITS, seed=seed
                )
            )
            await loop.score(tasks, made[-1])
        return made

    return asyncio.run(every())


def sampled(trajectory):
    """The sampled tokens with their log-probabilities, in order."""
    pieces = [piece for piece in trajectory.pieces if piece.author == "policy"]
    return [(id, logp) for p in pieces for id, logp in zip(p.tokens, p.logps, strict=True)]


def test_every_sampled_token_is_learned_once_with_the_rollouts_advantage(chat):
    group = rollouts(chat)
    long, short = group
    assert [len(t.branches) for t in group] == [3, 1]
    assert (long.reward, short.reward) == (1.0, pytest.approx(1 / 3))
    rewards = assign_advantages([group])
    rows = to_rows([group])
    assert len(rows) == 4
    batches = pack(rows, B=2, T=LIMITS.max_tokens)
    learned = collections.Counter()
    for batch in batches:
        mask_BT = batch.learn_BT > 0
        learned += collections.Counter(
            zip(
                batch.tokens_BT[mask_BT].tolist(),
                batch.logp_BT[mask_BT].tolist(),
                batch.advantage_BT[mask_BT].tolist(),
                strict=True,
            )
        )
    want = [(id, logp, t.advantage) for t in group for id, logp in sampled(t)]
    assert learned == collections.Counter(
        (id, float(np.float32(logp)), float(np.float32(a))) for id, logp, a in want
    )
    assert set(learned.values()) == {1}
    metrics = summary.advantage_metrics([group], rewards, Rules())
    masks = sum(int(np.count_nonzero(batch.learn_BT)) for batch in batches)
    assert metrics["grpo/loss_tokens"] == masks == long.sampled + short.sampled
    assert metrics["grpo/rows"] == 4


def test_gaps_of_the_rows_of_a_rollout_are_one_list_over_its_branches(chat):
    group = rollouts(chat)
    assign_advantages([group])
    rows = to_rows([group])
    T = LIMITS.max_tokens
    batches = pack(rows, B=2, T=T)
    trainers = [batch.logp_BT + 0.5 * batch.logp_BT * (batch.learn_BT > 0) for batch in batches]
    gaps = summary.gaps_of(group, rows, trainers, T)
    for trajectory, gap in zip(group, gaps, strict=True):
        want = [0.5 * logp for _, logp in sampled(trajectory)]
        np.testing.assert_allclose(gap, want, rtol=1e-5)
    age = summary.staleness(group, gaps, 5)
    assert age == {"staleness": 3.0, "max_staleness": 3.0}
    group[0].advantage = None
    rows = to_rows([group])
    assert len(rows) == 1
    none, short = summary.gaps_of(group, rows, [b.logp_BT for b in pack(rows, B=1, T=T)], T)
    assert none is None and short.tolist() == [0.0] * group[1].sampled


def test_a_record_with_its_gaps_comes_back_whole(chat, tmp_path):
    group = rollouts(chat)
    assign_advantages([group])
    gaps = [np.linspace(-1, 1, t.sampled, dtype=np.float32) for t in group]
    record.write(tmp_path / "r.jsonl", group, chat.tokenizer)
    record.write_gaps(tmp_path / "g.npy", group, gaps)
    again = record.read(tmp_path / "r.jsonl")
    assert again == group and [len(t.branches) for t in again] == [3, 1]
    for (trajectory, gap), want in zip(
        record.with_gaps(again, tmp_path / "g.npy"), gaps, strict=True
    ):
        assert len(gap) == trajectory.sampled
        np.testing.assert_allclose(gap, want, atol=1e-3)


def test_the_view_shows_branches_one_under_another(chat, tmp_path):
    group = rollouts(chat)
    assign_advantages([group])
    record.write(tmp_path / "rollouts" / "000001.jsonl", group)
    (tmp_path / FILE).write_text(chat.tokenizer.text)
    view.build([tmp_path], tmp_path / "view")
    script = (tmp_path / "view/0/000001/0.js").read_text()
    (payload,) = re.fullmatch(r'view\("[\w/-]+",(.*)\)\n', script, re.DOTALL).groups()
    long, short = json.loads(payload)
    assert long["ids"] == group[0].tokens and len(long["logps"]) == group[0].sampled
    heads = [(end, label) for end, _, kind, label in long["parts"] if kind == "branch"]
    ends = np.cumsum([0] + [len(branch.tokens) for branch in group[0].branches]).tolist()
    assert heads == [(end, f"branch {n} of 3") for n, end in enumerate(ends[:3], 1)]
    assert long["parts"][-1][0] == ends[3]
    # Calls and results are told in their own branch, none of them twice.
    told = [label for _, _, kind, label in long["parts"] if kind in ("call", "result")]
    assert told == [
        text for page in range(3) for text in (f"read(page={page})", f"read: page {page}")
    ]
    learned = sum(
        end - begin
        for (begin, *_), (end, own, *_) in zip([(0,), *long["parts"]], long["parts"], strict=False)
        if own
    )
    assert learned == group[0].sampled
    assert not any(kind == "branch" for _, _, kind, _ in short["parts"])


def test_rewards_and_health_see_all_that_was_said(chat):
    long, _ = rollouts(chat)
    said = [m.content for m in long.messages if m.role == "assistant" and not m.calls]
    assert said == ["so far: 0", "so far: 0, 1", "done"]
    assert sum(m == QUESTION for m in long.messages) == 1
    found = summary.summarize([[long]])
    assert found["rollout/calls"] == 3 and found["rollout/turns"] == 6
    assert found["reward/read"] == 1.0
    tasks = Tasks()
    gold = Trajectory(tasks[0], messages=tasks.gold(tasks[0]), stop=Stop.FINISHED)
    asyncio.run(loop.score(tasks, gold))
    assert gold.reward == 1.0


def branches(*sizes, prompt=7, reward=0.0):
    """A trajectory with branches of (world, sampled) tokens."""
    made = [
        Branch([Piece([prompt + n] * world, "world"), Piece([1] * own, "policy", [-0.5] * own)])
        for n, (world, own) in enumerate(sizes)
    ]
    return Trajectory(Task("t", "?"), branches=made, reward=reward, stop=Stop.FINISHED)


def test_a_branch_without_sampled_tokens_makes_no_row():
    group = [branches((4, 3), (5, 0), (2, 2)), branches((4, 1), reward=1.0)]
    rewards = assign_advantages([group])
    assert [len(row.tokens) for row in to_rows([group])] == [7, 4, 5]
    metrics = summary.advantage_metrics([group], rewards, Rules())
    assert metrics["grpo/rows"] == 3 and metrics["grpo/loss_tokens"] == 6


def test_a_group_has_one_first_prompt_whatever_its_branches_begin_with():
    assign_advantages([[branches((4, 3), (6, 2)), branches((4, 3), (9, 1))]])
    with pytest.raises(DataError, match="2 different prompts"):
        assign_advantages([[branches((4, 3)), branches((4, 3), prompt=8)]])


def test_the_penalty_for_length_is_for_the_longest_branch_and_the_reward_for_all_sampled():
    group = [branches((4, 2), (4, 10), (4, 4)), branches((4, 4))]
    overlong = Shaping(overlong=1.0, window=0.5)
    assert shaped(group, [1.0, 1.0], overlong, limit=16, solved=1.0) == pytest.approx(
        [1 - (14 - 8) / 8, 1.0]
    )
    # 16 sampled tokens are the longest, 4 the shortest.
    found = shaped(group, [1.0, 1.0], Shaping(length=0.4), limit=16, solved=1.0)
    assert found == pytest.approx([0.8, 1.2])


@pytest.mark.parametrize("aggregate", ["token", "sequence", "constant"])
def test_a_rollout_is_one_sequence_however_many_branches_it_has(chat, aggregate):
    group = rollouts(chat)
    assign_advantages([group])
    for trajectory, advantage in zip(group, (0.7, -0.4), strict=True):
        trajectory.advantage = advantage
    batches = pack(to_rows([group], aggregate), B=2, T=LIMITS.max_tokens)
    objective = Objective(aggregate=aggregate, length=1000, kl=Kl("k2", 0.3))
    rng, total, each = np.random.default_rng(0), 0.0, collections.defaultdict(list)
    for batch in batches:
        gap_BT = rng.normal(0, 0.1, batch.learn_BT.shape).astype(np.float32)
        before = ReferenceLogps(None, batch.logp_BT - gap_BT)
        loss, _ = losses.loss(batch.logp_BT, 0 * gap_BT, batch, before, objective=objective)
        total += float(loss)
        for b, t in np.argwhere(batch.learn_BT > 0):
            worth = 0.7 if batch.advantage_BT[b, t] > 0 else -0.4  # at a ratio of 1
            each[worth].append(-worth + 0.3 * gap_BT[b, t] ** 2 / 2)
    assert sorted(map(len, each.values())) == sorted(t.sampled for t in group)
    found = total / losses.denominator(batches, objective, len(learned([group])))
    want = {
        "token": np.mean(np.concatenate(list(each.values()))),
        "sequence": np.mean([np.mean(tokens) for tokens in each.values()]),
        "constant": sum(map(sum, each.values())) / 2 / 1000,
    }
    assert found == pytest.approx(want[aggregate], rel=1e-5)
