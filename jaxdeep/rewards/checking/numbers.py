"""Comparison of numbers and quantities: which precision a gold asks for, units, percent."""

from __future__ import annotations

import re
from fractions import Fraction

from jaxdeep.rewards.checking import forms, units, values
from jaxdeep.rewards.checking.formula import FormulaError, Node, nodes
from jaxdeep.rewards.checking.units import Quantity
from jaxdeep.rewards.checking.verdict import Book, Verdict, right, wrong

TOLERANCE = Fraction(1, 100)  # of a decimal gold
DIGITS = 6  # significant digits with which a decimal may stand for 1/3 or pi


def compare(gold: Quantity, answer: Quantity, question: str, book: Book, rough: bool) -> Verdict:
    """Whether a quantity is the gold's. `rough`: the gold says "about"."""
    missing = gold.unit is not None and answer.unit is None
    noun = _nouns(gold, answer)
    if noun:
        return wrong("number", noun)
    try:
        a = values.evaluate(gold.value, log=book.log)
    except FormulaError as error:
        return Verdict(None, None, "number", f"the gold has no value: {error}")
    try:
        b = values.evaluate(answer.value, log=book.log)
    except FormulaError as error:
        return wrong("number", str(error))
    step = values.decimal_step(gold.value)
    digits = values.decimal_step(answer.value)
    rounded = None  # the size of an answer that was converted and rounded, in the gold's unit
    if gold.unit is not None and answer.unit is not None and gold.unit != answer.unit:
        if gold.unit.powers != answer.unit.powers:
            return wrong("number", f"{answer.written} is not {gold.written}")
        exact = gold.unit.exact and answer.unit.exact and gold.unit.offset == answer.unit.offset
        scale = answer.unit.factor / gold.unit.factor
        rounded = None if exact else abs(values.inexact(b) * values.inexact(scale))
        digits = (digits or Fraction(1)) * scale if digits or not exact else None
        b = _converted(b, answer.unit, gold.unit)
    money = gold.unit is not None and gold.unit.powers == units.UNITS["$"].powers
    decimal = (step is not None or values.has_decimal(gold.value) or rough) and not money
    same = equal(a, b, step=step, digits=digits, decimal=decimal, rounded=rounded)
    if not same and _percent_of(gold, answer, question):
        same = _scaled(a, b, step, decimal)
    if not same:
        return wrong("number", "another value")
    form = forms.mismatch(forms.asked(question), gold.value, answer.value)
    return wrong("number", form) if form else right("number", unit_missing=missing)


def equal(
    gold: values.Value,
    answer: values.Value,
    *,
    step: Fraction | None,
    digits: Fraction | None,
    decimal: bool,
    rounded: values.Value | None = None,
) -> bool:
    """Whether two values agree: `step` and `digits` are the values of the last digit of gold and
    answer, None where they are no decimals; `decimal` allows 1 %; `rounded` is the size of an
    answer whose unit was converted between systems, else None."""
    if values.close(gold, answer):
        return True
    a, b = values.inexact(gold), values.inexact(answer)
    if not (values.is_real(a) and values.is_real(b)):
        return False
    gap = abs(a - b)
    if step is not None and gap <= values.inexact(step) / 2:
        return True
    if decimal and a and gap <= values.inexact(TOLERANCE) * abs(a) and a * b > 0:
        return True
    if digits is None or not a:
        return False
    last = abs(values.inexact(digits))
    if rounded is not None:  # to three digits or more
        return gap <= last / 2 * values.mpf("1.000001") and last * 200 <= rounded
    return not _terminates(gold) and gap < last and last * 10 ** (DIGITS - 1) <= abs(a)


def _terminates(value: values.Value) -> bool:
    """Whether the value has a finite decimal expansion."""
    if not isinstance(value, Fraction):
        return False
    bottom = value.denominator
    for prime in (2, 5):
        while bottom % prime == 0:
            bottom //= prime
    return bottom == 1


def _converted(value: values.Value, source: units.Unit, target: units.Unit) -> values.Value:
    """A value of one unit in another."""
    if isinstance(value, Fraction):
        return (value * source.factor + source.offset - target.offset) / target.factor
    base = value * values.inexact(source.factor) + values.inexact(source.offset)
    return (base - values.inexact(target.offset)) / values.inexact(target.factor)


def _nouns(gold: Quantity, answer: Quantity) -> str:
    """Why what follows the numbers disagrees; "" where it does not."""
    if gold.unit is not None and answer.noun:
        return f"{answer.noun!r} is not {gold.written}"
    if gold.noun and answer.unit is not None:
        return f"{answer.written!r} is not {gold.noun}"
    if gold.noun and answer.noun:
        ours, theirs = (
            {word.rstrip("s") for word in re.split(r"[\s-]+", one)}
            for one in (gold.noun, answer.noun)
        )
        if not ours & theirs:
            return f"{answer.noun!r} is not {gold.noun}"
    return ""


def _percent_of(gold: Quantity, answer: Quantity, question: str) -> bool:
    """Whether one of the two leaves out the percent that the question asks for."""
    asks = bool(re.search(r"\bper\s?cent|%", question, re.IGNORECASE))
    return asks and _has_percent(gold.value) != _has_percent(answer.value)


def _has_percent(node: Node) -> bool:
    return any(inner.kind == "percent" for inner in nodes(node))


def _scaled(a: values.Value, b: values.Value, step: Fraction | None, decimal: bool) -> bool:
    """Whether the two are equal once the bare one is read as percent."""
    hundred = Fraction(100)
    pairs = ((a, _over(b, hundred), step), (_over(a, hundred), b, step / 100 if step else None))
    return any(
        equal(one, other, step=last, digits=None, decimal=decimal) for one, other, last in pairs
    )


def _over(value: values.Value, divisor: Fraction) -> values.Value:
    return value / divisor if isinstance(value, Fraction) else value / int(divisor)
