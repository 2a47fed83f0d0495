"""Text of a PDF: columns side by side, fractions fallen apart, superscripts on the line.

Nothing here repairs a formula. An exercise or an answer is emitted where its line can be trusted:
no line beside it holds fragments of a fraction over or under it, its number goes on from the one
above it in its column, and no power has fallen to the line ("8n2"). Else it gets the flag `layout`
and no gold. A PDF itself is read by pypdfium2, a page a file."""

from __future__ import annotations

import dataclasses
import itertools
import re
from pathlib import Path

from jaxdeep.envs.textbook.fields import Field
from jaxdeep.envs.textbook.files import File, Folder
from jaxdeep.envs.textbook.schema import Book, Data, Item, Section
from jaxdeep.errors import ConfigError, DataError

_BY = "pdf_text.cells"
MOST_PAGES = 5_000
_EXAMPLE = re.compile(r"Example (\d+(?:\.\d+)*)\.?\s*$")
_HEADING = re.compile(r"(#{1,6})\s+(.*?)\s*$|((?:\d+\.\d+)\s+(?:Practice|Answers|[A-Z]).{0,80})$")
_PRACTICE = re.compile(r"(\d+\.\d+)\s*(?:Practice|Exercises|Problems)\b", re.I)
_ANSWERS = re.compile(r"(\d+\.\d+)\s*(?:Answers?|Solutions?)\b", re.I)
_CELL = re.compile(r"(?:^\s*|(?<=\s\s))(\d{1,3})\)(?=\s|$)|^\s*(\d{1,3})\.(?=\s)")
_FALLEN = re.compile(r"[A-Za-z)\]]\s?\d+\b(?!\))|\b[A-Za-z]\s+\d(?=\s*[-+=]|\s*$)")


@dataclasses.dataclass
class _Row:
    """A line of the file: where it begins, its text."""

    start: int
    text: str


@dataclasses.dataclass
class _Cell:
    """One numbered entry of a line: its number, its columns, its place in the file."""

    number: int
    column: int
    end_column: int
    row: int
    start: int
    end: int
    text: str
    trusted: bool = True
    rows: tuple[int, ...] = ()  # further lines of it


def found(folder: Folder) -> bool:
    """Whether the folder holds text of a PDF: lines with entries of several columns."""
    for name in folder.names(".md", ".txt"):
        lines = folder.file(name).text.splitlines()
        wide = sum(len(_CELL.findall(line)) > 1 and "   " in line.strip() for line in lines)
        if wide > 20:
            return True
    return False


def read(folder: Folder) -> Data:
    """The files of the folder as one book, in the order of their names."""
    names = folder.names(".md", ".txt")
    identity = folder.only.partition(".")[0] if folder.only else folder.root.name
    data = Data(Book(identity, profile="pdf text"))
    reader = _Reader(data)
    for name in names:
        file = folder.file(name)
        data.content.append(file.span(0, len(file.text)))
        reader.file_of(file)
    reader.finish()
    data.book = dataclasses.replace(data.book, title=reader.title or identity)
    return data


def convert(pdf: Path, target: Path) -> Path:
    """Write the text of a PDF to a file in the folder `target`, its pages one after the other, and
    return the file. ConfigError without pypdfium2, DataError for a file that cannot be read."""
    try:
        import pypdfium2
    except ImportError as error:
        raise ConfigError(f"{pdf} needs pypdfium2: pip install 'jaxdeep[textbook]'") from error
    try:
        document = pypdfium2.PdfDocument(pdf)
        if len(document) > MOST_PAGES:
            raise DataError(f"{pdf} has {len(document)} pages; at most {MOST_PAGES} are read")
        pages = [page.get_textpage().get_text_bounded() for page in document]
    except pypdfium2.PdfiumError as error:
        raise DataError(f"{pdf} cannot be read: {error}") from error
    if not any(page.strip() for page in pages):
        raise DataError(f"{pdf} holds no text, only images: run OCR on it first")
    target.mkdir(parents=True, exist_ok=True)
    out = target / f"{pdf.stem}.txt"
    text = "\n\n".join(page.replace("\r\n", "\n") for page in pages)
    out.write_text(text, encoding="utf-8", errors="replace")
    return out


