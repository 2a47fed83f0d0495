"""An independent check that every field says what the files say where its spans point.

It reads the bytes again, takes markup out by rules of its own, and compares the sequence of letters
and digits with the field's: equal, in order. It shares no code with the readers. Taken out on both
sides are names of commands, Greek letters (which formulas write as commands) and marks of images;
on the field's side also what its origin says was added."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator

from jaxdeep.envs.textbook.files import File, Folder
from jaxdeep.envs.textbook.schema import Data, Item, Origin, Section

FIELDS = ("text", "question", "reasoning", "answer")

# Names of functions are words of the formula and stay, whether written with a backslash or not.
_KEPT = "sin|cos|tan|sec|csc|cot|arcsin|arccos|arctan|sinh|cosh|tanh|ln|log|lim|exp|max|min|det|gcd"
_COMMAND = re.compile(rf"\\(?!(?:{_KEPT})(?![A-Za-z]))[A-Za-z]+\*?")
_FUNCTION = re.compile(rf"\\(?=(?:{_KEPT})(?![A-Za-z]))")
_BEGIN = re.compile(r"\\(?:begin|end)\s*\{[^{}]*\}")
_IMAGE = re.compile(r"\[image:[^\]]*\]")
_GREEK = re.compile("[Α-Ωα-ωϑϕϖϱϵ]")
_TAG = re.compile(
    r"<!--.*?-->|<!\[CDATA\[(.*?)\]\]>|<\?.*?\?>|<!.*?>|<(/?)([\w:.-]+)((?:[^<>\"']|\"[^\"]*\"|'[^']*')*?)(/?)>",
    re.S,
)
_TEX_COMMENT = re.compile(
    r"\\begin *\{(verbatim\*?|lstlisting|Verbatim|minted|alltt)\}[\s\S]*?\\end *\{\1\}"
    r"|\\verb\*?([^\sA-Za-z*])[\s\S]*?\2|(?<!\\)((?:\\\\)*)%[^\n]*"
)
_TEX_SKIPPED = re.compile(
    r"\\iffalse(?![A-Za-z])[\s\S]*?\\fi(?![A-Za-z])|\\begin *\{comment\}[\s\S]*?\\end *\{comment\}"
)
_DROPPED = {"annotation", "annotation-xml"}
_SILENT = re.compile(
    r"\\(?:label|ref|pageref|eqref|autoref|index|cite[a-z]*|nocite|vspace|hspace|input|include|vref"
    r"|includegraphics|pagestyle|thispagestyle|setcounter|addtocounter|stepcounter|bibliography"
    r"|addcontentsline|phantomsection|footnotemark|graphicspath|pgfplotsset|tikzset)\*?"
    r"(?:\s*\[[^\[\]]*\])*(?:\s*\{(?:[^{}]|\{[^{}]*\})*\})*"
)


def failures(data: Data, folder: Folder) -> list[str]:
    """What fails, an entry a field: its item, its name, and where it first differs."""
    return [f"{row.id}.{name}: {why}" for row, name, why in _failures(data, folder)]


def checked(data: Data) -> int:
    """The number of fields with text, all of which `failures` compares."""
    return sum(1 for _ in _fields(data))


def _fields(data: Data) -> Iterator[tuple[Section | Item, str, str]]:
    for row in (*data.sections, *data.items):
        for name in FIELDS:
            text = getattr(row, name, "")
            if text:
                yield row, name, text


def _failures(data: Data, folder: Folder) -> Iterator[tuple[Section | Item, str, str]]:
    for row, name, text in _fields(data):
        why = failure(text, row.spans.get(name), folder)
        if why:
            yield row, name, why


def failure(text: str, origin: Origin | None, folder: Folder) -> str:
    """Why a field is not what its spans say; "" where it is."""
    if origin is None or not origin.spans:
        return "no span"
    source = ""
    for span in origin.spans:
        file = folder.file(span.file)
        if not 0 <= span.start <= span.end <= len(file.data):
            return f"{span.file} has no bytes {span.start} to {span.end}"
        source += letters_of_source(file, span.start, span.end)
    for start, end in sorted(origin.added, reverse=True):
        if not 0 <= start <= end <= len(text):
            return f"it has no characters {start} to {end}"
        text = text[:start] + " " + text[end:]
    field = letters(_IMAGE.sub(" ", text), markup=True)
    if field == source:
        return ""
    at = next(
        (n for n, (a, b) in enumerate(zip(field, source, strict=False)) if a != b),
        min(len(field), len(source)),
    )
    return f"{field[at : at + 30]!r} stands where the source has {source[at : at + 30]!r}"


def letters(text: str, *, markup: bool) -> str:
    """The letters and digits of a text in order; with `markup`, without commands of LaTeX."""
    if markup:
        text = _BEGIN.sub(" ", text)
        text = _SILENT.sub(" ", text)
        text = _FUNCTION.sub(" ", text)
        text = _COMMAND.sub(" ", text)
    return "".join(filter(str.isalnum, _GREEK.sub("", text)))


def letters_of_source(file: File, start: int, end: int) -> str:
    """The letters and digits of some bytes of a file, read by what its name says it is."""
    text = file.data[start:end].decode(file.encoding, "surrogateescape")
    kind = file.name.rpartition(".")[2].lower()
    if kind in ("cnxml", "xml", "html", "htm", "xhtml"):
        return letters(_IMAGE.sub(" ", _untagged(text)), markup=kind.startswith("h"))
    if kind in ("tex", "ltx", "sty"):
        text = _TEX_COMMENT.sub(lambda m: m[0] if m[3] is None else m[3], text)
        text = _TEX_SKIPPED.sub(" ", text)
        return letters(text, markup=True)
    if kind in ("md", "markdown"):
        return letters(re.sub(r"!\[[^\]]*\]\([^)]*\)", " ", text), markup=True)
    return letters(_IMAGE.sub(" ", text), markup=True)


def _untagged(text: str) -> str:
    """The text between tags, with entities written out; the index of a root before what is under
    it, as formulas are written."""
    text = re.sub(r"<(script|style)\b.*?</\1\s*>", " ", text, flags=re.S | re.I)
    stack: list[list[str]] = [[]]
    names: list[str] = [""]
    at = 0
    for match in _TAG.finditer(text):
        stack[-1].append(html.unescape(text[at : match.start()]))
        at = match.end()
        if match[1] is not None:
            stack[-1].append(match[1])
        name = (match[3] or "").rpartition(":")[2].lower()
        if not name or match[5]:
            continue
        if not match[2]:
            if name in ("mroot", *_DROPPED) or (len(names) > 1 and names[-1] == "mroot"):
                stack.append([])
                names.append(name)
            elif names[-1]:
                names.append("=" + name)
        elif names[-1] == "=" + name:
            names.pop()
        elif names[-1] == name and len(stack) > 1:
            inside = stack.pop()
            names.pop()
            joined = [] if name in _DROPPED else inside
            if name == "mroot":
                pieces = [piece for piece in inside if piece.strip()]
                joined = pieces[::-1] if len(pieces) == 2 else pieces
            stack[-1].append("".join(joined))
    stack[-1].append(html.unescape(text[at:]))
    return "".join("".join(level) for level in stack)
