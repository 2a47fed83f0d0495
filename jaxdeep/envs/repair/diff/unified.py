"""Unified diffs, as `diff -u` and `git diff` write them and as models write them.

Git's extended headers are read: new and deleted files, renames, copies, modes, binary contents, and
paths in C quotes. The counts in hunk headers are not trusted, since models miscount; where they are
right they tell what belongs to a hunk. A line without anything in it is blank context.

A hunk is placed where its header says, if its lines are there; else in the only place where they
are; else where they are but for one or two outer lines of context, if that is one place. Line
endings that the diff gets wrong do not matter: the file keeps its own.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterator, Sequence

from jaxdeep.envs.repair.diff.common import (
    NO_NEWLINE,
    DiffError,
    Files,
    body_of,
    check_new,
    check_path,
    ending_of,
    find,
    quote,
    split_lines,
    unquote,
)

_HUNK = re.compile(r"@@ -(\d+)(?:,(\d+))? \+\d+(?:,(\d+))? @@(.*)|@@(?!@)(.*)")
_LINK_MODES = ("120000", "160000")  # symbolic link, submodule
_OUTER = 2  # lines of context that may be dropped at each end of a hunk


@dataclasses.dataclass(frozen=True, slots=True)
class Hunk:
    """Changed lines with context. `start` is the first old line by the header, from 1 (for a hunk
    without old lines the line it comes after); None where the header has no numbers. `lines` begin
    with a space, `-` or `+` and end with a line feed, unless the file's last line has none."""

    start: int | None
    lines: tuple[str, ...]
    section: str = ""

    def old(self) -> list[str]:
        """The lines it expects to find."""
        return [line[1:] for line in self.lines if line[0] != "+"]

    def new(self) -> list[str]:
        """The lines it leaves."""
        return [line[1:] for line in self.lines if line[0] != "-"]


@dataclasses.dataclass(frozen=True, slots=True)
class FileDiff:
    """What happens to one file. `old` is None for a new file, `new` for a deleted one; they differ
    for a rename, and for a copy, which has `copy`. `binary` is git's text of binary contents."""

    old: str | None
    new: str | None
    hunks: tuple[Hunk, ...] = ()
    old_mode: str | None = None
    new_mode: str | None = None
    copy: bool = False
    binary: str = ""

    @property
    def path(self) -> str:
        """The path of the file, the new one of a rename."""
        path = self.new if self.new is not None else self.old
        assert path is not None
        return path


@dataclasses.dataclass(frozen=True, slots=True)
class UnifiedPatch:
    """The changes of a diff, applied in order."""

    files: tuple[FileDiff, ...]

    def apply(self, files: Files, symlinks: frozenset[str] = frozenset()) -> dict[str, str | None]:
        """The files after the patch; the argument is left as it is. `symlinks`: paths of the folder
        that are symbolic links or submodules, which are not written to or through. Modes are not
        part of a map of texts: a change of mode alone leaves it as it is.

        Raises `DiffError`, and then nothing is applied."""
        result = dict(files)
        for diff in self.files:
            _apply(diff, result, symlinks)
        return result

    def paths(self) -> list[str]:
        """The paths that are changed, made or deleted, each once, in order."""
        both = (path for diff in self.files for path in (diff.old, diff.new))
        return list(dict.fromkeys(path for path in both if path is not None))

    def text(self) -> str:
        """The diff in git's form, which `parse` reads back as an equal patch."""
        return "".join(_render(diff) for diff in self.files)


def parse(text: str) -> UnifiedPatch:
    """The diff in a text. Raises `DiffError("unparsable")` for a text without a change in it, and
    for hunks without the path of their file."""
    lines = text.split("\n")
    if lines[-1] == "":
        lines.pop()
    files, index = [], 0
    while index < len(lines):
        if lines[index].startswith("diff --git "):
            diff, index = _git(lines, index)
            files.append(diff)
        elif _is_header(lines, index):
            old, new = _names(lines[index][4:], lines[index + 1][4:])
            hunks, index = _hunks(lines, index + 2)
            files.append(FileDiff(old, new, hunks, *_modes(old, new, None, None)))
        elif lines[index].startswith("@@@"):
            raise DiffError("unparsable", f"line {index + 1}: a diff of a merge cannot be applied")
        elif _HUNK.fullmatch(lines[index]):
            raise DiffError("unparsable", f"line {index + 1}: a hunk without the path of its file")
        else:
            index += 1
    if not files:
        raise DiffError("unparsable", "no diff")
    for diff in files:
        if (
            not (diff.hunks or diff.binary)
            and diff.old == diff.new
            and diff.old_mode == diff.new_mode
        ):
            raise DiffError("unparsable", f"no hunk for {diff.path!r}", path=diff.path)
    return UnifiedPatch(tuple(files))


