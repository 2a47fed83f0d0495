"""A LaTeX book as one text in reading order, that knows where each character stands.

Files are included where the book includes them, through macros of its own too, inside its folder
only. Comments become spaces of equal length, so that places stay. Nothing is executed: macros
without arguments are replaced by the text that was last defined before, everything else is left as
it is."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import PurePosixPath

from jaxdeep.envs.textbook.fields import Field
from jaxdeep.envs.textbook.files import File, Folder
from jaxdeep.envs.textbook.schema import Span

DEEPEST = 20  # files that include each other, and macros inside macros

_COMMENT = re.compile(
    r"\\begin\s*\{(?P<name>verbatim\*?|lstlisting|Verbatim|minted|alltt)\}.*?\\end\s*\{(?P=name)\}"
    r"|\\verb\*?(?P<mark>[^\sA-Za-z*]).*?(?P=mark)"
    r"|(?<!\\)(?P<before>(?:\\\\)*)(?P<comment>%[^\n]*)",
    re.S,
)
_SKIPPED = re.compile(
    r"\\begin\s*\{comment\}.*?\\end\s*\{comment\}|\\iffalse(?![A-Za-z]).*?\\fi(?![A-Za-z])", re.S
)
_INCLUDE = re.compile(r"\\(input|include|subfile)(?![A-Za-z])\s*(?:\{([^{}]*)\}|([^\s{}\\]+))")
_DEFINE = re.compile(
    r"\\(?:(?:re)?newcommand|providecommand|DeclareRobustCommand)\*?\s*(?:\{\s*\\([A-Za-z@]+)\s*\}|\\([A-Za-z@]+))"
    r"\s*(?:\[(\d)\])?\s*(?:\[[^\[\]]*\]\s*)?(?=\{)"
    r"|\\[gex]?def\s*\\([A-Za-z@]+)\s*((?:#\d)*)(?=\{)"
)
_ENVIRONMENT = re.compile(
    r"\\(?:re)?newenvironment\*?\s*\{([A-Za-z@*]+)\}\s*(?:\[(\d)\])?\s*(?:\[[^\[\]]*\]\s*)?(?=\{)"
)
_THEOREM = re.compile(
    r"\\newtheorem\*?\s*\{([A-Za-z@*]+)\}\s*(?:\[(\w+)\])?\s*\{([^{}]*)\}\s*(?:\[(\w+)\])?"
)
_SILENT = re.compile(
    r"\\(?:label|index|cite[a-z]*|nocite|vspace|hspace|footfullcite|pagestyle|thispagestyle|setcounter"
    r"|addtocounter|stepcounter|addcontentsline|phantomsection|footnotemark|setlength|addvspace)\*?(?![A-Za-z])"
)
_OPAQUE = re.compile(r"\\(?:ref|pageref|eqref|autoref|vref|includegraphics)\*?(?![A-Za-z])")
_BRACE = re.compile(r"[{}\\]")


class Source:
    """`text` is the whole book; `notes` says what could not be read. `macros` has the definitions
    of macros without arguments, by name: (where it ends, body's start, body's end), in reading
    order. `aliases` are environments and macros that stand for a heading: name -> (level,
    argument)."""

    def __init__(self, folder: Folder, root: str) -> None:
        self.folder, self.notes = folder, []
        self._starts: list[int] = []
        self._pieces: list[tuple[File, int]] = []
        self._length = 0
        self._texts: list[str] = []
        self.including: dict[str, str] = {}  # macros whose body includes files: name -> body
        self._include(root, ())
        self.text = "".join(self._texts)
        self.macros: dict[str, list[tuple[int, int, int]]] = {}
        self.defined: list[tuple[int, int]] = []  # ranges of definitions: no text of the book
        self.bodies: dict[str, str] = {}  # of environments and macros with arguments
        self.theorems: dict[
            str, tuple[str, str]
        ] = {}  # environment -> (printed name, counter's parent)
        self._define()

    # files

    def _include(self, name: str, stack: tuple[str, ...]) -> None:
        file = self.folder.file(name)
        text = blanked(file.text)
        at = 0
        for match in self._includes(text):
            start, end, targets = match
            if start < at:
                continue
            self._append(file, text, at, start)
            at = end
            for target in targets:
                self._included(target, name, stack)
        self._append(file, text, at, len(text))

    def _includes(self, text: str) -> Iterator[tuple[int, int, list[str]]]:
        """(start, end, names) of each command that includes files, definitions of such commands
        left out and remembered."""
        skipped = []
        for match in _DEFINE.finditer(text):
            body = group(text, match.end())
            if body and (_INCLUDE.search(text[body[0] : body[1]])):
                self.including[match[1] or match[2] or match[4]] = text[body[0] : body[1]]
                skipped.append((match.start(), body[1] + 1))
        for match in re.finditer(r"\\([A-Za-z@]+)", text):
            if any(start <= match.start() < end for start, end in skipped):
                continue
            found = _INCLUDE.match(text, match.start())
            if found:
                yield match.start(), found.end(), [(found[2] or found[3] or "").strip()]
            elif match[1] in self.including:
                arguments, end = groups(text, match.end())
                body = self.including[match[1]]
                for number, argument in enumerate(arguments, 1):
                    body = body.replace(f"#{number}", text[slice(*argument)])
                names = [(m[2] or m[3] or "").strip() for m in _INCLUDE.finditer(body)]
                yield match.start(), end, names

    def _included(self, target: str, by: str, stack: tuple[str, ...]) -> None:
        if target.startswith(("/", "~", "|")) or ".." in PurePosixPath(target).parts:
            self.notes.append(f"{by}: \\input{{{target}}} leads out of the book's folder: not read")
            return
        found = self._find(target, by)
        if found is None:
            self.notes.append(f"{by}: \\input{{{target}}}: the file is missing")
        elif found in stack or len(stack) >= DEEPEST:
            self.notes.append(f"{by}: \\input{{{target}}} includes itself: not read again")
        else:
            self._include(found, (*stack, found))

    def _find(self, target: str, by: str) -> str | None:
        folders = ("", f"{PurePosixPath(by).parent}/" if "/" in by else "")
        generated = target.removesuffix("-lang") if target.endswith("-lang") else None
        for name in filter(None, (target, generated)):
            for folder in dict.fromkeys(folders):
                for suffix in ("", ".tex", ".ltx"):
                    path = str(PurePosixPath(folder + name + suffix))
                    if path.lower().endswith((".tex", ".ltx", ".sty")) and self.folder.inside(path):
                        if name != target:
                            self.notes.append(f"{target} is generated from {path}, which is read")
                        return path
        return None

    def _append(self, file: File, text: str, start: int, end: int) -> None:
        if end > start:
            self._starts.append(self._length)
            self._pieces.append((file, start))
            self._texts.append(text[start:end])
            self._length += end - start

    def spans(self, start: int, end: int) -> list[Span]:
        """Where the characters from `start` to `end` stand in the files."""
        out = []
        number = bisect_right(self._starts, start) - 1
        while start < end:
            limit = self._starts[number + 1] if number + 1 < len(self._starts) else self._length
            file, offset = self._pieces[number]
            begin = offset + start - self._starts[number]
            stop = min(end, limit)
            out.append(file.span(begin, begin + stop - start))
            start, number = stop, number + 1
        return out

    # definitions

    def _define(self) -> None:
        for match in _DEFINE.finditer(self.text):
            body = group(self.text, match.end())
            if body is None:
                continue
            name = match[1] or match[2] or match[4]
            arguments = int(match[3] or 0) or (match[5] or "").count("#")
            self.defined.append((match.start(), body[1] + 1))
            if arguments:
                self.bodies[name] = self.text[slice(*body)]
            else:
                self.macros.setdefault(name, []).append((body[1] + 1, *body))
        for match in _ENVIRONMENT.finditer(self.text):
            bodies, end = groups(self.text, match.end())
            self.defined.append((match.start(), end))
            if bodies:
                self.bodies[match[1]] = self.text[slice(*bodies[0])]
        for match in _THEOREM.finditer(self.text):
            self.defined.append((match.start(), match.end()))
            self.theorems[match[1]] = (match[3], match[4] or match[2] or "")
        self.defined.sort()

    def is_definition(self, at: int) -> bool:
        """Whether this place is inside a definition."""
        number = bisect_right(self.defined, (at, self._length)) - 1
        return any(
            start <= at < end for start, end in self.defined[max(0, number - 3) : number + 1]
        )

    def value(self, name: str, at: int) -> tuple[int, int] | None:
        """The body of a macro without arguments as it was last defined before `at`, where that is a
        short text and no set of formatting commands."""
        best = None
        for end, start, stop in self.macros.get(name, ()):
            if end <= at:
                best = (start, stop)
        if best is None or best[1] - best[0] > 200:
            return None
        return (
            best
            if re.fullmatch(r"[^\\#&]*(?:\\[%$#&_,A-Za-z]+[^\\#]*)*", self.text[slice(*best)])
            else None
        )

    # text

    def add(self, field: Field, start: int, end: int) -> None:
        """Add the text from `start` to `end`: macros expanded, labels and the like left out, white
        space as TeX reads it."""
        pieces: list[tuple[int, int]] = []
        self._expand(start, end, end, pieces, 0)
        text = ""
        for a, b in pieces:
            glued = self.text[a : a + 1].isalpha() and re.search(r"\\[A-Za-z]+$", text)
            text += (" " if glued else "") + self.text[a:b]
        spans = [span for a, b in pieces for span in self.spans(a, b)]
        field.add(tidy(text), *spans)

    def _expand(
        self, start: int, end: int, place: int, out: list[tuple[int, int]], depth: int
    ) -> None:
        at = start
        for match in re.finditer(r"\\([A-Za-z@]+)\*?", self.text[start:end]):
            here, stop = start + match.start(), start + match.end()
            if here < at:
                continue
            hidden = None if depth else self._definition(here)
            silent = _SILENT.match(self.text, here)
            opaque = _OPAQUE.match(self.text, here)
            value = self.value(match[1], place if depth else here) if depth < DEEPEST else None
            if hidden:
                out.append((at, here))
                at = min(end, hidden)
            elif silent:
                out.append((at, here))
                at = min(
                    end,
                    groups(self.text, silent.end())[1]
                    if match[1] != "footnotemark"
                    else silent.end(),
                )
            elif opaque:
                out.append((at, here))
                at = min(end, groups(self.text, opaque.end())[1])
                out.append((here, at))
            elif value:
                out.append((at, here))
                self._expand(*value, place if depth else here, out, depth + 1)
                at = stop
        out.append((min(at, end), end))

    def _definition(self, at: int) -> int | None:
        number = bisect_right(self.defined, (at, self._length)) - 1
        if number >= 0 and self.defined[number][0] <= at < self.defined[number][1]:
            return self.defined[number][1]
        return None


def blanked(text: str) -> str:
    """The text with comments as spaces of equal length; those in verbatim environments are none."""
    text = _COMMENT.sub(_spaces, text)
    return _SKIPPED.sub(lambda m: re.sub(r"[^\n]", " ", m[0]), text)


def _spaces(match: re.Match) -> str:
    return match["before"] + " " * len(match["comment"]) if match["comment"] else match[0]


def group(text: str, at: int) -> tuple[int, int] | None:
    """The inside of the braces that open at `at`, after white space: (start, end); None where there
    are none, or they do not close."""
    opening = re.compile(r"\s*\{").match(text, at)
    if not opening:
        return None
    depth, at = 1, opening.end()
    start = at
    while True:
        match = _BRACE.search(text, at)
        if not match:
            return None
        at = match.end()
        if match[0] == "\\":
            at += 1
            continue
        depth += 1 if match[0] == "{" else -1
        if not depth:
            return start, match.start()


def groups(text: str, at: int) -> tuple[list[tuple[int, int]], int]:
    """The arguments in braces that follow at once, ones in square brackets skipped; and their
    end."""
    out = []
    while True:
        option = re.compile(r"\[[^\[\]\n]*\]").match(text, at)
        if option:
            at = option.end()
            continue
        found = group(text, at) if text[at : at + 1] == "{" else None
        if found is None:
            return out, at
        out.append(found)
        at = found[1] + 1


def tidy(text: str) -> str:
    """White space as TeX reads it: one space, or an empty line between paragraphs."""
    text = re.sub(r"[ \t\r\f]+", " ", text)
    text = re.sub(r" ?\n ?", "\n", text)
    return re.sub(r"\n{2,}", "\n\n", text).strip()
