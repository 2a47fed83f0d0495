"""Values of formulas: exact fractions where they can be, 50 digits elsewhere, always bounded.

Operands of factorials and combinations are at most 10^4, sums and products have at most 10^4 terms,
integers at most 200,000 bits, and one evaluation spends at most `BUDGET`. What goes beyond raises
`OutOfBounds`: no text can make an evaluation long.
"""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Mapping
from fractions import Fraction

import mpmath

from jaxdeep.rewards.checking.formula import FormulaError, Node, nodes, symbols

LARGEST_OPERAND = 10_000
LARGEST_BITS = 200_000
LARGEST_EXPONENT = 10_000  # of 10, of a value that is no exact integer
BUDGET = 3_000_000  # bits of exact operands, and 500 for each operation on inexact ones
POINTS = 8  # at which two formulas with symbols are compared

_context = mpmath.MPContext()
_context.dps = 50
mpf, mpc = _context.mpf, _context.mpc

Value = Fraction | mpmath.mpf | mpmath.mpc


class OutOfBounds(FormulaError):
    """The value, or a step towards it, is too large."""


class NoValue(FormulaError):
    """The formula has no value here: a division by zero, an infinity, a factorial of a fraction."""


def evaluate(node: Node, bindings: Mapping[str, Value] | None = None, log: float | None = None):
    """The value of a formula: a Fraction where it is rational, else a number of 50 digits, complex
    where it must be. `bindings` has the values of its symbols, `log` the base of `\\log` (None: e).
    NoValue, OutOfBounds."""
    try:
        return _Evaluation(dict(bindings or {}), log).value(node)
    except (ZeroDivisionError, ValueError, TypeError) as error:
        if isinstance(error, FormulaError):
            raise
        raise NoValue(f"no value: {error}") from error
    except (OverflowError, MemoryError, mpmath.libmp.NoConvergence) as error:
        raise OutOfBounds(f"out of bounds: {error}") from error


def inexact(value: Value | int):
    """The value as a number of 50 digits."""
    if isinstance(value, Fraction):
        return mpf(value.numerator) / value.denominator
    return value


def close(a: Value, b: Value, relative: float = 1e-30) -> bool:
    """Whether two values are equal: exactly where both are fractions."""
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a == b
    a, b = inexact(a), inexact(b)
    return abs(a - b) <= relative * max(abs(a), abs(b), mpf(10) ** -20)


def is_real(value: Value) -> bool:
    """Whether the value has no imaginary part but for rounding."""
    return not isinstance(value, _context.mpc) or abs(value.imag) <= mpf(10) ** -35 * abs(value)


def points(names: frozenset[str], count: int = POINTS) -> list[dict[str, Value]]:
    """Values in [1, 3] for each symbol, the same in every process; `i` is the imaginary unit."""
    draw = random.Random(zlib.crc32(" ".join(sorted(names)).encode()))
    out = []
    for _ in range(count):
        point = {
            name: Fraction(draw.randrange(1_000_001, 2_999_999), 10**6) for name in sorted(names)
        }
        out.append({name: mpc(0, 1) if name == "i" else value for name, value in point.items()})
    return out


def has_decimal(node: Node) -> bool:
    """Whether a number in the formula is written with a decimal point, and does not repeat."""
    return any(
        inner.kind == "number"
        and "." in inner.text.rstrip(".")
        and "\\" not in inner.text
        and "..." not in inner.text
        for inner in nodes(node)
    )


def decimal_step(node: Node) -> Fraction | None:
    """The value of the last digit of a decimal number as it is written: 1/100 for 3.14, 10^-6 for
    9.8 times 10^-5. None for any other formula, and for integers."""
    if node.kind == "neg":
        return decimal_step(node.children[0])
    if node.kind == "percent":
        inner = decimal_step(node.children[0])
        return inner / 100 if inner else None
    if node.kind == "number" and has_decimal(node):
        digits, _, power = node.text.lower().partition("e")
        places = len(digits.rstrip(".").partition(".")[2])
        return Fraction(10) ** (int(power or 0) - places)
    if node.kind == "mul" and len(node.children) == 2:
        mantissa, scale = node.children
        inner = decimal_step(mantissa)
        if inner and scale.kind == "pow" and not symbols(scale):
            factor = evaluate(scale)
            return inner * factor if isinstance(factor, Fraction) else None
    return None


