"""Which form of an answer a question asks for, beside its value: simplified, factored, in words."""

from __future__ import annotations

import math
import re
from fractions import Fraction

from jaxdeep.rewards.checking.formula import Node, nodes, symbols

_ASKED = {
    "words": r"\bin words\b|\bword form\b|\bname the (?:whole )?number\b|\bname (?:each|the) (?:whole )?(?:number|decimal)",
    "simplify": r"\bsimplif|\breduce\b|\blowest terms\b|\bsimplest form\b",
    "evaluate": r"\bevaluate\b|\bcompute\b|\bcalculate\b|\badd\b|\bsubtract\b|\bmultiply\b|\bdivide\b"
    r"|\bperform the\b|\bwork out\b",
    "factor": r"\bfactor(?:ise|ize)?\b(?! of\b)(?!s\b)(?!ial)",
    "expand": r"\bexpand\b|\bmultiply out\b",
    "fraction": r"\b(?:as|to|into) (?:a |an )?(?:improper |proper |equivalent )?fractions?\b",
    "improper": r"\bimproper fractions?\b",
    "mixed": r"\b(?:as|to|into) (?:a )?mixed numbers?\b",
    "decimal": r"\b(?:as|to|into) (?:a )?decimals?\b|\bdecimal (?:form|notation)\b",
    "percent": r"\b(?:as|to|into) (?:a )?percents?\b",
    "scientific": r"\bin scientific notation\b",
    "order": r"\border\b|\bascending\b|\bdescending\b|\bleast to greatest\b|\bsmallest to largest\b"
    r"|\bgreatest to least\b|\bnext (?:two|three|four|five) terms\b|\bsequence\b",
}
_PATTERNS = {name: re.compile(pattern, re.IGNORECASE) for name, pattern in _ASKED.items()}
_PLAIN = {"number", "mixed", "neg", "percent", "div"}


def asked(question: str) -> frozenset[str]:
    """The forms that a question asks for, by the keys of this module's table."""
    return frozenset(name for name, pattern in _PATTERNS.items() if pattern.search(question))


def mismatch(wanted: frozenset[str], gold: Node, answer: Node) -> str:
    """Why the form of an answer with the right value is not the one asked for; "" if it is. Where
    the gold itself is not in that form, the form is not asked for."""
    for name in sorted(wanted & _CHECKS.keys()):
        check = _CHECKS[name]
        if not check(answer, gold) and check(gold, gold):
            return f"not in the form asked for ({name})"
    return ""


def _simplified(node: Node, gold: Node) -> bool:
    """No operation left to be done that the gold does not leave either."""
    kinds, allowed = ({inner.kind for inner in nodes(one)} for one in (node, gold))
    if any(not _lowest(inner) for inner in nodes(node)):
        return False
    if not symbols(node):
        rooted = any(inner.kind in ("call", "constant", "pow") for inner in nodes(node))
        extra = {"mul", "pow", "call", "constant"} if rooted and not _done(node) else set()
        radicals = {
            inner.children[0]
            for one in (gold, node)
            for inner in nodes(one)
            if inner.text == "sqrt"
        }
        if kinds - allowed - _PLAIN - extra:
            return False
        return all(_free_of_squares(inner) for inner in radicals)
    terms = [sum(len(i.children) for i in nodes(one) if i.kind == "add") for one in (node, gold)]
    return terms[0] <= terms[1] and len(nodes(node)) <= len(nodes(gold)) + 4


def _done(node: Node) -> bool:
    """Whether a power is left that is neither of ten nor in a root: 2^3."""
    return any(
        inner.kind == "pow" and not symbols(inner) and inner.children[0].value not in (None, 10)
        for inner in nodes(node)
    )


def _lowest(node: Node) -> bool:
    """Whether a fraction of integers is in lowest terms; True for all else."""
    if node.kind != "div":
        return True
    top, bottom = (child.children[0] if child.kind == "neg" else child for child in node.children)
    if top.kind != "number" or bottom.kind != "number":
        return True
    if top.value.denominator != 1 or bottom.value.denominator != 1:
        return True
    return math.gcd(top.value.numerator, bottom.value.numerator) == 1 and bottom.value != 1


def _free_of_squares(node: Node) -> bool:
    value = node.value
    if value is None or value.denominator != 1 or value > 10**6:
        return True
    return all(value % (n * n) for n in range(2, math.isqrt(int(value)) + 1))


def _evaluated(node: Node, gold: Node) -> bool:
    kinds, allowed = ({inner.kind for inner in nodes(one)} for one in (node, gold))
    if symbols(node):
        return True
    powers_of_ten = all(i.children[0].value == Fraction(10) for i in nodes(node) if i.kind == "pow")
    rooted = any(inner.kind in ("call", "constant") for inner in nodes(node))
    extra = {"mul", "pow"} if "pow" in kinds and powers_of_ten else set()
    extra |= {"mul", "call", "constant", "add"} if rooted else set()
    return not kinds - allowed - _PLAIN - extra


def _factors(node: Node) -> int:
    """The number of factors with symbols, powers counted as often as they say."""
    if node.kind == "mul":
        return sum(map(_factors, node.children))
    if node.kind == "neg":
        return _factors(node.children[0])
    if node.kind == "pow" and node.children[1].value is not None:
        return int(node.children[1].value) * _factors(node.children[0])
    return int(bool(symbols(node)))


def _factored(node: Node, gold: Node) -> bool:
    return _factors(node) >= _factors(gold)


def _expanded(node: Node, gold: Node) -> bool:
    return not any(
        inner.kind in ("mul", "pow") and any(child.kind == "add" for child in inner.children)
        for inner in nodes(node)
    )


def _unsigned(node: Node) -> Node:
    return node.children[0] if node.kind == "neg" else node


def _is_fraction(node: Node, gold: Node) -> bool:
    node = _unsigned(node)
    whole = node.kind == "number" and "." not in node.text
    return node.kind in ("div", "mixed") or whole


def _is_decimal(node: Node, gold: Node) -> bool:
    return _unsigned(node).kind == "number"


def _is_scientific(node: Node, gold: Node) -> bool:
    node = _unsigned(node)
    if node.kind == "number":
        return "e" in node.text.lower()
    if node.kind != "mul" or len(node.children) != 2:
        return False
    mantissa, power = node.children
    return power.kind == "pow" and mantissa.value is not None and 1 <= mantissa.value < 10


_CHECKS = {
    "simplify": _simplified,
    "evaluate": _evaluated,
    "factor": _factored,
    "expand": _expanded,
    "fraction": _is_fraction,
    "improper": lambda node, gold: _unsigned(node).kind == "div",
    "mixed": lambda node, gold: _unsigned(node).kind == "mixed",
    "decimal": _is_decimal,
    "percent": lambda node, gold: _unsigned(node).kind == "percent",
    "scientific": _is_scientific,
}
