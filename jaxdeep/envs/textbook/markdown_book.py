"""Markdown and plain text: headings, bold markers, lists of exercises and answers."""

from __future__ import annotations

import re
from collections.abc import Iterator

from jaxdeep.envs.textbook.files import File, Folder
from jaxdeep.envs.textbook.lines import Line, assemble
from jaxdeep.envs.textbook.schema import Book, Data

_BY = "markdown_book.lines"
_ATX = re.compile(r" {0,3}(#{1,6})\s+(.*?)\s*#*\s*$")
_FENCE = re.compile(r" {0,3}(```+|~~~+)")
_RULE = re.compile(r" {0,3}([-*_])(?:\s*\1){2,}\s*$")
_PLAIN_HEADING = re.compile(
    r"(?:chapter\s+\d+\b.*|(?:exercises?|answers?|solutions|practice|problems)(?:\s+(?:to|for)?\s*[\w.]+){0,4}|\d+\.\d+\s+[A-Z][^.]{2,60}|answer key)\s*:?\s*$",
    re.I,
)
_IMAGE = re.compile(r"!\[([^\]]*)\]\([^)]*\)")


def found(folder: Folder) -> bool:
    """Whether the folder holds Markdown or plain text."""
    return bool(folder.names(".md", ".markdown", ".txt"))


def read(folder: Folder) -> Data:
    """The files of the folder as one book, in the order of their names; READMEs and licences beside
    other files are none."""
    names = folder.names(".md", ".markdown", ".txt")
    kept = [
        n
        for n in names
        if not re.match(r"(?:readme|licen[cs]e|copying|contributing)\b", n.rpartition("/")[2], re.I)
    ]
    names = kept or names
    title = next(
        (
            m[2]
            for name in names
            for line in folder.file(name).text.splitlines()
            if (m := _ATX.match(line)) and len(m[1]) == 1
        ),
        "",
    )
    data = Data(
        Book(
            folder.root.name if not folder.only else folder.only.partition(".")[0],
            title,
            profile="markdown",
        )
    )
    data.content += [folder.file(name).span(0, len(folder.file(name).text)) for name in names]
    assemble(data, (line for name in names for line in lines(folder.file(name))), _BY)
    return data


def lines(file: File) -> Iterator[Line]:
    """The lines of a file: headings of both kinds, and in plain text also a line that can only be
    one; code stays as it is."""
    at, apart, fence = 0, True, ""
    plain = file.name.lower().endswith(".txt")
    rows = file.text.splitlines(keepends=True)
    for number, row in enumerate(rows):
        start, at = at, at + len(row)
        text = row.rstrip()
        if fence or _FENCE.match(text):
            mark = _FENCE.match(text)
            if mark:
                fence = "" if fence and mark[1].startswith(fence[:3]) else fence or mark[1]
            yield Line(text, file, start, start + len(text), apart=apart)
            apart = False
            continue
        if not text.strip():
            apart = True
            continue
        after = rows[number + 1].strip() if number + 1 < len(rows) else ""
        heading = _ATX.match(text)
        level = len(heading[1]) if heading else 0
        if not heading and apart and re.fullmatch(r"=+|-{3,}", after) and not _RULE.match(text):
            level = 1 if after[0] == "=" else 2
        underline = number and re.fullmatch(r"=+|-{3,}", text.strip()) and rows[number - 1].strip()
        if underline or (_RULE.match(text) and not level):
            yield Line("", file, start, start + len(text), rule=not underline)
            continue
        if plain and not level and apart and not after and _PLAIN_HEADING.match(text.strip()):
            level = 1 if text.strip().lower().startswith("chapter") else 2
        shown = heading[2] if heading else text.strip()
        shown = _IMAGE.sub(lambda m: f"[image: {m[1] or 'no description'}]", shown)
        emphasised = bool(re.fullmatch(r"(\*\*|__|\*|_)[^*_]+\1[.:]?", shown))
        begin = start + len(row) - len(row.lstrip())
        yield Line(shown, file, begin, start + len(text), level, emphasised, apart)
        apart = False
