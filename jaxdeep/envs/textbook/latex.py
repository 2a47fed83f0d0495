"""LaTeX books: worked examples, exercises and answers by a profile of the book, or by general
rules.

A profile says which environments and macros are what. Where none fits, environments are known by
their names and by what `\\newtheorem` prints for them, and a solution is an environment or macro of
that name inside the item or right after it."""

from __future__ import annotations

import dataclasses
import re
from collections import deque
from collections.abc import Iterator

from jaxdeep.envs.textbook.fields import Field
from jaxdeep.envs.textbook.files import Folder
from jaxdeep.envs.textbook.latex_source import Source, group, groups
from jaxdeep.envs.textbook.schema import Book, Data, Item, Section
from jaxdeep.errors import DataError

_BY = "latex_source.Source.add"


@dataclasses.dataclass(frozen=True)
class Profile:
    """Environments and macros by role. `titled` are examples whose first argument is the question;
    `footnoted` exercises have their answer in the next `\\footnotetext`; `macros` are exercises
    that a macro's first argument holds; `key` is (header, answer) of the answers at the end, `step`
    their distance in numbers where the definition does not say it."""

    name: str
    examples: tuple[str, ...] = ()
    titled: tuple[str, ...] = ()
    exercises: tuple[str, ...] = ()
    footnoted: tuple[str, ...] = ()
    macros: tuple[str, ...] = ()
    key: tuple[str, str] = ("", "")
    step: int = 1
    solutions: tuple[str, ...] = ("solution", "solutions", "sol", "answer", "ans", "Answer", "soln")


OPENINTRO = Profile(
    "openintro",
    titled=("nexample", "example"),
    exercises=("exercise",),
    footnoted=("nexercise",),
    macros=("eoce",),
    key=("eocesolch", "eocesol"),
    step=2,
)
_EXAMPLE = re.compile(
    r"(?:worked)?(?:ex|exa|exam|exmp|exmpl|examp|example|eg|egs|workedexample)\*?$", re.I
)
_EXERCISE = re.compile(
    r"(?:exc|exer|exercise|exercice|problem|prob|question|xca|task|homework|practice|activity|tryit)\*?$",
    re.I,
)
_PRINTED = (
    (re.compile(r"example", re.I), "examples"),
    (re.compile(r"exercise|problem|question|practice|try it|activity", re.I), "exercises"),
)
_HEADING = re.compile(
    r"\\(part|chapter|section|subsection)(\*?)(?![A-Za-z])\s*(?:\[[^\[\]]*\]\s*)?(?=\{)"
)
_LEVELS = {"part": 0, "chapter": 1, "section": 2, "subsection": 3}
_EXERCISES_TITLE = re.compile(r"\b(?:exercises|problems|review questions|practice)\b", re.I)
_LEAD = re.compile(
    r"\\(?:textbf|emph|textit|underline|paragraph\*?)\s*\{\s*(?:solution|answer|soln)s?[.:]?\s*\}[.:]?|\bSolution[.:]",
    re.I,
)


def found(folder: Folder) -> bool:
    """Whether the folder holds LaTeX."""
    return bool(folder.names(".tex", ".ltx"))


def read(folder: Folder, root: str = "") -> Data:
    """The book whose main file is `root`; empty: the one with `\\documentclass` that includes
    most."""
    source = Source(folder, root) if root else _largest(folder)
    profile = _profile(source)
    data = Data(
        Book(
            folder.root.name if not folder.only else folder.only.partition(".")[0],
            profile=profile.name,
        )
    )
    title = re.search(r"\\title(?:\[[^\]]*\])?\s*(?=\{)", source.text)
    where = group(source.text, title.end()) if title else None
    name = (
        re.sub(r"\\\\.*|\\[A-Za-z]+\s*|[{}]", " ", source.text[slice(*where)], flags=re.S)
        if where
        else ""
    )
    data.book = dataclasses.replace(data.book, title=" ".join(name.split()))
    data.notes += source.notes
    _Reader(source, profile, data).read()
    return data


