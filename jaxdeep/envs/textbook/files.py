"""The files of a book: read once, inside its folder only, in whatever encoding they are."""

from __future__ import annotations

import codecs
import hashlib
import re
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path, PurePosixPath

from jaxdeep.envs.textbook.schema import Span
from jaxdeep.errors import DataError

LARGEST = 64 * 2**20  # bytes of one file
MOST = 20_000  # files of a book
_DECLARED = re.compile(rb"""(?:encoding|charset)\s*=\s*["']?([A-Za-z0-9_.:-]+)""")


class File:
    """One file: its bytes, its text, and where the characters of the text stand in the bytes."""

    def __init__(self, name: str, data: bytes) -> None:
        self.name, self.data = name, data
        self.encoding = encoding_of(data)
        self.text = data.decode(self.encoding, "surrogateescape")
        self._wide: tuple[list[int], list[int]] | None = None

    def span(self, start: int, end: int) -> Span:
        """The bytes of the characters from `start` to `end`."""
        return Span(self.name, self.byte(start), self.byte(end))

    def byte(self, at: int) -> int:
        """Where the character with this index begins."""
        if len(self.text) == len(self.data):
            return at
        if self.encoding not in ("utf-8", "utf-8-sig"):
            return len(self.text[:at].encode(self.encoding, "surrogateescape"))
        if self._wide is None:
            found = [
                (m.start(), len(m[0].encode("utf-8", "surrogateescape")) - 1)
                for m in re.finditer(r"[^\x00-\x7f]", self.text)
            ]
            self._wide = [at for at, _ in found], [0, *accumulate(extra for _, extra in found)]
        places, extra = self._wide
        return at + extra[bisect_right(places, at - 1)] + 3 * (self.encoding == "utf-8-sig")


def encoding_of(data: bytes) -> str:
    """UTF-8 where the bytes are, or what a mark or a declaration in them says; else Windows-1252,
    or Latin-1 where that does not fit either."""
    for mark, name in (
        (codecs.BOM_UTF8, "utf-8-sig"),
        (codecs.BOM_UTF16_LE, "utf-16"),
        (codecs.BOM_UTF16_BE, "utf-16"),
    ):
        if data.startswith(mark):
            return name
    declared = _DECLARED.search(data[:1000])
    for name in ("utf-8", declared[1].decode() if declared else "", "cp1252"):
        try:
            data.decode(codecs.lookup(name).name if name else "utf-8")
            return codecs.lookup(name).name if name else "utf-8"
        except (UnicodeDecodeError, LookupError):
            continue
    return "iso8859-1"


class Folder:
    """The folder of a book, or one file as a folder of its own. Whatever is read is remembered, and
    counted in `sha256`. A path that leads out of the folder is refused, links followed."""

    def __init__(self, path: Path) -> None:
        if not path.exists():
            raise DataError(f"{path} does not exist: give the folder or the file of a book")
        self.root = path if path.is_dir() else path.parent
        self.only = None if path.is_dir() else path.name
        self.read: dict[str, File] = {}

    def names(self, *suffixes: str) -> list[str]:
        """The files that end so, in the order of their names, hidden ones left out."""
        if self.only:
            return [self.only] if self.only.lower().endswith(suffixes) else []
        found = []
        for path in sorted(self.root.rglob("*")):
            name = path.relative_to(self.root).as_posix()
            hidden = any(part.startswith(".") for part in PurePosixPath(name).parts)
            if not hidden and path.is_file() and name.lower().endswith(suffixes):
                found.append(name)
            if len(found) > MOST:
                raise DataError(f"{self.root} has more than {MOST} files that end in {suffixes}")
        return found

    def inside(self, name: str) -> bool:
        """Whether the name is that of a file in the folder."""
        try:
            path = (self.root / name).resolve()
            return path.is_relative_to(self.root.resolve()) and path.is_file()
        except (OSError, ValueError):
            return False

    def file(self, name: str) -> File:
        """The file of that name. DataError where it is not in the folder, or too large."""
        name = str(PurePosixPath(name))
        if name not in self.read:
            path = self.root / name
            if not self.inside(name):
                raise DataError(f"{name!r} is no file inside {self.root}")
            if path.stat().st_size > LARGEST:
                raise DataError(f"{path} has more than {LARGEST >> 20} MiB")
            self.read[name] = File(name, path.read_bytes())
        return self.read[name]

    @property
    def sha256(self) -> str:
        """Of the names and bytes of all files read."""
        digest = hashlib.sha256()
        for name in sorted(self.read):
            digest.update(name.encode() + b"\0" + self.read[name].data + b"\0")
        return digest.hexdigest()
