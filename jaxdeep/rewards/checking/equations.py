"""Equations: those with a name on the left, and whether two have the same solutions."""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction

from jaxdeep.rewards.checking import values
from jaxdeep.rewards.checking.formula import FormulaError, Node, parse, symbols

_EQUALS = re.compile(r"(?<![<>=!])=(?![<>=])|\\approx(?![a-z])")
_NAME = re.compile(
    r"[A-Za-z](?:_\{?\w+\}?)?'*"
    r"|[A-Za-z]{1,2}'*\s*\([^()=]{1,20}\)"
    r"|\\frac\s*\{\s*d\^?\{?\d?\}?\s*\w*\s*\}\s*\{\s*d\w+(?:\^\{?\d\}?)?\s*\}|d\w\s*/\s*d\w"
    r"|\\(?:hat|bar|vec|overline)\s*\{?\s*\w\s*\}?(?:_\{?\w+\}?)?"
    r"|\\(?:alpha|beta|theta|lambda|mu|sigma|rho|omega|phi|Delta [A-Za-z])(?:_\{?\w+\}?)?"
    r"|[A-Z]{2,5}(?:_\{?\w+\}?)?"
    r"|(?:[A-Za-z]{1,20} ){0,3}[A-Za-z]{4,20}(?:\s*\([^()=]{1,20}\))?"
)


def split(text: str) -> tuple[str, list[str], bool]:
    """(name, sides, rough) of a chain of equal things: "x = 2 + 3 = 5" is ("x", ["2 + 3", "5"],
    False). The name is "" where the first side is no symbol, function, derivative or word; `rough`
    says that one sign is an approximate one."""
    sides, rough = _sides(text)
    if len(sides) > 1 and not sides[0]:
        return "", sides[1:], rough
    if len(sides) > 1 and _NAME.fullmatch(sides[0]):
        name = re.sub(r"\\frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"\1/\2", sides[0])
        return re.sub(r"\s+", "", name), sides[1:], rough
    return "", sides, rough


def _sides(text: str) -> tuple[list[str], bool]:
    """The sides of the signs that stand in no brackets, and whether one of them is approximate."""
    sides, start, rough = [], 0, False
    for match in _EQUALS.finditer(text):
        before = text[: match.start()]
        if all(before.count(a) <= before.count(b) for a, b in ("()", "{}", "⦃⦄")):
            sides.append(text[start : match.start()].strip())
            start, rough = match.end(), rough or match[0] != "="
    return [*sides, text[start:].strip()], rough


def same(gold: tuple[str, str], answer: tuple[str, str], log: float | None) -> bool | None:
    """Whether two equations, each given by its sides, have the same solutions: one is a multiple of
    the other, or each holds on the other's solutions for a symbol in which it is linear. None where
    that cannot be told."""
    try:
        f, g = (
            Node("add", (parse(left), Node("neg", (parse(right),))))
            for left, right in (gold, answer)
        )
    except FormulaError:
        return None
    if symbols(f) != symbols(g):
        return False
    try:
        ratio = _ratio(f, g, log)
        if ratio is not None:
            return True
        found = [_holds(one, other, log) for one, other in ((f, g), (g, f))]
    except values.OutOfBounds:
        return None
    if False in found:
        return False
    return True if found == [True, True] else None


def _ratio(f: Node, g: Node, log: float | None):
    """f / g where it is the same number other than zero at every point; else None."""
    ratios = []
    for point in values.points(symbols(f)):
        try:
            a, b = values.evaluate(f, point, log), values.evaluate(g, point, log)
        except values.NoValue:
            continue
        if a == 0 or b == 0:
            return None
        ratios.append(values.inexact(a) / values.inexact(b))
    if len(ratios) < values.POINTS // 2:
        return None
    return ratios[0] if all(values.close(ratios[0], one, 1e-25) for one in ratios) else None


def positive_multiple(f: Node, g: Node, log: float | None = None) -> bool:
    """Whether f is g times a positive number."""
    if symbols(f) != symbols(g):
        return False
    ratio = _ratio(f, g, log)
    return ratio is not None and values.is_real(ratio) and ratio.real > 0


def _holds(f: Node, g: Node, log: float | None) -> bool | None:
    """Whether g is zero wherever f is, at points found by solving f for a symbol in which it is
    linear; None where there is no such symbol."""
    for name in sorted(symbols(f)):
        solved = list(_solutions(f, name, log))
        if len(solved) < values.POINTS // 2:
            continue
        for point in solved:
            try:
                value = values.inexact(values.evaluate(g, point, log))
            except values.NoValue:
                return False
            if abs(value) > values.mpf(10) ** -25:
                return False
        return True
    return None


def _solutions(f: Node, name: str, log: float | None) -> Iterator[dict[str, values.Value]]:
    for point in values.points(symbols(f)):
        try:
            at = [values.evaluate(f, point | {name: Fraction(n)}, log) for n in (1, 2, 3)]
        except values.NoValue:
            continue
        first, second, third = map(values.inexact, at)
        slope = second - first
        linear = abs(third - 2 * second + first) <= values.mpf(10) ** -30 * (abs(third) + 1)
        if linear and abs(slope) > values.mpf(10) ** -20:
            yield point | {name: 1 - first / slope}
