"""Search/replace blocks.

    src/add.py
    <<<<<<< SEARCH
        return a - b
    =======
        return a + b
    >>>>>>> REPLACE

A fence is five or more equal marks. The opener's length decides where its block is divided and
closed, so that bodies may hold shorter markers (a file with merge conflicts). Bodies are verbatim,
blank lines included. The path is the last line with text before the fence, whatever Markdown it
wears; it may be missing where there is only one file.

The searched lines are whole lines. They are sought exactly; then whatever their line endings; then
whatever white space their lines end with; then with one indentation more or less in front of all of
them, which the replacement is given too. The first of these that fits anywhere must fit in exactly
one place. The replacement takes the line ending of the first line it replaces and ends with a line
feed if what it replaces did. It is verbatim where the search fits exactly and the block itself has
carriage returns, or says how the file ends: `\\ No newline at end of file` as the last line of a
body, as in unified diffs.

An empty search creates a file or fills an empty one, and nothing else.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterator

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

_OPENER = re.compile(r"(<{5,})[ \t]*SEARCH[ \t]*:?[ \t]*\r?", re.IGNORECASE)
_SHORT_OPENER = re.compile(r"<{1,4}[ \t]*SEARCH[ \t]*:?[ \t]*\r?", re.IGNORECASE)
_CODE_FENCE = re.compile(r"(?:`{3,}|~{3,})[\w+#-]*\s*")
_LABEL = re.compile(r"(?:file|path|filename|file path)[ \t]*:[ \t]*", re.IGNORECASE)
_SPACE = " \t\r\f\v"


@dataclasses.dataclass(frozen=True, slots=True)
class Block:
    """One change. `path` is None where the text names none; an empty `search` creates a file.
    Lines end with line feeds; a last line without one says that the file ends so."""

    path: str | None
    search: str
    replace: str


@dataclasses.dataclass(frozen=True, slots=True)
class BlockPatch:
    """Blocks, applied in order, each to the result of the one before."""

    blocks: tuple[Block, ...]

    def apply(self, files: Files, symlinks: frozenset[str] = frozenset()) -> dict[str, str | None]:
        """The files after the patch; the argument is left as it is. `symlinks`: paths of the folder
        that are symbolic links or submodules, which are not written to or through.

        Raises `DiffError`, and then nothing is applied."""
        result = dict(files)
        for block in self.blocks:
            path = _resolve(block, result, symlinks)
            result[path] = _replace(block, path, result.get(path))
        return result

    def paths(self) -> list[str]:
        """The paths that blocks name, each once, in order."""
        return list(dict.fromkeys(block.path for block in self.blocks if block.path))

    def text(self) -> str:
        """The blocks as text, which `parse` reads back as an equal patch."""
        return "\n".join(_render(block) for block in self.blocks)


def parse(text: str) -> BlockPatch:
    """The blocks in a text. Raises `DiffError("unparsable")` for a text without any, a block that
    is not closed, and one whose own marks occur in its body."""
    lines = text.split("\n")
    blocks, index, candidate = [], 0, None
    while index < len(lines):
        opener = _OPENER.fullmatch(lines[index])
        if opener:
            search, replace, index = _bodies(lines, index, len(opener.group(1)))
            blocks.append(Block(candidate, search, replace))
            candidate = None
            continue
        if _SHORT_OPENER.fullmatch(lines[index]):
            raise DiffError("unparsable", f"line {index + 1}: a fence has 5 marks or more")
        if lines[index].strip() and not _CODE_FENCE.fullmatch(lines[index].strip()):
            candidate = _path_in(lines[index])
        index += 1
    if not blocks:
        raise DiffError("unparsable", "no search/replace block")
    return BlockPatch(tuple(blocks))


def _bodies(lines: list[str], start: int, marks: int) -> tuple[str, str, int]:
    """Search and replacement of the block that opens at line `start`, and the line after it."""
    divider = re.compile(rf"={{{marks}}}[ \t]*\r?")
    closer = re.compile(rf">{{{marks}}}[ \t]*REPLACE[ \t]*\r?", re.IGNORECASE)
    opener = re.compile(rf"<{{{marks}}}[ \t]*SEARCH[ \t]*:?[ \t]*\r?", re.IGNORECASE)
    divided = None
    for index in range(start + 1, len(lines)):
        line = lines[index]
        if opener.fullmatch(line) or (closer.fullmatch(line) and divided is None):
            break
        if divider.fullmatch(line):
            if divided is not None:
                raise DiffError(
                    "unparsable",
                    f"line {index + 1}: a second divider of {marks} marks in the block that opens "
                    f"at line {start + 1}; use longer marks than the text itself has",
                )
            divided = index
        elif closer.fullmatch(line):
            assert divided is not None
            search = _body(lines[start + 1 : divided])
            return search, _body(lines[divided + 1 : index]), index + 1
    raise DiffError("unparsable", f"the block that opens at line {start + 1} is not closed")


def _body(lines: list[str]) -> str:
    if len(lines) > 1 and body_of(lines[-1]).removesuffix("\r") == NO_NEWLINE:
        return "\n".join(lines[:-1])
    return "".join(line + "\n" for line in lines)


def _path_in(line: str) -> str | None:
    """The path that a line of text is, without its Markdown; None for a line of prose."""
    line = line.strip()
    if line.startswith('"'):
        path, rest = unquote(line) if line.count('"') > 1 else ("", line)
        return path if path and rest in ("", ":") else None
    spans = re.findall(r"`([^`]+)`", line)
    if len(spans) == 1:
        return spans[0].strip() or None
    line = re.sub(r"^(?:#+|[-*+]|//)[ \t]+", "", line.strip("`"))
    line = _LABEL.sub("", line.strip("*"), count=1).strip()
    bare = line.removesuffix(":").strip("`'*")
    if not bare or re.search(r"\s", bare) or bare.startswith(("<", ">", "=")):
        return None
    if "/" not in bare and "." not in bare.rstrip(".") and line.endswith((":", ".", "!")):
        return None  # "Fix:" and "Done." are prose, "Makefile" is not
    return bare


def _resolve(block: Block, files: Files, symlinks: frozenset[str]) -> str:
    """The path of the file that a block is for."""
    present = [path for path, text in files.items() if text is not None]
    path = block.path
    if path is not None and path not in present:
        path = check_path(path, symlinks)
        prefixed = block.path.startswith(("a/", "b/"))
        if path not in present and prefixed and path[2:] in present:
            path = path[2:]
        elif path not in present and not block.search and prefixed:
            # the prefix of a diff, unless there is such a folder
            path = path if any(p.startswith(path[:2]) for p in present) else path[2:]
        elif path not in present and block.search and not re.search(r"[/.]", path):
            path = None  # a word, not a path
    if path is None:
        if len(present) != 1:
            raise DiffError("unparsable", "a block without the path of its file")
        path = present[0]
    check_path(path, symlinks)
    if path not in present:
        if block.search:
            raise DiffError("not_found", f"there is no file {path!r}", path=path)
        check_new(path, present)
    return path


def _replace(block: Block, path: str, text: str | None) -> str:
    """The text of a file after one block."""
    if text is not None and block.search == block.replace:
        raise DiffError("no_change", "search and replacement are equal", path=path)
    if not block.search:
        if text:
            message = f"{path!r} is not empty: an empty search only creates a file"
            raise DiffError("conflict", message, path=path)
        return block.replace
    assert text is not None
    lines, search = split_lines(text), split_lines(block.search)
    explicit = not block.search.endswith("\n") or (
        block.replace != "" and not block.replace.endswith("\n")
    )
    for level, places in enumerate(_levels(lines, search, explicit)):
        if len(places) > 1:
            numbers = [place + 1 for place, _ in places]
            message = f"the text to replace is at lines {', '.join(map(str, numbers))} of {path!r}"
            raise DiffError("ambiguous", message, path=path, lines=numbers)
        if places:
            ((place, shift),) = places
            end = place + len(search)
            if explicit:
                new = split_lines(block.replace)
            elif level == 0 and "\r\n" in block.search + block.replace:
                new = split_lines(block.replace)
                if new and not lines[end - 1].endswith("\n"):
                    new[-1] = body_of(new[-1])
            else:
                new = _fitted(split_lines(block.replace), lines, place, end, shift, path)
            after = "".join([*lines[:place], *new, *lines[end:]])
            if after == text:
                raise DiffError("no_change", "the text is there already", path=path)
            return after
    raise DiffError("not_found", f"the text to replace is not in {path!r}", path=path)


def _levels(
    lines: list[str], search: list[str], explicit: bool
) -> Iterator[list[tuple[int, tuple[str, str]]]]:
    """Where the searched lines fit, level by level, with the indentation to take off and to put on
    in front of the replacement."""
    none = ("", "")
    if explicit:  # the block says how the file ends: so it must, and there
        at_end = find(search, lines)
        yield [(place, none) for place in at_end if place + len(search) == len(lines)]
        return
    # the last line of a file may lack the line feed that the body of a block always has
    whole = [*lines[:-1], lines[-1].removesuffix("\n") + "\n"] if lines else []
    yield [(place, none) for place in find(search, whole)]
    plain = [body_of(line) for line in whole]
    wanted = [body_of(line) for line in search]
    yield [(place, none) for place in find(wanted, plain)]
    plain = [line.rstrip(_SPACE) for line in plain]
    wanted = [line.rstrip(_SPACE) for line in wanted]
    yield [(place, none) for place in find(wanted, plain)]
    bare = [line.lstrip(" \t") for line in wanted]
    shifted = []
    for place in find(bare, [line.lstrip(" \t") for line in plain]):
        shift = _shift(wanted, plain[place : place + len(wanted)])
        if shift:
            shifted.append((place, shift))
    yield shifted


def _shift(wanted: list[str], found: list[str]) -> tuple[str, str] | None:
    """What to take off and put on in front of every line of `wanted` that is not blank to get
    `found`; None if it is not one and the same for all."""
    shifts = set()
    for have, want in zip(found, wanted, strict=True):
        if want and have.endswith(want):
            shifts.add(("", have.removesuffix(want)))
        elif want and want.endswith(have):
            shifts.add((want.removesuffix(have), ""))
        elif want:
            return None  # tabs against spaces
    return shifts.pop() if len(shifts) == 1 else None


def _fitted(
    new: list[str], lines: list[str], start: int, end: int, shift: tuple[str, str], path: str
) -> list[str]:
    """The replacement with the line endings and the indentation of the lines it replaces."""
    off, on = shift
    ending, fitted = ending_of(lines, start), []
    for line in new:
        body = body_of(line)
        if body.strip(_SPACE):
            if not body.startswith(off):
                message = "the text to replace is there with less indentation than a line of the "
                raise DiffError("not_found", message + "replacement has", path=path)
            body = on + body.removeprefix(off)
        fitted.append(body + ending)
    if fitted and not lines[end - 1].endswith("\n"):
        fitted[-1] = fitted[-1].removesuffix(ending)
    return fitted


def between(before: Files, after: Files) -> BlockPatch:
    """The blocks that make `after` of `before`: for each run of changed lines a block, with as many
    lines around it as it takes to be found in one place."""
    blocks = []
    for path in sorted({*before, *after}):
        old, new = before.get(path), after.get(path)
        if old == new:
            continue
        # a plain "a/" would be read as the prefix of a diff
        name = "./" + path if path.startswith(("a/", "b/")) and old is None else path
        if new is None:
            message = f"search/replace blocks cannot delete {path!r}"
            raise DiffError("inexpressible", message, path=path)
        if not old:
            blocks.append(Block(name, "", new))
        else:
            blocks += _blocks_of(name, old, new)
    return BlockPatch(tuple(blocks))


def _blocks_of(path: str, old: str, new: str) -> list[Block]:
    a, b = split_lines(old), split_lines(new)
    matcher = difflib.SequenceMatcher(None, a, b, autojunk=len(a) * len(b) > 10**7)
    changes = [op[1:] for op in matcher.get_opcodes() if op[0] != "equal"]
    blocks: list[Block] = []
    made: list[str] = []  # the new lines in place of a[:done], as earlier blocks leave them
    done = index = 0
    while index < len(changes):
        i, j, k, m = changes[index]
        index, context = index + 1, 0
        while True:
            low, high = max(done, i - context), min(len(a), j + context)
            if index < len(changes) and high >= changes[index][0]:
                _, j, _, m = changes[index]  # the context reaches the next change: one block
                index += 1
                continue
            block = Block(path, "".join(a[low:high]), "".join(b[k - (i - low) : m + (high - j)]))
            before = "".join(made + a[done:])
            after = "".join(made + a[done:i] + b[k:m] + a[j:])
            if _makes(block, path, before, after):
                break
            if low == done and high == len(a):
                return _whole(path, old, new)
            context = 2 * context + 1
        blocks.append(block)
        made += a[done:low] + split_lines(block.replace)
        done = high
    return blocks


def _whole(path: str, old: str, new: str) -> list[Block]:
    block = Block(path, old, new)
    if not _makes(block, path, old, new):
        raise DiffError("inexpressible", f"no block says how {path!r} changes", path=path)
    return [block]


def _makes(block: Block, path: str, before: str, after: str) -> bool:
    """Whether the block can be written and makes one text of the other."""
    for body in (block.search, block.replace):
        lines = split_lines(body)
        if len(lines) > 1 and body_of(lines[-1]) == NO_NEWLINE and body.endswith("\n"):
            return False  # it would be read as a statement about the line before
    try:
        return bool(block.search) and _replace(block, path, before) == after
    except DiffError:
        return False


def _render(block: Block) -> str:
    bodies = [_written(block.search), _written(block.replace)]
    runs = re.findall(r"^(?:<+|=+|>+)", "\n".join(bodies), re.MULTILINE)
    marks = max(7, *(len(run) + 1 for run in runs)) if runs else 7
    head = ""
    if block.path is not None:
        plain = _path_in(block.path) == block.path and not _CODE_FENCE.fullmatch(block.path)
        head = (block.path if plain else quote(block.path, always=True)) + "\n"
    search, replace = bodies
    return f"{head}{'<' * marks} SEARCH\n{search}{'=' * marks}\n{replace}{'>' * marks} REPLACE\n"


def _written(body: str) -> str:
    return body if not body or body.endswith("\n") else f"{body}\n{NO_NEWLINE}\n"
