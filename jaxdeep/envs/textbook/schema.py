"""A book as data: its sections, worked examples and exercises, each with where it stands in the
files.

A file of JSON lines has one `book`, then its sections and items, each an object with `"v": 1` and
its `type`. `read` and `write` also know the older form of one chapter, `{chapter_name,
chapter_text, example_problems, exercises}`."""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from jaxdeep.errors import DataError
from jaxdeep.workdir import write_atomic

VERSION = 1

Made = Literal["verbatim", "rendered", "expanded", "joined"]


@dataclasses.dataclass(frozen=True)
class Span:
    """Bytes `start` to `end` of a file; `file` is its path inside the book's folder."""

    file: str
    start: int
    end: int


@dataclasses.dataclass(frozen=True)
class Origin:
    """How a field came from the files: the spans in the field's order, what was done with them, by
    which function, and where (start and end, in characters of the field) texts stand that the spans
    do not have, such as "Example 2.3" for a link without text."""

    made: Made
    spans: tuple[Span, ...]
    by: str = ""
    added: tuple[tuple[int, int], ...] = ()


@dataclasses.dataclass(frozen=True)
class Part:
    """One part of an item, with its label as printed: "a"."""

    label: str
    question: str = ""
    answer: str = ""


@dataclasses.dataclass(frozen=True)
class Book:
    """What the book is. `licence` is an SPDX identifier, "" where none was found; `sha256` is of
    all files read, in order of their names; `profile` names the rules that were used."""

    id: str
    title: str = ""
    authors: tuple[str, ...] = ()
    licence: str = ""
    licence_url: str = ""
    source: str = ""
    sha256: str = ""
    language: str = "en"
    profile: str = ""


@dataclasses.dataclass
class Section:
    """A section's text, without its examples and exercises. `number` is as printed, `order` counts
    all sections of the book from 0."""

    id: str
    chapter: str
    number: str
    title: str
    order: int
    text: str = ""
    spans: dict[str, Origin] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Item:
    """A worked example or an exercise. `final` is the short answer to grade, "" where there is
    none; items of one `group` are twins, equal but for their numbers, and share a `split`."""

    id: str
    kind: Literal["example", "exercise"]
    section: str
    number: str = ""
    role: str = ""
    question: str = ""
    reasoning: str = ""
    answer: str = ""
    parts: list[Part] = dataclasses.field(default_factory=list)
    answer_kind: str = "none"
    final: str = ""
    needs_image: bool = False
    depends_on: list[str] = dataclasses.field(default_factory=list)
    group: str = ""
    flags: list[str] = dataclasses.field(default_factory=list)
    split: str = ""
    spans: dict[str, Origin] = dataclasses.field(default_factory=dict)
    instruction: str = ""  # what the question shares with its neighbours, and begins with


@dataclasses.dataclass
class Data:
    """A book with all that was found in it. `notes` are what a reader met on the way: missing
    files, broken markup, by name. `content` are the parts of the files that a field should hold,
    `dropped` what in them is left out on purpose, such as the heading "Solution"."""

    book: Book
    sections: list[Section] = dataclasses.field(default_factory=list)
    items: list[Item] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    content: list[Span] = dataclasses.field(default_factory=list)
    dropped: list[Span] = dataclasses.field(default_factory=list)


_TYPES = {"book": Book, "section": Section, "item": Item}


def lines(data: Data) -> list[dict[str, Any]]:
    """The objects of the file, in order: book, sections, items."""
    rows: list[Any] = [data.book, *data.sections, *data.items]
    names = {cls: name for name, cls in _TYPES.items()}
    return [{"v": VERSION, "type": names[type(row)], **dataclasses.asdict(row)} for row in rows]


def write(path: Path, data: Data) -> None:
    """Write the file of JSON lines, in one step."""
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in lines(data)))


