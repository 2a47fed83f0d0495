"""Books that come as lines of text, whatever they were: headings, "Example 3.", "(4) ...", answers.

Readers of HTML, Markdown and text make `Line`s; `assemble` finds in them the sections, examples,
exercises and answers. A number that does not go on from the one before begins no item. Answers find
their exercises by the set's name or number in their heading, or else belong to the last set.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable

from jaxdeep.envs.textbook.fields import Field
from jaxdeep.envs.textbook.files import File
from jaxdeep.envs.textbook.schema import Data, Item, Section

_EXERCISES = re.compile(
    r"\b(?:exercises?|practice|problems?|problem set|review questions|questions|drills?)\b", re.I
)
_ANSWERS = re.compile(r"\b(?:answers?|solutions?|answer key)\b", re.I)
_EXAMPLE = re.compile(
    r"[*\s]*(?:worked\s+)?example\s*\(?\s*(\d+(?:[.\-–]\d+)*)\s*(?:\.\s*\)|\)|[.:])?[*\s]*(?:[.:]|[-–—]\s)?[*\s]*",
    re.I,
)
_EXAMPLES = re.compile(r"\*\s*(?:some |further )*examples\s*[.:]?\s*\*[.:]?\s*", re.I)
_LONE_EXAMPLE = re.compile(r"\*+\s*example\s*[.:]?\s*\*+[.:]?\s*", re.I)
_SOLUTION = re.compile(
    r"[*\s]*(?:solution|answer|proof)\s*[.:]?\s*(?:\*+[.:]?\s*|(?<=[.:])\s*)", re.I
)
_ITEM = re.compile(
    r"[*\s]*(?:\((\d{1,3})\.?\)|(\d{1,3}(?:\.\d{1,3})?)\s*[.)](?=[\s*])|(?:exercise|problem)\s+(\d+(?:\.\d+)*)[.:]?)[*\s]*",
    re.I,
)
_INLINE_ANSWER = re.compile(r"[*\s]*(?:answer|ans)\s*[.:]\s*\**\s*", re.I)
_IMPERATIVE = re.compile(
    r"(?:\(?[a-z]\)\s*)?(?:for (?:the|each)|in (?:the following|exercises|problems|each)|find|solve|simplify|evaluate|write|"
    r"graph|differentiate|integrate|determine|factor|state|reduce|add|subtract|multiply|divide|identify|"
    r"give|calculate|compute|express|convert|use|translate|name|round|list|plot|prove|show|answer|complete|perform|"
    r"check|sketch|work|rationalize|expand|combine)\b",
    re.I,
)


@dataclasses.dataclass
class Line:
    """One line or block: its text as it is read, its characters in the file, whether it is a
    heading (`level` 1 to 6), whole in emphasis, after an empty line, or a rule that ends a list."""

    text: str
    file: File
    start: int
    end: int
    level: int = 0
    emphasised: bool = False
    apart: bool = True
    rule: bool = False


@dataclasses.dataclass
class _Set:
    """A set of exercises: its heading, the number in it, its items by number."""

    title: str
    number: str
    section: str
    items: dict[str, Item] = dataclasses.field(default_factory=dict)


class _Open:
    """The item that lines are added to."""

    def __init__(self, item: Item, by: str) -> None:
        self.item = item
        self.fields = {name: Field(by, "\n") for name in ("question", "reasoning", "answer")}
        self.name = "question"

    def add(self, text: str, line: Line, start: int, end: int) -> None:
        self.fields[self.name].add(text, line.file.span(start, end))

    def close(self) -> None:
        for name, field in self.fields.items():
            if field.text and not getattr(self.item, name):
                setattr(self.item, name, field.text)
                self.item.spans[name] = field.origin("rendered")
            elif field.text:
                self.item.flags.append(f"a second {name}")


def assemble(data: Data, lines: Iterable[Line], by: str) -> None:
    """Sections and items from the lines, added to the book; `by` names the function that made the
    lines' texts."""
    reader = _Assembly(data, by)
    for line in lines:
        reader.take(line)
    reader.finish()


