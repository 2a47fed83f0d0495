"""The builder of textbooks: from a folder of sources to sections, examples and exercises, checked.

Into the workdir go `book.jsonl` (see `schema`), `chapters.json` in the older form, and the log of
corrections. A field that the independent check does not find in the files is left out, by name.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import runpy
from collections.abc import Callable
from pathlib import Path

from jaxdeep.data.build import Built
from jaxdeep.envs.textbook import (
    choose,
    cnxml,
    edits,
    finish,
    html_book,
    latex,
    markdown_book,
    pdf_text,
    report,
    schema,
    verify,
)
from jaxdeep.envs.textbook.files import Folder
from jaxdeep.envs.textbook.schema import Data
from jaxdeep.errors import ConfigError, DataError
from jaxdeep.workdir import write_atomic

FORMATS = ("cnxml", "latex", "html", "pdf", "pdf text", "markdown", "json")
_LICENCES = (
    (r"creativecommons\.org/publicdomain/zero|\bCC0\b", "CC0-1.0"),
    (r"creativecommons\.org/licenses/(by(?:-nc)?(?:-sa|-nd)?)/(\d\.\d)", ""),
    (r"Attribution-NonCommercial-ShareAlike (\d\.\d)", "CC-BY-NC-SA-{}"),
    (r"Attribution-NonCommercial (\d\.\d)", "CC-BY-NC-{}"),
    (r"Attribution-ShareAlike (\d\.\d)", "CC-BY-SA-{}"),
    (r"Attribution (\d\.\d)", "CC-BY-{}"),
    (r"GNU Free Documentation License", "GFDL-1.3-or-later"),
    (r"\bMIT License\b", "MIT"),
    (r"Apache License,? Version 2", "Apache-2.0"),
)


@dataclasses.dataclass(frozen=True)
class Textbook:
    """`source` is a folder or a file: CNXML with its collection, LaTeX, HTML, PDF or text of one,
    Markdown, or a file that this builder wrote; `format` names one of them where the folder holds
    several. `root` is the main file of a LaTeX book, `collection` chooses among several books of
    OpenStax. `edits` is a file of corrections. `chooser` names a function of a prompt that returns
    a model's answer ("module:NAME" or "FILE.py:NAME"), for what the rules missed. About the share
    `test` of the items is for testing. `title` and `licence` (SPDX) are used where the book says
    none."""

    source: str
    format: str = ""
    root: str = ""
    collection: str = ""
    edits: str = ""
    chooser: str = ""
    title: str = ""
    licence: str = ""
    test: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        if self.format and self.format not in FORMATS:
            raise ConfigError(f"data.format={self.format!r} is none of {', '.join(FORMATS)}")
        if not 0 <= self.test <= 1:
            raise ConfigError(f"data.test={self.test} is a share, from 0 to 1")

    def build(self, workdir: Path) -> Built:
        """Read the book, check it, and write it with its report."""
        data, folder = self.read(workdir)
        if not data.items and not any(section.text for section in data.sections):
            raise DataError(
                f"{self.source} holds no text that could be read as {data.book.profile}"
            )
        left_out = {} if folder is None else leave_out(data, folder)
        finish.finish(data, test=self.test, seed=self.seed)
        log = edits.apply(data, edits.read(Path(self.edits))) if self.edits else []
        files = [workdir / "book.jsonl", workdir / "chapters.json"]
        schema.write(files[0], data)
        text = json.dumps(schema.chapters(data), ensure_ascii=False, indent=2)
        write_atomic(files[1], text + "\n")
        if self.edits:
            files.append(workdir / "edits.jsonl")
            write_atomic(
                files[2], "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in log)
            )
        summary = report.summarize(data, folder, left_out) | {"edits": len(log)}
        return Built(
            data.book.title or data.book.id,
            report.table(data),
            report.notes(summary),
            summary,
            files,
        )

    def read(self, workdir: Path) -> tuple[Data, Folder | None]:
        """The book as its reader finds it, and its folder; None for a book that comes as data."""
        path = Path(self.source)
        folder = Folder(path)
        form = self.format or _format(folder)
        if form == "json":
            return schema.read(_only_json(folder)), None
        if form == "pdf":
            names = folder.names(".pdf")
            if len(names) != 1:
                raise DataError(f"{path} holds {len(names)} PDF files: give one as data.source")
            folder = Folder(pdf_text.convert(folder.root / names[0], workdir / "pdf"))
            form = "pdf text"
        data = self._reader(form, folder)()
        if self.chooser:
            chosen = choose.choose(data, folder, _named(self.chooser))
            data.notes.append(f"a model chose {chosen.added} items")
            data.notes += [f"refused: {why}" for why in chosen.refused]
        others = [name for name in FORMATS[:3] if name != form and _holds(folder, name)]
        data.notes += [f"the folder also holds {name}, which is not read" for name in others]
        licence = data.book.licence or self.licence or licence_of(folder)
        title = data.book.title or self.title
        data.book = dataclasses.replace(
            data.book, licence=licence, title=title, sha256=folder.sha256, source=self.source
        )
        return data, folder

    def _reader(self, form: str, folder: Folder) -> Callable[[], Data]:
        return {
            "cnxml": lambda: cnxml.read(folder, self.collection),
            "latex": lambda: latex.read(folder, self.root),
            "html": lambda: html_book.read(folder),
            "pdf text": lambda: pdf_text.read(folder),
            "markdown": lambda: markdown_book.read(folder),
        }[form]


def _holds(folder: Folder, form: str) -> bool:
    return {"cnxml": cnxml.found, "latex": latex.found, "html": html_book.found}[form](folder)


def _format(folder: Folder) -> str:
    """The format of what the folder holds, the richest first."""
    tests = (
        ("cnxml", cnxml.found),
        ("latex", latex.found),
        ("html", html_book.found),
        ("pdf text", pdf_text.found),
        ("markdown", markdown_book.found),
        ("pdf", lambda folder: bool(folder.names(".pdf"))),
        ("json", lambda folder: bool(folder.names(".jsonl", ".json"))),
    )
    for name, found in tests:
        if found(folder):
            return name
    raise DataError(
        f"{folder.root} holds no CNXML, LaTeX, HTML, Markdown, text, PDF or JSON: nothing to read"
    )


def _only_json(folder: Folder) -> Path:
    names = folder.names(".jsonl", ".json")
    if len(names) != 1:
        raise DataError(f"{folder.root} holds {len(names)} JSON files: give one as data.source")
    return folder.root / names[0]


def leave_out(data: Data, folder: Folder) -> dict[str, str]:
    """Empty the fields that the independent check does not find where their spans point, and return
    them as {"item.field": why}. An item without its question goes as a whole."""
    out = {}
    for row in (*data.sections, *data.items):
        for name in verify.FIELDS:
            text = getattr(row, name, "")
            why = verify.failure(text, row.spans.get(name), folder) if text else ""
            if why:
                out[f"{row.id}.{name}"] = why
                setattr(row, name, "")
                row.spans.pop(name, None)
    data.items = [item for item in data.items if f"{item.id}.question" not in out]
    return out


def licence_of(folder: Folder) -> str:
    """The SPDX identifier of the licence that a file of the folder's top says; "" where none
    does."""
    names = sorted(path.name for path in folder.root.iterdir() if path.is_file())
    licences = [n for n in names if re.match(r"(?:licen[cs]e|copying|copyright|readme)", n, re.I)]
    files = [file for name, file in folder.read.items() if not name.lower().endswith("html")]
    texts = [file.text for file in files[:50]]  # of a web page the links may be to anything
    for text in [*(folder.file(name).text for name in licences), *texts]:
        for pattern, spdx in _LICENCES:
            match = re.search(pattern, text[:200_000], re.I)
            if match and not spdx:
                return f"CC-{match[1].upper()}-{match[2]}"
            if match:
                return spdx.format(*match.groups())
    return ""


def _named(name: str) -> Callable[[str], str]:
    """The function that "module:NAME" or "FILE.py:NAME" names."""
    place, _, attribute = name.rpartition(":")
    try:
        if place.endswith(".py"):
            found = runpy.run_path(place).get(attribute)
        else:
            found = getattr(importlib.import_module(place), attribute, None)
    except (ImportError, OSError, ValueError) as error:
        raise ConfigError(f"data.chooser={name!r} cannot be imported: {error}") from error
    if not callable(found):
        raise ConfigError(f"data.chooser={name!r}: {place} has no function {attribute!r}")
    return found
