"""What both forms of a patch share: lines, paths, and the error that a bad patch raises.

A line ends at a line feed and nowhere else: `str.splitlines` also cuts at form feeds and seven
other characters, which are content of source files. A carriage return that no line feed follows is
content too. Bytes that are not UTF-8 are kept as surrogates (`errors="surrogateescape"`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal

Code = Literal[
    "unparsable",
    "not_found",
    "ambiguous",
    "no_change",
    "outside",
    "binary",
    "conflict",
    "inexpressible",
]
Files = Mapping[str, str | None]
"""Path to text; None, or no entry: there is no such file."""

NO_NEWLINE = "\\ No newline at end of file"
"""The line that says of the line before it that no line feed ends it, as git writes it."""


class DiffError(Exception):
    """A patch that cannot be read or applied. It is the fault of whoever wrote the patch.

    `code` is one of
      unparsable     the text is no patch of this form, or is cut off
      not_found      the file, or the text to change, is not there
      ambiguous      the text to change is there more than once (`lines` has where)
      no_change      the patch changes nothing
      outside        a path that leaves the folder, enters `.git`, or is or passes a symbolic link
      binary         binary contents, which a map of texts cannot take
      conflict       the file is there already, text is left in a deleted file, hunks overlap
      inexpressible  a change that this form has no words for, as a deletion in search/replace
    `path` is the file, where one is known; `lines` are line numbers from 1 in the file as it was
    when the change was tried.
    """

    def __init__(
        self, code: Code, message: str, *, path: str | None = None, lines: Sequence[int] = ()
    ) -> None:
        super().__init__(message)
        self.code, self.path, self.lines = code, path, tuple(lines)


def split_lines(text: str) -> list[str]:
    """The lines of a text, each with its line feed; the last one may have none."""
    lines = text.split("\n")
    last = lines.pop()
    return [line + "\n" for line in lines] + ([last] if last else [])


def body_of(line: str) -> str:
    """A line without its ending, `\\n` or `\\r\\n`."""
    return line[:-2] if line.endswith("\r\n") else line.removesuffix("\n")


def ending_of(lines: Sequence[str], index: int) -> str:
    """How the line at `index` ends, `\\r\\n` or `\\n`; if nothing ends it, how the one before
    does."""
    for line in lines[index::-1] if index >= 0 else ():
        if line.endswith("\n"):
            return "\r\n" if line.endswith("\r\n") else "\n"
    return "\n"


def find(needle: Sequence[str], lines: Sequence[str]) -> list[int]:
    """Every index where `needle` stands in `lines`, overlapping places included. Linear time in
    practice: places are sought by the needle's rarest line."""
    if not needle or len(needle) > len(lines):
        return []
    counts = dict.fromkeys(needle, 0)
    for line in lines:
        if line in counts:
            counts[line] += 1
    rarest = min(range(len(needle)), key=lambda i: counts[needle[i]])
    if not counts[needle[rarest]]:
        return []
    last = len(lines) - len(needle)
    starts = (i - rarest for i, line in enumerate(lines) if line == needle[rarest])
    wanted = list(needle)
    return [s for s in starts if 0 <= s <= last and lines[s : s + len(wanted)] == wanted]


def check_path(path: str, symlinks: frozenset[str] = frozenset()) -> str:
    """The path in its plain form (`./` and doubled slashes dropped).

    `symlinks`: paths of the folder that are symbolic links, or submodules. Raises
    `DiffError("outside")` for a path that is absolute, climbs with `..`, enters `.git`, or is or
    passes one of those.
    """
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if not parts or path.startswith("/") or "\0" in path or re.match(r"[A-Za-z]:[\\/]", path):
        raise DiffError("outside", f"{path!r} is not a path inside the folder", path=path)
    # names that Windows and macOS take for .git as well, as in git's own check
    if ".." in parts or any(re.fullmatch(r"(?i)\.git[ .]*|git~1", part) for part in parts):
        raise DiffError("outside", f"{path!r} leaves the folder or enters .git", path=path)
    for end in range(1, len(parts) + 1):
        if "/".join(parts[:end]) in symlinks:
            raise DiffError("outside", f"{path!r} is or passes a symbolic link", path=path)
    return "/".join(parts)


def check_new(path: str, present: Sequence[str]) -> None:
    """Raises `DiffError("conflict")` where a new file would lie below a file, or is a folder."""
    for other in present:
        if path == other or path.startswith(other + "/") or other.startswith(path + "/"):
            message = f"{path!r} cannot be created: there is {other!r}"
            raise DiffError("conflict", message, path=path)


_ESCAPES = {"a": 7, "b": 8, "t": 9, "n": 10, "v": 11, "f": 12, "r": 13, '"': 34, "\\": 92}
_LETTERS = {value: letter for letter, value in _ESCAPES.items()}


def quote(path: str, *, always: bool = False) -> str:
    """The path as git writes it in a diff: in double quotes with C escapes where it has control
    characters, quotes, backslashes or anything beyond ASCII (or `always`); else as it is."""
    data = path.encode("utf-8", "surrogateescape")
    if not always and all(32 <= byte < 127 and byte not in (34, 92) for byte in data):
        return path
    out = []
    for byte in data:
        if byte in _LETTERS:
            out.append("\\" + _LETTERS[byte])
        else:
            out.append(chr(byte) if 32 <= byte < 127 else f"\\{byte:03o}")
    return '"' + "".join(out) + '"'


def unquote(text: str) -> tuple[str, str]:
    """The path that a text in double quotes begins with, and what follows the closing quote.
    Raises `DiffError("unparsable")`."""
    out, rest = bytearray(), text[1:]
    while rest:
        if rest[0] == '"':
            return out.decode("utf-8", "surrogateescape"), rest[1:]
        octal = re.match(r"\\([0-3][0-7]{2})", rest)
        if octal:
            out.append(int(octal.group(1), 8))
            rest = rest[4:]
        elif rest[0] == "\\":
            if len(rest) < 2 or rest[1] not in _ESCAPES:
                break
            out.append(_ESCAPES[rest[1]])
            rest = rest[2:]
        else:
            out += rest[0].encode("utf-8", "surrogateescape")
            rest = rest[1:]
    raise DiffError("unparsable", f"a quoted path that does not end: {text!r}")