def _is_header(lines: Sequence[str], index: int) -> bool:
    pair = index + 1 < len(lines) and lines[index + 1].startswith("+++ ")
    return pair and lines[index].startswith("--- ")


def _git(lines: list[str], index: int) -> tuple[FileDiff, int]:
    """One file of a git diff, from its line `diff --git`."""
    values = {}
    old, new = _git_names(lines[index].removesuffix("\r")[len("diff --git ") :])
    first, index = index, index + 1
    pattern = re.compile(
        r"(old mode|new mode|new file mode|deleted file mode|rename from|rename to|copy from"
        r"|copy to|similarity index|dissimilarity index|index) (.*?)\r?"
    )
    while index < len(lines) and (match := pattern.fullmatch(lines[index])):
        values[match.group(1)] = match.group(2)
        index += 1
    for key in ("rename", "copy"):
        if f"{key} from" in values and f"{key} to" in values:
            old, new = (_name(values[f"{key} {end}"]) for end in ("from", "to"))
    hunks: tuple[Hunk, ...] = ()
    binary = ""
    if index < len(lines) and _is_header(lines, index):
        a, b = _names(lines[index][4:], lines[index + 1][4:])
        if "rename from" not in values and "copy from" not in values:
            old, new = a, b
        hunks, index = _hunks(lines, index + 2)
    elif index < len(lines) and re.match(r"GIT binary patch|Binary files ", lines[index]):
        start = index
        while index < len(lines) and not lines[index].startswith(("diff --git ", "-- ")):
            index += 1
        binary = "\n".join(lines[start:index]).rstrip("\n") + "\n"
    if old is None and new is None:
        raise DiffError("unparsable", f"line {first + 1}: no path in {lines[first]!r}")
    if "new file mode" in values:
        old = None
    if "deleted file mode" in values:
        new = None
    mode = values.get("index", "").partition(" ")[2] or None
    old_mode = values.get("old mode") or values.get("deleted file mode") or mode
    new_mode = values.get("new mode") or values.get("new file mode") or mode
    modes = _modes(old, new, old_mode, new_mode)
    copy = "copy from" in values
    return FileDiff(old, new, hunks, *modes, copy, binary), index


def _modes(
    old: str | None, new: str | None, old_mode: str | None, new_mode: str | None
) -> tuple[str | None, str | None]:
    """Modes in one way of writing: None for a file that is not there, and for both where a file
    stays an ordinary one."""
    before = None if old is None else old_mode or "100644"
    after = None if new is None else new_mode or "100644"
    return (None, None) if before == after == "100644" else (before, after)


def _name(text: str) -> str:
    return unquote(text)[0] if text.startswith('"') else text


def _git_names(text: str) -> tuple[str | None, str | None]:
    """The two paths of a line `diff --git`; None where it does not say where one ends."""
    if text.startswith('"'):
        old, rest = unquote(text)
        return _unprefixed(old, _name(rest.strip()))
    if text.endswith('"'):
        old, _, new = text.partition(' "')
        return _unprefixed(old, _name('"' + new))
    # unquoted paths may have spaces, but without a rename both are the same
    half = len(text) // 2
    old, new = text[:half], text[half + 1 :]
    if text[half : half + 1] == " " and _unprefixed(old, new)[0] == _unprefixed(old, new)[1]:
        return _unprefixed(old, new)
    old, _, new = text.partition(" ")
    return _unprefixed(old, new) if new and " " not in new else (None, None)


def _names(old: str, new: str) -> tuple[str | None, str | None]:
    """The paths of the lines `---` and `+++`; None is /dev/null."""
    paths = []
    for text in (old, new):
        text = text.removesuffix("\r")
        quoted = text.startswith('"')
        # a tab ends the path: a time follows, or nothing, after a path with spaces
        paths.append(unquote(text)[0] if quoted else text.partition("\t")[0].rstrip(" "))
    null = [path == "/dev/null" for path in paths]
    if all(null):
        raise DiffError("unparsable", "both sides of a diff are /dev/null")
    plain = ["a/" if null[0] else paths[0], "b/" if null[1] else paths[1]]
    first, second = _unprefixed(*plain)
    return (None if null[0] else first), (None if null[1] else second)