def _largest(folder: Folder) -> Source:
    roots = [n for n in folder.names(".tex", ".ltx") if "\\documentclass" in folder.file(n).text]
    names = roots or folder.names(".tex", ".ltx")
    if not names:
        raise DataError(f"{folder.root} has no LaTeX file")
    sources = [Source(folder, name) for name in names]
    return max(sources, key=lambda source: len(source.text))


def _profile(source: Source) -> Profile:
    """OpenIntro's where the book has its macro; else general rules."""
    if re.search(r"\\eoce\s*\{", source.text):
        return OPENINTRO
    names = {match[1] for match in re.finditer(r"\\begin\s*\{([A-Za-z@*]+)\}", source.text)}
    kinds: dict[str, list[str]] = {"examples": [], "exercises": []}
    for name in sorted(names):
        printed = source.theorems.get(name, ("", ""))[0]
        kind = next((kind for pattern, kind in _PRINTED if pattern.search(printed)), "")
        kind = kind or ("examples" if not printed and _EXAMPLE.match(name) else "")
        kind = kind or ("exercises" if not printed and _EXERCISE.match(name) else "")
        if kind:
            kinds[kind].append(name)
    macros = tuple(
        name for name in ("exercise", "problem") if re.search(rf"\\{name}\s*\{{", source.text)
    )
    return Profile("latex", tuple(kinds["examples"]), (), tuple(kinds["exercises"]), (), macros)


@dataclasses.dataclass
class _Found:
    """One thing of the structure at its place in the text."""

    kind: str  # heading, item, solution, key header, key answer
    start: int
    end: int
    name: str = ""
    inside: tuple[int, int] = (0, 0)  # of its content
    question: tuple[int, int] | None = None
    level: int = 0
    starred: bool = False