class _Reader:
    def __init__(self, data: Data) -> None:
        self.data = data
        self.title = ""
        self.mode = "text"
        self.sets: dict[str, dict[int, Item]] = {}
        self.field: Field | None = None
        self.example: tuple[Item, Field, Field] | None = None
        self.block: list[_Row] = []
        self.target = ""
        self.chapter = ""

    def file_of(self, file: File) -> None:
        self.file = file
        at = 0
        for text in file.text.splitlines(keepends=True):
            self.row(_Row(at, text.rstrip()))
            at += len(text)
        self.end_block()

    def row(self, row: _Row) -> None:
        heading = _HEADING.match(row.text)
        example = _EXAMPLE.match(row.text)
        if heading:
            self.heading(row, heading[2] or heading[3])
        elif example and self.mode == "text":
            self.end_example()
            item = Item(
                f"{self.section_id()}-example-{example[1]}",
                "example",
                self.section_id(),
                example[1],
                "example",
            )
            self.data.items.append(item)
            self.example = (item, Field(_BY, "\n"), Field(_BY, "\n"))
            self.blank, self.begun = False, False
        elif self.mode == "text":
            self.text(row)
        else:
            self.block.append(row)

    def section_id(self) -> str:
        if self.field is None:
            self.begin(_Row(0, ""), "")
        return self.section.id

    # headings and text

    def heading(self, row: _Row, title: str) -> None:
        self.end_block()
        self.end_example()
        practice, answers = _PRACTICE.match(title), _ANSWERS.match(title)
        if row.text.startswith("# ") and not self.title:
            self.title = title
        if re.match(r"Chapter\s+\d+", title):
            self.chapter = title
        if practice or answers:
            self.mode = "practice" if practice else "answers"
            self.target = (practice or answers)[1]
            self.add(row)
            if practice:
                self.sets.setdefault(self.target, {})
            elif self.target not in self.sets:
                self.data.notes.append(f"answers of {self.target} have no practice")
        else:
            self.mode = "text"
            self.begin(row, title)

    def begin(self, row: _Row, title: str) -> None:
        self.end_section()
        order = len(self.data.sections)
        number = re.match(r"\d+(?:\.\d+)?", title)
        chapter = number[0].partition(".")[0] if number else self.chapter
        self.section = Section(
            f"s{order}",
            f"Chapter {chapter}" if number else chapter,
            number[0] if number else "",
            title,
            order,
        )
        self.data.sections.append(self.section)
        self.field = Field(_BY, "\n")
        if row.text:
            self.add(row)

    def end_section(self) -> None:
        if self.field is not None and self.field.text:
            self.section.text = self.field.text
            self.section.spans["text"] = self.field.origin("rendered")

    def add(self, row: _Row) -> None:
        if self.field is None:
            self.begin(_Row(row.start, ""), "")
        if row.text.strip():
            self.field.add(row.text, self.file.span(row.start, row.start + len(row.text)))

    def text(self, row: _Row) -> None:
        """A line of text, or of the open example: its question up to an empty line, or to what
        stands beside it on the right; then the reasoning, up to a paragraph of prose."""
        if self.example is None:
            self.add(row)
            return
        if not row.text.strip():
            self.blank = self.begun
            return
        _, question, reasoning = self.example
        if self.blank and _is_prose(row.text):
            self.end_example()
            self.add(row)
            return
        gap = re.search(r"(?<=\S)\s{3,}(?=\S)", row.text)
        if self.blank or reasoning.texts:
            gap = None
        if gap:  # the problem on the left, what is done with it on the right
            question.add(
                row.text[: gap.start()], self.file.span(row.start, row.start + gap.start())
            )
            rest = row.text[gap.end() :]
            reasoning.add(rest, self.file.span(row.start + gap.end(), row.start + len(row.text)))
        else:
            field = reasoning if self.blank or reasoning.texts else question
            field.add(row.text, self.file.span(row.start, row.start + len(row.text)))
        self.begun, self.blank = True, False

    def end_example(self) -> None:
        if self.example is None:
            return
        item, question, reasoning = self.example
        for name, field in (("question", question), ("reasoning", reasoning)):
            if field.text:
                setattr(item, name, field.text)
                item.spans[name] = field.origin("rendered")
        if not reasoning.text:
            item.flags.append("no solution heading")
        item.flags.append("layout")
        self.example = None

    def finish(self) -> None:
        self.end_example()
        self.end_section()
        for number, items in self.sets.items():
            if items and not any(item.answer or "layout" in item.flags for item in items.values()):
                self.data.notes.append(f"{number}: no answers")

    # blocks of entries

    def end_block(self) -> None:
        rows, self.block = self.block, []
        if not rows:
            return
        cells = _cells(rows)
        _judge(rows, cells)
        taken = {row for cell in cells for row in (cell.row, *cell.rows)}
        instruction = ""
        shared: list[_Row] = []
        order = sorted(cells, key=lambda cell: cell.number) if self.mode == "answers" else cells
        if self.mode == "answers":
            for row in rows:
                if _is_text(row) and row.text and rows.index(row) not in taken:
                    self.add(row)
            for cell in order:
                self.answer(cell)
            return
        for number, row in enumerate(rows):
            if any(cell.row == number for cell in cells):
                for cell in [cell for cell in cells if cell.row == number]:
                    self.exercise(cell, shared)
                instruction = ""
            elif row.text.strip() and number not in taken:
                if re.match(r"\s{0,8}[A-Z][a-z]+\b.*[a-z]{3}", row.text) and _is_text(row):
                    shared = [*shared, row] if instruction else [row]
                    instruction = row.text
                self.add(row)

    def exercise(self, cell: _Cell, shared: list[_Row]) -> None:
        items = self.sets[self.target]
        item = Item(
            f"{self.section_id()}-exercise-{self.target}-{cell.number}",
            "exercise",
            self.section.id,
            str(cell.number),
            "practice",
        )
        if cell.number in items:
            item.id += f"-{len(self.data.items)}"
            item.flags.append("number occurs twice")
        items.setdefault(cell.number, item)
        self.data.items.append(item)
        field = Field(_BY, "\n")
        for row in shared:
            field.add(row.text.strip(), self.file.span(row.start, row.start + len(row.text)))
        item.instruction = "\n".join(row.text.strip() for row in shared)
        field.add(cell.text, self.file.span(cell.start, cell.end))
        if not cell.trusted:
            item.flags.append("layout")
        if field.text:
            item.question = field.text
            item.spans["question"] = field.origin("joined" if shared else "rendered")

    def answer(self, cell: _Cell) -> None:
        item = self.sets.get(self.target, {}).get(cell.number)
        if item is None:
            self.data.notes.append(f"{self.target}: answer {cell.number} has no exercise")
        elif item.answer:
            item.flags.append("a second answer")
        elif not cell.trusted or not cell.text:
            item.flags.append("answer: layout")
        else:
            field = Field(_BY)
            field.add(cell.text, self.file.span(cell.start, cell.end))
            item.answer, item.spans["answer"] = field.text, field.origin("rendered")