def _unprefixed(old: str, new: str) -> tuple[str, str]:
    """The paths without `a/` and `b/`, where both have theirs."""
    if old.startswith("a/") and new.startswith("b/"):
        return old[2:], new[2:]
    return old, new


def _hunks(lines: list[str], index: int) -> tuple[tuple[Hunk, ...], int]:
    hunks = []
    while index < len(lines):
        head = _HUNK.fullmatch(lines[index].removesuffix("\r"))
        if not head:
            if lines[index].strip():
                break
            index += 1
            continue
        counts = (int(head[2] or 1), int(head[3] or 1)) if head[1] else None
        end = _counted_end(lines, index + 1, counts) or _seen_end(lines, index + 1)
        body = _body(lines[index + 1 : end], index + 2)
        start = int(head[1]) if head[1] else None
        old = sum(line[0] != "+" for line in body)
        if start is not None and counts and counts[0] == 0 and old:
            start += 1  # the header counts no old line, so it names the line before the first
        if start is not None and counts and counts[0] > 0 and not old:
            start = max(0, start - 1)
        hunks.append(Hunk(start, tuple(body), head[4] if head[1] else head[5]))
        index = end
    if not hunks:
        raise DiffError("unparsable", f"line {index}: no hunk after {lines[index - 1]!r}")
    return tuple(hunks), index


def _counted_end(lines: list[str], index: int, counts: tuple[int, int] | None) -> int | None:
    """Where the hunk ends by the counts of its header; None if they are wrong."""
    old, new = counts or (-1, -1)
    while (old > 0 or new > 0) and index < len(lines):
        mark = lines[index][:1] or " "
        if mark == "\\":
            index += 1
            continue
        old, new = old - (mark in " -\r"), new - (mark in " +\r")
        if mark not in " -+\r":
            return None
        index += 1
    if old or new:
        return None
    if index < len(lines) and lines[index].startswith("\\"):
        index += 1
    rest = next((line for line in lines[index:] if line.strip()), "@@")
    more = rest[0] in " -+" and not rest.startswith("-- ") and rest.rstrip() != "--"
    following = index + next((i for i, line in enumerate(lines[index:]) if line.strip()), 0)
    return None if more and not _is_header(lines, following) else index


def _seen_end(lines: list[str], index: int) -> int:
    """Where the hunk ends by what its lines begin with. Blank lines at its end are not its own."""
    start = index
    while index < len(lines):
        line = lines[index]
        header = _is_header(lines, index) and lines[index + 2 : index + 3]
        if header and _HUNK.fullmatch(header[0].removesuffix("\r")):
            break
        if re.match(r"-- ?\r?$", line) and re.match(r"\d+\.\d+", "".join(lines[index + 1 :][:1])):
            break  # the signature of a mail
        if line.strip("\r") and line[0] not in " -+\\":
            break
        index += 1
    while index > start and not lines[index - 1].strip("\r"):
        index -= 1
    return index


def _body(lines: list[str], number: int) -> list[str]:
    """The lines of a hunk; `number` is the line of the text that they begin at."""
    body: list[str] = []
    for offset, line in enumerate(lines):
        if line.startswith("\\"):
            if not body:
                raise DiffError(
                    "unparsable", f"line {number + offset}: a hunk begins with {line!r}"
                )
            body[-1] = body[-1].removesuffix("\n")
        else:
            body.append((line if line.strip("\r") else " " + line) + "\n")
    if not body:
        raise DiffError("unparsable", f"line {number - 1}: a hunk without lines")
    return body


