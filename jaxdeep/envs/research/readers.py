"""Reports of this and other systems from files, each with what it was shown.

    read(path)   every report in a file, whatever system wrote it

    report.json, report.md        ours
    .json, .jsonl rows            by their fields, see `READERS`
    .txt, .md with <tool_output>  a trace in the layout of DR-Tulu
    .md                           Markdown with marks `[n]`, footnotes or `<cite id>`, and a list of
                                  references at its end

Nothing is guessed in silence: what had to be assumed is in the notes of a report. A row that no
reader knows is a DataError.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxdeep.chat.formats import THOUGHTS
from jaxdeep.envs.research import conversation
from jaxdeep.envs.research import report as reports
from jaxdeep.envs.research.report import LAST, Report
from jaxdeep.envs.research.sources import Shelf, Source, normal, source
from jaxdeep.errors import DataError
from jaxdeep.types import Message, ToolCall

OWN_TEXT = "the texts of the sources are those in the report itself"
NO_TEXT = "the report names its sources and does not hold their texts"

_OUTPUT = re.compile(
    r"<(tool_output|tool_response|information)\b[^>\n]{0,200}>(.*?)(?:</\1>|\Z)", re.S
)
_SNIPPET = re.compile(
    r"""<(snippet|webpage)\s+[^<>\n]{0,200}?\bid\s*=\s*["']?([^"'>\s]{1,200})["']?[^<>\n]{0,200}>"""
)
_SNIPPET_END = re.compile(r"</(?:snippet|webpage)>")
_FIELD = re.compile(r"^(Title|URL|Url|url|title)\s*:\s*(.*)$", re.M)
_ANSWER = re.compile(r"<answer>(.*?)(</answer>|\Z)", re.S)
_LISTED = re.compile(
    r"^[ \t]{0,3}(?:[-*] )?\[(\^?[\w.:-]{1,60})\](?:\(([^)\s]{1,2000})\))?[.:]?[ \t]+(\S.*)$", re.M
)
_HEADING = re.compile(
    r"^[ \t]{0,3}(?:#{1,6}\s*)?[*_]{0,2}(?:references|sources|bibliography|works cited|citations|notes|"
    r"参考文献|参考资料|引用|来源)[*_]{0,2}\s*[:：]?[*_]{0,2}\s*$",
    re.M | re.I,
)
_URL = re.compile(r"https?://[^\s<>\"')\]]+")


def read(path: str | Path) -> list[Report]:
    """Every report in a file, in order. DataError: it cannot be read, or holds no report."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if not text.strip():
        raise DataError(f"{path} is empty")
    if path.suffix.lower() not in (".json", ".jsonl"):
        return [read_text(text)]
    found = [read_row(row, place) for place, row in _rows(text, path)]
    if not found:
        raise DataError(f"{path} holds no report")
    return found


def _rows(text: str, path: Path) -> Iterator[tuple[str, Any]]:
    """The rows of a file of JSON: of a list its members, of lines each."""
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError) as error:
        if path.suffix.lower() == ".json":
            raise DataError(f"{path} is not JSON: {error}") from error
    else:
        rows = whole if isinstance(whole, list) else [whole]
        yield from (
            (f"{path}[{n}]" if len(rows) > 1 else str(path), row) for n, row in enumerate(rows)
        )
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield f"{path}:{number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}:{number} is not JSON: {error}") from error


def read_text(text: str) -> Report:
    """The report in a text: one of ours, a trace, or Markdown."""
    if ours := reports.from_markdown(text):
        return ours
    if "<tool_output" in text or "<tool_response" in text:
        return from_trace("", text)
    return from_markdown(text)


