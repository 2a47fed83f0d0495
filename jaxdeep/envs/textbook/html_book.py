"""HTML books: blocks with TeX inside, in the order of the table of contents or of the files' names.

Tags are read where they stand, so that an unclosed `<p>` needs no repair: a block ends where the
next one begins."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from pathlib import PurePosixPath

from jaxdeep.envs.textbook.files import File, Folder
from jaxdeep.envs.textbook.lines import Line, assemble
from jaxdeep.envs.textbook.schema import Book, Data

_TAG = re.compile(
    r"<!--.*?-->|<!.*?>|<(/?)([a-zA-Z][a-zA-Z0-9]*)(?=[\s/>])((?:[^<>\"']|\"[^\"]*\"|'[^']*')*)>",
    re.S,
)
_MARKER = re.compile(r"\n(?=[ \t]*\(\d{1,2}\.?\)\s)")
_BLOCKS = set(
    [
        "p",
        "div",
        "h1",
        "h2",
        "h3",
        "h4",
        "h5",
        "h6",
        "ul",
        "ol",
        "li",
        "dl",
        "dt",
        "dd",
        "table",
        "tr",
        "blockquote",
        "pre",
        "section",
        "article",
        "header",
        "footer",
        "main",
        "aside",
        "figure",
        "figcaption",
        "center",
        "note",
        "form",
        "address",
        "nav",
        "hr",
        "body",
        "title",
    ]
)
_EMPHASIS = {"em", "i", "b", "strong"}
_HIDDEN = {"script", "style", "head", "noscript", "template"}
_BY = "html_book.blocks"


def found(folder: Folder) -> bool:
    """Whether the folder holds HTML."""
    return bool(folder.names(".html", ".htm", ".xhtml"))


def read(folder: Folder) -> Data:
    """The pages of the folder as one book."""
    names = _ordered(folder)
    first = folder.file(names[0])
    title = next(
        (
            html.unescape(re.sub(r"<[^>]+>", "", m[1])).strip()
            for name in names
            if (m := re.search(r"<title>(.*?)</title>", folder.file(name).text, re.S | re.I))
        ),
        "",
    )
    title = title.rpartition("|")[2].strip() or title
    language = re.search(r"<html[^>]*\blang=[\"']?([a-zA-Z-]+)", first.text)
    data = Data(
        Book(folder.root.name, title, language=language[1] if language else "en", profile="html")
    )
    data.content += [folder.file(name).span(0, len(folder.file(name).text)) for name in names]
    lines = (line for name in names for line in blocks(folder.file(name)))
    assemble(data, lines, _BY)
    return data


def _ordered(folder: Folder) -> list[str]:
    """The pages in the order in which the index links to them; others by their names, numbers as
    numbers."""
    names = sorted(folder.names(".html", ".htm", ".xhtml"), key=_natural)
    index = next((name for name in names if PurePosixPath(name).stem == "index"), None)
    if index is None:
        return names
    base = PurePosixPath(index).parent
    linked = [
        str(base / target)
        for target in re.findall(r"href=[\"']([^\"'#]+)", folder.file(index).text)
    ]
    order = [name for name in dict.fromkeys(linked) if name in names and name != index]
    return [index, *order, *(name for name in names if name not in order and name != index)]


def _natural(name: str) -> list:
    return [
        (0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name)
    ]


def blocks(file: File) -> Iterator[Line]:
    """The blocks of a page: text with `*` around emphasis, `[image: alt]` for images."""
    builder = _Builder(file)
    hidden = ""
    at = 0
    for match in _TAG.finditer(file.text):
        if not hidden:
            yield from _texts(builder, at, match.start())
        at = match.end()
        name = (match[2] or "").lower()
        if hidden:
            hidden = "" if match[1] and name == hidden else hidden
            continue
        if name in _HIDDEN and not match[1]:
            hidden = name
            continue
        if name in _BLOCKS or name == "br":
            line = builder.flush()
            if line:
                yield line
        if name == "hr":
            yield Line("", file, match.start(), match.end(), rule=True)
        builder.tag(name, bool(match[1]), match[3] or "", match.start(), match.end())
    yield from _texts(builder, at, len(file.text))
    line = builder.flush()
    if line:
        yield line


def _texts(builder: _Builder, start: int, end: int) -> Iterator[Line]:
    """The text between two tags. A line of the source that begins with a marker begins a line here
    too: some books forget the tag."""
    text = builder.file.text
    for match in _MARKER.finditer(text, start, end):
        builder.text(text[start : match.start()], start)
        line = builder.flush()
        if line:
            yield line
            builder.apart = False
        start = match.start()
    builder.text(text[start:end], start)


class _Builder:
    def __init__(self, file: File) -> None:
        self.file = file
        self.level, self.emphasis, self.apart = 0, 0, True
        self.reset()

    def reset(self) -> None:
        self.pieces: list[str] = []
        self.start = self.end = -1
        self.outside = False

    def text(self, text: str, at: int) -> None:
        if text.strip():
            stripped = len(text) - len(text.lstrip())
            if self.start < 0:
                self.start = at + stripped
            self.end = at + len(text.rstrip())
            self.outside |= not self.emphasis and bool(re.search(r"\w", text))
        self.pieces.append(html.unescape(text))

    def tag(self, name: str, closing: bool, attributes: str, start: int, end: int) -> None:
        if re.fullmatch(r"h[1-6]", name):
            self.level = 0 if closing else int(name[1])
        elif name in _EMPHASIS:
            self.emphasis = max(0, self.emphasis + (-1 if closing else 1))
            self.pieces.append("*")
        elif name in ("sup", "sub") and not closing:
            self.pieces.append("^{" if name == "sup" else "_{")
        elif name in ("sup", "sub"):
            self.pieces.append("}")
        elif name in ("td", "th") and not closing:
            self.pieces.append(" | ")
        elif name == "img":
            alt = re.search(r"alt=(?:\"([^\"]*)\"|'([^']*)')", attributes)
            words = html.unescape((alt[1] or alt[2] or "") if alt else "").strip()
            self.pieces.append(
                f" [image: {words.replace('[', '(').replace(']', ')') or 'no description'}] "
            )
            self.start = start if self.start < 0 else self.start
            self.end = end
        if name in _BLOCKS:
            self.apart = True
            self.emphasis = 0 if name in ("p", "div", "hr") else self.emphasis
        elif name == "br":
            self.apart = False

    def flush(self) -> Line | None:
        text = re.sub(r"\s+", " ", "".join(self.pieces)).strip()
        line = None
        if self.start >= 0 and text.strip("* |"):
            emphasised = "*" in text and not self.outside
            line = Line(text, self.file, self.start, self.end, self.level, emphasised, self.apart)
        self.reset()
        return line
