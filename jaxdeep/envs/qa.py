"""Questions answered by searching a corpus: one search tool, one final answer in <answer> tags.

What several task sets share: anything with `search(query, k)`, such as `tools.bm25.BM25`, and
questions make a `Taskset`. The reward of a trajectory is the weighted sum of answer, format and
retry; a wrong answer, an empty one, a copied question or endless searching get at most the weight
of format."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Annotated

from jaxdeep.agent.base import Env, Reward
from jaxdeep.agent.tool import ToolResult, tool
from jaxdeep.errors import ConfigError
from jaxdeep.rewards import answers
from jaxdeep.tools.search import SEARCH, CachedRetriever, Retriever, show
from jaxdeep.types import Message, Task, ToolCall

SYSTEM = """\
Answer the question with the help of the search tool.
Search for what you do not know, with a few words that its text is likely to contain. Think about the \
results as you like. If they do not hold the answer, search again with other words.
When you know the answer, end with it, as short as possible, between <answer> and </answer>."""


WEIGHTS = {"answer": 1.0, "format": 0.1, "retry": 0.1}
"""How much each reward counts where the configuration does not say."""


class SearchTaskset:
    """Questions over one corpus. A search shows the `k` best passages; the last `cache` answers of
    the engine are kept for whoever asks the same."""

    right = "answer"

    def __init__(
        self,
        questions: Sequence[Task],
        engine: Retriever,
        *,
        k: int = 5,
        system: str = SYSTEM,
        cache: int = 0,
    ) -> None:
        self.questions = questions
        self.engine = CachedRetriever(engine, cache)
        self.k = k
        self.system = system
        self.rewards: Mapping[str, tuple[float, Reward]] = {
            "answer": (WEIGHTS["answer"], answers.answer_em),
            "format": (WEIGHTS["format"], answers.format_ok),
            "retry": (WEIGHTS["retry"], functools.partial(answers.retry, tool=SEARCH)),
        }

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, index: int) -> Task:
        return self.questions[index]

    def check_rewards(self, weights: Mapping[str, float]) -> None:
        """ConfigError where a wrong answer could earn as much as a right one."""
        others = weights.get("format", 0.0), weights.get("retry", 0.0)
        if "answer" in weights and not (min(others) >= 0 and weights["answer"] > sum(others)):
            raise ConfigError(
                f"env.rewards={dict(weights)}: answer must count more than format and retry together, "
                "and none of them less than 0"
            )

    def env(self, task: Task) -> SearchEnv:
        return SearchEnv(task, self.engine, k=self.k, system=self.system)

    def gold(self, task: Task) -> list[Message]:
        """Searches until a result holds the answer, at most `answers.RETRIES`, and the first
        answer."""
        messages: list[Message] = []
        for query in _queries(task):
            found = show(self.engine.search(query, self.k))
            call = ToolCall(SEARCH, {"query": query})
            messages += [
                Message("assistant", calls=(call,)),
                Message("tool", found, name=call.name),
            ]
            if answers.contains_answer(found, task.answers):
                break
        return [*messages, Message("assistant", f"<answer>{task.answers[0]}</answer>")]


class SearchEnv(Env):
    """One question and the tool to search with."""

    def __init__(self, task: Task, engine: CachedRetriever, *, k: int, system: str) -> None:
        self.task = task
        self.engine = engine
        self.k = k
        self.system = system
        self.tools = (self.search,)

    async def open(self) -> list[Message]:
        return [Message("system", self.system), Message("user", self.task.question)]

    @tool
    def search(self, query: Annotated[str, "a few words to look for"]) -> ToolResult:
        """Search the corpus. The result lists the passages that fit best."""
        found, known = self.engine.look_up(query, self.k)
        return ToolResult(show(found), cached=known)


def _queries(task: Task) -> list[str]:
    """`answers.RETRIES` queries no two of which `answers.retry` takes for the same."""
    question, answer = task.question, task.answers[0]
    fallbacks = (f"{question} {n}" for n in range(answers.RETRIES))
    distinct: dict[str, str] = {}
    for query in (question, f"{question} {answer}", answer, *fallbacks):
        distinct.setdefault(answers.normalize(query), query)
    return list(distinct.values())[: answers.RETRIES]