def read(path: Path) -> Data:
    """The book in a file of JSON lines, or in a file of the older form. DataError names the line
    and the key that is wrong."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    stripped = text.lstrip()
    if stripped.startswith("[") or _is_chapter(stripped):
        return _of_chapters(_json(text, path), path)
    found: dict[str, list[Any]] = {name: [] for name in _TYPES}
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            row = _json(line, f"{path}:{number}")
            cls = _TYPES.get(row.pop("type", "")) if isinstance(row, dict) else None
            if cls is None or row.pop("v", None) != VERSION:
                raise DataError(f"{path}:{number} is no book, section or item of version {VERSION}")
            found[_name(cls)].append(_typed(cls, row, f"{path}:{number}"))
    if len(found["book"]) != 1:
        raise DataError(f"{path} has {len(found['book'])} books; expected one")
    return Data(found["book"][0], found["section"], found["item"])


def _name(cls: type) -> str:
    return next(name for name, other in _TYPES.items() if other is cls)


def _json(text: str, where: Any) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON: {error}") from error


def _typed(hint: Any, value: Any, where: str) -> Any:
    """The value as the dataclass, list, tuple or dict of an annotation."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise DataError(f"{where}: {value!r:.60} is no object")
        hints = typing.get_type_hints(hint)
        unknown = value.keys() - hints.keys()
        if unknown:
            raise DataError(f"{where}: unknown keys {', '.join(sorted(unknown))}")
        try:
            return hint(**{k: _typed(hints[k], v, f"{where}: {k}") for k, v in value.items()})
        except TypeError as error:
            raise DataError(f"{where}: {error}") from error
    if origin is tuple and isinstance(value, list) and args[-1] is not Ellipsis:
        if len(value) != len(args):
            raise DataError(f"{where}: {value!r:.60} has not {len(args)} elements")
        return tuple(_typed(arg, one, where) for arg, one in zip(args, value, strict=True))
    if origin in (list, tuple) and isinstance(value, list):
        return origin(_typed(args[0], element, where) for element in value)
    if origin is dict and isinstance(value, dict):
        return {key: _typed(args[1], element, where) for key, element in value.items()}
    if origin is Literal:
        if value not in args:
            raise DataError(f"{where}: {value!r} is none of {', '.join(map(repr, args))}")
    elif not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise DataError(f"{where}: {value!r:.60} is no {hint.__name__}")
    return value


# The older form: one chapter, or a list of chapters.


def _is_chapter(text: str) -> bool:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(row, dict) and "chapter_text" in row


def _of_chapters(rows: Any, path: Path) -> Data:
    rows = rows if isinstance(rows, list) else [rows]
    data = Data(Book(path.stem, title=path.stem, profile="chapters"))
    for order, row in enumerate(rows):
        if not isinstance(row, dict) or not isinstance(row.get("chapter_text"), str):
            raise DataError(f"{path}[{order}] has no chapter_text")
        number, title = str(order + 1), str(row.get("chapter_name", ""))
        section = Section(f"s{number}", title, number, title, order, row["chapter_text"])
        data.sections.append(section)
        for kind, key in (("example", "example_problems"), ("exercise", "exercises")):
            for index, problem in enumerate(row.get(key, ()), 1):
                if not isinstance(problem, dict) or not isinstance(problem.get("question"), str):
                    raise DataError(f"{path}[{order}].{key}[{index - 1}] has no question")
                item = Item(f"{section.id}-{kind}-{index}", kind, section.id, str(index))
                item.question = problem["question"]
                item.reasoning = str(problem.get("reasoning", ""))
                item.answer = str(problem.get("answer", ""))
                data.items.append(item)
    return data


def chapters(data: Data) -> list[dict[str, Any]]:
    """The book in the older form, an object a chapter: texts of its sections joined, examples with
    reasoning and answer, exercises with answer."""
    out = []
    for name, sections in _by_chapter(data.sections).items():
        ids = {section.id for section in sections}
        items = [item for item in data.items if item.section in ids]
        out.append(
            {
                "chapter_name": name,
                "chapter_text": "\n\n".join(section.text for section in sections if section.text),
                "example_problems": [
                    {"question": item.question, "reasoning": item.reasoning, "answer": item.answer}
                    for item in items
                    if item.kind == "example"
                ],
                "exercises": [
                    {"question": item.question, "answer": item.answer}
                    for item in items
                    if item.kind == "exercise"
                ],
            }
        )
    return out


def _by_chapter(sections: Iterable[Section]) -> dict[str, list[Section]]:
    out: dict[str, list[Section]] = {}
    for section in sections:
        out.setdefault(section.chapter, []).append(section)
    return out