def _apply(diff: FileDiff, files: dict[str, str | None], symlinks: frozenset[str]) -> None:
    """One file's change, made in `files`."""
    if diff.old_mode in _LINK_MODES or diff.new_mode in _LINK_MODES:
        message = f"{diff.path!r} is or becomes a symbolic link or a submodule"
        raise DiffError("outside", message, path=diff.path)
    present = [path for path, text in files.items() if text is not None]
    old = None if diff.old is None else _existing(diff.old, present, symlinks)
    new = None if diff.new is None else check_path(diff.new, symlinks)
    if diff.new == diff.old:
        new = old  # the same file, whatever prefix it was found by
    if diff.binary:
        raise DiffError("binary", f"{diff.path!r} is binary", path=diff.path)
    before = "" if old is None else files[old]
    assert before is not None
    after = _patched(diff, before)
    if new is None and after:
        message = f"the diff deletes {diff.old!r} but not all of its text"
        raise DiffError("conflict", message, path=diff.old)
    if old is not None and new == old and after == before and diff.old_mode == diff.new_mode:
        raise DiffError("no_change", f"the diff does not change {diff.path!r}", path=diff.path)
    if old is not None and not diff.copy:
        files[old] = None
        present.remove(old)
    if new is not None:
        if new != old:
            check_new(new, present)
        files[new] = after


def _existing(path: str, present: Sequence[str], symlinks: frozenset[str]) -> str:
    plain = check_path(path, symlinks)
    if plain not in present and path.startswith(("a/", "b/")):
        plain = check_path(path[2:], symlinks)  # a prefix on one side only
    if plain not in present:
        raise DiffError("not_found", f"there is no file {path!r}", path=path)
    return plain


def _patched(diff: FileDiff, text: str) -> str:
    """The text of a file after the hunks of its diff."""
    lines = split_lines(text)
    taken: list[tuple[int, int, list[str]]] = []  # old lines [start, end) and what replaces them
    for number, hunk in enumerate(diff.hunks, start=1):
        name = f"hunk {number} of {diff.path!r}"
        place, exact = _place(hunk, lines, name, diff.path)
        lead, trail = _outer(hunk)
        core = hunk.lines[lead : len(hunk.lines) - trail]
        start = place + lead
        end = start + sum(line[0] != "+" for line in core)
        if any(
            (start < stop and end > other) or start == other for other, stop, _ in taken if core
        ):
            raise DiffError("conflict", f"{name} overlaps another one", path=diff.path)
        taken += [(start, end, _result(core, lines, start, exact))] if core else []
    out: list[str] = []
    done = 0
    for start, end, new in sorted(taken, key=lambda item: item[:2]):
        out += lines[done:start] + new
        done = end
    out += lines[done:]
    for index, line in enumerate(out[:-1]):
        if not line.endswith("\n"):  # it was the last one, and is not any more
            out[index] += ending_of(lines, len(lines) - 1)
            out[-1] = body_of(out[-1])
    return "".join(out)


def _outer(hunk: Hunk) -> tuple[int, int]:
    """How many lines of context a hunk begins and ends with."""
    lead = next((i for i, line in enumerate(hunk.lines) if line[0] != " "), len(hunk.lines))
    trail = next((i for i, line in enumerate(reversed(hunk.lines)) if line[0] != " "), 0)
    return lead, trail


def _place(hunk: Hunk, lines: list[str], name: str, path: str) -> tuple[int, bool]:
    """The index of a hunk's first line, and whether its old lines stand there to the byte."""
    old = hunk.old()
    if not old:
        return _insertion(hunk, lines, name, path), True
    lead, trail = _outer(hunk)
    bare = [body_of(line) for line in lines]
    tried = None
    for drop in range(_OUTER + 1):
        front, back = min(drop, lead), min(drop, trail)
        part = old[front : len(old) - back]
        if not part or tried == (front, back):
            continue
        tried = (front, back)
        for exact in (True, False):
            places = find(part, lines) if exact else find([body_of(x) for x in part], bare)
            if not drop and hunk.start is not None and hunk.start - 1 in places:
                return hunk.start - 1, exact
            if len(places) > 1:
                numbers = [place + 1 for place in places]
                message = f"{name} fits at lines {', '.join(map(str, numbers))}"
                raise DiffError("ambiguous", message, path=path, lines=numbers)
            if places:
                return places[0] - front, exact
    raise DiffError("not_found", f"the old lines of {name} are not there", path=path)


def _insertion(hunk: Hunk, lines: list[str], name: str, path: str) -> int:
    """Where new lines without any context go."""
    if not lines:
        return 0
    if hunk.start is None:
        message = f"{name} has neither context nor a line number"
        raise DiffError("ambiguous", message, path=path)
    if hunk.start > len(lines):
        raise DiffError("not_found", f"{name} is beyond the end of the file", path=path)
    return hunk.start


