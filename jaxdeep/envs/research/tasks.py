"""Questions answered by a report: a search tool that shows numbered sentences, an answer that cites
them. Anything with `search(query, k)`, such as `tools.bm25.BM25`, and questions make a task set.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated

from jaxdeep.agent.base import Env, Reward
from jaxdeep.agent.tool import ToolResult, in_thread, tool
from jaxdeep.envs.research import conversation, explain, rewards, sources
from jaxdeep.envs.research.sources import Sentence, Shelf, Source
from jaxdeep.envs.research.support import content
from jaxdeep.errors import ConfigError, DataError
from jaxdeep.rewards.answers import contains_answer
from jaxdeep.tools import corpus
from jaxdeep.tools.bm25 import BM25
from jaxdeep.tools.corpus import Passage
from jaxdeep.tools.search import NO_RESULTS, SEARCH, CachedRetriever, Retriever
from jaxdeep.types import Message, Stop, Task, ToolCall, Trajectory

SYSTEM = """\
Answer the question with the help of the search tool, and show what the answer rests on.
A result shows sources, each with a handle such as S2 and numbered sentences. Search until you have \
read all that the answer needs. When you have, write a report between <answer> and </answer>:
- First the answer in bold, as short as possible, and in at most 60 words why it is right.
- Then parts under headings (## Title) for who wants to know more: first the gist of the part in a \
sentence or two, then details if there are any. At most seven parts, each with something new.
- Every fact inside <cite id="S2.3">...</cite>, with the sentence it rests on (S2.3-4 for several in a \
row, commas between places), in words as close to that sentence as you can."""

TRIES = 400  # reports that are tried for the perfect one


@dataclasses.dataclass(frozen=True)
class Research:
    """`corpus` is a file or folder of Markdown, text or JSONL; `questions` a JSONL file, whose rows
    may have `nuggets`: facts that belong in the report, each a sentence or a list of sentences that
    say the same. A search shows the `k` best passages of at most `chunk` characters."""

    corpus: str = ""
    questions: str = ""
    k: int = 3
    cache: int = 0
    chunk: int = 1000
    system: str = SYSTEM

    def __post_init__(self) -> None:
        if not (self.corpus and self.questions):
            raise ConfigError(
                f"a research task set needs env.corpus={self.corpus!r} and "
                f"env.questions={self.questions!r}: set both to files of yours"
            )

    def load(self) -> ResearchTaskset:
        """Reads both files and builds the index. DataError where one of them cannot be used."""
        documents = corpus.read_corpus(self.corpus)
        passages = [p for document in documents for p in corpus.chunk(document, self.chunk)]
        questions = [_task(row, place) for place, row in corpus.read_rows(Path(self.questions))]
        if not questions:
            raise DataError(f"{self.questions} holds no question")
        engine = BM25(passages)
        return ResearchTaskset(questions, engine, k=self.k, system=self.system, cache=self.cache)


class ResearchTaskset:
    """Questions over one search engine. `source_tools` are the tools whose results can be cited."""

    source_tools = (SEARCH,)

    def __init__(
        self,
        questions: Sequence[Task],
        engine: Retriever,
        *,
        k: int = 3,
        system: str = SYSTEM,
        cache: int = 0,
    ) -> None:
        self.questions, self.k, self.system = questions, k, system
        self.engine = CachedRetriever(engine, cache)
        self.rewards: Mapping[str, tuple[float, Reward]] = rewards.of_reports(self.source_tools)

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, index: int) -> Task:
        return self.questions[index]

    def check_rewards(self, weights: Mapping[str, float]) -> None:
        """ConfigError for a weight below 0, with which a wrong report could earn more."""
        if wrong := {name: weight for name, weight in weights.items() if weight < 0}:
            raise ConfigError(f"env.rewards={wrong}: a weight must not be below 0")

    def env(self, task: Task) -> ResearchEnv:
        return ResearchEnv(task, self.engine, k=self.k, system=self.system)

    def gold(self, task: Task) -> list[Message]:
        """Searches for the question, then with the answer, until the results hold what a report
        needs; then a report of sentences that were shown. It earns everything where the search
        engine finds a sentence that says the answer and one more about it."""
        handles, messages = Handles(), []
        best: tuple[float, list[Message]] = (-1.0, [])
        for query in (task.question, f"{task.question} {task.answers[0]}", task.answers[0]):
            call = ToolCall(SEARCH, {"query": query})
            text = handles.show([hit for hit, _ in self.engine.search(query, self.k)])
            messages += [Message("assistant", calls=(call,)), Message("tool", text, name=SEARCH)]
            for answer in _reports(task, conversation.shown(messages, self.source_tools)):
                episode = [*messages, Message("assistant", f"<answer>{answer}</answer>")]
                earned = self._earned(task, episode)
                best = max(best, (earned, episode), key=lambda pair: pair[0])
                if earned > 1 - 1e-9:
                    return episode
        return best[1]

    def _earned(self, task: Task, messages: list[Message]) -> float:
        played = Trajectory(task, messages=messages, stop=Stop.FINISHED)
        return sum(weight * judge(task, played) for weight, judge in self.rewards.values())


class ResearchEnv(Env):
    """One question, and the tool to search with. Sources have handles in order of appearance."""

    def __init__(self, task: Task, engine: CachedRetriever, *, k: int, system: str) -> None:
        self.task, self.engine, self.k, self.system = task, engine, k, system
        self.tools = (self.search,)
        self._handles = Handles()
        self._before: asyncio.Future[None] | None = None  # done when the last call has its handles

    async def open(self) -> list[Message]:
        return [Message("system", self.system), Message("user", self.task.question)]

    @tool
    async def search(self, query: Annotated[str, "a few words to look for"]) -> ToolResult:
        """Search for sources. The result shows those that fit best, as numbered sentences."""
        # Calls of one turn run at the same time and begin in order: each waits for the handles of
        # the one before it, so that the same rollout has the same handles again.
        before, done = self._before, asyncio.get_running_loop().create_future()
        self._before = done
        try:
            found, known = await in_thread(SEARCH, self.engine.look_up, query, self.k)
            if before is not None:
                await asyncio.shield(before)
            return ToolResult(self._handles.show([hit for hit, _ in found]), cached=known)
        finally:
            done.set_result(None)


class Handles:
    """The handles of a conversation's sources: S1, S2, ... in order of appearance, one for each
    passage."""

    def __init__(self) -> None:
        self._by_id: dict[str, str] = {}

    def show(self, passages: Sequence[Passage]) -> str:
        """The passages as a model reads them."""
        return "\n".join(sources.show(self._source(p)) for p in passages) or NO_RESULTS

    def _source(self, passage: Passage) -> Source:
        handle = self._by_id.setdefault(passage.id, f"S{len(self._by_id) + 1}")
        url = passage.source if passage.source.startswith(("http://", "https://")) else ""
        return sources.source(handle, passage.text, title=passage.title, url=url)


def _task(row: Mapping[str, object], place: str) -> Task:
    """A question with its answers, and all else in `meta`."""
    question, answers = row.get("question"), row.get("answers", row.get("answer"))
    answers = [answers] if isinstance(answers, str) else answers
    if not (isinstance(question, str) and question.strip()):
        raise DataError(f"{place}: a row needs a question")
    if not (isinstance(answers, list) and answers and all(isinstance(a, str) for a in answers)):
        raise DataError(f"{place}: a row needs an answer, a text or a list of texts")
    nuggets = row.get("nuggets", [])
    forms = [[n] if isinstance(n, str) else n for n in nuggets] if isinstance(nuggets, list) else 0
    if forms == 0 or not all(f and all(isinstance(said, str) for said in f) for f in forms):
        raise DataError(f"{place}: nuggets must be a list of sentences, or of lists of them")
    meta = {k: v for k, v in row.items() if k not in ("question", "answer", "answers", "id")}
    return Task(str(row.get("id", place)), question.strip(), tuple(answers), meta)


def _reports(task: Task, shelf: Shelf) -> Iterator[str]:
    """Reports of shown sentences that may be perfect: at the top those that state the nuggets, or
    one with the answer; under it parts of one sentence each."""
    said = [(s, n, s.text[n.start : n.end]) for s in shelf for n in s.sentences]
    said = [place for place in said if len(content(place[2]).tokens) >= 3]
    nuggets = rewards.nuggets_of(task)
    needed = [next((p for p in said if explain.states(p[2], n, p[0].title)), None) for n in nuggets]
    if None in needed:
        return
    right = [place for place in said if contains_answer(place[2], task.answers)]
    tops = [needed[:2]] if needed else [[place] for place in right]
    for top, more in itertools.islice(itertools.product(tops, said), TRIES):
        below = [*needed[2:], *([more] if more not in needed and more not in top else [])]
        if below:
            yield _written(task.answers[0], top, below)


def _written(
    answer: str,
    top: Sequence[tuple[Source, Sentence, str]],
    below: Sequence[tuple[Source, Sentence, str]],
) -> str:
    head = " ".join(_cited(place) for place in top)
    parts = (f"## {place[0].title or 'More'}\n{_cited(place)}" for place in below)
    return "\n\n".join([f"**{answer}**: {head}", *parts])


def _cited(place: tuple[Source, Sentence, str]) -> str:
    source, sentence, text = place
    return f'<cite id="{source.id}.{sentence.number}">{text}</cite>'
