"""The task set `search`: your questions over your corpus, answered with one BM25 search tool."""

from __future__ import annotations

import collections
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from jaxdeep.console import say
from jaxdeep.envs import qa
from jaxdeep.errors import ConfigError, DataError
from jaxdeep.files import read_rows
from jaxdeep.settings import AtLeast, section
from jaxdeep.tools import corpus
from jaxdeep.tools.bm25 import BM25
from jaxdeep.types import Task, answer_text

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
        left_out: collections.Counter[str] = collections.Counter()
        documents = corpus.read_corpus(self.corpus, left_out)
        if left_out:
            said = ", ".join(f"{count} {what}" for what, count in sorted(left_out.items()))
            say(f"env.corpus={self.corpus}: {len(documents)} documents; left out: {said}")
        passages = [p for document in documents for p in corpus.chunk(document, self.chunk)]
        engine = BM25(passages, k1=self.k1)
        return qa.SearchTaskset(questions, engine, k=self.k, system=self.system, cache=self.cache)


def read_questions(path: str | Path) -> list[Task]:
    """The questions of a .jsonl file (or of the list in a .json file), in order.

    A row has `question`, its right answers in `answer`, `answers`, `golden_answers` or
    `answer_aliases`, and optionally `id`; all else goes to the task's `meta`. Answers are a text, a
    number or a list of them, also as JSON text where the field's name is a plural. An id that was
    there before gets a number. DataError: no question, no answer, an empty file."""
    tasks: list[Task] = []
    seen: dict[str, int] = {}
    path = Path(path)
    for place, row in read_rows(path):
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
    found: list[Any] = []
    for field in ANSWERS:
        value = row.get(field)
        if field != ANSWERS[0] and isinstance(value, str) and value.lstrip().startswith("["):
            value = _list(value)
        found += value if isinstance(value, list) else [] if value is None else [value]
    try:
        answers = tuple(dict.fromkeys(said for x in found if (said := answer_text(x).strip())))
    except DataError as error:
        raise DataError(f"{place}: {error}") from error
    if not answers:
        raise DataError(f"{place}: a question without an answer (looked for {', '.join(ANSWERS)})")
    return answers


def _list(text: str) -> Any:
    """The list that a text writes in JSON, else the text: an answer may begin with a bracket."""
    try:
        return json.loads(text)
    except ValueError:
        return text