class _Reader:
    def __init__(self, source: Source, profile: Profile, data: Data) -> None:
        self.source, self.text = source, source.text
        self.profile, self.data = profile, data
        begin = [
            m.end()
            for m in re.finditer(r"\\begin\s*\{document\}", self.text)
            if not source.is_definition(m.start())
        ]
        end = self.text.rfind("\\end{document}")
        self.start, self.end = (begin[0] if begin else 0), (end if end > 0 else len(self.text))
        self.counters: dict[str, int] = {}
        self.pending: deque[Item | None] = deque()
        self.by_number: dict[tuple[int, int], Item] = {}
        self.chapters: list[str] = []

    # structure

    def structure(self) -> list[_Found]:
        """Headings, items and answers in order, nothing from inside definitions."""
        profile = self.profile
        environments = (*profile.examples, *profile.titled, *profile.exercises, *profile.footnoted)
        found = [*self.headings(), *self.environments(environments), *self.commands()]
        found = [one for one in found if self.start <= one.start < self.end]
        found = [one for one in found if not self.source.is_definition(one.start)]
        return sorted(found, key=lambda one: (one.start, -one.end))

    def headings(self) -> Iterator[_Found]:
        for match in _HEADING.finditer(self.text):
            inside = group(self.text, match.end())
            if inside:
                yield _Found(
                    "heading",
                    match.start(),
                    inside[1] + 1,
                    match[1],
                    inside,
                    None,
                    _LEVELS[match[1]],
                    bool(match[2]),
                )
        for name, body in self.source.bodies.items():
            alias = re.search(r"\\(chapter|section)\*?\s*\{\s*#(\d)\s*\}", body)
            if not alias:
                continue
            for match in re.finditer(
                rf"\\begin\s*\{{{re.escape(name)}\}}|\\{re.escape(name)}(?![A-Za-z])", self.text
            ):
                arguments, end = groups(self.text, match.end())
                if len(arguments) >= int(alias[2]):
                    inside = arguments[int(alias[2]) - 1]
                    yield _Found(
                        "heading", match.start(), end, alias[1], inside, None, _LEVELS[alias[1]]
                    )

    def environments(self, names: tuple[str, ...]) -> Iterator[_Found]:
        every = "|".join(
            re.escape(name)
            for name in sorted({*names, *self.profile.solutions}, key=len, reverse=True)
        )
        stack: list[tuple[str, re.Match]] = []
        for match in re.finditer(rf"\\(begin|end)\s*\{{({every})\}}", self.text):
            if self.source.is_definition(match.start()):
                continue
            if match[1] == "begin":
                stack.append((match[2], match))
            elif any(name == match[2] for name, _ in stack):
                while stack:
                    name, opening = stack.pop()
                    if name == match[2]:
                        yield self.environment(name, opening, match)
                        break
                    self.data.notes.append(f"\\begin{{{name}}} has no end")
        self.data.notes += [f"\\begin{{{name}}} has no end" for name, _ in stack]

    def environment(self, name: str, opening: re.Match, closing: re.Match) -> _Found:
        start = opening.end()
        option = re.compile(r"\s*\[[^\[\]]*\]").match(self.text, start)
        content = (option.end() if option else start, closing.start())
        kind = "solution" if name in self.profile.solutions else "item"
        question = None
        if name in self.profile.titled and kind == "item":
            question = group(self.text, start)
            content = (question[1] + 1, content[1]) if question else content
        return _Found(kind, opening.start(), closing.end(), name, content, question)

    def commands(self) -> Iterator[_Found]:
        profile = self.profile
        for name in profile.macros:
            for match in re.finditer(
                rf"\\{name}(?![A-Za-z])\s*(?:\[[^\[\]]*\]\s*)?(?=\{{)", self.text
            ):
                arguments, end = groups(self.text, match.end())
                if arguments:
                    yield _Found("item", match.start(), end, name, arguments[0])
        for name, kind in zip(profile.key, ("key header", "key answer"), strict=True):
            for match in re.finditer(rf"\\{name}(?![A-Za-z])\s*(?=\{{)", self.text) if name else ():
                inside = group(self.text, match.end())
                if inside:
                    yield _Found(kind, match.start(), inside[1] + 1, name, inside)
        if profile.footnoted:
            for match in re.finditer(r"\\footnote(mark|text)(?![A-Za-z])", self.text):
                inside = group(self.text, match.end()) if match[1] == "text" else None
                end = inside[1] + 1 if inside else match.end()
                yield _Found(f"footnote {match[1]}", match.start(), end, "", inside or (0, 0))
        for name in profile.solutions:
            for match in re.finditer(rf"\\{name}(?![A-Za-z])\s*(?=\{{)", self.text):
                inside = group(self.text, match.end())
                if inside and name not in profile.key:
                    yield _Found("solution", match.start(), inside[1] + 1, name, inside)

    # reading

    def read(self) -> None:
        self.data.content += self.source.spans(self.start, self.end)
        found = self.structure()
        outer: list[_Found] = []
        self.inner: dict[int, list[_Found]] = {}
        for one in found:
            around = next(
                (o for o in reversed(outer) if o.start <= one.start and one.end <= o.end), None
            )
            if around is not None and around.kind in ("item", "solution"):
                self.inner.setdefault(id(around), []).append(one)
            else:
                outer.append(one)
        self.section(None)
        at, last = self.start, None
        for one in outer:
            if one.start < at:
                continue
            self.text_between(at, one.start)
            last = self.take(one, last)
            at = one.end if one.kind != "footnote mark" else one.start
        self.text_between(at, self.end)
        self.finish_section()
        self.check_key()

    def take(self, one: _Found, last: Item | None) -> Item | None:
        """Handle one part of the structure; the item that a solution right after would belong
        to."""
        if one.kind == "heading":
            self.heading(one)
            return None
        if one.kind == "item":
            return self.item(one)
        if one.kind == "solution":
            self.answer(last, one) if last is not None else self.text_between(one.start, one.end)
            return last
        if one.kind == "footnote mark":
            self.pending.append(None)
        elif one.kind == "footnote text":
            item = self.pending.popleft() if self.pending else None
            if item is not None:
                self.fill(item, "answer", [one.inside])
            else:
                self.text_between(*one.inside)
        elif one.kind == "key header":
            self.key_header(one)
        elif one.kind == "key answer":
            self.key_answer(one)
        return last

    def heading(self, one: _Found) -> None:
        title = self.plain(*one.inside)
        if one.level == 1:
            appendix = "\\appendix" in self.text[self.start : one.start]
            if not one.starred and not appendix:
                self.counters = {"chapter": self.counters.get("chapter", 0) + 1}
            self.chapters.append(title)
        elif one.level == 2 and not one.starred:
            self.counters["section"] = self.counters.get("section", 0) + 1
        if one.level in (1, 2) or not self.data.sections:
            self.section(one)
        else:
            self.text_between(*one.inside)

    def section(self, heading: _Found | None) -> None:
        self.finish_section()
        chapter = self.counters.get("chapter", 0)
        title = self.plain(*heading.inside) if heading else ""
        number = str(chapter or "")
        if heading is not None and heading.level == 2 and not heading.starred:
            number = ".".join(filter(None, (number, str(self.counters["section"]))))
        order = len(self.data.sections)
        name = self.chapters[-1] if self.chapters else ""
        self.current = Section(f"s{order}", name, number, title, order)
        self.field = Field(_BY)
        self.data.sections.append(self.current)
        if heading is not None:
            self.source.add(self.field, *heading.inside)

    def finish_section(self) -> None:
        if not self.data.sections:
            return
        self.current.text = self.field.text
        if self.current.text:
            self.current.spans["text"] = self.field.origin("expanded")

    def text_between(self, start: int, end: int) -> None:
        if self.text[start:end].strip():
            self.source.add(self.field, start, end)

    def plain(self, start: int, end: int) -> str:
        field = Field(_BY)
        self.source.add(field, start, end)
        return " ".join(re.sub(r"\\[A-Za-z]+\s*|[{}$]", " ", field.text).split())

    # items

    def item(self, one: _Found) -> Item:
        profile = self.profile
        example = one.name in profile.examples or one.name in profile.titled
        kind = "example" if example else "exercise"
        key, number = self.number(one.name)
        role = "example" if example else "try" if one.name in profile.footnoted else "practice"
        item = Item(f"{self.current.id}-{one.name}-{key}", kind, self.current.id, number, role)
        self.data.items.append(item)
        inner = self.inner.get(id(one), [])
        solutions = [other for other in inner if other.kind == "solution"]
        rest = _without(one.inside, [(other.start, other.end) for other in solutions])
        if one.question:
            self.fill(item, "question", [one.question])
            self.fill(item, "reasoning", rest)
        elif example and not solutions:
            self.split_example(item, one)
        else:
            self.fill(item, "question", rest)
        for solution in solutions:
            self.answer(item, solution)
        for other in inner:
            if other.kind == "footnote mark" and one.name in profile.footnoted:
                self.pending.append(item)
            elif other.kind == "footnote mark":
                self.pending.append(None)
        item.needs_image = bool(
            re.search(
                r"\\(?:includegraphics|Figures?|FigureFullPath)(?![A-Za-z])|\\begin\{(?:tikzpicture|figure)\}",
                self.text[slice(*one.inside)],
            )
        )
        if one.name in profile.macros and profile.key[0]:
            item.number = f"{self.counters.get('chapter', 0)}.{self.counters[one.name]}"
            self.by_number[self.counters.get("chapter", 0), self.counters[one.name]] = item
        return item

    def split_example(self, item: Item, one: _Found) -> None:
        """An example without a marked solution: split where a word in bold says Solution."""
        lead = _LEAD.search(self.text, *one.inside)
        if lead:
            self.data.dropped += self.source.spans(lead.start(), lead.end())
            self.fill(item, "question", [(one.inside[0], lead.start())])
            self.fill(item, "reasoning", [(lead.end(), one.inside[1])])
        else:
            self.fill(item, "question", [one.inside])
            item.flags.append("no solution heading")

    def number(self, name: str) -> tuple[int, str]:
        """(running number of the book, number as printed)."""
        total = self.counters_all = getattr(self, "counters_all", {})
        total[name] = total.get(name, 0) + 1
        shared = (
            "numbered" if self.profile is OPENINTRO and name not in self.profile.macros else name
        )
        self.counters[shared] = self.counters.get(shared, 0) + 1
        parent = self.source.theorems.get(name, ("", ""))[1]
        chapter = self.counters.get("chapter", 0)
        within = chapter and (parent in ("chapter", "section") or self.profile is OPENINTRO)
        return total[name], f"{chapter}.{self.counters[shared]}" if within else str(
            self.counters[shared]
        )

    def fill(self, item: Item, name: str, ranges: list[tuple[int, int]]) -> None:
        field = Field(_BY)
        for start, end in ranges:
            if self.text[start:end].strip():
                self.source.add(field, start, end)
        if not field.text:
            return
        if getattr(item, name):
            item.flags.append(f"a second {name}")
            return
        setattr(item, name, field.text)
        item.spans[name] = field.origin("expanded")

    def answer(self, item: Item, solution: _Found) -> None:
        self.fill(item, "reasoning" if item.kind == "example" else "answer", [solution.inside])

    # the key at the end

    def key_header(self, one: _Found) -> None:
        self.key_chapter = getattr(self, "key_chapter", 0) + 1
        self.key_number = 1
        title = self.plain(*one.inside)
        self.text_between(*one.inside)
        numbered = [c for c in dict.fromkeys(self.chapters)]
        expected = numbered[self.key_chapter - 1] if self.key_chapter <= len(numbered) else ""
        if _same_title(title, expected):
            return
        match = next((n for n, c in enumerate(numbered, 1) if _same_title(c, title)), None)
        self.data.notes.append(
            f"the answers of {title!r} come in the place of chapter {expected!r}"
        )
        if match is not None:
            self.key_chapter = match

    def key_answer(self, one: _Found) -> None:
        chapter = getattr(self, "key_chapter", 0)
        number = getattr(self, "key_number", 1)
        item = self.by_number.get((chapter, number))
        body = self.source.macros.get(self.profile.key[1]) or self.source.bodies.get(
            self.profile.key[1], ""
        )
        steps = body.count("\\refstepcounter") if isinstance(body, str) else 0
        self.key_number = number + (steps or self.profile.step)
        if item is None:
            self.data.notes.append(f"answer {chapter}.{number} has no exercise")
            return
        self.fill(item, "answer", [one.inside])
        asked = len(re.findall(r"\\item(?![A-Za-z])", _outer_list(item.question)))
        labels = len(set(re.findall(r"(?:^|[\s~(\\])\(?([a-z])\)[~\s]", item.answer)))
        if asked and labels and asked != labels:
            item.flags.append("parts disagree")

    def check_key(self) -> None:
        """Whether the answers of each chapter are as many as its exercises have with a place in the
        key."""
        if not self.by_number or not self.profile.key[0]:
            return
        for chapter in sorted({chapter for chapter, _ in self.by_number}):
            numbers = [number for c, number in self.by_number if c == chapter]
            answered = [n for n in numbers if self.by_number[chapter, n].answer]
            expected = len(range(1, max(numbers) + 1, self.profile.step))
            if answered and len(answered) != expected:
                self.data.notes.append(
                    f"chapter {chapter}: {len(answered)} answers, {expected} expected"
                )


def _outer_list(text: str) -> str:
    """The first list of parts, without lists inside it."""
    match = re.search(r"\\begin\{(parts|enumerate)\}(.*?)\\end\{\1\}", text, re.S)
    inside = match[2] if match else ""
    return re.sub(
        r"\\begin\{(subparts|itemize|enumerate|romanparts)\}.*?\\end\{\1\}", "", inside, flags=re.S
    )


def _without(whole: tuple[int, int], holes: list[tuple[int, int]]) -> list[tuple[int, int]]:
    out, at = [], whole[0]
    for start, end in sorted(holes):
        if start >= at:
            out.append((at, start))
            at = end
    return [*out, (at, whole[1])]


def _same_title(a: str, b: str) -> bool:
    return re.sub(r"\W+", "", a).lower() == re.sub(r"\W+", "", b).lower()
