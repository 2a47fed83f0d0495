"""Questions answered by searching a corpus: one tool, one final answer in <answer> tags.

In: questions (`read_questions`) and anything with `search(query, k)`, such as `corpus.BM25`. Out: a
`Taskset`. The total of a trajectory is answer + format + retry by their weights; a wrong answer, an
empty one, a copied question or endless searching get at most `Weights.format`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from jaxdeep.agent.base import Env, Reward
from jaxdeep.agent.tool import ToolResult, tool
from jaxdeep.errors import ConfigError, DataError
from jaxdeep.rewards import answers as text
from jaxdeep.tools.corpus import read_rows
from jaxdeep.tools.search import SEARCH, CachedRetriever, Retriever, show
from jaxdeep.types import Message, Task, ToolCall

SYSTEM = """\
Answer the question with the help of the search tool.
Search for what you do not know, with a few words that its text is likely to contain. Think about the \
results as you like. If they do not hold the answer, search again with other words.
When you know the answer, end with it, as short as possible, between <answer> and </answer>."""


ANSWERS = ("answer", "answers", "golden_answers", "answer_aliases")


@dataclasses.dataclass(frozen=True, slots=True)
class Weights:
    """What the rewards count. The answer is to count more than the others together."""

    answer: float = 1.0
    format: float = 0.1
    retry: float = 0.1

    def __post_init__(self) -> None:
        if not (self.format >= 0 and self.retry >= 0 and self.answer > self.format + self.retry):
            raise ConfigError(f"need answer > format + retry and none below 0, got {self}")


WEIGHTS = Weights()


def read_questions(path: str | Path) -> list[Task]:
    """The questions of a .jsonl file (or of the list in a .json file), in order.

    A row has `question`, its right answers as a text or a list in `answer`, `answers`,
    `golden_answers` or `answer_aliases`, and optionally `id`; all else goes to the task's `meta`. An
    id that was there before gets a number. DataError: no question, no answer, an empty file.
    """
    tasks: list[Task] = []
    seen: dict[str, int] = {}
    path = Path(path)
    for where, row in read_rows(path):
        question = row.get("question")
        if not isinstance(question, str) or not question.strip():
            raise DataError(f"{where}: a row needs a question")
        id = str(row.get("id", f"{path.stem}-{len(tasks)}"))
        seen[id] = seen.get(id, 0) + 1
        unique = id if seen[id] == 1 else f"{id}/{seen[id]}"
        meta = {k: v for k, v in row.items() if k not in ("id", "question", *ANSWERS)}
        tasks.append(Task(unique, question.strip(), _answers(row, where), meta))
    if not tasks:
        raise DataError(f"{path} holds no question")
    return tasks


class SearchTaskset:
    """Questions over one corpus. `k` is the number of results a search shows; `cache` answers of the engine
    are kept for those who ask the same."""

    def __init__(
        self,
        questions: Sequence[Task],
        engine: Retriever,
        *,
        k: int = 5,
        system: str = SYSTEM,
        weights: Weights = WEIGHTS,
        cache: int = 0,
    ) -> None:
        self.questions = questions
        self.engine = CachedRetriever(engine, cache)
        self.k = k
        self.system = system
        self.rewards: Mapping[str, tuple[float, Reward]] = {
            "answer": (weights.answer, text.answer_em),
            "format": (weights.format, text.format_ok),
            "retry": (weights.retry, functools.partial(text.retry, tool=SEARCH)),
        }

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, index: int) -> Task:
        return self.questions[index]

    def env(self, task: Task) -> SearchEnv:
        return SearchEnv(task, self.engine, k=self.k, system=self.system)

    def gold(self, task: Task) -> list[Message]:
        """Searches until a result holds the answer, at most `text.RETRIES`, and the first answer."""
        messages: list[Message] = []
        for query in _queries(task):
            found = show(self.engine.search(query, self.k))
            call = ToolCall(SEARCH, {"query": query})
            messages += [
                Message("assistant", calls=(call,)),
                Message("tool", found, name=call.name),
            ]
            if text.contains_answer(found, task.answers):
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
    """`text.RETRIES` queries no two of which `text.retry` takes for the same."""
    question, answer = task.question, task.answers[0]
    fallbacks = (f"{question} {n}" for n in range(text.RETRIES))
    distinct: dict[str, str] = {}
    for query in (question, f"{question} {answer}", answer, *fallbacks):
        distinct.setdefault(text.normalize(query), query)
    return list(distinct.values())[: text.RETRIES]


def _answers(row: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """The right answers of a row, each once."""
    found: list[str] = []
    for field in ANSWERS:
        value = row.get(field) or []
        found += value if isinstance(value, list) else [value]
    if not all(isinstance(answer, str | int | float) for answer in found):
        raise DataError(f"{where}: an answer must be a text, found {found}")
    answers = tuple(dict.fromkeys(said for answer in found if (said := str(answer).strip())))
    if not answers:
        raise DataError(f"{where}: a question without an answer (looked for {', '.join(ANSWERS)})")
    return answers