def read_row(row: Any, place: str = "a row") -> Report:
    """The report in a row, by the first reader whose fields it has."""
    if isinstance(row, Mapping):
        for known, reader in READERS:
            if all(_at(row, field) is not None for field in known):
                return _checked(reader, row, place)
    fields = ", ".join(row) if isinstance(row, Mapping) else type(row).__name__
    ways = "; ".join(" and ".join(known) for known, _ in READERS)
    raise DataError(f"{place}: no report, found {fields:.200}. Known are rows with {ways}")


def _checked(reader: Any, row: Mapping[str, Any], place: str) -> Report:
    try:
        return reader(row)
    except DataError as error:
        raise DataError(f"{place}: {error}") from error
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"{place} is not a whole report ({reason})") from error


def _at(row: Any, field: str) -> Any:
    """What is at a path such as "full_traces.generated_text"; None where it is not there."""
    for name in field.split("."):
        row = row.get(name) if isinstance(row, Mapping) else None
    return row


# DR-Tulu: a trace is one text, in which results stand between the model's own words.


def from_trace(question: str, text: str, answer: str | None = None, id: str = "") -> Report:
    """A trace in which results are in `<tool_output>` with `<snippet id>` or `<webpage id>`, and
    the answer in `<answer>`, closed or not. Snippets outside of a result were written by the model
    and are no sources. Order is the place in the text. `answer` is taken where the trace has none;
    without either the report is empty, and its notes say so."""
    text = normal(text)
    shelf = Shelf()
    plain, last = [], 0
    for output in _OUTPUT.finditer(text):
        plain.append(text[last : output.start()])
        last = output.end()
        for snippet in _snippets(output[2], output.start()):
            shelf.add(snippet)
    plain.append(text[last:])
    blank = _OUTPUT.sub(lambda match: " " * len(match[0]), text)
    found = list(_ANSWER.finditer(blank))
    notes: tuple[str, ...] = ()
    if found:
        match = found[-1]
        answer, order = text[match.start(1) : match.end(1)], match.start()
        incomplete = not match[2]
    else:
        order, incomplete = len(text), answer is None
        said = answer if answer is not None else THOUGHTS.sub("", plain[-1]).strip()
        answer = "" if "<call_tool" in said else said
        notes = ("the trace has no <answer>",)
    if incomplete and found:
        notes = ("the answer is not closed",)
    return Report(question, answer, shelf, max(1, order), incomplete, id, notes)


def _snippets(output: str, order: int) -> Iterator[Source]:
    """The sources of a result, each with all that was shown of it."""
    openings = list(_SNIPPET.finditer(output))
    for n, opening in enumerate(openings):
        end = openings[n + 1].start() if n + 1 < len(openings) else len(output)
        close = _SNIPPET_END.search(output, opening.end(), end)
        body = output[opening.end() : close.start() if close else end].strip()
        facts = {match[1].lower(): match[2].strip() for match in _FIELD.finditer(body[:4000])}
        title, url = facts.get("title", ""), facts.get("url", "")
        if body:
            yield source(opening[2], body, order=order, title=title, url=url)


def _dr_tulu(row: Mapping[str, Any]) -> Report:
    traces = row["full_traces"]
    text = traces.get("generated_text")
    if not isinstance(text, str):
        parts = (call.get("generated_text") for call in traces["tool_calls"])
        text = "".join(part for part in parts if isinstance(part, str))
    id = str(row.get("example_id", row.get("id", "")))
    return from_trace(str(row.get("problem", "")), text, row.get("final_response"), id)


def _dr_tulu_trajectory(row: Mapping[str, Any]) -> Report:
    trajectory = row["trajectory"]
    text, answer = trajectory["interleaved_text"], trajectory.get("final_answer")
    return from_trace(str(row["question"]), text, answer, str(row.get("sample_id", "")))