class _Evaluation:
    def __init__(self, bindings: dict[str, Value], log: float | None) -> None:
        self.bindings, self.log, self.spent = bindings, log, 0

    def spend(self, *values: Value) -> None:
        for value in values:
            if isinstance(value, Fraction):
                bits = value.numerator.bit_length() + value.denominator.bit_length()
                if bits > 2 * LARGEST_BITS:
                    raise OutOfBounds(f"more than {LARGEST_BITS} bits")
                self.spent += bits + 20
            else:
                if value and abs(_context.mag(value)) > 4 * LARGEST_EXPONENT:
                    raise OutOfBounds(f"beyond 10^{LARGEST_EXPONENT}")
                self.spent += 500
        if self.spent > BUDGET:
            raise OutOfBounds("too long to evaluate")

    def value(self, node: Node) -> Value:
        result = getattr(self, f"_{node.kind}")(node)
        self.spend(result)
        return result

    def values(self, node: Node) -> list[Value]:
        return [self.value(child) for child in node.children]

    def _number(self, node: Node) -> Value:
        return node.value

    _mixed = _number

    def _symbol(self, node: Node) -> Value:
        if node.text not in self.bindings:
            raise NoValue(f"{node.text} has no value")
        return self.bindings[node.text]

    def _constant(self, node: Node) -> Value:
        if node.text == "infty":
            raise NoValue("infinity is no number")
        return +_context.pi if node.text == "pi" else +_context.e

    def _add(self, node: Node) -> Value:
        total: Value = Fraction(0)
        for value in self.values(node):
            total = _apply(lambda a, b: a + b, total, value)
            self.spend(total)
        return total

    def _neg(self, node: Node) -> Value:
        return -self.value(node.children[0])

    def _mul(self, node: Node) -> Value:
        result: Value = Fraction(1)
        for value in self.values(node):
            self.spend(result, value)
            result = _apply(lambda a, b: a * b, result, value)
        return result

    def _div(self, node: Node) -> Value:
        top, bottom = self.values(node)
        if bottom == 0:
            raise NoValue("a division by zero")
        return _apply(lambda a, b: a / b, top, bottom)

    def _pow(self, node: Node) -> Value:
        base, exponent = self.values(node)
        return self.power(base, exponent)

    def power(self, base: Value, exponent: Value) -> Value:
        if base == 0:
            if not is_real(exponent) or _real(exponent) <= 0:
                raise NoValue("zero to a power that is not positive")
            return Fraction(0)
        if isinstance(base, Fraction) and isinstance(exponent, Fraction):
            if exponent.denominator == 1:
                size = max(base.numerator.bit_length(), base.denominator.bit_length())
                if abs(exponent.numerator) * max(1, size - 1) > LARGEST_BITS and size > 1:
                    raise OutOfBounds(f"a power of more than {LARGEST_BITS} bits")
                return base**exponent.numerator
            root = _exact_root(base, exponent.denominator)
            if root is not None:
                return self.power(root, Fraction(exponent.numerator))
        if (
            abs(inexact(exponent)) * abs(_context.log(abs(inexact(base)) + 1))
            > LARGEST_EXPONENT * 2
        ):
            raise OutOfBounds("a power that is too large")
        base, exponent = inexact(base), inexact(exponent)
        return _context.power(base, exponent)

    def _percent(self, node: Node) -> Value:
        return _apply(lambda a, b: a / b, self.value(node.children[0]), Fraction(100))

    def _degree(self, node: Node) -> Value:
        return inexact(self.value(node.children[0])) * _context.pi / 180

    def _abs(self, node: Node) -> Value:
        return abs(self.value(node.children[0]))

    def _fact(self, node: Node) -> Value:
        n = self.operand(node.children[0])
        self.spent += 20 * n  # about the bits of the result
        return Fraction(math.factorial(n))

    def operand(self, node: Node) -> int:
        value = self.value(node)
        if not isinstance(value, Fraction) or value.denominator != 1 or value < 0:
            raise NoValue("a factorial or combination of something that is no natural number")
        if value > LARGEST_OPERAND:
            raise OutOfBounds(f"an operand above {LARGEST_OPERAND}")
        return value.numerator

    def _binom(self, node: Node) -> Value:
        n, k = map(self.operand, node.children)
        self.spent += 4 * n
        return Fraction(math.comb(n, k))

    def _perm(self, node: Node) -> Value:
        n, k = map(self.operand, node.children)
        self.spent += 20 * min(n, k)
        return Fraction(math.perm(n, k))

    def _sum(self, node: Node) -> Value:
        low, high = (self.value(child) for child in node.children[:2])
        if not all(isinstance(end, Fraction) and end.denominator == 1 for end in (low, high)):
            raise NoValue("a sum or product between ends that are no integers")
        if high - low >= LARGEST_OPERAND:
            raise OutOfBounds(f"more than {LARGEST_OPERAND} terms")
        outer = self.bindings
        total = Fraction(0 if node.kind == "sum" else 1)
        for n in range(int(low), int(high) + 1):
            self.bindings = outer | {node.text: Fraction(n)}
            value = self.value(node.children[2])
            operation = (lambda a, b: a + b) if node.kind == "sum" else (lambda a, b: a * b)
            total = _apply(operation, total, value)
            self.spend(total)
        self.bindings = outer
        return total

    _prod = _sum

    def _call(self, node: Node) -> Value:
        name, values = node.text, self.values(node)
        if name == "sqrt":
            value, index = values
            if not isinstance(index, Fraction) or index.denominator != 1 or not 1 < index < 100:
                raise NoValue("a root that is no natural number")
            exact = _exact_root(value, int(index)) if isinstance(value, Fraction) else None
            if exact is not None:
                return exact
            odd = index % 2 == 1 and is_real(value) and _real(value) < 0
            if odd:
                return -_context.root(-inexact(value), int(index))
            return _context.root(inexact(value), int(index))
        x = inexact(values[0])
        if name in ("ln", "log", "lg"):
            base = values[1] if len(values) > 1 else Fraction(10) if name == "lg" else None
            base = Fraction(str(self.log)) if base is None and name == "log" and self.log else base
            return _logarithm(values[0], base)
        if name == "exp":
            return self.power(+_context.e, values[0])
        if abs(x) > 10**9:
            raise OutOfBounds("an angle above 10^9")
        return getattr(_context, _MPMATH[name])(x)


