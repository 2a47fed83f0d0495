"""Corrections of a book's items by a person: a line of JSON each, applied in order and logged.

{"id": "m81243-fs-1", "drop": true, "why": "the picture is the question"}
{"id": "m81243-fs-2", "set": {"final": "18"}, "why": "a footnote's digit", "by": "K. M."}
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jaxdeep.envs.textbook.schema import Data, Item
from jaxdeep.errors import DataError

SETTABLE = ("question", "reasoning", "answer", "final", "answer_kind", "number", "role", "split")
_KEYS = {"id", "drop", "set", "why", "by"}


def read(path: Path) -> list[dict[str, Any]]:
    """The corrections in a file. DataError names the line that is none."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    return [_edit(line, f"{path}:{n}") for n, line in enumerate(lines, 1) if line.strip()]


def _edit(line: str, where: str) -> dict[str, Any]:
    try:
        edit = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where} is not JSON: {error}") from error
    if not isinstance(edit, dict) or not isinstance(edit.get("id"), str) or edit.keys() - _KEYS:
        raise DataError(
            f'{where} is not {{"id": ..., "drop": true}} or {{"id": ..., "set": {{...}}}}'
        )
    if ("set" in edit) == bool(edit.get("drop")):
        raise DataError(f"{where}: an edit has either drop or set")
    values = edit.get("set", {})
    wrong = [k for k, v in values.items() if k not in SETTABLE or not isinstance(v, str)]
    if wrong:
        raise DataError(f"{where}: {wrong[0]} cannot be set; texts of {', '.join(SETTABLE)} can")
    return edit


def apply(data: Data, edits: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Apply corrections in place and return the log, with what was there before. DataError for an
    item that the book does not have."""
    items = {item.id: item for item in data.items}
    log = []
    for edit in edits:
        item = items.get(edit["id"])
        if item is None:
            raise DataError(f"an edit is for the item {edit['id']!r}, which the book does not have")
        log.append(_apply(data, item, edit))
        if edit.get("drop"):
            del items[item.id]
    return log


def _apply(data: Data, item: Item, edit: dict[str, Any]) -> dict[str, Any]:
    entry = {"id": item.id, "why": edit.get("why", ""), "by": edit.get("by", "")}
    if edit.get("drop"):
        data.items.remove(item)
        return entry | {"dropped": {"question": item.question, "answer": item.answer}}
    before = {name: getattr(item, name) for name in edit["set"]}
    for name, value in edit["set"].items():
        setattr(item, name, value)
        item.spans.pop(name, None)  # a person's text stands in no file
    item.flags.append(f"edited: {', '.join(edit['set'])}")
    return entry | {"before": before, "after": edit["set"]}