def _conversation(row: Mapping[str, Any]) -> Report:
    """Messages: rollouts of ours, and OpenAI's or ShareGPT's form. Results of ours are numbered
    sentences; others' stand inside the assistant's text or are turns of their own."""
    turns = row.get("messages") or row["conversations"]
    messages = [
        Message(
            _ROLES[turn.get("role", turn.get("from"))],
            str(turn.get("content", turn.get("value")) or ""),
            calls=tuple(
                ToolCall("call") for _ in turn.get("calls") or turn.get("tool_calls") or ()
            ),
            name="tool",
        )
        for turn in turns
    ]
    questions = (m.content for m in messages if m.role == "user" and "<tool_" not in m.content)
    question, id = next(questions, ""), _id(row)
    if isinstance(task := row.get("task"), Mapping):
        question, id = str(task.get("question", question)), str(task.get("id", id))
    if len(conversation.shown(messages, ("tool",))):
        return conversation.report(question, messages, ("tool",), id)
    parts = []
    for message in messages:
        if message.role == "assistant" or "<tool_" in message.content:
            parts.append(message.content)
        elif message.role == "tool":
            parts.append(f"<tool_output>{message.content}</tool_output>")
    return from_trace(question, "\n".join(parts), id=id)


_ROLES = {role: role for role in ("system", "user", "assistant", "tool")} | {
    "human": "user",
    "gpt": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function": "tool",
}


# Sections with snippets, and answers over a list of passages.


def _sqa(row: Mapping[str, Any]) -> Report:
    """SQA-CS: sections whose citations name their snippets. The snippets are all that is known of
    a source."""
    response = row["response"]
    shelf, parts = Shelf(), []
    for section in response["sections"]:
        title = str(section.get("title") or "").strip()
        parts.append((f"## {title}\n\n" if title else "") + str(section["text"]).strip())
        for citation in section.get("citations") or ():
            id = str(citation["id"]).strip().strip("[]")
            snippets = [s for s in citation.get("snippets") or () if str(s).strip()]
            about = citation.get("title") or ""
            if not snippets:
                shelf.add(Source(id, "", (), title=str(about)))
            for snippet in snippets:
                shelf.add(source(id, str(snippet), title=str(about)))
    notes = (OWN_TEXT,)
    return Report(str(row["question"]), "\n\n".join(parts), shelf, LAST, False, _id(row), notes)


def _passages(row: Mapping[str, Any]) -> Report:
    """An answer whose marks count the passages in `ctxs`, from 0. Where none is 0 and one is their
    number, they count from 1."""
    answer, passages = str(row["output"]), row["ctxs"]
    numbers = {
        int(n) for m in re.findall(r"\[([\d,\s–-]+)\]", answer) for n in re.findall(r"\d+", m)
    }
    first = int(0 not in numbers and len(passages) in numbers)
    shelf = Shelf()
    for n, passage in enumerate(passages, start=first):
        facts = {"title": str(passage.get("title") or ""), "url": str(passage.get("url") or "")}
        shelf.add(source(str(n), str(passage["text"]), **facts))
    notes = (f"the passages are counted from {first}",)
    return Report(str(row["input"]), answer, shelf, LAST, False, _id(row), notes)


def _article(row: Mapping[str, Any]) -> Report:
    return from_markdown(str(row["article"]), str(row.get("prompt", "")), _id(row))


def _answered(row: Mapping[str, Any]) -> Report:
    return from_markdown(str(row["answer"]), str(row["question"]), _id(row))


def _id(row: Mapping[str, Any]) -> str:
    return str(row.get("id", row.get("query_id", "")))


def _run_file(row: Mapping[str, Any]) -> Report:
    """BrowseComp-Plus: the output cites documents as `[20]`, of those that were retrieved."""
    outputs = [part["output"] for part in row["result"] if part["type"] == "output_text"]
    shelf = Shelf(Source(str(id), "", ()) for id in row["retrieved_docids"])
    answer = str(outputs[-1]) if outputs else ""
    return Report("", answer, shelf, LAST, row.get("status") != "completed", _id(row), (NO_TEXT,))