_MPMATH = {
    **{name: name for name in ("sin", "cos", "tan", "sec", "csc", "cot", "sinh", "cosh", "tanh")},
    **{"arcsin": "asin", "arccos": "acos", "arctan": "atan"},
}


def _real(value: Value):
    return value.real if isinstance(value, _context.mpc) else value


def _apply(operation, a: Value, b: Value) -> Value:
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return operation(a, b)
    return operation(inexact(a), inexact(b))


def _logarithm(value: Value, base: Value | None) -> Value:
    if value == 0:
        raise NoValue("the logarithm of zero")
    if base is None:
        return Fraction(0) if value == 1 else _context.ln(inexact(value))
    result = _context.ln(inexact(value)) / _context.ln(inexact(base))
    nearest = Fraction(round(float(_real(result)))) if abs(result) < 10**6 else None
    if nearest is not None and isinstance(base, Fraction) and isinstance(value, Fraction):
        small = abs(nearest) * max(base.numerator, base.denominator).bit_length() < 10_000
        if small and base**nearest.numerator == value:
            return nearest
    return result


def _exact_root(value: Fraction, index: int) -> Fraction | None:
    """The rational root of a rational number; None where it has none."""
    if value < 0:
        inner = _exact_root(-value, index) if index % 2 else None
        return -inner if inner is not None else None
    top, bottom = _integer_root(value.numerator, index), _integer_root(value.denominator, index)
    return Fraction(top, bottom) if top is not None and bottom is not None else None


def _integer_root(value: int, index: int) -> int | None:
    if value in (0, 1):
        return value
    if index == 2:
        root = math.isqrt(value)
        return root if root * root == value else None
    if index > value.bit_length() or value.bit_length() > 10_000:
        return None
    low, high = 1, 1 << (value.bit_length() // index + 1)
    while low < high:
        middle = (low + high) // 2
        if middle**index < value:
            low = middle + 1
        else:
            high = middle
    return low if low**index == value else None


def same(gold: Node, answer: Node, log: float | None = None) -> bool | None:
    """Whether two formulas with symbols are equal at `POINTS` random points, and at as many
    negative ones where there are absolute values; None where too few of them have a value. Their
    free symbols must be the same."""
    names = symbols(gold)
    if names != symbols(answer):
        return False
    compared, where = 0, points(names)
    if any(inner.kind == "abs" for node in (gold, answer) for inner in nodes(node)):
        where += [{name: -value for name, value in point.items()} for point in where]
    for point in where:
        try:
            a, b = evaluate(gold, point, log), evaluate(answer, point, log)
        except NoValue:
            continue
        if not close(a, b, 1e-25):
            return False
        compared += 1
    return True if compared >= POINTS // 2 else None