class _Assembly:
    def __init__(self, data: Data, by: str) -> None:
        self.data, self.by = data, by
        self.mode = "text"  # text, examples, exercises, answers
        self.open: _Open | None = None
        self.sets: list[_Set] = []
        self.field: Field | None = None
        self.chapter = ""
        self.last = ""  # the number before
        self.instruction: list[Line] = []
        self.target: _Set | None = None
        self.restarted = False  # the answers' numbers began again under the same heading
        self.counts = {"example": 0}

    # lines

    def take(self, line: Line) -> None:
        if line.rule:
            self.close()
            self.mode = "text"
        elif line.level:
            self.heading(line)
        elif self.mode == "answers":
            self.answer_line(line)
        else:
            self.line(line)

    def finish(self) -> None:
        self.close()
        self.end_section()
        for one in self.sets:
            answered = [item for item in one.items.values() if item.answer]
            missing = [number for number, item in one.items.items() if not item.answer]
            if answered and missing:
                self.data.notes.append(f"{one.title}: no answer to {', '.join(missing)}")

    def close(self) -> None:
        if self.open is not None:
            self.open.close()
            self.open = None

    def heading(self, line: Line) -> None:
        title = line.text.strip("* #")
        example = _EXAMPLE.match(title)
        if example:
            self.example(line, example)
            return
        if _SOLUTION.fullmatch(title + ".") and self.open is not None and self.mode != "answers":
            self.open.name = "reasoning" if self.open.item.kind == "example" else "answer"
            self.data.dropped.append(line.file.span(line.start, line.end))
            return
        item = _ITEM.match(title)
        if item and self.mode in ("exercises", "answers") and line.level > 2 and item[3]:
            (self.answer_line if self.mode == "answers" else self.line)(
                dataclasses.replace(line, level=0)
            )
            return
        self.close()
        self.last, self.instruction, self.restarted = "", [], False
        if _ANSWERS.search(title) and not re.search(r"\bexample", title, re.I):
            self.mode, self.target = "answers", self.set_of(title)
            self.text(line)
        elif _EXERCISES.search(title):
            self.mode = "exercises"
            if line.level <= 2 and re.match(r"[\d.]+\s", title) and not self.same_number(title):
                self.begin_section(line, title)
            else:
                self.text(line)
            self.sets.append(_Set(title, _number(title), self.section.id))
        else:
            self.mode = "text"
            if line.level <= 2 or self.field is None:
                self.begin_section(line, title)
            else:
                self.text(line)

    def same_number(self, title: str) -> bool:
        return self.field is not None and _number(title) == self.section.number

    def begin_section(self, line: Line, title: str) -> None:
        self.end_section()
        order = len(self.data.sections)
        number = _number(title)
        if line.level <= 1:
            self.chapter = title
        self.section = Section(f"s{order}", self.chapter or title, number, title, order)
        self.field = Field(self.by, "\n")
        self.data.sections.append(self.section)
        self.text(line)

    def end_section(self) -> None:
        if self.field is not None and self.field.text:
            self.section.text = self.field.text
            self.section.spans["text"] = self.field.origin("rendered")

    def text(self, line: Line) -> None:
        if self.field is None:
            here = dataclasses.replace(line, text="", level=1, end=line.start)
            self.begin_section(here, line.file.name)
        text = ("\n" if line.apart else "") + line.text
        self.field.add(text, line.file.span(line.start, line.end))

    # examples and exercises

    def line(self, line: Line) -> None:
        example = _EXAMPLE.match(line.text)
        whole = example and (
            line.text[: example.end()].strip().endswith((".", ":", ")", "*"))
            or example.end() == len(line.text)
        )
        if whole and not line.text[example.end() :].lower().startswith(
            ("and ", "shows", "above", "we ")
        ):
            self.example(line, example)
            return
        plural = _EXAMPLES.match(line.text) or _LONE_EXAMPLE.match(line.text)
        if plural and self.mode != "exercises":
            self.close()
            self.mode, self.last = "examples", ""
            rest = line.text[plural.end() :]
            if not _ITEM.match(rest):
                self.text(line)
                return
            self.item_line(line, plural.end())
            return
        if self.mode in ("examples", "exercises") and self.item_line(line, 0):
            return
        self.continued(line)

    def item_line(self, line: Line, offset: int) -> bool:
        """Begin the item that the line's marker announces; False where it announces none."""
        marker = _ITEM.match(line.text, offset)
        number = next((group for group in marker.groups() if group), "") if marker else ""
        if not number or not self.follows(number):
            return False
        self.last = number
        kind = "example" if self.mode == "examples" else "exercise"
        shared = self.instruction if kind == "exercise" else []
        self.new(kind, number, line, shared)
        self.begin_text(line, marker.end())
        return True

    def follows(self, number: str) -> bool:
        """Whether the number can come after the last one: at most 5 further, or 1 at the start."""
        here, last = _last_number(number), _last_number(self.last)
        return here == 1 or here - last in range(1, 6) if self.last else here <= 40

    def new(self, kind: str, number: str, line: Line, shared: list[Line]) -> None:
        self.close()
        if self.field is None:
            self.text(dataclasses.replace(line, text="", start=line.start, end=line.start))
        self.counts[kind] = self.counts.get(kind, 0) + 1
        item = Item(f"{self.section.id}-{kind}-{self.counts[kind]}", kind, self.section.id, number)
        item.role = "example" if kind == "example" else "practice"
        self.data.items.append(item)
        self.open = _Open(item, self.by)
        for one in shared:
            self.open.fields["question"].add(one.text, one.file.span(one.start, one.end))
        item.instruction = "\n".join(one.text for one in shared)
        if kind == "exercise":
            if not self.sets:
                self.sets.append(_Set("", "", self.section.id))
            if number in self.sets[-1].items:
                item.flags.append("number occurs twice")
            self.sets[-1].items.setdefault(number, item)

    def begin_text(self, line: Line, offset: int) -> None:
        self.add_after(line, offset)
        self.open.item.needs_image |= "[image" in line.text

    def add_after(self, line: Line, offset: int) -> None:
        """Add what follows a marker to the open item; the marker itself is no text of a field."""
        marker = re.sub(r"\W", "", line.text[:offset])
        start = _after(line, marker)
        self.data.dropped.append(line.file.span(line.start, start))
        if line.text[offset:].strip():
            self.open.add(line.text[offset:], line, start, line.end)

    def example(self, line: Line, marker: re.Match) -> None:
        offset = marker.end() if not line.level else line.text.index(marker[1]) + len(marker[1])
        self.mode = "text"
        self.instruction, self.last = [], ""
        self.new("example", marker[1], line, [])
        self.begin_text(line, offset)

    def continued(self, line: Line) -> None:
        """A line that begins no item: of the open item, an instruction to the next ones, or
        text."""
        if self.open is None:
            if self.mode == "exercises" and line.apart and line.text.strip():
                self.instruction = (
                    [line] if _IMPERATIVE.match(line.text.lstrip("* ")) else self.instruction
                )
            elif self.mode == "exercises" and self.instruction:
                self.instruction = [*self.instruction, line]
            self.text(line)
            return
        solution = _SOLUTION.match(line.text)
        if solution and self.mode != "exercises":
            self.open.name = "reasoning"
            self.add_after(line, solution.end())
            return
        inline = _INLINE_ANSWER.match(line.text)
        if inline and self.mode == "exercises":
            self.open.name = "answer"
            self.add_after(line, inline.end())
            return
        if line.emphasised or (self.mode == "exercises" and line.apart and self.instructs(line)):
            self.close()
            self.instruction = [] if line.emphasised else [line]
            self.text(line)
            return
        if (
            self.open.item.kind == "example"
            and self.open.name == "question"
            and line.apart
            and self.open.fields["question"].texts
        ):
            self.open.name = "reasoning"
        self.open.item.needs_image |= "[image" in line.text
        self.open.add(line.text, line, line.start, line.end)

    def instructs(self, line: Line) -> bool:
        """Whether a block after an exercise is the instruction to the next ones."""
        return bool(_IMPERATIVE.match(line.text.lstrip("* "))) and len(line.text) < 300

    # answers

    def set_of(self, title: str) -> _Set | None:
        """The set that a heading of answers is about."""
        number = _number(title)
        if number:
            same = [one for one in self.sets if one.number == number]
            if same:
                return same[-1]
        wanted = _bare(_ANSWERS.sub("", title))
        for one in self.sets:
            if wanted and wanted == _bare(one.title):
                return one
        if number or (
            wanted and len(wanted) > 3 and self.sets and len(self.sets) > 1 and "key" not in wanted
        ):
            return None if number else self.sets[-1]
        return self.sets[-1] if self.sets else None

    def answer_line(self, line: Line) -> None:
        named = self.named_set(line)
        if named is not None:
            self.close()
            self.target, self.last, self.restarted = named, "", False
            self.text(line)
            return
        marker = _ITEM.match(line.text)
        number = next((group for group in marker.groups() if group), "") if marker else ""
        if number and self.last and _last_number(number) <= _last_number(self.last):
            if self.open is not None and not self.restarted:
                self.open.item.flags.append("answer numbers restart")
                self.data.notes.append(
                    f"{self.section.title}: answers restart at {number} after {self.last}: what "
                    f"follows is kept in the answer {self.last}"
                )
            self.restarted = True
        number = "" if self.restarted else number
        if number:
            self.begin_answer(line, number, marker.end())
        elif self.open is not None and not line.emphasised:
            self.open.add(line.text, line, line.start, line.end)
        else:
            self.text(line)

    def named_set(self, line: Line) -> _Set | None:
        """The set that a line in bold or emphasis names among the answers."""
        title = line.text.strip("* .:")
        if not line.emphasised or self.last:
            return None
        return next(
            (one for one in self.sets if one.title and _bare(one.title) == _bare(title)), None
        )

    def begin_answer(self, line: Line, number: str, offset: int) -> None:
        self.close()
        self.last = number
        item = self.target.items.get(number) if self.target else None
        if item is None:
            title = self.target.title if self.target else "no set"
            self.data.notes.append(
                f"{self.section.title}: answer {number} has no exercise ({title})"
            )
            self.text(line)
            return
        if item.answer:
            item.flags.append("a second answer")
            self.text(line)
            return
        self.open = _Open(item, self.by)
        self.open.name = "answer"
        self.add_after(line, offset)


def _after(line: Line, letters: str) -> int:
    """Where the line goes on in its file once these letters and digits have been read."""
    at = line.start
    source = line.file.text
    inside = 0
    for letter in letters:
        while at < line.end and (inside or source[at] != letter):
            inside += (source[at] == "<") - (source[at] == ">" and inside > 0)
            at += 1
        at += 1
    return min(at, line.end)


def _number(title: str) -> str:
    match = re.search(r"\b(\d+(?:\.\d+)+|\d+)\b|\b([IVXL]+)\b", title)
    return (match[1] or match[2]) if match else ""


def _last_number(number: str) -> int:
    return int(re.split(r"[.\-–]", number)[-1] or 0) if number else 0


def _bare(title: str) -> str:
    return re.sub(r"\W+|\b(?:to|for|of|the|section|chapter)\b", "", title.lower())