def from_markdown(text: str, question: str = "", id: str = "") -> Report:
    """A report in Markdown. The list of references at its end names its sources: `[1] url - title`,
    `[1]. url`, `[^1]: url`, under a heading or not. Where `<qwen:cite>` holds a quotation, it is
    looked up and the claim is the sentence before."""
    text = re.sub(r"</?qwen:takeaway\b[^<>\n]{0,200}>\n?", "", normal(text))
    body, listed = _references(text)
    shelf = Shelf()
    for name, about in listed:
        url = match[0] if (match := _URL.search(about)) else ""
        title = re.sub(
            r"^[\s\-–—.:|]+|[\s\-–—:|]+$", "", about.replace(url, "", 1) if url else about
        )
        bare = name.removeprefix("^")
        named = f"id_{bare}" if "<qwen:cite" in body else bare
        shelf.add(Source(named, "", (), title=title, url=url))
    if "<qwen:cite" in body:
        body = _quoting(body)
    notes = (NO_TEXT,) if listed else ("the report has no list of references",)
    return Report(question, body, shelf, LAST, False, id, notes)


def _references(text: str) -> tuple[str, list[tuple[str, str]]]:
    """The text before its list of references, and the list: (id, what is said of it)."""
    lines = list(_LISTED.finditer(text))
    if not lines:
        return text, []
    headings = [m for m in _HEADING.finditer(text) if m.end() <= lines[-1].start()]
    begin = headings[-1].start() if headings else _tail(text, lines)
    if begin is None:
        return text, []
    found = [(m[1], f"{m[2] or ''} {m[3]}".strip()) for m in lines if m.start() >= begin]
    rest = _LISTED.sub("", text[begin:])
    following = [m.start() for m in re.finditer(r"^#{1,6} .*$", rest, re.M)]
    tail = rest[following[-1] :] if len(following) > 1 else ""
    return (text[:begin].rstrip() + "\n\n" + tail).strip(), found


def _tail(text: str, lines: Sequence[re.Match[str]]) -> int | None:
    """Where the list begins that ends the text without a heading; None where none does."""
    begin = None
    end = len(text)
    for line in reversed(lines):
        if text[line.end() : end].strip() or not (_URL.search(line[0]) or line[1].startswith("^")):
            break
        begin = end = line.start()
    return begin


def _quoting(text: str) -> str:
    """The text with each `<qwen:cite id="...">quotation</qwen:cite>` as a citation of the words
    before it, with that quotation."""

    def mark(match: re.Match[str]) -> str:
        quoted = match[2].strip().replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
        return f'<cite id="{match[1]}" quote="{quoted[:3000]}"/>'

    return re.sub(
        r'\s?<qwen:cite id="([^"<>\n]{1,400})">((?:(?!</?qwen:cite)[^<]|<(?!/?qwen:cite))*)</qwen:cite>',
        mark,
        text,
    )


READERS: Sequence[tuple[tuple[str, ...], Any]] = (
    (("format", "answer", "sources"), reports.from_json),
    (("full_traces.generated_text",), _dr_tulu),
    (("full_traces.tool_calls",), _dr_tulu),
    (("trajectory.interleaved_text", "question"), _dr_tulu_trajectory),
    (("question", "response.sections"), _sqa),
    (("input", "output", "ctxs"), _passages),
    (("result", "retrieved_docids"), _run_file),
    (("article",), _article),
    (("question", "answer"), _answered),
    (("messages",), _conversation),
    (("conversations",), _conversation),
)
"""The fields that a row must have, and what reads it; the first that fits does."""


def source_texts(folder: str | Path) -> dict[str, str]:
    """The texts in a folder by source id: `ID.txt` or `ID.md`. DataError for no folder, or none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"--sources={folder} is not a folder")
    found = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in (".txt", ".md") and path.is_file():
            found[path.stem] = path.read_text(encoding="utf-8", errors="replace")
    if not found:
        raise DataError(f"--sources={folder} holds no .txt or .md file, named by the source's id")
    return found
