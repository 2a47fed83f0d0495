"""Inequalities and intervals as sets of real numbers, so that x > 4 and (4, infinity) compare."""

from __future__ import annotations

import re
from typing import NamedTuple

from jaxdeep.rewards.checking import text as texts
from jaxdeep.rewards.checking import values
from jaxdeep.rewards.checking.formula import FormulaError, Node, parse, symbols


class Interval(NamedTuple):
    """From `low` to `high`, None for no end; `closed` says which ends belong to it."""

    low: Node | None
    high: Node | None
    closed: tuple[bool, bool]


EVERYTHING = (Interval(None, None, (False, False)),)
_SIGN = re.compile(r"\\le(?![a-z])|\\ge(?![a-z])|<=|>=|=<|<|>")
_FLIPPED = {"<": ">", ">": "<", "le": "ge", "ge": "le"}
_ALL = re.compile(r"(?:the set of )?(?:all |the )?real numbers|all reals|all numbers")
_BUILDER = re.compile(r"⦃\s*([A-Za-z])\s*(?:\||:|\\mid)\s*(.+)⦄")


def region(text: str) -> tuple[str, tuple[Interval, ...]] | None:
    """(variable or "", intervals in order) of an inequality in one variable, of intervals and of
    unions; None for all else."""
    text = text.strip()
    builder = _BUILDER.fullmatch(text)
    if builder:
        text = builder[2]
    text = re.sub(r"^([A-Za-z])\s*\\in\s*", "", text)
    if _ALL.fullmatch(text.lower()):
        return "", EVERYTHING
    pieces = texts.elements(text) if not texts.bracketed(text) else [text]
    joined = re.search(r"\\cup(?![a-z])|\bor\b", text)
    if len(pieces) > 1 and not joined and any(map(texts.bracketed, pieces)):
        return None  # pairs, and no union
    found = [_one(piece) for piece in pieces]
    if not found or any(one is None for one in found):
        return None
    names = {name for name, _ in found if name}
    if len(names) > 1:
        return None
    intervals = [interval for _, several in found for interval in several]
    if len(intervals) > 1 and re.search(r"\band\b", text):
        return None
    return "".join(names), tuple(sorted(intervals, key=_order))


def _one(text: str) -> tuple[str, tuple[Interval, ...]] | None:
    if re.match(r"\\ne(?![a-z])", text) or r"\ne " in text:
        name, _, value = text.partition(r"\ne")
        point = _formula(value)
        if not re.fullmatch(r"[A-Za-z]", name.strip()) or point is None:
            return None
        ends = Interval(None, point, (False, False)), Interval(point, None, (False, False))
        return name.strip(), ends
    brackets = texts.bracketed(text)
    if brackets and brackets[0] != "⦃":
        ends = texts.elements(brackets[1])
        if len(ends) != 2:
            return None
        low, high = map(_end, ends)
        if low is False or high is False:
            return None
        return "", (Interval(low, high, (brackets[0] == "[", brackets[2] == "]")),)
    return _inequality(text)


def _inequality(text: str) -> tuple[str, tuple[Interval, ...]] | None:
    signs = [_spelled(sign) for sign in _SIGN.findall(text)]
    sides = [side.strip() for side in _SIGN.split(text)]
    if len(signs) == 1:
        left, right = sides
        if not re.fullmatch(r"[A-Za-z](?:_\w)?", left):
            left, right, signs = right, left, [_FLIPPED[signs[0]]]
        value = _formula(right)
        if not re.fullmatch(r"[A-Za-z](?:_\w)?", left) or value is None:
            return None
        closed = signs[0] in ("le", "ge")
        if signs[0] in ("<", "le"):
            return left, (Interval(None, value, (False, closed)),)
        return left, (Interval(value, None, (closed, False)),)
    if len(signs) == 2 and re.fullmatch(r"[A-Za-z](?:_\w)?", sides[1]):
        if signs[0] in (">", "ge"):
            sides, signs = sides[::-1], [_FLIPPED[sign] for sign in reversed(signs)]
        low, high = _formula(sides[0]), _formula(sides[2])
        if low is None or high is None or any(sign not in ("<", "le") for sign in signs):
            return None
        return sides[1], (Interval(low, high, (signs[0] == "le", signs[1] == "le")),)
    return None


def _spelled(sign: str) -> str:
    return {r"\le": "le", r"\ge": "ge", "<=": "le", "=<": "le", ">=": "ge"}.get(sign, sign)


def _formula(text: str) -> Node | None:
    try:
        node = parse(text.strip())
        return None if symbols(node) or values.evaluate(node) is None else node
    except FormulaError:
        return None


def _end(text: str) -> Node | bool | None:
    """The end of an interval: None for an infinite one, False for none at all."""
    if re.fullmatch(r"[-+]?\s*(?:\\infty|infinity|inf|oo)", text.strip()):
        return None
    return _formula(text) or False


def _order(interval: Interval) -> float:
    return (
        -1e300
        if interval.low is None
        else float(values.inexact(values.evaluate(interval.low)).real)
    )


def same(gold: tuple[Interval, ...], answer: tuple[Interval, ...]) -> bool:
    """Whether two regions are the same set, given in the same pieces."""
    return len(gold) == len(answer) and all(
        a.closed == b.closed and _same_end(a.low, b.low) and _same_end(a.high, b.high)
        for a, b in zip(gold, answer, strict=True)
    )


def _same_end(a: Node | None, b: Node | None) -> bool:
    if a is None or b is None:
        return a is b
    return values.close(values.evaluate(a), values.evaluate(b))


def general(text: str) -> tuple[Node, bool] | None:
    """An inequality between two formulas as (F, strict) for F < 0 or F <= 0; None for all else."""
    signs, sides = _SIGN.findall(text), _SIGN.split(text)
    if len(signs) != 1:
        return None
    try:
        left, right = map(parse, sides)
    except FormulaError:
        return None
    sign = _spelled(signs[0])
    if sign in (">", "ge"):
        left, right = right, left
    return Node("add", (left, Node("neg", (right,)))), sign in ("<", ">")