def _cells(rows: list[_Row]) -> list[_Cell]:
    out = []
    for number, row in enumerate(rows):
        markers = list(_CELL.finditer(row.text))
        ends = [marker.start() for marker in markers[1:]] + [len(row.text)] * bool(markers)
        for marker, end in zip(markers, ends, strict=True):
            text = row.text[marker.end() : end]
            start = row.start + marker.end() + len(text) - len(text.lstrip())
            stop = row.start + marker.end() + len(text.rstrip())
            cell = _Cell(
                int(marker[1] or marker[2]),
                marker.start(),
                marker.end() + len(text.rstrip()),
                number,
                start,
                max(start, stop),
                text.strip(),
            )
            out.append(cell)
        if not markers and out and _goes_on(rows, number, out):
            last = out[-1]
            last.text += "\n" + row.text.strip()
            last.end, last.rows = row.start + len(row.text), (*last.rows, number)
    return out


def _goes_on(rows: list[_Row], number: int, cells: list[_Cell]) -> bool:
    """Whether a line without an entry is the next line of the only entry of the line before."""
    last = cells[-1]
    alone = len(cells) < 2 or cells[-2].row != last.row
    follows = last.rows[-1] == number - 1 if last.rows else last.row == number - 1
    return alone and follows and _is_text(rows[number]) and len(last.text.split()) >= 5


def _judge(rows: list[_Row], cells: list[_Cell]) -> None:
    """Mark the cells that cannot be trusted."""
    by_row: dict[int, list[_Cell]] = {}
    for cell in cells:
        by_row.setdefault(cell.row, []).append(cell)
    for cell in cells:
        beside = [n for n in (cell.row - 1, cell.row + 1) if 0 <= n < len(rows)]
        for number in beside:
            text = rows[number].text
            if number in cell.rows:
                continue
            if text.strip() and not by_row.get(number) and not _is_text(rows[number]):
                cell.trusted = False
            leading = by_row.get(number, [None])[0]
            if leading is not None and text[: leading.column].strip():
                cell.trusted = False  # a fragment stands before the next line's first entry
        before = rows[cell.row].text[: by_row[cell.row][0].column]
        if before.strip() or _FALLEN.search(cell.text) or re.search(r"\s{4,}\S", cell.text):
            cell.trusted = False
        if "√" in cell.text or "\ufffd" in cell.text:
            cell.trusted = False
    _in_order(cells)


def _in_order(cells: list[_Cell]) -> None:
    """A cell's number goes on from that of the cell above it in its column by the column's step."""
    columns: list[list[_Cell]] = []
    for cell in cells:
        near = [column for column in columns if abs(column[-1].column - cell.column) <= 4]
        if near:
            near[0].append(cell)
        else:
            columns.append([cell])
    for column in columns:
        steps = [b.number - a.number for a, b in itertools.pairwise(column)]
        step = max(set(steps), key=steps.count) if steps else 1
        for at, cell in enumerate(column):
            before = at == 0 or cell.number - column[at - 1].number in (step, 1)
            after = at + 1 == len(column) or column[at + 1].number - cell.number in (step, 1)
            if not before and not after:
                cell.trusted = False


def _is_prose(text: str) -> bool:
    """Whether a line is a sentence rather than a step of a calculation."""
    words = re.findall(r"[A-Za-z]{3,}", text)
    return len(words) >= 8 and not re.search(r"\S\s{3,}\S", text)


def _is_text(row: _Row) -> bool:
    return len(re.findall(r"[A-Za-z]{3,}", row.text)) >= 2
