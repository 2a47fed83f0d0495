"""An answer as levels from the top down: parsed from plain Markdown, and measured.

    The currency is the **Euro**: ...          the top level: everything before the first heading

    ## Cyprus joined the euro in 2008          a node: its title,
    It has paid in euro since then.            its gist, the first paragraph,

    The rate was fixed at 0.585274 ...         its detail, the rest up to the next heading

    ### How the rate was set                   a node below it

Any report is such a tree, so that those of other systems can be compared. Headings in code, quotes
and lists are none (CommonMark, by markdown-it).
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

from markdown_it import MarkdownIt

from jaxdeep.envs.research.sources import split
from jaxdeep.envs.research.support import content
from jaxdeep.envs.research.words import count

TOP_WORDS, GIST_WORDS, DETAIL_WORDS = 60, 45, 200  # of a level, at most, in a good explanation
MOST_CHILDREN, DEEPEST = 7, 3
READ_WORDS = 1024  # after so many words a reader has given up
STATES = 0.7  # share of a nugget's content words that a sentence must have to state it
COMMON = 0.6  # share of content words from which two sentences may contradict each other

_DEFERRAL = re.compile(
    r"\b(?:see|as (?:described|discussed|shown|explained|detailed)|(?:described|discussed|explained|"
    r"given|found|detailed|answered)(?: \w+)?) (?:below|later|further down|in (?:the )?(?:next|following))\b"
    r"|\b(?:see|in) (?:the )?(?:sections?|following sections?|next sections?)\b"
    r"|\bthis (?:report|answer|section|document|text) (?:will|aims|provides|explains|describes|covers|"
    r"discusses|examines|presents|explores)\b|\bthe (?:details|answer|rest|following) (?:is|are|follow)"
    r"[^.]{0,20}\b(?:below|follows?)\b|\bread on\b|(?:见|参见|请看|详见|如)下文|本(?:报告|文)将|以下(?:将|是|为)",
    re.I,
)
_DANGLING = re.compile(
    r"^\W*(?:the (?:above|former|latter|aforementioned)|as (?:above|mentioned|shown|noted))\b"
    r"|\b(?:shown|seen|mentioned|described|noted) above\b",
    re.I,
)
_BOLD = re.compile(r"(?<!\*)\*\*(?!\s|\*)([^*\n]{1,200}?)(?<!\s)\*\*(?!\*)")
_MARKUP = re.compile(r"[*_`]{1,3}(?=\S)|(?<=\S)[*_`]{1,3}|\[([^\]]*)\]\([^)]*\)")
_LIST_ITEM = re.compile(r"(?:[-*•>]|\d{1,3}[.)])\s+|\|\s*")

Span = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Node:
    """A part of an answer. The spans are in the answer without its citations; `title` is without
    markup and "" for a top level that has none."""

    title: str
    depth: int  # 0 for the top level
    gist: Span
    detail: Span
    text: str  # of the whole answer
    children: tuple[Node, ...] = ()

    def walk(self) -> Iterator[Node]:
        """This node and all below it, in the order of the text."""
        yield self
        for child in self.children:
            yield from child.walk()

    @property
    def body(self) -> str:
        """Gist and detail."""
        return self.text[self.gist[0] : self.detail[1]]

    def sentences(self, span: Span) -> list[Span]:
        """The sentences of a part of this node, without marks of lists."""
        found = []
        for start, end in split(self.text[slice(*span)]):
            start, end = span[0] + start, span[0] + end
            if mark := _LIST_ITEM.match(self.text, start, end):
                start = mark.end()
            if start < end:
                found.append((start, end))
        return found

    @cached_property
    def factual(self) -> list[Span]:
        """The sentences of this node and those below that say something which can be checked: no
        questions, no hints to other parts, nothing of fewer than two content words."""
        return [
            span
            for node in self.walk()
            for part in (node.gist, node.detail)
            for span in node.sentences(part)
            if _is_factual(self.text[slice(*span)])
        ]


def parse(text: str) -> Node:
    """The tree of an answer. A heading that begins the text and has no equal is its title."""
    lines = [0]
    lines += [match.end() for match in re.finditer("\n", text)]
    lines += [len(text)] * 2

    def place(line: int) -> int:
        return lines[min(line, len(lines) - 1)]

    tokens = _parser().parse(text)
    headings, blocks = [], []
    for n, token in enumerate(tokens):
        if token.level == 0 and token.map and token.nesting >= 0:
            blocks.append((place(token.map[0]), place(token.map[1])))
            if token.type == "heading_open":
                title = " ".join(_MARKUP.sub(r"\1", tokens[n + 1].content).split())
                headings.append((int(token.tag[1]), title, *blocks[-1]))
    title = ""
    start = 0
    if headings and not text[: headings[0][2]].strip():
        level = headings[0][0]
        if all(other > level for other, *_ in headings[1:]):
            _, title, _, start = headings.pop(0)
    ends = [h[2] for h in headings[1:]] + [len(text)] * bool(headings)
    first = headings[0][2] if headings else len(text)
    root = _Open(title, 0, 0, (start, first), (first, first))
    stack = [root]
    starts = [begin for begin, _ in blocks]
    for (level, name, _, begin), end in zip(headings, ends, strict=True):
        n = bisect.bisect_left(starts, begin)
        gist_end = blocks[n][1] if n < len(blocks) and blocks[n][0] < end else begin
        while len(stack) > 1 and stack[-1].level >= level:
            stack.pop()
        node = _Open(name, level, len(stack), (begin, gist_end), (gist_end, max(gist_end, end)))
        stack[-1].children.append(node)
        stack.append(node)
    return root.closed(text)


class _Open:
    """A node while its children are found."""

    def __init__(self, title: str, level: int, depth: int, gist: Span, detail: Span) -> None:
        self.title, self.level, self.depth, self.gist, self.detail = (
            title,
            level,
            depth,
            gist,
            detail,
        )
        self.children: list[_Open] = []

    def closed(self, text: str) -> Node:
        children = tuple(child.closed(text) for child in self.children)
        return Node(self.title, self.depth, self.gist, self.detail, text, children)


@lru_cache(maxsize=1)
def _parser() -> MarkdownIt:
    return MarkdownIt("commonmark").enable("table").disable("inline")  # blocks are all that is read


def to_json(node: Node) -> dict[str, Any]:
    """The tree as JSON can hold it."""
    return {
        "title": node.title,
        "depth": node.depth,
        "gist": list(node.gist),
        "detail": list(node.detail),
        "children": [to_json(child) for child in node.children],
    }


def short_answer(root: Node) -> str:
    """The answer itself: what is first set in bold at the top level, else the top level."""
    top = root.text[slice(*root.gist)].strip()
    bold = _BOLD.search(top)
    return bold[1].strip() if bold else top


def top_alone(root: Node) -> bool:
    """Whether the top level says something, and neither refers to what comes later nor to something
    that is not there."""
    top = root.text[slice(*root.gist)].strip()
    return bool(top) and not _DEFERRAL.search(top) and not _DANGLING.search(top)


def _is_factual(sentence: str) -> bool:
    if sentence.rstrip("*_\"'”) ").endswith(("?", "？")) or _DEFERRAL.search(sentence):
        return False
    return len(content(sentence).tokens) >= 2


def novelties(root: Node) -> list[float]:
    """For each node below the top, the share of its runs of three words that are in no node before
    it; 0 for a node without text."""
    seen: set[tuple[str, ...]] = set()
    shares = []
    for node in root.walk():
        words = re.findall(r"\w+", f"{node.title} {node.body}".lower())
        grams = {tuple(words[n : n + 3]) for n in range(max(1, len(words) - 2))}
        if node is not root:
            has_text = bool(node.body.strip())
            shares.append(len(grams - seen) / len(grams) if has_text else 0.0)
        seen |= grams
    return shares


def linked(root: Node) -> float:
    """The share of nodes below the top that have a content word in common with their parent; 1
    where there are none."""
    pairs = [(node, child) for node in root.walk() for child in node.children]
    shared = [_stems(parent) & _stems(child) for parent, child in pairs]
    return sum(map(bool, shared)) / len(pairs) if pairs else 1.0


def _stems(node: Node) -> frozenset[str]:
    return frozenset(t.stem for t in content(f"{node.title}. {node.body}").tokens)


def contradictions(root: Node) -> list[tuple[Span, Span]]:
    """Pairs of sentences of different depth with at least `COMMON` of their content words in common
    and different numbers, neither being part of the other, or different negation.

    Sentences that can have so much in common share one of their rarest words: only such pairs are
    compared.
    """
    rows = []
    for node in root.walk():
        for part in (node.gist, node.detail):
            for span in node.sentences(part):
                said = content(root.text[slice(*span)])
                if len(said.stems) >= 3:
                    rows.append((node.depth, span, said))
    frequency = collections.Counter(stem for *_, said in rows for stem in said.stems)
    index: dict[str, list[int]] = collections.defaultdict(list)
    found = []
    for n, (depth, span, said) in enumerate(rows):
        stems = sorted(said.stems, key=lambda stem: (frequency[stem], stem))
        rare = stems[: len(stems) - math.ceil(COMMON * len(stems)) + 1]
        for m in sorted({m for stem in rare for m in index[stem]}):
            other_depth, other_span, other = rows[m]
            if other_depth != depth and _contradict(said, other):
                found.append((other_span, span))
        for stem in rare:
            index[stem].append(n)
    return found


def _contradict(a: Any, b: Any) -> bool:
    if len(a.stems & b.stems) < COMMON * max(len(a.stems), len(b.stems)):
        return False
    apart = not (a.numbers <= b.numbers or b.numbers <= a.numbers)
    return apart or (a.negations % 2 != b.negations % 2)


class Sizes(NamedTuple):
    """What of an explanation has the size it should have."""

    top: bool  # the top level is not empty and has at most `TOP_WORDS`
    children: bool  # one to `MOST_CHILDREN` under the top, at most so many under any other node
    depth: bool  # at most `DEEPEST`
    nodes: float  # share of nodes below the top with a gist and a detail that are not too long


def sizes(root: Node) -> Sizes:
    """Which parts of the explanation have the size they should have."""
    nodes = list(root.walk())
    below = nodes[1:]
    fits = [
        0 < count(root.text[slice(*n.gist)]) <= GIST_WORDS
        and count(root.text[slice(*n.detail)]) <= DETAIL_WORDS
        for n in below
    ]
    return Sizes(
        0 < count(root.text[slice(*root.gist)]) <= TOP_WORDS,
        bool(root.children) and all(len(node.children) <= MOST_CHILDREN for node in nodes),
        all(node.depth <= DEEPEST for node in nodes),
        sum(fits) / len(below) if below else 0.0,
    )


# What a reader has to read: a nugget is a fact that belongs in the answer, as one sentence or as
# several that say the same.

Nugget = str | Sequence[str]


def nugget_costs(root: Node, nuggets: Sequence[Nugget], supported: Sequence[Span]) -> list[float]:
    """For each nugget the words that are read before it is known, infinite where it never is.

    Gists are read level by level with their titles, then the details. A nugget is known with the
    first sentence that states it, has at least half of its words in `supported` (the claims that
    their citations support, in order), and no other: words without evidence count for nothing.
    """
    parts: list[tuple[Node, Span, bool]] = []
    by_depth = sorted(root.walk(), key=lambda node: node.depth)
    parts += [(node, node.gist, True) for node in by_depth]
    parts += [(node, node.detail, False) for node in root.walk()]
    return [_cost(parts, nugget, supported) for nugget in nuggets]


def skip_costs(root: Node, nuggets: Sequence[Nugget], supported: Sequence[Span]) -> list[float]:
    """As `nugget_costs` for a reader who reads the top level, then titles and gists of the nodes
    under it, opens the one that names most of the nugget, and so on."""
    costs = []
    for nugget in nuggets:
        parts: list[tuple[Node, Span, bool]] = [(root, root.gist, True), (root, root.detail, False)]
        node = root
        wanted = max((content(said).stems for said in _forms(nugget)), key=len)
        while node.children:
            parts += [(child, child.gist, True) for child in node.children]
            node = max(node.children, key=lambda child: len(wanted & _named(child)))
            if not wanted & _named(node):
                break
            parts.append((node, node.detail, False))
        costs.append(_cost(parts, nugget, supported))
    return costs


def auc(costs: Sequence[float]) -> float:
    """The area under the share of nuggets that are known after w words, over log2 w up to
    `READ_WORDS`: 1 for all at once, 0 for none."""
    logs = (math.log2(max(1.0, cost)) for cost in costs if cost <= READ_WORDS)
    return sum(1 - log / math.log2(READ_WORDS) for log in logs) / len(costs) if costs else 0.0


def states(sentence: str, nugget: Nugget, subject: str = "") -> bool:
    """Whether a sentence states a nugget in one of its forms: all its numbers and names, as many
    negations, most of its words. Names may be in `subject`, the title above the sentence, but half
    of the words must be in the sentence itself."""
    said = content(sentence)
    there = {t.stem for t in said.tokens}
    above = {t.stem for t in content(subject).tokens}
    for form in _forms(nugget):
        wanted = content(form)
        if (
            wanted.tokens
            and wanted.numbers <= there
            and wanted.names <= there | above
            and wanted.negations == said.negations
            and len(wanted.stems & (there | wanted.names & above)) >= STATES * len(wanted.stems)
            and 2 * len(wanted.stems & there) >= len(wanted.stems)
        ):
            return True
    return False


def _forms(nugget: Nugget) -> Sequence[str]:
    return (nugget,) if isinstance(nugget, str) else nugget


def _named(node: Node) -> frozenset[str]:
    return content(f"{node.title}. {node.text[slice(*node.gist)]}").stems


def _cost(
    parts: Sequence[tuple[Node, Span, bool]], nugget: Nugget, supported: Sequence[Span]
) -> float:
    words = 0
    for node, span, with_title in parts:
        words += count(node.title) if with_title else 0
        for start, end in node.sentences(span):
            words += count(node.text[start:end])
            if is_covered((start, end), supported) and states(
                node.text[start:end], nugget, node.title
            ):
                return float(words)
    return math.inf


def is_covered(span: Span, supported: Sequence[Span]) -> bool:
    """Whether at least half of a span lies in spans that are in order and apart."""
    start, end = span
    first = max(0, bisect.bisect_right(supported, (start, start)) - 1)
    inside = 0
    for low, high in supported[first:]:
        if low >= end:
            break
        inside += max(0, min(end, high) - max(start, low))
    return 2 * inside >= end - start


def measures(
    root: Node, supported: Sequence[Span], nuggets: Sequence[Nugget] = ()
) -> dict[str, float]:
    """The measures of an explanation, from 0 to 1; `nodes` and `words` are counts."""
    shares = novelties(root)
    found = {
        "nodes": float(len(shares)),
        "words": float(count(root.text)),
        "top_alone": float(top_alone(root)),
        "novelty": sum(shares) / len(shares) if shares else 0.0,
        "linked": linked(root),
        "consistent": float(not contradictions(root)),
    }
    if nuggets:
        found["nugget_auc"] = auc(nugget_costs(root, nuggets, supported))
        found["skip_auc"] = auc(skip_costs(root, nuggets, supported))
    return found
