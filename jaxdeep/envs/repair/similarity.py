"""How like the right patch a patch is: rewards that need no execution.

`similar` pays for what a patch gains over doing nothing. `original_similarity` and
`block_similarity` are those of CodeRepairRL, kept for comparison: the first pays .62 and more for a
comment in the right file.
"""

from __future__ import annotations

import difflib
import io
import re
import tokenize
from collections.abc import Sequence

from jaxdeep.envs.repair.diff import Block, Files, split_lines

_BY_CHARACTER = 4_000_000  # pairs of characters that are compared at most


def similar(before: Files, after: Files, right: Files) -> float:
    """The gain of `after` over `before` in likeness to `right`, 0 to 1: the mean over all files
    that either patch changes, of (sim(new, right) - sim(old, right)) / (1 - sim(old, right)), where
    sim compares whole files without their comments and docstrings. A file that only the patch in
    question changes counts 0; with nothing to change, doing nothing is 1."""
    paths = {
        path
        for path in {*before, *after, *right}
        if not before.get(path) == after.get(path) == right.get(path)
    }
    if not paths:
        return 1.0
    return sum(_gain(before.get(p), after.get(p), right.get(p)) for p in paths) / len(paths)


def _gain(old: str | None, new: str | None, right: str | None) -> float:
    if old == right:
        return 0.0
    if new == right:
        return 1.0
    if new is None or right is None:
        return 0.0  # there, or not there, against what is right
    bare_old, bare_new, bare_right = (_bare(text or "") for text in (old, new, right))
    if bare_new == bare_old:
        return 0.0
    if bare_new == bare_right:
        return 1.0
    texts: list[Sequence[str]] = [bare_old, bare_new, bare_right]
    parts = [_differing(text, bare_right) for text in texts[:2]]
    if any(len(a) * len(b) > _BY_CHARACTER for a, b in parts):  # the same for both comparisons
        texts = [split_lines(text) for text in (bare_old, bare_new, bare_right)]
    base, gained = (_ratio(text, texts[2]) for text in texts[:2])
    return min(1.0, max(0.0, (gained - base) / (1.0 - base))) if base < 1.0 else 0.0


def _differing(a: Sequence[str], b: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    """Two texts, or lists of lines, without what both begin and end with."""
    limit = min(len(a), len(b))
    head = next((i for i in range(limit) if a[i] != b[i]), limit)
    tail = next((i for i in range(limit - head) if a[-1 - i] != b[-1 - i]), limit - head)
    return a[head : len(a) - tail], b[head : len(b) - tail]


def _ratio(a: Sequence[str], b: Sequence[str]) -> float:
    """Twice the characters in common over all characters, after Ratcliff and Obershelp; of texts by
    character, of lists by line. Only what differs in between is compared: that is quadratic."""
    parts = _differing(a, b)
    blocks = difflib.SequenceMatcher(None, *parts, autojunk=False).get_matching_blocks()
    total = len("".join(a)) + len("".join(b))
    different = sum(len("".join(part)) for part in parts)
    common = sum(len("".join(parts[0][m.a : m.a + m.size])) for m in blocks)
    return (total - different + 2 * common) / total if total else 1.0


def _bare(text: str) -> str:
    """Python source without comments, docstrings and blank lines; other text as it is."""
    out: list[str] = []
    line_start, previous = True, None
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    except (tokenize.TokenError, SyntaxError):
        return text
    spaces = {tokenize.INDENT, tokenize.DEDENT, tokenize.NEWLINE, tokenize.NL, tokenize.COMMENT}
    for index, token in enumerate(tokens):
        if token.type == tokenize.STRING and line_start:
            following = next(t for t in tokens[index + 1 :] if t.type != tokenize.COMMENT)
            if following.type in (tokenize.NEWLINE, tokenize.ENDMARKER):
                continue  # a statement of text alone: a docstring
        if token.type == tokenize.NEWLINE:
            out += ["\n"] if not line_start else []
            line_start, previous = True, None
        elif token.type not in spaces and token.type != tokenize.ENDMARKER:
            if line_start:
                out.append(" " * token.start[1])
            elif previous is not None and previous.end == token.start:
                pass
            else:
                out.append(" ")
            out.append(token.string)
            line_start, previous = False, token
    return "".join(out)


def original_similarity(generated: str, oracle: str) -> float:
    """CodeRepairRL's reward for unified diffs: by file, the character ratio of the two texts of the
    diff, headers included; summed over the oracle's files and divided by the larger number of files
    (0 where both are empty)."""
    ours, theirs = _by_file(generated), _by_file(oracle)
    if not ours or not theirs:
        return 0.0
    total = sum(
        difflib.SequenceMatcher(None, ours[path], text).ratio()
        for path, text in theirs.items()
        if path in ours
    )
    return total / max(len(ours), len(theirs))


def file_match(generated: str, oracle: str) -> float:
    """CodeRepairRL's share of files in common: |A and B| / max(|A|, |B|), 1 if both are empty."""
    ours, theirs = _by_file(generated), _by_file(oracle)
    if not ours and not theirs:
        return 1.0
    return len({*ours} & {*theirs}) / max(len(ours), len(theirs))


def _by_file(diff: str) -> dict[str, str]:
    parts = re.split(r"^(?=diff --git )", diff, flags=re.MULTILINE)
    found = {}
    for part in parts:
        match = re.match(r"diff --git a/(\S+) b/(\S+)", part)
        if match:
            found[match.group(2)] = part.strip()
    return found


def block_similarity(generated: Sequence[Block], oracle: Sequence[Block]) -> float:
    """CodeRepairRL's likeness of search/replace blocks, pair by pair in order: the mean of the line
    ratios of both parts, over the larger number of blocks. Where the oracle has no block it is 1
    for none and 0 for any. Blocks that could not be read are never none here, since `parse` raises:
    in the original they were, and garbage was paid in full."""
    count = max(len(generated), len(oracle))
    if not count:
        return 1.0
    total = 0.0
    for ours, theirs in zip(generated, oracle, strict=False):
        for a, b in ((ours.search, theirs.search), (ours.replace, theirs.replace)):
            total += difflib.SequenceMatcher(None, a.split("\n"), b.split("\n")).ratio() / 2
    return total / count