def _result(core: Sequence[str], lines: list[str], place: int, exact: bool) -> list[str]:
    """What replaces the old lines of a hunk's core from `place` on. Context stays as it is in the
    file; new lines are as written where the old ones are, else they take the file's line ending."""
    ending, index, out = ending_of(lines, place), place, []
    for line in core:
        if line[0] == "+":
            out.append(line[1:] if exact else body_of(line[1:]) + ending)
        else:
            out += [lines[index]] if line[0] == " " else []
            index += 1
    if out and not exact and index == len(lines) > place and not lines[-1].endswith("\n"):
        out[-1] = body_of(out[-1])
    return out


def between(before: Files, after: Files) -> UnifiedPatch:
    """The diff that makes `after` of `before`, with three lines of context."""
    files = []
    for path in sorted({*before, *after}):
        old, new = before.get(path), after.get(path)
        if old != new:
            hunks = tuple(_make_hunks(split_lines(old or ""), split_lines(new or "")))
            gone, made = (None if text is None else path for text in (old, new))
            files.append(FileDiff(gone, made, hunks, *_modes(gone, made, None, None)))
    return UnifiedPatch(tuple(files))


def _make_hunks(a: list[str], b: list[str]) -> Iterator[Hunk]:
    # what both begin and end with needs no comparison, which is quadratic at worst
    limit = min(len(a), len(b))
    head = next((i for i in range(limit) if a[i] != b[i]), limit)
    limit -= head
    tail = next((i for i in range(limit) if a[-1 - i] != b[-1 - i]), limit)
    low, high = max(0, head - 3), max(0, tail - 3)
    a, b = a[low : len(a) - high], b[low : len(b) - high]
    matcher = difflib.SequenceMatcher(None, a, b, autojunk=len(a) * len(b) > 10**7)
    for group in matcher.get_grouped_opcodes(3):
        lines: list[str] = []
        for tag, i, j, k, m in group:
            if tag == "equal":
                lines += [" " + line for line in a[i:j]]
            else:
                lines += ["-" + line for line in a[i:j]] + ["+" + line for line in b[k:m]]
        count = group[-1][2] - group[0][1]
        yield Hunk(low + group[0][1] + (1 if count else 0), tuple(lines))


def _render(diff: FileDiff) -> str:
    first = diff.old if diff.old is not None else diff.new
    second = diff.new if diff.new is not None else diff.old
    assert first is not None and second is not None
    out = [f"diff --git {quote('a/' + first)} {quote('b/' + second)}\n"]
    if diff.old is None:
        out.append(f"new file mode {diff.new_mode or '100644'}\n")
    elif diff.new is None:
        out.append(f"deleted file mode {diff.old_mode or '100644'}\n")
    elif diff.old_mode != diff.new_mode:
        out += [f"old mode {diff.old_mode}\n", f"new mode {diff.new_mode}\n"]
    if diff.old is not None and diff.new is not None and (diff.copy or diff.old != diff.new):
        word = "copy" if diff.copy else "rename"
        out += [f"{word} from {quote(diff.old)}\n", f"{word} to {quote(diff.new)}\n"]
    if diff.old_mode and diff.old_mode == diff.new_mode:
        out.append(f"index 0000000..0000000 {diff.old_mode}\n")
    out.append(diff.binary)
    if diff.hunks:
        for mark, path, prefix in (("---", diff.old, "a/"), ("+++", diff.new, "b/")):
            name = "/dev/null" if path is None else quote(prefix + path)
            out.append(f"{mark} {name}" + ("\t\n" if " " in name and name[0] != '"' else "\n"))
    offset = 0  # how many lines more the new file has by now
    for hunk in diff.hunks:
        old, new = len(hunk.old()), len(hunk.new())
        if hunk.start is None:
            out.append(f"@@{hunk.section}\n")
        else:
            second_start = hunk.start + offset + (0 if old else 1) - (0 if new else 1)
            out.append(
                f"@@ -{_span(hunk.start, old)} +{_span(second_start, new)} @@{hunk.section}\n"
            )
        offset += new - old
        for line in hunk.lines:
            out.append(line if line.endswith("\n") else f"{line}\n{NO_NEWLINE}\n")
    return "".join(out)


def _span(start: int, count: int) -> str:
    return str(start) if count == 1 else f"{start},{count}"
