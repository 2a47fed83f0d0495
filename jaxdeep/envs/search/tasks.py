"""The task set `search`: your questions over your corpus, answered with one BM25 search tool."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from jaxdeep.envs import qa
from jaxdeep.errors import ConfigError, DataError
from jaxdeep.settings import AtLeast, section
from jaxdeep.tools import corpus
from jaxdeep.tools.bm25 import BM25
from jaxdeep.types import Task

ANSWERS = ("answer", "answers", "golden_answers", "answer_aliases")


@section
class Search:
    """The task set `search`: questions of yours over a corpus of yours."""

    corpus: Annotated[str, "a file or folder of Markdown, text or JSONL"] = ""
    questions: Annotated[str, "a JSONL file"] = ""
    k: Annotated[int, AtLeast(1), "passages that a search shows: the best ones"] = 5
    k1: Annotated[
        float, AtLeast(0), "of BM25: how much a word that is repeated in a passage counts"
    ] = 1.5
    cache: Annotated[int, AtLeast(0), "answers of the engine kept for whoever asks the same"] = 0
    chunk: Annotated[int, AtLeast(1), "characters of a passage, at most"] = 1000
    system: Annotated[str, "the system prompt; empty: none"] = qa.SYSTEM

    def __post_init__(self) -> None:
        if not (self.corpus and self.questions):
            raise ConfigError(
                f"the task set search needs env.corpus={self.corpus!r} and "
                f"env.questions={self.questions!r}: set both to files of yours, or env.taskset to "
                "another task set"
            )

    def load(self) -> qa.SearchTaskset:
        """Reads both files and builds the index. DataError where one of them cannot be used."""
        questions = read_questions(self.questions)
        documents = corpus.read_corpus(self.corpus)
        passages = [p for document in documents for p in corpus.chunk(document, self.chunk)]
        engine = BM25(passages, k1=self.k1)
        return qa.SearchTaskset(questions, engine, k=self.k, system=self.system, cache=self.cache)


def read_questions(path: str | Path) -> list[Task]:
    """The questions of a .jsonl file (or of the list in a .json file), in order.

    A row has `question`, its right answers as a text or a list in `answer`, `answers`,
    `golden_answers` or `answer_aliases`, and optionally `id`; all else goes to the task's `meta`.
    An id that was there before gets a number. DataError: no question, no answer, an empty file."""
    tasks: list[Task] = []
    seen: dict[str, int] = {}
    path = Path(path)
    for place, row in corpus.read_rows(path):
        question = row.get("question")
        if not isinstance(question, str) or not question.strip():
            raise DataError(f"{place}: a row needs a question")
        id = str(row.get("id", f"{path.stem}-{len(tasks)}"))
        seen[id] = seen.get(id, 0) + 1
        unique = id if seen[id] == 1 else f"{id}/{seen[id]}"
        meta = {k: v for k, v in row.items() if k not in ("id", "question", *ANSWERS)}
        tasks.append(Task(unique, question.strip(), _answers(row, place), meta))
    if not tasks:
        raise DataError(f"{path} holds no question")
    return tasks


def _answers(row: Mapping[str, Any], place: str) -> tuple[str, ...]:
    """The right answers of a row, each once."""
    found: list[str] = []
    for field in ANSWERS:
        value = row.get(field) or []
        found += value if isinstance(value, list) else [value]
    if not all(isinstance(answer, str | int | float) for answer in found):
        raise DataError(f"{place}: an answer must be a text, found {found}")
    answers = tuple(dict.fromkeys(said for answer in found if (said := str(answer).strip())))
    if not answers:
        raise DataError(f"{place}: a question without an answer (looked for {', '.join(ANSWERS)})")
    return answers
